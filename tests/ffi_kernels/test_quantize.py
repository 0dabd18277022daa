"""Blocks, scales and containers, bit for bit against the torch oracle.

Here: the quantizing ops of the xla backend. Not here: the rounding of one element (`test_numerics.py`), what consumes
the quantized arrays (`test_ops.py`). What must be exact runs eagerly and under jit; what follows from it, under jit.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from compare import assert_bits, bits
from oracle import formats

import ffi_kernels as ops

F32 = np.float32
TINY = F32(2.0**-126)  # the smallest normal fp32
ALL_BF16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
FINITE_BF16 = ALL_BF16[np.isfinite(ALL_BF16.astype(F32))]


def around(x):
    """x and its fp32 neighbours one ulp away."""
    x = np.asarray(x, F32)
    return np.concatenate([x, np.nextafter(x, F32(np.inf)), np.nextafter(x, F32(-np.inf))])


def exponents(scale):
    """fp32 powers of two (torch) -> e8m0 bytes."""
    return (scale.numpy().view(np.int32) >> 23).astype(np.uint8)


def packed(codes):
    codes = np.asarray(codes)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def oracle_blocks(x, size, floor, limit):
    """fp32 [..., K] -> (x / scale [..., K], e8m0 bytes [..., ceil(K/size)]) by the oracle's scales."""
    blocks = formats._blocks(torch.from_numpy(np.array(x, F32)), size)
    scale = formats.power_of_two_scale(blocks.abs().amax(-1, keepdim=True), floor, limit)
    return (blocks / scale).flatten(-2)[..., : x.shape[-1]], exponents(scale)[..., 0]


def oracle_fp8(x, size=128):
    ratio, scale = oracle_blocks(x, size, 1e-4, 448.0)
    return formats.e4m3(ratio).view(torch.uint8).numpy(), scale


def oracle_mxfp4(x):
    ratio, scale = oracle_blocks(x, 32, 6 * 2.0**-126, 6.0)
    return packed(formats.e2m1_codes(ratio).numpy()), scale


# --- blocks with power-of-two scales -----------------------------------------------------------------------------


