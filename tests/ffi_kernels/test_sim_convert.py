"""Conversions in the PTX interpreter, over all their inputs or many, against ml_dtypes, numpy and exact fractions."""

import math

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_driver import assert_same
from sim_draws import Draws
from sim_record import any_nan
from sim_rounding import rounded

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()
BF16, F16, E4M3, E5M2, E2M1 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn
E2M3, E3M2 = ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn
CODES = np.arange(65536, dtype=np.uint16)


def many_floats() -> np.ndarray:
    """All of bf16 and f16, their neighbours and midpoints, and random bit patterns."""
    halves = CODES.view(F16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    brains = CODES.astype(np.uint32) << 16
    bits = np.concatenate([halves.view(np.uint32), brains, brains | 0x8000, brains | 0x8001, brains | 0x7FFF, np.random.RandomState(0).randint(0, 2**32, 65536, dtype=np.uint32)])
    return np.concatenate([bits.view(np.float32), finite[:-1] + (finite[1:] - finite[:-1]) / 2])


FLOATS = many_floats()


def one(kernel, values, out, arch="sm_90a", per=1):
    """d = kernel(values) elementwise, `per` numbers of the kind `out` each; a nan of a device may have other bits."""
    values, d = np.ascontiguousarray(values), np.zeros(per * len(values), out)
    values.flags.writeable = False
    sim.run(sim.ptx("convert", arch), kernel, [values, d, len(values)], grid=2, block=256, compare=any_nan())
    return d


def two(kernel, a, b, out, arch="sm_90a", per=1):
    """The same of pairs (a, b): a becomes the second number."""
    a, b, d = np.ascontiguousarray(a), np.ascontiguousarray(b), np.zeros(per * len(a), out)
    a.flags.writeable = b.flags.writeable = False
    sim.run(sim.ptx("convert", arch), kernel, [a, b, d, len(a)], grid=2, block=256, compare=any_nan())
    return d


def test_widening():
    assert_same(one("f32_bf16", CODES, np.float32), CODES.view(BF16).astype(np.float32))
    assert_same(one("f32_f16", CODES, np.float32), CODES.view(F16).astype(np.float32))
    for kernel, kind in (("f16x2_e4m3x2", E4M3), ("f16x2_e5m2x2", E5M2)):
        assert_same(one(kernel, CODES, F16, per=2), CODES.view(np.uint8).view(kind).astype(F16))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
def test_narrowing_to_16_bits():
    assert_same(one("bf16_f32", FLOATS, BF16), FLOATS.astype(BF16), FLOATS)
    assert_same(one("f16_f32", FLOATS, F16), FLOATS.astype(F16), FLOATS)
    numbers = FLOATS[~np.isnan(FLOATS)]
    assert_same(one("bf16_f32_rz", numbers, BF16), (numbers.view(np.uint32) >> 16).astype(np.uint16).view(BF16), numbers)
    relu = np.where(FLOATS > 0, FLOATS, np.where(np.isnan(FLOATS), FLOATS, np.float32(0))).astype(BF16)
    assert_same(one("bf16_f32_relu", FLOATS, BF16), relu, FLOATS)
    pairs = two("bf16x2_f32", FLOATS, FLOATS[::-1], BF16, per=2)
    assert_same(pairs[0::2], FLOATS[::-1].astype(BF16))
    assert_same(pairs[1::2], FLOATS.astype(BF16))
    assert_same(two("f16x2_f32", FLOATS, FLOATS[::-1], F16, per=2)[1::2], FLOATS.astype(F16))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_directed_rounding():
    x = FLOATS[np.isfinite(FLOATS)]
    near = x.astype(F16)
    down = np.where(near.astype(np.float32) > x, np.nextafter(near, F16(-np.inf)), near)
    up = np.where(near.astype(np.float32) < x, np.nextafter(near, F16(np.inf)), near)
    assert_same(one("f16_f32_rm", x, F16), down, x)
    assert_same(one("f16_f32_rp", x, F16), up, x)
    assert_same(one("f16_f32_rz", x, F16), np.where(x < 0, up, down), x)
    clipped = np.clip(x, -65504, 65504).astype(F16)
    assert_same(one("f16_f32_satfinite", x, F16), clipped, x)
    tf32 = one("tf32_f32", x, np.uint32)
    assert not (tf32 & 0x1FFF).any()
    inside = np.abs(x) < 3e38
    want = ((x.view(np.uint32) + 0x1000) & 0xFFFFE000)[inside]
    np.testing.assert_array_equal(tf32[inside], want)


def saturated(x, kind, most):
    """Round to nearest even into `kind`, overflow and infinity to +-most, nan kept."""
    out = np.clip(x, -most, most).astype(kind)
    return out


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow encountered")
@pytest.mark.parametrize("kernel, kind, most", [("e4m3x2_f32", E4M3, 448), ("e5m2x2_f32", E5M2, 57344)])
def test_narrowing_to_fp8(kernel, kind, most):
    got = two(kernel, FLOATS, FLOATS[::-1], kind, per=2)
    assert_same(got[1::2], saturated(FLOATS, kind, most), FLOATS)
    assert_same(got[0::2], saturated(FLOATS[::-1], kind, most), FLOATS[::-1])
    halves = CODES.view(F16)
    pairs = (CODES.astype(np.uint32) << 16) | CODES[::-1]
    from_pairs = one(kernel.replace("f32", "f16x2"), pairs, kind, per=2)
    assert_same(from_pairs[1::2], saturated(halves.astype(np.float32), kind, most), halves)
    assert (one(kernel.replace("f32", "f16x2"), np.full(4, 0x7E007C00, np.uint32), np.uint16) == np.uint16(0x7F00 | (0x7E if kind is E4M3 else 0x7B))).all()


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow encountered")
@pytest.mark.skipif(sim.ON_DEVICE, reason="needs sm_100a")
def test_small_formats_of_blackwell():
    x = np.where(np.isnan(FLOATS), np.float32(1e9), FLOATS)  # nan becomes the largest number
    got = two("e2m1x2_f32", FLOATS, FLOATS[::-1], np.uint16, "sm_100a")
    assert_same((got >> 4).astype(np.uint8).view(E2M1), saturated(x, E2M1, 6), FLOATS)
    assert_same((got & 15).astype(np.uint8).view(E2M1), saturated(x[::-1], E2M1, 6))
    for kernel, kind, most in (("e2m3x2_f32", E2M3, 7.5), ("e3m2x2_f32", E3M2, 28)):
        got = two(kernel, FLOATS, FLOATS[::-1], np.uint16, "sm_100a").view(np.uint8)
        assert_same(got[1::2].view(kind), saturated(x, kind, most), FLOATS)
    bytes_ = np.arange(256, dtype=np.uint16)
    wide = one("f16x2_e2m1x2", bytes_, np.uint32, "sm_100a").view(F16)
    assert_same(wide[0::2], (bytes_ & 15).astype(np.uint8).view(E2M1).astype(F16))
    assert_same(wide[1::2], (bytes_ >> 4).astype(np.uint8).view(E2M1).astype(F16))
    for kernel, kind in (("f16x2_e2m3x2", E2M3), ("f16x2_e3m2x2", E3M2)):
        assert_same(one(kernel, CODES & 0x3F3F, np.uint32, "sm_100a").view(F16), (CODES & 0x3F3F).view(np.uint8).view(kind).astype(F16))


@pytest.mark.skipif(sim.ON_DEVICE, reason="needs sm_100a")
def test_scales_of_blackwell():
    x = np.abs(FLOATS[np.isfinite(FLOATS) & (FLOATS != 0)])
    exponent = np.frexp(x.astype(np.float64))
    floor = exponent[1] - 1
    ceil = np.where(exponent[0] > 0.5, floor + 1, floor)
    got = two("ue8m0x2_f32_rz", x, x[::-1], np.uint16, "sm_100a") >> 8
    np.testing.assert_array_equal(got, np.clip(floor + 127, 0, 254))
    got = two("ue8m0x2_f32_rp", x, x[::-1], np.uint16, "sm_100a") >> 8
    np.testing.assert_array_equal(got, np.clip(ceil + 127, 0, 254))
    codes = np.arange(256, dtype=np.uint16)
    wide = one("bf16x2_ue8m0x2", codes, np.uint32, "sm_100a").view(BF16)[0::2].astype(np.float32)
    np.testing.assert_array_equal(wide, np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(np.int64) - 127)).astype(np.float32))


