"""Rounding and division, bit for bit against ml_dtypes, the torch oracle and IEEE, eagerly and under jit.

Here: `numerics.py`. Not here: blocks and scales (`test_quantize.py`).
XLA flushes subnormal fp32 results to zero on the CPU, so results are compared where they are normal or zero.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from compare import assert_bits, bits
from oracle import formats

from ffi_kernels import numerics

F32 = np.float32
TINY = F32(2.0**-126)  # the smallest normal fp32
ALL_BF16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
E2M1_GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F32)
E4M3_GRID = np.unique(np.abs(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)))[:-1]


def around(x):
    """x and its fp32 neighbours, one and two ulp away on either side."""
    x = np.asarray(x, F32)
    up, down = np.nextafter(x, F32(np.inf)), np.nextafter(x, F32(-np.inf))
    return np.concatenate([x, up, down, np.nextafter(up, F32(np.inf)), np.nextafter(down, F32(-np.inf))])


def elements(grid):
    """Every bf16 value, random fp32 of all sizes, and what lies on and beside the grid and its midpoints."""
    rng = np.random.default_rng(0)
    edges = around(np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [480, 464, 3e38]]).astype(F32))
    random = np.concatenate([rng.standard_normal(100_000) * s for s in (1e-3, 1, 100)]).astype(F32)
    anything = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(F32)
    return np.concatenate([ALL_BF16.astype(F32), edges, -edges, random, anything])


# --- one element -------------------------------------------------------------------------------------------------


def test_round_e4m3(run):
    x = elements(E4M3_GRID)
    got = np.asarray(run(numerics.round_e4m3)(x))
    nan = np.isnan(x)
    assert np.isnan(got[nan]).all()
    assert_bits(got[~nan].astype(ml_dtypes.float8_e4m3fn), formats.e4m3(torch.from_numpy(x[~nan])).view(torch.uint8).numpy())
    assert_bits(got[~nan], np.clip(x[~nan], -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(F32))


def test_e2m1(run):
    x = elements(E2M1_GRID)
    codes = np.asarray(run(numerics.encode_e2m1)(x))
    nan = np.isnan(x)
    assert (codes[nan] == 7).all(), "cvt.rn.satfinite.e2m1x2 turns nan into +6"
    assert_bits(codes[~nan], formats.e2m1_codes(torch.from_numpy(x[~nan])).numpy())
    assert_bits(codes[~nan], bits(np.clip(x[~nan], -6, 6).astype(ml_dtypes.float4_e2m1fn)) & 15)
    values = np.asarray(run(numerics.round_e2m1)(x))
    assert_bits(values, formats.e2m1_values(torch.from_numpy(codes.copy())).numpy())
    assert_bits(run(numerics.decode_e2m1)(codes), values)


def test_pack_and_unpack(run):
    every = np.arange(256, dtype=np.uint8).reshape(4, 64)
    codes = np.asarray(run(numerics.unpack_e2m1)(every))
    assert (codes[..., 0::2] == every & 15).all() and (codes[..., 1::2] == every >> 4).all(), "low nibble is the even K"
    assert_bits(run(numerics.pack_e2m1)(codes), every)


def test_e8m0_clamps(run):
    exponent = np.array([-400, -128, -127, -126, 0, 126, 127, 128, 400], np.int32)
    coded = run(numerics.encode_e8m0)(exponent)
    assert np.asarray(coded).tolist() == [0, 0, 0, 1, 127, 253, 254, 254, 254]
    assert (np.asarray(run(numerics.decode_e8m0)(coded)) == np.clip(exponent, -127, 127)).all()


@pytest.mark.parametrize("exponent", [-252, -149, -127, -126, -1, 0, 1, 127, 128, 200, 254])
@pytest.mark.parametrize("scale", [numerics.scale_by_power_of_two, numerics.times_power_of_two])
def test_scale_by_power_of_two(scale, exponent):
    """The exponent as an argument and as a constant of the graph, which XLA folds."""
    x = ALL_BF16.astype(F32)
    if scale is numerics.times_power_of_two:
        x = x[(x == 0) | ~(np.abs(x) < TINY)]  # it takes no subnormals
    nan = np.isnan(x)
    with np.errstate(all="ignore"):
        want = np.ldexp(x, exponent)
    exact = ~nan & ((np.abs(want) >= TINY) | (x == 0))
    for got in (jax.jit(scale)(x, np.int32(exponent)), jax.jit(lambda x: scale(x, jnp.int32(exponent)))(x)):
        got = np.asarray(got)
        assert_bits(got[exact], want[exact])
        assert np.isnan(got[nan]).all() and (np.abs(got[~exact & ~nan]) <= TINY).all()


# --- division ----------------------------------------------------------------------------------------------------


def normal_pairs(count=1_000_000):
    """Normal fp32 pairs of every exponent, and of moderate ones, whose quotients are not subnormal."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 2**32, (2, count), dtype=np.uint32).view(F32)
    half = count // 2
    x[:half], y[:half] = rng.standard_normal((2, half))
    with np.errstate(all="ignore"):
        q = x / y
    normal = (np.abs(np.stack([x, y])) >= TINY).all(0) & np.isfinite(x) & np.isfinite(y) & (np.abs(q) > TINY)
    return x[normal], y[normal], q[normal]


