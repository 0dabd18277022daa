"""Native quantizers, dequantizers and SwiGLU: bit for bit the reference on the CPU.

Here: the kernels of `native/cuda/quantize.cu`. Not here: what the formats promise (`test_quantize.py`, which holds the
reference to the torch oracle).
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits, assert_close, bits

import ffi_kernels as ops

BF16, F32 = ml_dtypes.bfloat16, np.float32
TINY = F32(2.0**-126)  # the smallest normal fp32
ALL_BF16 = np.arange(2**16, dtype=np.uint16).view(BF16)
FINITE_BF16 = ALL_BF16[np.isfinite(ALL_BF16.astype(F32))]
QUANTIZERS = {"quantize_fp8": (128, 448.0), "quantize_mxfp4": (32, 6.0), "quantize_nvfp4_rows": (16, 2688.0)}


def native(function, *arrays):
    """function on the backend of the fixture, as numpy."""
    return jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arrays))


def reference(function, *arrays):
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        return jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arrays))


def assert_same(function, *arrays):
    got, want = native(function, *arrays), reference(function, *arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert_bits(a, b)


def without_subnormals(x):
    """XLA on a CPU flushes subnormal numbers, kernels keep them."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)


def blocks(size, limit, every):
    """fp32 [many, 128]: for awkward largest magnitudes of a block, bf16 values not above it and the magnitude itself."""
    powers = np.ldexp(F32(limit), np.array([-100, -9, 0, 1, 100])).astype(F32)
    amax = np.concatenate([powers, np.nextafter(powers, F32(np.inf)), np.nextafter(powers, F32(0)), [1e-4, 5e-5, 3e38]])
    values = FINITE_BF16[::every].astype(F32)
    values = np.resize(values, (-(-len(values) // (size - 1)), size - 1))
    out = []
    for i, a in enumerate(amax.astype(F32)):
        kept = np.where(np.abs(values) <= a, values, 0)
        out.append(np.insert(kept, i % (size - 1), a if i % 2 else -a, axis=1))
    out = np.concatenate(out).reshape(-1)
    return np.resize(out, (-(-len(out) // 128), 128))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_bf16_value_is_exact(backend, name):
    """Every finite bf16 value, as bf16 and fp32, under many scales."""
    quantize, (size, limit) = getattr(ops, name), QUANTIZERS[name]
    x = blocks(size, limit, 64 if backend == "sim" else 1)
    if name == "quantize_nvfp4_rows":
        x = x[np.abs(x).max(-1) > 1e-30]  # where a block underflows fp32, XLA on a CPU flushes it
        x = np.where(np.abs(x) < TINY, 0, x)
    assert_same(quantize, x)
    assert_same(quantize, x.astype(BF16))
    ordered = np.concatenate([FINITE_BF16, np.zeros(128, BF16)]).reshape(-1, 128)[:: 8 if backend == "sim" else 1]
    assert_same(quantize, ordered if name != "quantize_nvfp4_rows" else ordered[np.abs(ordered.astype(F32)).max(-1) > 1e-30])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_nan_and_inf(backend, name):
    """The same numbers as the reference where the payload of a nan is free; other blocks (NVFP4: rows) bit for bit."""
    x = np.random.default_rng(1).standard_normal((6, 256)).astype(F32)
    clean = x.copy()
    x[1, 130], x[2, 5], x[3, 7], x[4, 200] = np.nan, np.inf, -np.inf, -np.nan
    for x, clean in ((x, clean), (x.astype(BF16), clean.astype(BF16))):
        run = lambda x: (getattr(ops, name)(x), ops.dequantize(getattr(ops, name)(x)))  # noqa: E731
        (got, values), (_, want) = native(run, x), reference(run, x)
        np.testing.assert_array_equal(np.isnan(values), np.isnan(want))
        np.testing.assert_array_equal(np.nan_to_num(values), np.nan_to_num(want))
        before = native(getattr(ops, name), clean)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(before), strict=True):
            assert_bits(a[[0, 5]], b[[0, 5]])


def test_fp8_of_partial_blocks(backend):
    for shape in ((5, 1), (2, 3, 7), (3, 127), (3, 129), (5, 200), (1, 8)):
        for dtype in (F32, BF16):
            assert_same(ops.quantize_fp8, np.random.default_rng(2).standard_normal(shape).astype(dtype))


def test_nvfp4_with_a_given_amax(backend):
    x = np.random.default_rng(3).standard_normal((4, 96)).astype(F32)
    for amax in (np.abs(x).max(-1, keepdims=True), np.array([[1e-3], [0], [np.inf], [np.nan]], F32), np.full((4, 1), 7, BF16)):
        got, want = (f(ops.quantize_nvfp4_rows, x, amax) for f in (native, reference))
        assert_bits(got.data, want.data)
        np.testing.assert_array_equal(np.isnan(got.scale.astype(F32)), np.isnan(want.scale.astype(F32)))
        np.testing.assert_array_equal(np.nan_to_num(got.scale.astype(F32)), np.nan_to_num(want.scale.astype(F32)))
        np.testing.assert_array_equal(np.nan_to_num(got.global_scale), np.nan_to_num(want.global_scale))


def test_nvfp4_rows_of_every_size(backend):
    """Outliers that push blocks below e4m3, zero blocks, zero rows, rows longer than a CTA's registers."""
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((24, 256)) * 10.0 ** rng.uniform(-20, 30, (24, 1)) * 10.0 ** rng.uniform(-6, 0, (24, 256))).astype(F32)
    x[3:9, 77] = 1e7 * np.abs(x[3:9]).max(-1)
    x[10:12, 16:48], x[12] = 0, 0
    assert_same(ops.quantize_nvfp4_rows, x)
    for width in (16, 48) if backend == "sim" else (16, 48, 4096, 7168, 8208, 20000):
        assert_same(ops.quantize_nvfp4_rows, rng.standard_normal((3, width)).astype(BF16))


def test_many_rows(backend):
    rows = 40 if backend == "sim" else 5000
    x = np.random.default_rng(5).standard_normal((rows, 384)).astype(BF16)
    for name in QUANTIZERS:
        assert_same(getattr(ops, name), x)


# --- dequantize ----------------------------------------------------------------------------------------------------


def assert_same_values(t):
    got, want = native(ops.dequantize, t), reference(ops.dequantize, t)
    nan = np.isnan(want)
    assert got.dtype == np.float32 and (np.isnan(got) == nan).all()
    assert_bits(np.where(nan, 0, without_subnormals(got)), np.where(nan, 0, without_subnormals(want)))


def codes(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_dequantize_fp4(backend):
    scale = np.arange(255, dtype=np.uint8).reshape(255, 1)
    assert_same_values(ops.MXFP4Tensor(codes(6, 255, 16), scale))
    scale = np.tile(np.arange(128, dtype=np.uint8), 2).reshape(4, 64).view(ml_dtypes.float8_e4m3fn)
    for global_scale in (np.array([[1], [1e-30], [1e30], [0.37]], F32), np.array([[0.37]], F32)):
        assert_same_values(ops.NVFP4Tensor(codes(7, 4, 512), scale, global_scale))
    weight = ops.NVFP4Tensor(codes(8, 3, 5, 32), np.resize(scale.reshape(-1), (3, 5, 4)), np.array([1, 0.1, 3e-9], F32))
    assert_same_values(weight)
    assert_same_values(ops.NVFP4Tensor(weight.data[0], weight.scale[0], np.float32(0.3)))


def test_dequantize_fp8(backend):
    every = np.tile(np.arange(256, dtype=np.uint8), 255).reshape(255, 256).view(ml_dtypes.float8_e4m3fn)
    assert_same_values(ops.FP8Activation(every, np.repeat(np.arange(255, dtype=np.uint8), 2).reshape(255, 2)))
    for shape in ((5, 1), (2, 3, 130), (3, 136)):
        data = (codes(9, *shape) & 0x7E).view(ml_dtypes.float8_e4m3fn)
        assert_same_values(ops.FP8Activation(data, codes(10, *shape[:-1], -(-shape[-1] // 128)) % 200))
    for shape in ((130, 200), (2, 129, 264), (1, 1)) + (() if backend == "sim" else ((2, 1024, 4096),)):
        scale = codes(11, *shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)) % 200
        assert_same_values(ops.FP8Tensor((codes(12, *shape) & 0x7E).view(ml_dtypes.float8_e4m3fn), scale))


# --- SwiGLU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_swiglu(backend, dtype):
    rng = np.random.default_rng(13)
    for shape in [(3, 2, 256), (2, 7), (1, 40)] + ([] if backend == "sim" else [(16, 7, 2048), (112, 3072)]):
        gate, up = (rng.standard_normal((2, *shape)) * 6).astype(F32)
        weight = rng.standard_normal((*shape[:-1], 1)).astype(F32)
        gate[0].reshape(-1)[:5] = np.inf, -np.inf, np.nan, 200, -200
        up[0].reshape(-1)[5:7] = np.inf, np.nan
        for w in (weight, None):
            run = lambda g, u: ops.swiglu(g, u, w, 10.0, dtype)  # noqa: B023, E731
            got = native(run, gate, up)
            assert got.dtype == dtype
            assert_close(got, reference(run, gate, up), "bf16" if dtype == BF16 else "fp32")


@pytest.mark.parametrize("quantize", ["fp8", "nvfp4"])
def test_swiglu_quantize(backend, quantize):
    rng = np.random.default_rng(14)
    for shape in [(3, 2, 256), (2, 48)] + ([] if backend == "sim" else [(16, 7, 2048), (16, 7, 3072)]):
        gate, up = (rng.standard_normal((2, *shape)) * 6).astype(F32)
        weight = rng.standard_normal((*shape[:-1], 1)).astype(F32)
        h, got = native(lambda g, u: ops.swiglu_quantize(g, u, weight, 10.0, BF16, quantize), gate, up)  # noqa: B023
        assert_bits(h, native(lambda g, u: ops.swiglu(g, u, weight, 10.0, BF16), gate, up))  # noqa: B023
        want = reference(ops.quantize_fp8 if quantize == "fp8" else ops.quantize_nvfp4_rows, h)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_bits(a, b)


def test_refusals(backend):
    for call, message in (
        (lambda: ops.quantize_fp8(jnp.ones((2, 8), jnp.float16)), f"quantize_fp8 on {backend} takes bf16 or fp32, got float16"),
        (lambda: ops.quantize_mxfp4(jnp.ones((2, 48))), "quantize_mxfp4 needs the last axis to be a multiple of 32"),
        (lambda: ops.swiglu(jnp.ones((2, 9000)), jnp.ones((2, 9000)), None, 10.0, BF16), "at most 8192 channels, got 9000"),
        (lambda: ops.swiglu(jnp.ones((2, 8)), jnp.ones((2, 8)), jnp.ones((2, 8)), 10.0, BF16), r"one weight per row \[..., 1\], got \(2, 8\)"),
        (lambda: ops.swiglu_quantize(jnp.ones((2, 8)), jnp.ones((2, 8)), None, 10.0, BF16, "nvfp4"), "multiple of 16 channels, got 8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert bits(native(ops.dequantize, jnp.full((2, 2), 1.5, jnp.bfloat16))).dtype == np.uint32