def to_integer(x, how, low, high):
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x.astype(np.float64))
    return [0 if np.isnan(v) else int(min(max(v, low), high)) for v in rounded]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_integers():
    x = np.concatenate([FLOATS[::37], np.float32([0.5, 1.5, -0.5, 2.5, 2147483648.0, -2147483648.0, 4294967296.0, np.inf, -np.inf, np.nan, 1e30])])
    for how in ("rni", "rzi", "rmi", "rpi"):
        np.testing.assert_array_equal(one(f"s32_f32_{how}", x, np.int32), np.array(to_integer(x, how, -(2**31), 2**31 - 1), np.int32))
    np.testing.assert_array_equal(one("u32_f32_rzi", x, np.uint32), np.array(to_integer(x, "rzi", 0, 2**32 - 1), np.uint32))
    want = np.array([-(2**63) if np.isnan(v) else int(min(max(np.trunc(np.float64(v)), -(2**63)), 2**63)) for v in x], object)
    np.testing.assert_array_equal(one("s64_f32_rzi", x, np.int64), np.array([min(v, 2**63 - 1) for v in want], np.int64))
    doubles = np.float64([0, 1.9, 2**53, 1.8e19, 2e19, -3, np.nan])
    np.testing.assert_array_equal(one("u64_f64_rzi", doubles, np.uint64), np.array([0, 1, 2**53, int(1.8e19), 2**64 - 1, 0, 2**63], np.uint64))
    i = np.concatenate([RNG.integers(-(2**31), 2**31, 4096), [0, 1, -1, 2**31 - 1, -(2**31), 2**24 + 1, 2**25 + 3]]).astype(np.int32)
    assert_same(one("f32_s32_rn", i, np.float32), i.astype(np.float32))
    assert_same(one("f32_s32_rz", i, np.float32), toward_zero(i.astype(np.float32), i))
    u = np.concatenate([RNG.integers(0, 2**64, 4096, dtype=np.uint64), np.uint64([2**63, 2**64 - 1, (1 << 40) + (1 << 16)])])
    assert_same(one("f32_u64_rn", u, np.float32), u.astype(np.float32))
    assert_same(one("f64_s64_rn", u.view(np.int64), np.float64), u.view(np.int64).astype(np.float64))
    np.testing.assert_array_equal(one("s8_s32", i, np.int32), i.astype(np.int8))
    np.testing.assert_array_equal(one("u16_s32_sat", i, np.uint32), np.clip(i, 0, 65535))
    np.testing.assert_array_equal(one("s8_s32_sat", i, np.int32), np.clip(i, -128, 127))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
