"""Operands of `nvfp4_matmul` for the tests of its implementations: arrays, shapes, and the product in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import ffi_kernels as ops
from ffi_kernels import layout

LAYOUTS = ("linear", layout.TCGEN05)


def operand(rows: int, k: int, seed: int, *, row_scales: bool, exact: bool = False) -> ops.NVFP4Tensor:
    """Linear NVFP4 [rows, k] of random codes; `exact`: powers of two as scales, so that sums of products have no rounding in fp32."""
    rng = np.random.default_rng(seed)
    scale = rng.choice(np.asarray([0.5, 1, 2] if exact else np.arange(0.25, 4, 0.25), np.float32), (rows, k // 16))
    shape = (rows, 1) if row_scales else ()
    global_scale = 2.0 ** rng.integers(-3, 3, shape) if exact else rng.uniform(0.01, 0.1, shape)
    return ops.NVFP4Tensor(
        jnp.asarray(rng.integers(0, 256, (rows, k // 2), np.uint8)), jnp.asarray(scale).astype(jnp.float8_e4m3fn),
        jnp.asarray(global_scale, jnp.float32),
    )  # fmt: skip


def in_layout(tensor: ops.NVFP4Tensor, name: str) -> ops.NVFP4Tensor:
    return layout.pack_tcgen05(tensor) if name == layout.TCGEN05 else tensor


def operands(rows: int, columns: int, k: int, name: str = layout.TCGEN05, *, row_scales: bool = True, exact: bool = False):
    """x [rows, k] and w [columns, k] in a layout."""
    x, w = operand(rows, k, 1, row_scales=row_scales, exact=exact), operand(columns, k, 2, row_scales=False, exact=exact)
    return in_layout(x, name), in_layout(w, name)


def shapes_of(rows: int, columns: int, k: int, name: str = layout.TCGEN05):
    """The same operands as shapes, made without arrays."""
    return jax.eval_shape(lambda: operands(rows, columns, k, name))


def wanted(x: ops.NVFP4Tensor, w: ops.NVFP4Tensor) -> np.ndarray:
    """The sum of dequantized products, float64 [M, N]; linear operands."""
    with ops.backend("xla"):
        a, b = (np.asarray(ops.dequantize(t), np.float64) for t in (x, w))
    return a @ b.T
