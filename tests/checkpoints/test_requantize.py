"""Requantization in numpy equals the reference bit for bit: every code, every scale, every pair of formats."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ffi_kernels as ops
from checkpoints import layout
from checkpoints import requantize as rq
from dsv4_jax import params
from dsv4_jax.precision import RECIPES

convert_one = jax.jit(params.convert, static_argnums=1)  # as the package loads, and much faster
BEYOND_FP32 = 247  # 448 * 2**(247 - 127) is infinite: `transcode.py` refuses it


def bits(x):
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def reference_of_fp8(codes, scale):
    tensor = ops.FP8Tensor(codes.view(ml_dtypes.float8_e4m3fn), scale)
    with ops.backend("xla"):
        return convert_one(tensor, "nvfp4")


def converted(codes, scale, amax):
    converter = rq.FP8ToNVFP4(scale, float(amax))
    n, k = codes.shape
    per_block = np.repeat(np.repeat(scale, 128, axis=0)[:n], 8, axis=1)[:, : k // 16]
    data, block_scale = converter.rows(codes, per_block)
    return data, block_scale, converter


def largest(codes, scale):
    n, k = codes.shape
    wide = np.repeat(np.repeat(rq.power_of_two(scale), 128, axis=0)[:n], 128, axis=1)[:, :k]
    return (rq.E4M3[codes & 0x7F] * wide).max(), wide


def assert_equals_reference(codes, scale):
    amax, _ = largest(codes, scale)
    data, block_scale, converter = converted(codes, scale, amax)
    expected = reference_of_fp8(codes, scale)
    assert np.float32(converter.global_scale) == np.float32(expected.global_scale)
    np.testing.assert_array_equal(block_scale, bits(expected.scale))
    np.testing.assert_array_equal(data, np.asarray(expected.data))


def every_code_under_every_maximum():
    """Blocks in which each magnitude 0..126 is the largest and each code of it occurs with both signs: [127 * 16, 128]."""
    rows = []
    for top in range(127):
        codes = np.concatenate([np.arange(top + 1), np.arange(top + 1) + 128]).astype(np.uint8)
        codes = np.concatenate([codes, np.zeros(-len(codes) % 15, np.uint8)]).reshape(-1, 15)
        blocks = np.concatenate([np.full((len(codes), 1), top, np.uint8), codes], axis=1)
        rows.append(np.concatenate([blocks, np.zeros((24 - len(blocks), 16), np.uint8)]))
    return np.concatenate(rows).reshape(-1, 128)


@pytest.mark.parametrize("first", range(0, BEYOND_FP32, 16))
def test_every_e4m3_code_and_maximum_under_every_scale(first):
    for scale in range(first, min(first + 16, BEYOND_FP32)):
        one_scale(every_code_under_every_maximum(), scale)


def one_scale(codes, scale):
    rows = -(-codes.shape[0] // 128)
    # Two more rows of blocks bring in another scale, so that the global scale is not always that of the block itself.
    other = min(BEYOND_FP32 - 1, scale + scale % 12)
    codes = np.concatenate([codes, np.zeros((rows * 128 - len(codes), 128), np.uint8), codes[:128]])
    tiles = np.full((rows + 1, 1), scale, np.uint8)
    tiles[-1] = other
    assert_equals_reference(codes, tiles)


@pytest.mark.parametrize("shape", [(1, 16), (130, 48), (257, 272), (384, 512)])
def test_odd_shapes_and_mixed_scales(shape):
    rng = np.random.default_rng(shape[0])
    codes = rng.integers(0, 127, shape, dtype=np.uint8) | (rng.integers(0, 2, shape, dtype=np.uint8) << 7)
    codes[rng.random(shape) < 0.3] = 0
    scale = rng.integers(100, 130, (-(-shape[0] // 128), -(-shape[1] // 128)), dtype=np.uint8)
    assert_equals_reference(codes, scale)


def test_slabs_and_errors_do_not_depend_on_how_rows_are_cut():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 127, (256, 256), dtype=np.uint8)
    scale = rng.integers(110, 120, (2, 2), dtype=np.uint8)
    amax, wide = largest(codes, scale)
    data, block_scale, whole = converted(codes, scale, amax)
    parts = rq.FP8ToNVFP4(scale, float(amax))
    per_block = np.repeat(np.repeat(scale, 128, axis=0), 8, axis=1)
    pieces = [parts.rows(codes[a:b], per_block[a:b]) for a, b in ((200, 256), (0, 1), (1, 200))]
    np.testing.assert_array_equal(np.concatenate([pieces[1][0], pieces[2][0], pieces[0][0]]), data)
    assert parts.error() == whole.error()
    values = rq.E4M3[codes] * wide
    after = rq.decode_blocks(rq.unpack_e2m1(data), rq.E4M3[block_scale] * whole.global_scale)
    slow, fast = rq.Error.between(values, after), whole.error()
    for a, b in zip((slow.squared_error, slow.squared_norm, slow.largest), (fast.squared_error, fast.squared_norm, fast.largest)):
        assert abs(a - b) <= 1e-5 * abs(b)
    assert 0.05 < (fast.squared_error / fast.squared_norm) ** 0.5 < 0.15


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 3e-38, 1e30])
def test_encoders_equal_the_reference(form, magnitude):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((200, 160)) * np.exp(rng.standard_normal((200, 160)) * 3) * magnitude).astype(np.float32)
    x[::7] = 0
    x[3, :32] = np.float32(magnitude) * np.array([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 6.5, 7, -1, -5, 2, 448] * 2)
    x = np.where(np.abs(x) < 2.0**-126, np.float32(0), x)  # XLA flushes them; so does the converter where it matters
    with ops.backend("xla"):
        expected = convert_one(x, form)
    if form == "nvfp4":
        global_scale = rq.nvfp4_global_scale(np.abs(x).max())
        assert global_scale == np.float32(expected.global_scale)
        data, scale = rq.encode_nvfp4(x, global_scale)
    else:
        data, scale = {"fp8": rq.encode_fp8, "mxfp4": rq.encode_mxfp4}[form](x)
    np.testing.assert_array_equal(scale, bits(expected.scale))
    np.testing.assert_array_equal(data, bits(expected.data))


def test_mxfp4_to_nvfp4_equals_the_reference_and_counts_alike():
    rng = np.random.default_rng(3)
    for low, high in ((0, 1), (0, 30), (100, 118), (100, 119), (90, 140), (230, 255), (0, 255)):
        data = rng.integers(0, 256, (40, 48), dtype=np.uint8)
        scale = rng.integers(low, high, (40, 3), dtype=np.uint8)
        data.reshape(40, 3, 16)[rng.random((40, 3)) < 0.2] = 0
        with ops.backend("xla"):
            expected, inexact = ops.mxfp4_to_nvfp4(ops.MXFP4Tensor(data, scale))
        block_scale, global_scale, lost = rq.mxfp4_scale_to_nvfp4(scale)
        assert global_scale == np.float32(expected.global_scale)
        np.testing.assert_array_equal(block_scale, bits(expected.scale))
        assert int((lost & data.reshape(40, 3, 16).any(-1)).sum()) == int(inexact)


def test_decoding_is_exact():
    for byte in range(256):
        low, high = rq.unpack_e2m1(np.array([[byte]], np.uint8))[0]
        assert (low, high) == (rq.E2M1[byte & 15], rq.E2M1[byte >> 4])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(rq.power_of_two(every[:255]), every[:255].view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    for name, recipe in RECIPES.items():  # the parts that layout.py lists are those that the package makes
        for role in ("linear", "wo_a", "experts", "plain", "fp32", "int32"):
            shape = (3, 160, 96) if role in ("wo_a", "experts") else (160, 96)
            param = params.Param(shape, (None,) * len(shape), role)
            form = params.storage(param, recipe)
            like = jax.eval_shape(lambda: params.convert(jnp.zeros(shape, jnp.float32), form))
            found = [(leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(like)]
            assert found == list(layout.stored_parts(shape, form).values()), (name, role)