def test_floats_to_floats():
    assert_same(one("f32_f32_rni", FLOATS, np.float32), np.rint(FLOATS))
    finite = np.where(np.isnan(FLOATS), np.float32(0), FLOATS)
    np.testing.assert_array_equal(one("f32_sat", FLOATS, np.float32), np.clip(finite, 0, 1))
    assert_same(one("f64_f32", FLOATS, np.float64), FLOATS.astype(np.float64))
    doubles = np.concatenate([np.ldexp(RNG.normal(4096), RNG.integers(-160, 140, 4096)), [1e-46, 1e39, -1e39, 0.0, -0.0, np.inf]])
    assert_same(one("f32_f64_rn", doubles, np.float32), doubles.astype(np.float32))
    near = doubles.astype(np.float32)
    assert_same(one("f32_f64_rz", doubles, np.float32), np.where(np.isinf(doubles), near, toward_zero(near, doubles)))


# --- every other pair of types, a table -----------------------------------------------------------------------------


def some_floats():
    return np.concatenate([FLOATS[::71], np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 2**31, -(2**31), 2**32, 2**63, 1e30, -1e30, 3e38, 1e-45, 6e-8, -6e-8, 448, 464, 65520, np.inf, -np.inf, np.nan])]).astype(np.float32)


def some_doubles():
    edges = [0.0, -0.0, 0.5, 1.5, 2.5, -2.5, 2.0**31, 2.0**31 - 0.5, -(2.0**31) - 0.5, 2.0**32, 2.0**32 - 0.5, 65519.999, 65520.0, 1e-8, 1e300, -1e300, 3.4e38, np.inf, -np.inf, np.nan]
    return np.concatenate([np.ldexp(RNG.normal(1500), RNG.integers(-160, 140, 1500)), edges])


