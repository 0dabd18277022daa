"""Loads, stores and atomics in the PTX interpreter: every width, space, operation and type."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws
from sim_driver import assert_same
from sim_record import EXACT, any_nan

pytestmark = [pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-"), pytest.mark.filterwarnings("ignore")]
RNG = Draws()
BF16 = ml_dtypes.bfloat16
TYPES = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "b16": np.uint16, "f32": np.float32, "f64": np.float64,
         "f16": np.float16, "bf16": BF16, "f16x2": np.float16, "bf16x2": BF16}  # fmt: skip
MEANING = {
    "add": lambda old, b, c: old + b, "min": lambda old, b, c: np.minimum(old, b), "max": lambda old, b, c: np.maximum(old, b), "and": lambda old, b, c: old & b,
    "or": lambda old, b, c: old | b, "xor": lambda old, b, c: old ^ b, "exch": lambda old, b, c: b, "cas": lambda old, b, c: np.where(old == b, c, old),
    "inc": lambda old, b, c: np.where(old >= b, 0, old + 1), "dec": lambda old, b, c: np.where((old == 0) | (old > b), b, old - 1),
}  # fmt: skip
ATOMS = [
    *[f"add_{t}" for t in ("u32", "u64", "f32", "f64", "f16", "bf16", "f16x2", "bf16x2")], *[f"{op}_{t}" for op in ("min", "max") for t in ("u32", "s32", "u64", "s64")], "inc_u32", "dec_u32",
    *[f"{op}_{t}" for op in ("and", "or", "xor") for t in ("b32", "b64")], "exch_b32", "exch_b64", "cas_b16", "cas_b32", "cas_b64",
]  # fmt: skip


def drawn(kind, n, op):
    if np.dtype(kind).kind in "iu":
        bits = 8 * np.dtype(kind).itemsize
        x = RNG.integers(0, 2**bits, n, np.dtype(f"u{bits // 8}").type)
        if op in ("inc", "dec", "cas"):
            x = x % 5
        return x.view(kind)
    return np.ldexp(RNG.normal(n), RNG.integers(-6, 6, n)).astype(kind)


@pytest.mark.parametrize("name, way", [(name, way) for name in ATOMS for way in ("global", "shared", "red") if way != "red" or name[:3] not in ("exc", "cas")])
def test_atomics(name, way):
    op, _, type_ = name.partition("_")
    kind, n = TYPES[type_], 256 if type_.endswith("x2") else 128
    cell, b, c = (drawn(kind, n, op) for _ in range(3))
    if op == "cas":
        b[::2] = cell[::2]
    if type_ == "f32":  # in global memory subnormal numbers are zero
        cell[:4], b[:4] = np.float32([1e-40, 3e-39, -2e-40, 1.5e-38]), np.float32([2e-40, 1.3e-38, 1, -1e-38])
    values = [x.astype(np.float64) if np.dtype(kind).kind not in "iu" else x for x in (cell, b, c)]
    if type_ == "f32" and way != "shared":
        flush = lambda v: np.where(np.abs(v) < 2.0**-126, 0 * v, v)
        want = flush(MEANING[op](*map(flush, values)).astype(np.float32)).astype(np.float32)
    else:
        want = MEANING[op](*values).astype(np.float32 if np.dtype(kind).itemsize == 2 and np.dtype(kind).kind not in "iu" else kind).astype(kind)
    before, old = cell.copy(), np.zeros_like(cell)
    b.flags.writeable = c.flags.writeable = False
    sim.run(sim.ptx("memory"), f"{name}_{way}", [cell, b, c, old], block=128, compare=EXACT if np.dtype(kind).kind in "iu" else any_nan())
    assert_same(cell, want, list(zip(before, b)))
    assert_same(old, np.zeros_like(old) if way == "red" else before)


def test_atomics_of_vectors():
    f, h, w = (RNG.integers(-64, 64, (128, n)) / 4 for n in (4, 8, 8))
    b, c = RNG.integers(-64, 64, (128, 4)) / 4, RNG.integers(-64, 64, (128, 8)) / 4
    memory = [f.astype(np.float32), h.astype(np.float16), w.astype(np.float16)]
    inputs, old = [b.astype(np.float32), c.astype(np.float16)], np.zeros((128, 4), np.float32)
    for x in inputs:
        x.flags.writeable = False
    sim.run(sim.ptx("memory"), "vectors", [*memory, *inputs, old], block=128)
    np.testing.assert_array_equal(old, f)
    want = f + b + b[:, ::-1]
    want[:, 2:] += b[:, 1:3]
    np.testing.assert_array_equal(memory[0], want)
    want = h + c
    want[:, :4] = np.maximum(want[:, :4], c[:, 4:])
    np.testing.assert_array_equal(memory[1], want)
    want = w.copy()
    want[:, :4] = np.minimum(want[:, :4], c[:, :4])
    np.testing.assert_array_equal(memory[2], want + c.reshape(128, 4, 2)[:, ::-1].reshape(128, 8))


def test_many_threads_on_the_same_cells():
    cells = np.array([5, 10**6, -(10**6), -1, 0, 12345, 0, 0, 0, 0, 0, 7], np.int32)
    sim.run(sim.ptx("memory"), "contended", [cells, 0], grid=6, block=128)
    t = np.arange(768)
    v = t * 37 % 1001 - 300
    wide = int(sum(1 << int(i) % 40 for i in t))
    dec = 0
    for _ in t:
        dec = 50 if dec == 0 or dec > 50 else dec - 1
    want = [5 + v.sum(), v.min(), v.max(), -1 & ~((1 << 20) - 1), (1 << 31) - 1, 12345 ^ int(np.bitwise_xor.reduce(v)), 768 % 78, dec, wide & 0xFFFFFFFF, wide >> 32, 0, 7 + 3 * 768]
    want[10] = int(np.float32(384).view(np.int32))
    np.testing.assert_array_equal(cells, np.array(want, np.int64).astype(np.int32))


def test_widths_and_spaces():
    a = RNG.integers(0, 256, (32, 32)).astype(np.uint8)
    d, stored = np.zeros((32, 32), np.int64), np.zeros((32, 32), np.uint8)
    a.flags.writeable = False
    sim.run(sim.ptx("memory"), "widths", [a, d, stored], block=32)
    table = [5, -7, 100, -128, 127, 0, 1, -1, 33, -33, 64, -64, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, -16, 17, 18, 19, 20, 21, 22, -23]
    for row, got, out in zip(a, d, stored):
        at = lambda offset, kind: int(row[offset : offset + np.dtype(kind).itemsize].view(kind)[0])
        u, h = lambda o: at(o, np.uint32), lambda o: at(o, np.uint16)
        loads = [at(0, np.uint8), at(1, np.int8), h(2), at(4, np.int16), u(8), at(8, np.int32), at(7, np.uint8), at(7, np.int8), at(16, np.int64), u(12), at(6, np.int16), u(4),
                 at(8, np.int64), u(0), u(0), u(28), h(30), u(16) ^ u(20) ^ u(24) ^ u(28), at(30, np.int8) * 1000 + at(31, np.int8), h(8) + 3 * h(10) + 5 * h(12) + 7 * h(14)]  # fmt: skip
        s = np.zeros(32, np.uint8)
        s[:16] = np.array([h(8), h(10), h(12), h(14)], np.uint32).view(np.uint8)
        s[16:] = np.array([at(16, np.int64), at(8, np.int64)]).view(np.uint8)
        s[1], s[6:8], s[12:16] = row[1], row[4:6], np.array([at(1, np.int8)], np.int32).view(np.uint8)
        local = (np.tile(s, 2)[:40] + np.arange(40)).astype(np.uint8)
        local[(row[0] & 7) + 3 * np.arange(8)] ^= 0x55
        total = 0
        for x in local.view(np.int8):
            total = total * 5 + int(x)
        total &= 2**64 - 1
        want = [*loads, int(s[:8].view(np.int64)[0]), at(1, np.int8), at(1, np.int8), total - (total >> 63 << 64), table[row[0] & 31], 7]
        np.testing.assert_array_equal(got[:26], want)
        bytes_ = np.zeros(32, np.uint8)
        bytes_[0], bytes_[2:4], bytes_[4:8], bytes_[8:10], bytes_[12:16] = row[7], row[6:8], row[8:12], [row[7], row[8]], row[8:12]
        bytes_[16:] = np.concatenate([row[16:24], row[8:16]])
        np.testing.assert_array_equal(out, bytes_)
