"""Conversions in the PTX interpreter, over all their inputs, against ml_dtypes and numpy."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_driver import assert_same

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = np.random.default_rng(0)
BF16, F16, E4M3, E5M2, E2M1 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn
E2M3, E3M2 = ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn
CODES = np.arange(65536, dtype=np.uint16)


def many_floats() -> np.ndarray:
    """All of bf16 and f16, their neighbours and midpoints, and random bit patterns."""
    halves = CODES.view(F16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    brains = CODES.astype(np.uint32) << 16
    bits = np.concatenate([halves.view(np.uint32), brains, brains | 0x8000, brains | 0x8001, brains | 0x7FFF, RNG.integers(0, 2**32, 65536, dtype=np.uint32)])
    return np.concatenate([bits.view(np.float32), finite[:-1] + (finite[1:] - finite[:-1]) / 2])


FLOATS = many_floats()


def one(kernel, values, out, arch="sm_90a"):
    """d = kernel(values) elementwise."""
    values, d = np.ascontiguousarray(values), np.zeros(len(values), out)
    values.flags.writeable = False
    sim.run(sim.ptx("convert", arch), kernel, [values, d, len(values)], grid=2, block=256)
    return d


def two(kernel, a, b, out, arch="sm_90a"):
    a, b, d = np.ascontiguousarray(a), np.ascontiguousarray(b), np.zeros(len(a), out)
    sim.run(sim.ptx("convert", arch), kernel, [a, b, d, len(a)], grid=2, block=256)
    return d


def test_widening():
    assert_same(one("f32_bf16", CODES, np.float32), CODES.view(BF16).astype(np.float32))
    assert_same(one("f32_f16", CODES, np.float32), CODES.view(F16).astype(np.float32))
    for kernel, kind in (("f16x2_e4m3x2", E4M3), ("f16x2_e5m2x2", E5M2)):
        assert_same(one(kernel, CODES, np.uint32).view(F16), CODES.view(np.uint8).view(kind).astype(F16))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
def test_narrowing_to_16_bits():
    assert_same(one("bf16_f32", FLOATS, np.uint16).view(BF16), FLOATS.astype(BF16), FLOATS)
    assert_same(one("f16_f32", FLOATS, np.uint16).view(F16), FLOATS.astype(F16), FLOATS)
    numbers = FLOATS[~np.isnan(FLOATS)]
    assert_same(one("bf16_f32_rz", numbers, np.uint16).view(BF16), (numbers.view(np.uint32) >> 16).astype(np.uint16).view(BF16), numbers)
    relu = np.where(FLOATS > 0, FLOATS, np.where(np.isnan(FLOATS), FLOATS, np.float32(0))).astype(BF16)
    assert_same(one("bf16_f32_relu", FLOATS, np.uint16).view(BF16), relu, FLOATS)
    pairs = two("bf16x2_f32", FLOATS, FLOATS[::-1], np.uint32).view(BF16)
    assert_same(pairs[0::2], FLOATS[::-1].astype(BF16))
    assert_same(pairs[1::2], FLOATS.astype(BF16))
    assert_same(two("f16x2_f32", FLOATS, FLOATS[::-1], np.uint32).view(F16)[1::2], FLOATS.astype(F16))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_directed_rounding():
    x = FLOATS[np.isfinite(FLOATS)]
    near = x.astype(F16)
    down = np.where(near.astype(np.float32) > x, np.nextafter(near, F16(-np.inf)), near)
    up = np.where(near.astype(np.float32) < x, np.nextafter(near, F16(np.inf)), near)
    assert_same(one("f16_f32_rm", x, np.uint16).view(F16), down, x)
    assert_same(one("f16_f32_rp", x, np.uint16).view(F16), up, x)
    assert_same(one("f16_f32_rz", x, np.uint16).view(F16), np.where(x < 0, up, down), x)
    clipped = np.clip(x, -65504, 65504).astype(F16)
    assert_same(one("f16_f32_satfinite", x, np.uint16).view(F16), clipped, x)
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
    got = two(kernel, FLOATS, FLOATS[::-1], np.uint16).view(np.uint8).view(kind)
    assert_same(got[1::2], saturated(FLOATS, kind, most), FLOATS)
    assert_same(got[0::2], saturated(FLOATS[::-1], kind, most), FLOATS[::-1])
    halves = CODES.view(F16)
    pairs = (CODES.astype(np.uint32) << 16) | CODES[::-1]
    from_pairs = one(kernel.replace("f32", "f16x2"), pairs, np.uint16).view(np.uint8).view(kind)
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
    near = i.astype(np.float32)
    toward = np.where(np.abs(near.astype(np.float64)) > np.abs(i.astype(np.float64)), np.nextafter(near, np.float32(0)), near)
    assert_same(one("f32_s32_rz", i, np.float32), toward)
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
    doubles = np.concatenate([RNG.normal(size=4096) * np.exp2(RNG.integers(-160, 140, 4096)), [1e-46, 1e39, -1e39, 0.0, -0.0, np.inf]])
    assert_same(one("f32_f64_rn", doubles, np.float32), doubles.astype(np.float32))
    near = doubles.astype(np.float32)
    toward = np.where(np.abs(near.astype(np.float64)) > np.abs(doubles), np.nextafter(near, np.float32(0)), near)
    assert_same(one("f32_f64_rz", doubles, np.float32), np.where(np.isinf(doubles), near, toward))