def some_integers(kind):
    info, small = np.iinfo(kind), {np.int32: np.uint32, np.int64: np.uint64}.get(kind, kind)
    edges = [info.min, info.max, 0, 1, info.max - 1, 2**24 + 1, 2**25 + 3, 257, 2049, 65519, 65520, 65535, 127, 128, 255, 256, 32767, 32768]
    drawn = RNG.integers(0, 2 ** (8 * np.dtype(kind).itemsize), 1500, small)
    drawn[::3] >>= RNG.integers(0, 8 * np.dtype(kind).itemsize, len(drawn[::3])).astype(small)
    return np.concatenate([drawn.astype(kind), np.array([e for e in edges if info.min <= e <= info.max], kind)])


def to_floats(x, kind, mode="rn", *, ftz=False, sat=False, relu=False):
    """The reference of conversions to floats."""
    out = []
    for v in x:
        v = v.item() if isinstance(v.item(), int) else float(v)
        if ftz and abs(v) < 2.0**-126:
            v = v * 0.0
        if sat:
            v = min(max(v, 0.0), 1.0) + 0.0 if v == v else 0.0
        if relu and v <= 0:
            v = 0.0
        out.append(rounded(v, kind, mode) if isinstance(v, int) or np.isfinite(v) else v)
    return np.array(out, np.float64).astype(kind) if kind is not F16 else np.array(out).astype(np.float32).astype(F16)


def to_integers(x, kind, how, *, ftz=False):
    """The reference of conversions to integers: clamped; nan gives 0, or the top bit of 64 bits and from f64."""
    info, out = np.iinfo(kind), []
    for v in x:
        v = float(v)
        if np.isnan(v):
            out.append(0 if info.bits < 64 and x.dtype != np.float64 else info.min if info.min else 2 ** (info.bits - 1))
        elif np.isinf(v):
            out.append(info.max if v > 0 else info.min)
        else:
            v = v * 0.0 if ftz and abs(v) < 2.0**-126 else v
            out.append(min(max({"rni": round, "rzi": int, "rmi": math.floor, "rpi": math.ceil}[how](v), info.min), info.max))
    return np.array(out, kind)


def toward_zero(near, x):
    """What is nearest to x, or its neighbour if that lies beyond x."""
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x.astype(np.float64)), np.nextafter(near, near.dtype.type(0)), near)


def integral(x, how):
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x)


def wrapped(x, kind):
    bits = np.iinfo(kind).bits
    return np.array([((int(v) & 2**bits - 1) ^ 2 ** (bits - 1)) - 2 ** (bits - 1) if np.iinfo(kind).min else int(v) & 2**bits - 1 for v in x], kind)


def clamped(x, kind):
    return np.array([min(max(int(v), np.iinfo(kind).min), np.iinfo(kind).max) for v in x], kind)