def adversarial_blocks(size, limit, floor):
    """fp32 [many, size]: for every awkward amax, every bf16 value not above it, and the amax itself once per block."""
    powers = np.ldexp(F32(limit), np.array([-126, -9, 0, 1, 110]))
    amax = np.concatenate([around(powers), around([floor]), [floor / 2, TINY, 2.0**-133, 3.38e38, np.finfo(F32).max]])
    amax = np.abs(amax[np.isfinite(amax)]).astype(F32)
    blocks = np.resize(FINITE_BF16.astype(F32), (-(-len(FINITE_BF16) // (size - 1)), size - 1))
    out = []
    for i, a in enumerate(amax):
        values = np.where(np.abs(blocks) <= a, blocks, 0)
        out.append(np.insert(values, i % (size - 1), a if i % 2 else -a, axis=1))
    return np.concatenate(out)


def test_quantize_fp8_is_exact(run):
    x = adversarial_blocks(128, 448.0, 1e-4)
    got, (data, scale) = run(ops.quantize_fp8)(x), oracle_fp8(x)
    assert_bits(got.scale, scale)
    assert_bits(got.data, data)


def test_quantize_mxfp4_is_exact(run):
    x = adversarial_blocks(32, 6.0, 6 * 2.0**-126)
    got, (data, scale) = run(ops.quantize_mxfp4)(x), oracle_mxfp4(x)
    assert_bits(got.scale, scale)
    assert_bits(got.data, data)


def test_bf16_input_is_exact():
    """Neighbouring bf16 values in one block: subnormal blocks, huge blocks, blocks of one exponent."""
    x = np.concatenate([FINITE_BF16, np.zeros(128, ml_dtypes.bfloat16)]).reshape(-1, 128)
    fp8, fp4 = jax.jit(ops.quantize_fp8)(x), jax.jit(ops.quantize_mxfp4)(x)
    for got, (data, scale) in ((fp8, oracle_fp8(x)), (fp4, oracle_mxfp4(x))):
        assert_bits(got.scale, scale)
        assert_bits(got.data, data)
    assert not np.asarray(fp4.data)[-1].any() and (np.asarray(fp4.scale)[-1] == 1).all(), "a zero block: 2**-126"


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_nan_or_inf_stays_in_its_block(bad):
    x = np.random.default_rng(4).standard_normal((3, 256)).astype(F32)
    clean = x.copy()
    x[1, 130] = bad
    fp8, before = jax.jit(ops.quantize_fp8)(x), jax.jit(ops.quantize_fp8)(clean)
    assert_bits(np.delete(bits(fp8.data).reshape(6, 128), 3, 0), np.delete(bits(before.data).reshape(6, 128), 3, 0))
    found = np.asarray(fp8.data[1, 130], F32)
    assert np.isnan(found) if np.isnan(bad) else found == 448
    fp4, before = jax.jit(ops.quantize_mxfp4)(x), jax.jit(ops.quantize_mxfp4)(clean)
    assert_bits(np.delete(bits(fp4.data).reshape(24, 16), 12, 0), np.delete(bits(before.data).reshape(24, 16), 12, 0))
    assert int(fp4.data[1, 65]) & 15 == 7 and int(fp4.scale[1, 4]) < 255
    nvfp4, before = jax.jit(ops.quantize_nvfp4_rows)(x), jax.jit(ops.quantize_nvfp4_rows)(clean)
    assert_bits(np.asarray(nvfp4.data)[[0, 2]], np.asarray(before.data)[[0, 2]])
    assert np.isnan(np.asarray(ops.dequantize(nvfp4))[1, 128:144]).all(), "a row with nan or inf must not look sane"


@pytest.mark.parametrize("k", [1, 7, 127, 129, 200])
def test_fp8_of_partial_blocks(k):
    x = np.random.default_rng(k).standard_normal((5, k)).astype(F32)
    got, (data, scale) = jax.jit(ops.quantize_fp8)(x), oracle_fp8(x)
    assert_bits(got.data, data)
    assert_bits(got.scale, scale)
    assert_bits(jax.jit(ops.dequantize)(got), formats.fp8_round(torch.from_numpy(x), 128).numpy())


@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (130, 200), (256, 128), (2, 129, 130)])
def test_fp8_weight(shape):
    rng = np.random.default_rng(5)
    w = (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)).astype(F32)
    got = jax.jit(ops.quantize_fp8_weight)(w)
    *lead, n, k = shape
    want, scales = np.empty(shape, F32), np.empty((*lead, -(-n // 128), -(-k // 128)), np.uint8)
    for index in np.ndindex(scales.shape):
        *head, i, j = index
        tile = (*head, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        scale = formats.power_of_two_scale(torch.tensor(np.abs(w[tile]).max()), 1e-4, 448.0)
        scales[index] = exponents(scale)
        want[tile] = (formats.e4m3(torch.from_numpy(w[tile]) / scale).float() * scale).numpy()
    assert got.shape == shape
    assert_bits(got.scale, scales)
    assert_bits(jax.jit(ops.dequantize)(got), want)


# --- NVFP4 -------------------------------------------------------------------------------------------------------


def nvfp4_rows():
    """Rows of every size, with outliers that push blocks below e4m3, zero blocks and zero rows."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((96, 256)) * 10.0 ** rng.uniform(-25, 34, (96, 1))
    x[:32] *= 10.0 ** rng.uniform(-6, 0, (32, 256))  # wide rows
    x[32:40, 77] = 1e7 * np.abs(x[32:40]).max(-1)  # all other blocks underflow
    x[40:44, 16:48] = 0
    x[44] = 0
    every = np.random.default_rng(7).permutation(FINITE_BF16[np.abs(FINITE_BF16.astype(F32)) < 1e6])
    every = np.resize(every.astype(F32), (-(-len(every) // 256), 256))
    return np.concatenate([x.astype(F32), every])


def oracle_nvfp4(x):
    codes, scale, wide = formats.nvfp4_quantize(torch.from_numpy(x))
    return packed(codes.numpy()), scale.view(torch.uint8).numpy(), wide.numpy()


def test_nvfp4_rows_are_exact(run):
    x = nvfp4_rows()
    got = run(ops.quantize_nvfp4_rows)(x)
    for row, data, scale, wide in zip(x, bits(got.data), bits(got.scale), np.asarray(got.global_scale)[:, 0]):
        if not row.any():
            assert not data.any() and not scale.any() and wide == 1
            continue
        want_data, want_scale, want_wide = oracle_nvfp4(row)
        assert_bits(wide, want_wide)
        assert_bits(scale, want_scale)
        assert_bits(data, want_data)
    underflowed = (bits(got.scale)[32:40] == 0).sum(1)
    assert (underflowed == 15).all(), "the outlier rows must contain blocks below e4m3"
    assert not bits(got.data).reshape(len(x), 16, 8)[bits(got.scale) == 0].any(), "scale zero: all codes zero"


def test_nvfp4_weight_is_exact():
    rng = np.random.default_rng(8)
    w = (rng.standard_normal((3, 33, 128)) * np.array([1e-9, 1, 1e9])[:, None, None]).astype(F32)
    w[1] *= 10.0 ** rng.uniform(-7, 0, (33, 128))
    got = jax.jit(ops.quantize_nvfp4_weight)(w)
    assert got.shape == w.shape and got.global_scale.shape == (3,)
    for e in range(3):
        data, scale, wide = oracle_nvfp4(w[e])
        assert_bits(np.asarray(got.global_scale)[e], wide)
        assert_bits(np.asarray(got.scale)[e], scale)
        assert_bits(np.asarray(got.data)[e], data)


def test_nvfp4_rounds_once(run):
    """Global and block scale 1: 2.6 is 3 and 5.1 is 6 (rounding to half steps first made them 2 and 4)."""
    x = np.zeros_like(nvfp4_rows())
    x[0, 0], x[0, 16:19] = 2688, [6, 2.6, 5.1]
    got = run(ops.quantize_nvfp4_rows)(x)
    assert float(got.global_scale[0, 0]) == 1 and float(got.scale[0, 1]) == 1
    assert np.asarray(run(ops.dequantize)(got))[0, 16:19].tolist() == [6, 3, 6]


def test_nvfp4_rows_are_independent():
    x = nvfp4_rows()[:48]
    together = jax.jit(ops.quantize_nvfp4_rows)(x)
    for i in (0, 33, 41, 44, 47):
        alone = jax.jit(ops.quantize_nvfp4_rows)(x[i : i + 1])
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
            assert_bits(a, np.asarray(b)[i : i + 1])


def test_nvfp4_shard_with_the_amax_of_its_row():
    x = nvfp4_rows()[:8]
    whole = jax.jit(ops.quantize_nvfp4_rows)(x)
    for part in (slice(0, 128), slice(128, 256)):
        shard = jax.jit(ops.quantize_nvfp4_rows)(x[:, part], np.abs(x).max(-1, keepdims=True))
        assert_bits(shard.data, np.asarray(whole.data)[:, part.start // 2 : part.stop // 2])
        assert_bits(shard.scale, np.asarray(whole.scale)[:, part.start // 16 : part.stop // 16])


def test_nvfp4_of_vanishing_rows_is_finite():
    """Rows too small for a normal scale: zero or nearly so, never nan or larger than the row."""
    x = np.outer(F32(2.0) ** np.arange(-148, -96, dtype=F32), np.linspace(-1, 1, 32, dtype=F32)).astype(F32)
    values = np.asarray(jax.jit(ops.dequantize)(jax.jit(ops.quantize_nvfp4_rows)(x)))
    assert (np.abs(values) <= 1.001 * np.abs(x).max(-1, keepdims=True)).all()


# --- what the formats promise --------------------------------------------------------------------------------------


def test_quantizing_twice_changes_nothing():
    """Values never change. The bytes neither, unless the largest of a block rounded down to the next scale's limit."""
    x = (np.random.default_rng(9).standard_normal((64, 256)) * np.logspace(-8, 8, 64)[:, None]).astype(F32)
    for quantize, block, edge in ((ops.quantize_fp8, 128, 224), (ops.quantize_mxfp4, 32, 3)):
        once = jax.jit(quantize)(x)
        values = np.asarray(jax.jit(ops.dequantize)(once))
        twice = jax.jit(quantize)(values)
        assert_bits(jax.jit(ops.dequantize)(twice), values)
        largest = np.abs(values).reshape(64, -1, block).max(-1) / np.ldexp(1.0, np.asarray(once.scale, np.int32) - 127)
        kept = largest != edge
        assert kept.mean() > 0.5
        assert_bits(np.asarray(twice.scale)[kept], np.asarray(once.scale)[kept])
        data = [bits(t.data).reshape(*kept.shape, -1)[kept] for t in (twice, once)]
        assert_bits(*data)


def test_quantizing_nvfp4_twice_keeps_codes_and_scales():
    """With normal block scales every block's largest code is 6; the global scale may move by one ulp."""
    x = np.random.default_rng(10).standard_normal((64, 256)).astype(F32)
    once = jax.jit(ops.quantize_nvfp4_rows)(x)
    twice = jax.jit(ops.quantize_nvfp4_rows)(jax.jit(ops.dequantize)(once))
    assert (np.asarray(once.scale, F32) >= 2.0**-6).all()
    assert_bits(twice.data, once.data)
    assert_bits(twice.scale, once.scale)
    moved = bits(twice.global_scale).astype(np.int64) - bits(once.global_scale)
    assert np.abs(moved).max() <= 1


@pytest.mark.parametrize("quantize, limit", [(ops.quantize_fp8, 448), (ops.quantize_mxfp4, 6), (ops.quantize_nvfp4_rows, 6)])
def test_rounding_is_unbiased(quantize, limit):
    """Uniform values up to the largest code: rounding to nearest has mean error 0, of values and of magnitudes.

    Bound: five standard errors of the mean; truncation would be off by hundreds.
    """
    x = np.random.default_rng(11).uniform(-limit, limit, (4096, 256)).astype(F32)
    x[:, ::16] = limit  # block scale 1; for NVFP4 448, under a global scale of 1/448
    error = np.asarray(jax.jit(ops.dequantize)(jax.jit(quantize)(x)), np.float64) - x
    bound = 5 * error.std() / error.size**0.5
    assert abs(error.mean()) < bound
    assert abs((error * np.sign(x)).mean()) < bound


# --- conversion and cache ------------------------------------------------------------------------------------------


def mxfp4(rng, shape, exponent):
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8)
    return ops.MXFP4Tensor(jnp.asarray(data), jnp.asarray(exponent.astype(np.uint8)))


@pytest.mark.parametrize("largest", [5, 60, 127, 200, 250])
def test_mxfp4_to_nvfp4_is_lossless(run, largest):
    rng = np.random.default_rng(largest)
    exponent = np.maximum(rng.integers(largest - 17, largest + 1, (2, 40, 8)), 2)
    exponent[:, 0, 0], exponent[0, 1, 1] = (largest, largest - 2), max(largest - 17, 2)
    w = mxfp4(rng, (2, 40, 256), exponent)
    got, inexact = run(ops.mxfp4_to_nvfp4)(w)
    assert int(inexact) == 0
    assert_bits(got.data, w.data)
    assert_bits(run(ops.dequantize)(got), run(ops.dequantize)(w))


def test_mxfp4_to_nvfp4_counts_what_it_loses(run):
    rng = np.random.default_rng(12)
    exponent = rng.integers(100, 131, (2, 40, 8))
    exponent[:, 0, 0] = 130, 120  # every matrix has its own largest scale
    exponent[1] = np.minimum(exponent[1], 120)
    lost = exponent < np.array([130, 120])[:, None, None] - 17
    w = mxfp4(rng, (2, 40, 256), exponent)
    got, inexact = run(ops.mxfp4_to_nvfp4)(w)
    assert int(inexact) == lost.sum() > 0
    assert (np.asarray(got.scale, F32).reshape(2, 40, 8, 2)[lost] == 0).all(), "a lost block is zero, not wrong"
    values, want = (np.asarray(run(ops.dequantize)(t)).reshape(2, 40, 8, 32) for t in (got, w))
    assert_bits(values[~lost], want[~lost])


def test_kv_cache_of_584_bytes():
    rng = np.random.default_rng(13)
    kv = rng.standard_normal((64, 512)) * 10.0 ** rng.uniform(-6, 6, (64, 1))
    kv = kv.astype(ml_dtypes.bfloat16)
    kv[:, 448:] = np.resize(ALL_BF16[:: 2**16 // 4096], (64, 64))  # nan, inf, -0 and subnormals among them
    cache = jax.jit(lambda kv: ops.encode_kv(kv, 64))(kv)
    assert cache.data.dtype == cache.scale.dtype == np.uint8
    assert cache.data.shape[-1] + cache.scale.shape[-1] == 584 and not np.asarray(cache.scale)[:, 7:].any()
    data, scale = oracle_fp8(kv[:, :448].astype(F32), 64)
    assert_bits(np.asarray(cache.data)[:, :448], data)
    assert_bits(np.asarray(cache.scale)[:, :7], scale)
    values = jax.jit(lambda c: ops.kv_values(c, 64))(cache)
    assert values.dtype == jnp.bfloat16
    nan = np.isnan(kv[:, 448:].astype(F32))  # the payload of a nan is free
    assert np.isnan(np.asarray(values)[:, 448:][nan].astype(F32)).all()
    assert_bits(np.asarray(values)[:, 448:][~nan], kv[:, 448:][~nan])
    want = formats.fp8_round(torch.from_numpy(kv[:, :448].astype(F32)), 64).numpy()
    assert_bits(np.asarray(values)[:, :448], want.astype(ml_dtypes.bfloat16))
    again = jax.jit(lambda kv: ops.kv_values(ops.encode_kv(kv, 64), 64))(values)
    assert_bits(again, values)  # nan included: it is canonical by now
    plain = jnp.ones((2, 512), jnp.bfloat16)
    assert ops.kv_values(plain, 64) is plain


def test_refusals():
    with pytest.raises(ValueError, match=r"quantize_mxfp4 needs the last axis to be a multiple of 32, got shape \(2, 48\)"):
        ops.quantize_mxfp4(jnp.ones((2, 48)))
    for quantize in (ops.quantize_nvfp4_rows, ops.quantize_nvfp4_weight):
        with pytest.raises(ValueError, match="multiple of 16.*pad it with zeros"):
            quantize(jnp.ones((2, 24)))
    for quantize in (ops.quantize_fp8, ops.quantize_fp8_weight, ops.quantize_mxfp4, ops.quantize_nvfp4_rows):
        with pytest.raises(TypeError, match="takes floating-point input, got int32"):
            quantize(jnp.ones((2, 32), jnp.int32))
    with pytest.raises(ValueError, match="= 32 channels in blocks of 64.*use the bf16 recipe"):
        ops.encode_kv(jnp.ones((2, 48)), 16)
