"""mma.sync, ldmatrix, stmatrix and movmatrix in the PTX interpreter."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws
from sim_driver import launch
from sim_record import Compare

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()
QUARTERS = lambda shape: RNG.integers(-8, 9, shape) / 4.0
ELEMENTS = {
    "bf16": (ml_dtypes.bfloat16, 2), "f16": (np.float16, 2), "tf32": (np.float32, 1), "e4m3": (ml_dtypes.float8_e4m3fn, 4),
    "e5m2": (ml_dtypes.float8_e5m2, 4), "s8": (np.int8, 4), "u8": (np.uint8, 4), "s4": (np.int8, 8), "u4": (np.uint8, 8),
}  # fmt: skip


def drawn(kind, shape):
    """Values that are exact in `kind`."""
    if kind in ("s8", "u8"):
        return RNG.integers(-128 if kind == "s8" else 0, 128 if kind == "s8" else 256, shape).astype(float)
    if kind in ("s4", "u4"):
        return RNG.integers(*((-8, 8) if kind == "s4" else (0, 16)), shape).astype(float)
    return QUARTERS(shape)


def packed(values, kind):
    """[..., k] values to 32-bit words [..., k / elements]."""
    element, count = ELEMENTS[kind]
    if kind in ("s4", "u4"):
        nibbles = (values.astype(np.int64) & 15).reshape(*values.shape[:-1], -1, 8)
        return (nibbles << (4 * np.arange(8))).sum(-1).astype(np.uint32)
    return np.ascontiguousarray(values.astype(element)).view(np.uint32)


MMAS = [
    ("bf16_k16", "bf16", "bf16", 16), ("f16_k16", "f16", "f16", 16), ("tf32_k8", "tf32", "tf32", 8), ("e4m3_k32", "e4m3", "e4m3", 32),
    ("e5m2_e4m3_k32", "e5m2", "e4m3", 32), ("bf16_k8", "bf16", "bf16", 8), ("f16_k8", "f16", "f16", 8), ("tf32_k4", "tf32", "tf32", 4),
    ("s8_k32", "s8", "s8", 32), ("s8_u8_k32", "s8", "u8", 32), ("u8_k16", "u8", "u8", 16), ("s4_k64", "s4", "s4", 64), ("u8_k32", "u8", "u8", 32),
    ("s8_k16", "s8", "s8", 16), ("u4_s4_k64", "u4", "s4", 64), ("u4_k32", "u4", "u4", 32), ("e4m3_k16", "e4m3", "e4m3", 16), ("e5m2_k16", "e5m2", "e5m2", 16),
]  # fmt: skip
SUMS_OF_HALVES = [("f16_sums", "f16", "f16", 16), ("f16_sums_k8", "f16", "f16", 8), ("e4m3_sums", "e4m3", "e4m3", 32), ("e5m2_e4m3_sums", "e5m2", "e4m3", 32)]
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def mma(kernel, ka, kb, k, c, as_words, places):
    """(registers of D, what they should hold before rounding); fragments as figures of the ISA lay them out."""
    a, b = drawn(ka, (16, k)), drawn(kb, (8, k))
    wa, wb = packed(a, ka), packed(b, kb)  # [16][k/E], [8][k/E]
    ra = np.stack([wa[G + 8 * (r % 2), T + 4 * (r // 2)] for r in range(2 * wa.shape[1] // 4)])
    rb = np.stack([wb[G, T + 4 * r] for r in range(wb.shape[1] // 4)])
    rc = np.ascontiguousarray(places(as_words(c)))
    d = np.zeros_like(rc)
    for x in (ra, rb, rc):
        x.flags.writeable = False
    launch(kernel, [ra, rb, rc, d], module="matrix")
    return d, places(as_words(a @ b.T + c))


def single(matrix):  # one number in a register
    return np.stack([matrix[G + 8 * (r // 2), 2 * T + r % 2] for r in range(4)])


@pytest.mark.parametrize("kernel, ka, kb, k", MMAS, ids=[m[0] for m in MMAS])
def test_mma(kernel, ka, kb, k):
    kind = np.int32 if ka in ("s8", "u8", "s4", "u4") else np.float32
    d, want = mma(kernel, ka, kb, k, RNG.integers(-64, 64, (16, 8)).astype(float), lambda x: (x + 0.0).astype(kind).view(np.uint32), single)
    np.testing.assert_array_equal(d, want)


def test_mma_saturates():
    c = np.where(RNG.integers(0, 2, (16, 8)), 2.0**31 - 1000, 1000 - 2.0**31)
    d, want = mma("u8_s8_sat_k32", "u8", "s8", 32, c, lambda x: np.clip(x, -(2.0**31), 2.0**31 - 1).astype(np.int32).view(np.uint32), single)
    np.testing.assert_array_equal(d, want)


@pytest.mark.parametrize("kernel, ka, kb, k", SUMS_OF_HALVES, ids=[m[0] for m in SUMS_OF_HALVES])
def test_mma_of_half_sums(kernel, ka, kb, k):
    d, want = mma(kernel, ka, kb, k, QUARTERS((16, 8)), lambda x: packed(x + 0.0, "f16"), lambda words: np.stack([words[G + 8 * r, T] for r in range(2)]))
    np.testing.assert_array_equal(d, want)


@pytest.mark.parametrize("m, k", [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_mma_of_doubles(m, k):
    a, b, c = RNG.normal((m, k)), RNG.normal((8, k)), RNG.normal((m, 8))
    tall = m // 8
    ra = np.stack([a[G + 8 * (i % tall), T + 4 * (i // tall)] for i in range(tall * k // 4)])
    rb, rc = np.stack([b[G, T + 4 * i] for i in range(k // 4)]), np.stack([c[G + 8 * (i // 2), 2 * T + i % 2] for i in range(2 * tall)])
    d = np.zeros((2 * tall, 32))
    for x in (ra, rb, rc):
        x.flags.writeable = False
    launch(f"f64_m{m}_k{k}", [ra, rb, rc, d], module="matrix", compare=Compare(rtol=1e-14, atol=1e-14))  # the order of the sum is the device's
    want = a @ b.T + c
    np.testing.assert_allclose(d, np.stack([want[G + 8 * (i // 2), 2 * T + i % 2] for i in range(2 * tall)]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_and_stmatrix(count, trans):
    """Rows where each lane points; lanes that no matrix asks point elsewhere."""
    a, rows = RNG.integers(0, 65536, (32, 8)).astype(np.uint16), RNG.permutation(np.arange(32)).astype(np.int32)
    d, stored = np.zeros((4, 32), np.uint32), np.zeros((32, 8), np.uint16)
    a.flags.writeable = rows.flags.writeable = False
    launch(f"tiles_x{count}{'_trans' if trans else ''}", [a, rows, d, stored], module="matrix")
    for i in range(4):
        tile = a[rows[8 * i : 8 * i + 8]]
        want = np.ascontiguousarray(tile.T if trans else tile).ravel().view(np.uint32)
        np.testing.assert_array_equal(d[i], want if i < count else 0)
        np.testing.assert_array_equal(stored[rows[8 * i : 8 * i + 8]], tile if i < count else 0xEEEE)


def test_ldmatrix_stmatrix_movmatrix():
    a = RNG.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    d, stored = np.zeros((11, 32), np.uint32), np.zeros((4, 8, 8), np.uint16)
    launch("tiles", [a, d, stored], module="matrix")
    lane = np.arange(32)
    for i in range(4):
        np.testing.assert_array_equal(d[i], a[i].ravel().view(np.uint32))
        turned = np.ascontiguousarray(a[i].T).ravel().view(np.uint32)
        np.testing.assert_array_equal(d[4 + i], turned)
        np.testing.assert_array_equal(stored[i], a[i].T)
    np.testing.assert_array_equal(d[8:10], d[:2])
    np.testing.assert_array_equal(d[10], np.ascontiguousarray(a[1].T).ravel().view(np.uint32)[lane])


def test_gemm_is_exact_on_quarters():
    m, n, k = 48, 40, 160
    a, b = QUARTERS((m, k)).astype(ml_dtypes.bfloat16), QUARTERS((n, k)).astype(ml_dtypes.bfloat16)
    d = np.full((m, n), np.nan, np.float32)
    launch("gemm", [a.view(np.uint16), b.view(np.uint16), d, m, n, k], module="matrix", grid=(n // 8, m // 16))
    np.testing.assert_array_equal(d, a.astype(np.float32) @ b.astype(np.float32).T)
