"""Native RMSNorm, RoPE and Hadamard against the reference on the CPU.

Here: the kernels of `native/cuda/norm.cu`. Quantized outputs must be exactly what the reference makes of the norm that
the kernel returned. Not here: the model's cases at full size (`dsv4 selftest`).
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops

BF16, F32 = ml_dtypes.bfloat16, np.float32


def native(function, *arrays):
    """function on the backend of the fixture, as numpy."""
    return jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arrays))


def reference(function, *arrays):
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        return jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arrays))


def normal(seed, *shape, dtype=F32, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def shapes(backend, small, large):
    """The interpreter runs small shapes only."""
    return small if backend == "sim" else small + large


def kind_of(dtype, fp32="fp32"):
    return "bf16" if dtype == BF16 else fp32


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(backend, dtype, weighted):
    for shape in shapes(backend, [(3, 128), (2, 2, 16), (1, 1), (2, 7), (2, 520)], [(16, 4096), (3, 7168), (1024, 512), (2, 8192)]):
        x = normal(1, *shape, dtype=dtype) * dtype(3)
        weight = normal(2, shape[-1], dtype=dtype) if weighted else None
        run = lambda x, weight: ops.rms_norm(x, weight, 1e-6)  # noqa: E731
        got = native(run, x, weight)
        assert got.dtype == dtype
        assert_close(got, reference(run, x, weight), kind_of(dtype))


def test_rms_norm_of_odd_rows(backend):
    """Zero, huge, subnormal rows, rows with nan and inf: as the reference, and each in its own row only."""
    x = normal(3, 6, 256, dtype=F32)
    x[1], x[2, 5], x[3, 7] = 0, np.nan, np.inf
    x[4] *= F32(1e25)
    x[5] *= F32(1e-25)
    run = lambda x: ops.rms_norm(x, None, 1e-6)  # noqa: E731
    got, want = native(run, x), reference(run, x)
    assert_close(got, want, "fp32")
    assert_bits(got[0], native(run, x[:1])[0])
    x = x.astype(BF16)
    assert_close(native(run, x), reference(run, x), "bf16")


@pytest.mark.parametrize("quantize", ["fp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rms_norm_quantize(backend, dtype, quantize):
    widths = [16, 128, 400] + ([7] if quantize == "fp8" else [])
    for width in shapes(backend, widths, [1536, 4096, 7168]):
        x, weight = normal(4, 3, width, dtype=dtype), normal(5, width, dtype=dtype)
        x[1, : width // 2] = 0
        y, got = native(lambda x, w: ops.rms_norm_quantize(x, w, 1e-6, quantize), x, weight)
        assert_bits(y, native(lambda x, w: ops.rms_norm(x, w, 1e-6), x, weight))
        want = reference(ops.quantize_fp8 if quantize == "fp8" else ops.quantize_nvfp4_rows, y)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_bits(a, b)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rope(backend, dtype):
    """Angles of each row, shared by heads, shared by sequences, shared by all; widths for 8 and for 2 channels a thread."""
    cases = [((2, 3, 64), (2, 3, 16)), ((2, 3, 4, 40), (2, 3, 1, 8)), ((2, 3, 20), (3, 5)), ((2, 3, 20), (1, 1, 4)),
             ((2, 3, 4, 12), (2, 1, 4, 3)), ((5, 8), (4,))]  # fmt: skip
    for shape, angles in shapes(backend, cases, [((16, 1, 128, 512), (16, 1, 1, 32)), ((7, 4, 64, 128), (7, 4, 1, 32))]):
        x, theta = normal(6, *shape, dtype=dtype), normal(7, *angles, scale=30)
        cos, sin = np.cos(theta), np.sin(theta)
        got = native(ops.rope, x, cos, sin)
        assert_close(got, reference(ops.rope, x, cos, sin), kind_of(dtype))
        untouched = shape[-1] - 2 * angles[-1]
        assert_bits(got[..., :untouched], x[..., :untouched])
        assert_close(native(ops.rope, got, cos, -sin), x, "two bf16" if dtype == BF16 else "fp32")


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_hadamard(backend, dtype):
    for shape in shapes(backend, [(3, 1), (3, 2), (2, 16), (2, 2, 128)], [(1024, 128), (3, 4096)]):
        x = normal(8, *shape, dtype=dtype)
        assert_close(native(ops.hadamard, x), reference(ops.hadamard, x), kind_of(dtype, "sum"))


def test_rows_do_not_depend_on_each_other(backend):
    """Bits of a row are the same alone, and in any slot of 2, 7 and 16."""
    width = 256 if backend == "sim" else 4096
    x, weight = normal(9, 16, width, dtype=BF16), normal(10, width, dtype=BF16)
    run = lambda x: ops.rms_norm_quantize(x, weight, 1e-6, "nvfp4")  # noqa: E731
    alone = jax.tree.leaves(native(run, x[:1]))
    for rows, slot in ((2, 1), (7, 3), (16, 15)):
        batch = np.roll(x[:rows], slot, axis=0)
        for a, b in zip(alone, jax.tree.leaves(native(run, batch)), strict=True):
            assert_bits(a[0], b[slot])


def test_refusals(backend):
    for call, message in (
        (lambda: ops.rms_norm(jnp.ones((2, 8200)), None, 1e-6), f"rms_norm on {backend} holds rows of at most 8192 channels, got 8200"),
        (lambda: ops.rms_norm(jnp.ones((2, 8), jnp.float16), None, 1e-6), f"rms_norm on {backend} takes bf16 or fp32, got float16"),
        (lambda: ops.rms_norm(jnp.ones((2, 8)), jnp.ones(4), 1e-6), "rms_norm needs one weight per channel"),
        (lambda: ops.rms_norm_quantize(jnp.ones((2, 8)), None, 1e-6, "int8"), "quantizes to 'fp8' or 'nvfp4', got 'int8'"),
        (lambda: ops.rms_norm_quantize(jnp.ones((2, 8)), None, 1e-6, "nvfp4"), "needs a multiple of 16 channels, got 8"),
        (lambda: ops.rope(jnp.ones((2, 7)), jnp.ones((2, 2)), jnp.ones((2, 2))), "even number of channels.*got 7 channels"),
        (lambda: ops.hadamard(jnp.ones((2, 8192))), "at most 4096 channels, got 8192; use backend"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
