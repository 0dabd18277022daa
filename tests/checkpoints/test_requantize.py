"""Requantization in numpy equals the reference bit for bit: every code, every scale, every pair of formats."""

import dataclasses

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
from ffi_kernels import library

convert_one = jax.jit(params.convert, static_argnums=1)  # as the package loads, and much faster
BEYOND_FP32 = 247  # 448 * 2**(247 - 127) is infinite: `matrix.py` refuses it


def bits(x):
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def reference_of_fp8(codes, scale):
    tensor = ops.FP8Tensor(codes.view(ml_dtypes.float8_e4m3fn), scale)
    with ops.backend("xla"):
        return convert_one(tensor, "nvfp4")


@pytest.fixture(params=["numpy", "native"])
def implementation(request, monkeypatch):
    """NVFP4 by numpy alone, and by the native library."""
    if request.param == "numpy":
        monkeypatch.setattr(rq, "_native", lambda name: None)
    elif library.host_function("dsv4_nvfp4_of_fp8") is None:
        pytest.skip("the native library is not built: python -m ffi_kernels.build")


def per_block(scale, shape):
    return np.repeat(np.repeat(scale, 128, axis=0)[: shape[0]], 8, axis=1)[:, : shape[1] // 16]


def largest(codes, scale):
    n, k = codes.shape
    wide = np.repeat(np.repeat(rq.power_of_two(scale), 128, axis=0)[:n], 128, axis=1)[:, :k]
    return (rq.E4M3[codes & 0x7F] * wide).max(), wide


def assert_equals_reference(codes, scale):
    global_scale = rq.nvfp4_global_scale(largest(codes, scale)[0])
    data, block_scale, _ = rq.fp8_to_nvfp4(codes, per_block(scale, codes.shape), global_scale)
    expected = reference_of_fp8(codes, scale)
    assert np.float32(global_scale) == np.float32(expected.global_scale)
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
def test_every_e4m3_code_and_maximum_under_every_scale(first, implementation):
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
def test_odd_shapes_and_mixed_scales(shape, implementation):
    rng = np.random.default_rng(shape[0])
    codes = rng.integers(0, 127, shape, dtype=np.uint8) | (rng.integers(0, 2, shape, dtype=np.uint8) << 7)
    codes[rng.random(shape) < 0.3] = 0
    scale = rng.integers(100, 130, (-(-shape[0] // 128), -(-shape[1] // 128)), dtype=np.uint8)
    assert_equals_reference(codes, scale)


def test_errors_are_those_of_the_numbers(implementation):
    """And rows may be cut anywhere."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 127, (256, 256), dtype=np.uint8) | (rng.integers(0, 2, (256, 256), dtype=np.uint8) << 7)
    scale = rng.integers(110, 120, (2, 2), dtype=np.uint8)
    amax, wide = largest(codes, scale)
    values, global_scale = rq.E4M3[codes] * wide, rq.nvfp4_global_scale(amax)
    blocks = per_block(scale, codes.shape)
    data, block_scale, found = rq.fp8_to_nvfp4(codes, blocks, global_scale)
    pieces = [rq.fp8_to_nvfp4(codes[a:b], blocks[a:b], global_scale) for a, b in ((0, 1), (1, 200), (200, 256))]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in pieces]), data)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in pieces]), block_scale)
    after = rq.decode_blocks(rq.unpack_e2m1(data), rq.E4M3[block_scale] * global_scale)
    wanted = rq.Error.between(values, after)
    for error in (found, sum((p[2] for p in pieces), rq.Error()), rq.encode_nvfp4(values, global_scale)[2]):
        np.testing.assert_allclose(dataclasses.astuple(error), dataclasses.astuple(wanted), rtol=1e-6)
    assert 0.05 < (found.squared_error / found.squared_norm) ** 0.5 < 0.15
    # blocks that become zero lose all they have; what can be held is not lost
    tiny = np.zeros((2, 32), np.float32)
    tiny[0, :2], tiny[1, 3] = (3.0, -1.5), -(2.0**-20)
    data, block_scale, error = rq.encode_nvfp4(tiny, np.float32(1 / 448))
    assert (data != 0).sum() == 1 and (block_scale != 0).sum() == 1
    assert dataclasses.astuple(error) == (2.0**-40, 11.25 + 2.0**-40, 2.0**-20)


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 2e-36, 1e30])
def test_bf16_is_encoded_as_the_same_fp32(magnitude, implementation):
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((60, 112)) * np.exp(rng.standard_normal((60, 112)) * 3) * magnitude).astype(ml_dtypes.bfloat16)
    x[::7] = 0
    scale = rq.nvfp4_global_scale(rq.largest_magnitude(x))
    for a, b in zip(rq.encode_nvfp4(x, scale), rq.encode_nvfp4(x.astype(np.float32), scale)):
        assert a == b if isinstance(a, rq.Error) else np.array_equal(a, b)


def test_largest_magnitude():
    for dtype in (np.float32, ml_dtypes.bfloat16):
        x = np.array([[1, -2.5], [0, 2]], dtype)
        assert rq.largest_magnitude(x) == 2.5 and rq.largest_magnitude(x[:0]) == 0 and rq.largest_magnitude(-x) == 2.5
        assert np.isinf(rq.largest_magnitude(np.array([1, -np.inf], dtype)))


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 3e-38, 1e30])
def test_encoders_equal_the_reference(form, magnitude, implementation):
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
        data, scale, _ = rq.encode_nvfp4(x, global_scale)
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


def test_rounding_to_e4m3_is_that_of_ml_dtypes():
    x = np.arange(2**15, dtype=np.uint16)[:0x7F80].view(ml_dtypes.bfloat16).astype(np.float32)  # every finite bf16, and between
    for x in (x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))):
        expected = np.minimum(x, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        np.testing.assert_array_equal(rq.round_e4m3(x), expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["fp8", "mxfp4", "nvfp4"])
def test_decoder_equals_arithmetic_and_counts_what_is_lost(form, dtype):
    rng = np.random.default_rng(5)
    dtype, block = np.dtype(dtype), {"fp8": 128, "mxfp4": 16, "nvfp4": 8}[form]
    data = rng.integers(0, 256, (37, 300 if form == "fp8" else 160), dtype=np.uint8)
    data[(data & 0x7F) == 0x7F] = 3
    scales = np.float32(2.0) ** rng.integers(-12, 3, 7) if form != "nvfp4" else rq.E4M3[rng.integers(1, 126, 7)]
    which = rng.integers(0, 7, (37, -(-data.shape[1] // block)))
    factor = np.float32(0.3) if form == "nvfp4" else np.float32(1)
    values = rq.E4M3[data] if form == "fp8" else rq.unpack_e2m1(data)
    per_number = np.repeat(scales[which], block * values.shape[1] // data.shape[1], axis=1)[:, : values.shape[1]]
    exact = values * per_number * factor
    decoder = rq.Decoder(form, scales, dtype, factor)
    parts = [decoder.rows(data[a:b], which[a:b]) for a, b in ((0, 20), (20, 37))]
    np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(exact.astype(dtype)))
    if form == "nvfp4" and dtype != np.float32:
        wanted = rq.Error.between(exact, exact.astype(dtype).astype(np.float32))
        assert wanted.squared_error > 0
        np.testing.assert_allclose(dataclasses.astuple(decoder.lost), dataclasses.astuple(wanted), rtol=1e-6)
    else:
        assert decoder.lost == rq.Error(), "a power of two loses nothing"
    assert decoder.beyond == 0


def test_decoder_counts_what_is_out_of_range():
    data = np.array([[0x7E, 0, 0x01, 0xFE]], np.uint8)
    high = rq.Decoder("fp8", np.array([2.0**120, 1], np.float32), np.dtype(np.float32))
    high.rows(data, np.array([[0]]))
    assert high.beyond == 2
    low = rq.Decoder("fp8", np.array([2.0**-126], np.float32), np.dtype(ml_dtypes.bfloat16))
    low.rows(data, np.array([[0]]))  # 2**-135 is no bf16 number
    assert low.beyond == 0 and low.lost.largest == 2.0**-135


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