@pytest.mark.parametrize("divide", [numerics.divide, numerics._divide_corrected], ids=["cpu", "gpu"])
def test_divide_is_ieee(run, divide):
    x, y, want = normal_pairs()
    assert len(x) > 700_000 and np.isinf(want).any()
    assert_bits(run(divide)(x, y), want)


@pytest.mark.parametrize("divide", [numerics.divide, numerics._divide_corrected], ids=["cpu", "gpu"])
@pytest.mark.parametrize("constant", [3.0, 6.0, 2688.0, 448.0, 1e-30])
def test_divide_by_a_constant(run, divide, constant):
    x = np.random.default_rng(2).standard_normal(20_000).astype(F32)
    assert_bits(run(lambda x: divide(x, jnp.full_like(x, constant)))(x), x / F32(constant))
    y = np.where(x == 0, 1, x)
    assert_bits(run(lambda y: divide(jnp.full_like(y, constant), y))(y), F32(constant) / y)


@pytest.mark.parametrize("divide", [numerics.divide, numerics._divide_corrected], ids=["cpu", "gpu"])
def test_divide_special_values(run, divide):
    special = np.array([0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, 3.4e38, 1.2e-38], F32)
    x, y = (a.ravel() for a in np.meshgrid(special, special))
    with np.errstate(all="ignore"):
        want = x / y
    usual = np.isnan(want) | (want == 0) | (np.abs(want) >= TINY)
    np.testing.assert_array_equal(np.asarray(run(divide)(x, y))[usual], want[usual])


def test_quotient_correction_from_two_ulp_away(run):
    """Quotients as near as can be to the middle of two floats, from every start that a GPU's division may give."""
    rng = np.random.default_rng(3)
    middle = rng.integers(2**24, 2**25, 100_000) | 1  # an odd 25-bit significand lies between two 24-bit ones
    miss = rng.choice([-3, -1, 1, 3], middle.size)
    inverse = middle.copy()
    for _ in range(6):
        inverse = inverse * (2 - middle * inverse) % 2**25
    b = -miss * inverse % 2**25  # then middle * b + miss is divisible by 2**25
    a = (middle * b + miss) >> 25
    fits = (b >= 2**23) & (b < 2**24)
    a, b = ((2 * np.frexp(v[fits].astype(F32))[0]).astype(F32) for v in (a, b))
    want = a / b
    for ulp in range(-2, 3):
        start = (want.view(np.int32) + ulp).view(F32)
        assert_bits(run(numerics._correct_quotient)(a, b, start), want)