I8, I16, I32, I64, U8, U16, U32, U64, F32, F64 = np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.float32, np.float64
HALF, BRAIN = CODES.view(F16), CODES.view(BF16)
TABLE = {  # kernel: (inputs, type of the register that it writes, what is wanted of them)
    "bf16_f16": (lambda: HALF, BF16, lambda x: x.astype(F32).astype(BF16)), "f16_bf16": (lambda: BRAIN, F16, lambda x: x.astype(F32).astype(F16)),
    "f64_f16": (lambda: HALF, F64, lambda x: x.astype(F64)), "f64_bf16": (lambda: BRAIN, F64, lambda x: x.astype(F64)),
    "f16_f64": (some_doubles, F16, lambda x: to_floats(x, F16)), "bf16_f64": (some_doubles, BF16, lambda x: to_floats(x, BF16)),
    "s32_f16_rni": (lambda: HALF, I32, lambda x: to_integers(x, I32, "rni")), "u16_f16_rzi": (lambda: HALF, U16, lambda x: to_integers(x, U16, "rzi")),
    "s64_f16_rmi": (lambda: HALF, I64, lambda x: to_integers(x, I64, "rmi")), "s32_bf16_rpi": (lambda: BRAIN, I32, lambda x: to_integers(x, I32, "rpi")),
    "f16_s32": (lambda: some_integers(I32), F16, lambda x: to_floats(x, F16)), "f16_u16_rz": (lambda: CODES, F16, lambda x: toward_zero(x.astype(F32).astype(F16), x)),
    "f16_s64": (lambda: some_integers(I64), F16, lambda x: to_floats(x, F16)), "bf16_s32": (lambda: some_integers(I32), BF16, lambda x: to_floats(x, BF16)),
    "bf16_u64_rz": (lambda: some_integers(U64), BF16, lambda x: to_floats(x, BF16, "rz")), "f32_u32_rp": (lambda: some_integers(U32), F32, lambda x: to_floats(x, F32, "rp")),
    "f32_u32_rm": (lambda: some_integers(U32), F32, lambda x: to_floats(x, F32, "rm")), "f32_s64_rz": (lambda: some_integers(I64), F32, lambda x: to_floats(x, F32, "rz")),
    "f64_u32": (lambda: some_integers(U32), F64, lambda x: x.astype(F64)), "f64_u64_rz": (lambda: some_integers(U64), F64, lambda x: to_floats(x, F64, "rz")),
    "f64_s64_rp": (lambda: some_integers(I64), F64, lambda x: to_floats(x, F64, "rp")), "f32_u8": (lambda: some_integers(U32), F32, lambda x: x.astype(U8).astype(F32)),
    "f32_s8": (lambda: some_integers(U32), F32, lambda x: x.astype(U8).view(I8).astype(F32)), "f32_s16": (lambda: CODES, F32, lambda x: x.view(I16).astype(F32)),
    "u8_f32_rzi_sat": (some_floats, U32, lambda x: to_integers(x, U8, "rzi").astype(U32)), "s8_f32_rni_sat": (some_floats, I32, lambda x: to_integers(x, I8, "rni").astype(I32)),
    "u32_f64_rni": (some_doubles, U32, lambda x: to_integers(x, U32, "rni")), "s32_f64_rmi": (some_doubles, I32, lambda x: to_integers(x, I32, "rmi")),
    "u64_f32_rpi": (some_floats, U64, lambda x: to_integers(x, U64, "rpi")), "s32_f32_rpi_ftz": (some_floats, I32, lambda x: to_integers(x, I32, "rpi", ftz=True)),
    **{f"f32_{how}": (lambda: FLOATS, F32, lambda x, how=how: integral(x, how)) for how in ("rzi", "rmi", "rpi")},
    "f64_rni": (some_doubles, F64, lambda x: integral(x, "rni")), "f16_rni": (lambda: HALF, F16, lambda x: integral(x, "rni")), "f16_rpi": (lambda: HALF, F16, lambda x: integral(x, "rpi")),
    "f32_ftz_sat": (some_floats, F32, lambda x: to_floats(x, F32, ftz=True, sat=True)), "f32_f64_rm": (some_doubles, F32, lambda x: to_floats(x, F32, "rm")),
    "f32_f64_rp": (some_doubles, F32, lambda x: to_floats(x, F32, "rp")), "f32_f16_ftz": (lambda: HALF, F32, lambda x: x.astype(F32)),
    "f16_f32_sat": (some_floats, F16, lambda x: to_floats(x, F16, sat=True)), "f16_f32_relu": (some_floats, F16, lambda x: to_floats(x, F16, relu=True)),
    "tf32_f32_rn": (some_floats, F32, lambda x: tf32(x, "rn")), "tf32_f32_rz_relu": (some_floats, F32, lambda x: np.where(x <= 0, F32(0), tf32(x, "rz"))),
    "u8_s32_sat": (lambda: some_integers(I32), U32, lambda x: clamped(x, U8).astype(U32)), "s16_u32": (lambda: some_integers(U32), I32, lambda x: wrapped(x, I16).astype(I32)),
    "s16_u32_sat": (lambda: some_integers(U32), I32, lambda x: clamped(x, I16).astype(I32)), "u32_s64_sat": (lambda: some_integers(I64), U32, lambda x: clamped(x, U32)),
    "s64_s32": (lambda: some_integers(I32), I64, lambda x: x.astype(I64)), "u64_s8": (lambda: some_integers(U32), U64, lambda x: wrapped(x, I8).astype(I64).view(U64)),
}  # fmt: skip
PAIRS = {  # of two inputs: the first becomes the upper number
    "bf16x2_f32_rz": (BF16, lambda x: to_floats(x, BF16, "rz")), "bf16x2_f32_relu": (BF16, lambda x: to_floats(x, BF16, relu=True)), "f16x2_f32_rz": (F16, lambda x: to_floats(x, F16, "rz")),
    "f16x2_f32_relu": (F16, lambda x: to_floats(x, F16, relu=True)), "e4m3x2_f32_relu": (E4M3, lambda x: saturated(np.where(x <= 0, F32(0), x), E4M3, 448)),
    "e5m2x2_f32_relu": (E5M2, lambda x: saturated(np.where(x <= 0, F32(0), x), E5M2, 57344)),
}  # fmt: skip
PACKS = {  # kernel: (type, what stands below the two numbers, a on top)
    "pack_s8": (I8, lambda a, b: np.broadcast_to(np.array([0x78, 0x56], U8).view(I8), (len(a), 2))), "pack_u8": (U8, lambda a, b: np.stack([clamped(a, U8), clamped(b, U8)], 1)),
    "pack_s16": (I16, None), "pack_u16": (U16, None),
}  # fmt: skip


