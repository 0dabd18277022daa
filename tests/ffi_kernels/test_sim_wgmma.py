"""wgmma of the PTX interpreter, one product at a time: layouts of its operands in shared memory and registers, types, sizes."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()
TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "s8": np.int8, "u8": np.uint8}
SLACK = 1024  # for aligning dynamic shared memory


def drawn(kind, shape):
    """Numbers whose products and sums are exact: quarters, or all of 8-bit integers."""
    low, high, unit = {"s8": (-128, 128, 1), "u8": (0, 256, 1)}.get(kind, (-8, 9, 4))
    return (RNG.integers(low, high, shape) / unit).astype(TYPES[kind])


def bent(offset, swizzle):
    return offset ^ ((offset >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]) << 4)


def k_major(matrix, swizzle, step=0):
    """[mn, k] of 32 bytes along k, at the step-th 32 bytes of swizzled rows. Returns memory, start, leading and stride bytes."""
    rows = np.ascontiguousarray(matrix).view(np.uint8)  # [mn, 32]
    mn, kb = np.meshgrid(np.arange(len(rows)), np.arange(32), indexing="ij")
    if swizzle:
        width, start, leading = swizzle, 32 * (step % (swizzle // 32)), 16
        stride = 1024 if swizzle == 128 else 8 * width + 256
        place = bent(mn % 8 * width + mn // 8 * stride + start + kb, swizzle)
    else:
        start, stride, leading = 0, 128, -(-len(rows) // 8) * 128 + 128
        place = mn % 8 * 16 + mn // 8 * stride + kb // 16 * leading + kb % 16
    memory = np.zeros(int(place.max()) // 1024 * 1024 + 1024, np.uint8)
    memory[place] = rows
    return memory, start, leading, stride


def mn_major(matrix, swizzle, step=0):
    """[mn, 16] of 16-bit elements, mn contiguous; strides leave gaps and `step` skips 16 k. As the canonical layouts of the ISA."""
    bits = np.ascontiguousarray(matrix).view(np.uint16)
    mn, k = np.meshgrid(np.arange(bits.shape[0]), np.arange(16) + 16 * step, indexing="ij")
    width = swizzle or 16  # bytes of one row of a span
    spans = -(-2 * bits.shape[0] // width)
    group = 8 * width if not swizzle else 1024  # from a span of mn to the next
    eight = group * spans + 1024 * (swizzle > 0)  # from 8 k to the next 8
    leading, stride = (group, eight) if swizzle else (eight, group)
    place = bent(2 * mn // width * group + 2 * mn % width + k % 8 * width + k // 8 * eight, swizzle)
    memory = np.zeros(int(place.max()) // 1024 * 1024 + 1024, np.uint8)
    memory.view(np.uint16)[place // 2] = bits
    return memory, 2 * step * eight, leading, stride


def fragments(matrix):
    """A [64, k] as four registers of 128 threads."""
    words = np.ascontiguousarray(matrix).view(np.uint32)  # [64, 8]
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    return np.stack([words[16 * warp + lane // 4 + 8 * (r & 1), lane % 4 + 4 * (r >> 1)] for r in range(4)])


def spread(matrix, half):
    """D [64, n] as registers: pairs of f16 in one, or one number each."""
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    if half:
        pairs = np.ascontiguousarray(matrix.astype(np.float16)).view(np.uint32)
        return np.stack([pairs[16 * warp + lane // 4 + 8 * (i & 1), i // 2 * 4 + lane % 4] for i in range(matrix.shape[1] // 4)])
    words = np.ascontiguousarray(matrix).view(np.uint32)
    return np.stack([words[16 * warp + lane // 4 + 8 * (i // 2 & 1), i // 4 * 8 + lane % 4 * 2 + (i & 1)] for i in range(matrix.shape[1] // 2)])


def run(kernel, a, b, c, *, swizzle=128, lay_a=k_major, lay_b=k_major, step=0, add=1, half=False, in_registers=False, defect=0):
    """The registers of D after kernel(A, B) (+ C)."""
    a_memory = (np.zeros(16, np.uint8), 0, 16, 16) if in_registers else lay_a(a, swizzle, step)
    b_memory = lay_b(b, swizzle, step)
    d = spread(c, half)
    f = fragments(a) if in_registers else np.zeros((4, 128), np.uint32)
    for x in (a_memory[0], b_memory[0], f):
        x.flags.writeable = False
    args = [a_memory[0], b_memory[0], f, d, len(a_memory[0]), len(b_memory[0]), a_memory[1], b_memory[1], *a_memory[2:], *b_memory[2:], swizzle, add, defect]
    sim.run(sim.ptx("wgmma"), kernel, args, block=128, shared_bytes=-(-len(a_memory[0]) // 1024) * 1024 + len(b_memory[0]) + SLACK)
    return d


def sums(n, integer=False):
    return RNG.integers(-64, 65, (64, n)).astype(np.int32 if integer else np.float32)


def product(a, b):
    return a.astype(np.float64) @ b.astype(np.float64).T


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("majors", ["k_k", "mn_k", "k_mn", "mn_mn"])
@pytest.mark.parametrize("step", [0, 1])
def test_layouts(swizzle, majors, step):
    """Every canonical layout of A with every one of B; a step lies further along k in the same memory."""
    lay = {"k": k_major, "mn": mn_major}
    lay_a, lay_b = (lay[m] for m in majors.split("_"))
    a, b, c = drawn("bf16", (64, 16)), drawn("bf16", (64, 16)), sums(64)
    d = run("bf16_n64" if majors == "k_k" else f"bf16_{majors}", a, b, c, swizzle=swizzle, lay_a=lay_a, lay_b=lay_b, step=step)
    np.testing.assert_array_equal(d, spread((product(a, b) + c).astype(np.float32), False))


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_wide_operands_along_mn(swizzle):
    a, b, c = drawn("f16", (64, 16)), drawn("f16", (128, 16)), sums(128)
    d = run("f16_mn_mn_n128", a, b, c, swizzle=swizzle, lay_a=mn_major, lay_b=mn_major)
    np.testing.assert_array_equal(d, spread((product(a, b) + c).astype(np.float32), False))


@pytest.mark.parametrize("kind", ["bf16", "tf32", "e4m3", "s8"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("step", [0, 3])
def test_types_in_every_layout(kind, swizzle, step):
    a, b, c = drawn(kind, (64, 32 // np.dtype(TYPES[kind]).itemsize)), drawn(kind, (64, 32 // np.dtype(TYPES[kind]).itemsize)), sums(64, kind == "s8")
    d = run(f"{kind}_n64", a, b, c, swizzle=swizzle, step=step)
    np.testing.assert_array_equal(d, spread((product(a, b) + c).astype(c.dtype), False))


SHARED = [  # kernel, types of A and B, n, signs of A and B, f16 sums
    *[(f"bf16_n{n}", "bf16", "bf16", n, 1, False) for n in (8, 24, 40, 128, 192, 256)], ("f16_n64", "f16", "f16", 64, 1, False), ("f16_minus_a", "f16", "f16", 64, -1, False),
    ("f16_minus_both", "f16", "f16", 64, 1, False), ("f16_sums_n64", "f16", "f16", 64, 1, True), ("tf32_n8", "tf32", "tf32", 8, 1, False), ("tf32_minus_b", "tf32", "tf32", 64, -1, False),
    ("e5m2_n64", "e5m2", "e5m2", 64, 1, False), ("e4m3_e5m2_n64", "e4m3", "e5m2", 64, 1, False), ("e4m3_n256", "e4m3", "e4m3", 256, 1, False),
    ("e5m2_e4m3_sums_n64", "e5m2", "e4m3", 64, 1, True), ("u8_n64", "u8", "u8", 64, 1, False), ("s8_u8_n64", "s8", "u8", 64, 1, False), ("s8_n8", "s8", "s8", 8, 1, False),
]  # fmt: skip
REGISTERS = [
    ("bf16_registers", "bf16", "bf16", 64, 1, False), ("f16_registers", "f16", "f16", 64, -1, False), ("f16_registers_sums", "f16", "f16", 64, 1, True), ("tf32_registers", "tf32", "tf32", 64, 1, False),
    ("e4m3_registers", "e4m3", "e4m3", 64, 1, False), ("e5m2_registers", "e5m2", "e4m3", 64, 1, False), ("s8_registers", "s8", "s8", 64, 1, False), ("u8_registers", "u8", "s8", 64, 1, False),
    ("bf16_registers_n256", "bf16", "bf16", 256, 1, False),
]  # fmt: skip


@pytest.mark.parametrize("kernel, ka, kb, n, sign, half", SHARED + REGISTERS, ids=[case[0] for case in SHARED + REGISTERS])
@pytest.mark.parametrize("add", [0, 1])
def test_types_and_sizes(kernel, ka, kb, n, sign, half, add):
    integer = ka in ("s8", "u8")
    k = 32 // np.dtype(TYPES[ka]).itemsize
    a, b, c = drawn(ka, (64, k)), drawn(kb, (n, k)), sums(n, integer)
    d = run(kernel, a, b, c, add=add, half=half, in_registers="registers" in kernel)
    np.testing.assert_array_equal(d, spread((sign * product(a, b) + add * c + 0.0).astype(c.dtype), half))  # an exact zero is +0


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_registers_with_b_along_mn(swizzle):
    a, b, c = drawn("bf16", (64, 16)), drawn("bf16", (64, 16)), sums(64)
    d = run("bf16_registers_mn", a, b, c, swizzle=swizzle, lay_b=mn_major, in_registers=True)
    np.testing.assert_array_equal(d, spread((product(a, b) + c).astype(np.float32), False))


def test_integers_saturate():
    a, b = drawn("u8", (64, 32)), drawn("s8", (64, 32))
    c = np.where(RNG.integers(0, 2, (64, 64)), 2**31 - 1000, -(2**31) + 1000).astype(np.int32)
    d = run("u8_s8_sat", a, b, c)
    np.testing.assert_array_equal(d, spread(np.clip(product(a, b) + c, -(2**31), 2**31 - 1).astype(np.int32), False))


@pytest.mark.skipif(sim.ON_DEVICE, reason="a race would not show")
def test_threads_must_fence_what_they_wrote():
    with pytest.raises(sim.SimError, match="fence.proxy.async"):
        run("bf16_n64", drawn("bf16", (64, 16)), drawn("bf16", (64, 16)), sums(64), defect=1)


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random seed=1", "random seed=2"])
@pytest.mark.skipif(sim.ON_DEVICE, reason="a device gives no alarm")
def test_results_before_the_wait(schedule, monkeypatch):
    """The compiler may move a copy of a result across the wait, nothing else. Devices wait, and begin when all four warps are there."""
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    a, b, c = drawn("bf16", (64, 16)), drawn("bf16", (8, 16)), sums(8)
    want = run("early", a, b, c)
    np.testing.assert_array_equal(want, spread((product(a, b) + c).astype(np.float32), False))
    np.testing.assert_array_equal(run("early", a, b, c, defect=3), want)
    for defect in (2, 4):
        with pytest.raises(sim.SimError, match="no wgmma.wait_group lies between"):
            run("early", a, b, c, defect=defect)
    with pytest.raises(sim.SimError, match="hazard in shared memory: .*(waited for|no synchronisation between)"):
        run("early", a, b, c, defect=5)
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule} strict=off")
    np.testing.assert_array_equal(run("early", a, b, c, defect=2), want)
    np.testing.assert_array_equal(run("early", a, b, c, defect=5), want)