def tf32(x, mode):
    """f32 to the 10 bits of mantissa that tf32 has."""
    bits = x.view(np.uint32)
    up = 0xFFF + (bits >> 13 & 1) if mode == "rn" else np.uint32(0)
    return np.where(np.isfinite(x), (bits + up).astype(np.uint32) & np.uint32(0xFFFFE000), bits).view(F32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernel", TABLE)
def test_conversion(kernel):
    inputs, kind, meaning = TABLE[kernel]
    x = inputs()
    assert_same(one(kernel, x, kind), np.ascontiguousarray(meaning(x)), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernel", PAIRS)
def test_conversion_of_pairs(kernel):
    kind, meaning = PAIRS[kernel]
    a = some_floats()
    b = RNG.permutation(a)
    got = two(kernel, a, b, kind, per=2)
    assert_same(got[1::2], meaning(a), a)
    assert_same(got[0::2], meaning(b), b)


def test_fp8_to_halves_with_relu():
    codes = CODES.view(np.uint8).view(E4M3).astype(F16)
    assert_same(one("f16x2_e4m3x2_relu", CODES, F16, per=2), np.where(codes <= 0, F16(0), codes))


@pytest.mark.parametrize("kernel", PACKS)
def test_packing_of_integers(kernel):
    kind, below = PACKS[kernel]
    a = some_integers(I32)
    b = RNG.permutation(a)
    parts = [clamped(b, kind), clamped(a, kind)]
    want = np.stack(parts, 1)
    if kernel == "pack_s8":
        want = np.concatenate([want, below(a, b)], 1)
    elif kernel == "pack_u8":
        want = np.concatenate([want, below(a, b)], 1)
    np.testing.assert_array_equal(two(kernel, a, b, kind, per=32 // np.iinfo(kind).bits).reshape(len(a), -1), want)
