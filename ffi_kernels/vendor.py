"""Implementations of `nvfp4_matmul` that NVIDIA maintains: what they have in common, and which of them can run.

    x [M, K] times w [N, K] transposed -> [M, N], both NVFP4. Products of dequantized blocks are accumulated in fp32; the sum times
    x's global scale (float32, one or [M, 1]) and then times w's (one) is rounded once to dtype, float32 or bfloat16.

`cute/gemm.py` calls an operator of nvidia-cutlass-operators, `cudnn.py` cuDNN through `jax.nn.scaled_matmul`. Both run on sm_100a
only and stand beside the kernels of this project: as oracles, and as the bar to beat.
Here: their checks, the layouts of scales, the global scales, `implementations`. Not here: products of a few tokens and
other formats (`linear.py`).
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from ffi_kernels import dispatch
from ffi_kernels.layout import TCGEN05, TILE_BLOCKS, TILE_ROWS, tile_scales, untile_scales
from ffi_kernels.tensor import LINEAR, NVFP4_BLOCK, NVFP4Tensor, require_layout

ARCH = "sm_100a"
K_MULTIPLE, N_MULTIPLE = 32, 8  # 16 bytes of a row of elements, and of a row of a bf16 result


class Implementation(NamedTuple):
    """function(x, w, dtype), and a sentence that says why it cannot run here, or None."""

    function: Callable[..., jax.Array]
    refusal: str | None


def implementations() -> dict[str, Implementation]:
    """What stands beside this project's kernels, by name: 'cute' and 'cudnn'. Asking imports and compiles next to nothing
    except on an sm_100a device, where one small product is compiled to see what XLA makes of `cudnn`."""
    from ffi_kernels import cudnn
    from ffi_kernels.cute import gemm

    modules = {"cute": gemm, "cudnn": cudnn}
    return {name: Implementation(module.nvfp4_matmul, module.why_not()) for name, module in modules.items()}


def why_not_device(op: str) -> str | None:
    """None if an op traced now is lowered for sm_100a, else a sentence."""
    arch = dispatch.arch()
    if arch == ARCH:
        return None
    return (
        f"{op} runs on an {ARCH} device (B200) and the ops traced now are for {arch or 'a device of another kind'}; "
        "use nvfp4_matmul with backend('xla'), or DSV4_BACKEND=sm_100a to lower without a device."
    )


def check(op: str, x: NVFP4Tensor, w: NVFP4Tensor, dtype) -> tuple[int, int, int]:
    """(M, N, K) of a product that `nvfp4_matmul` takes. TypeError or ValueError for anything else."""
    for name, tensor in (("x", x), ("w", w)):
        if not isinstance(tensor, NVFP4Tensor):
            raise TypeError(f"{op} multiplies two NVFP4Tensors, but {name} is a {type(tensor).__name__}; quantize it first.")
    require_layout(op, x, w, accepted=(LINEAR, TCGEN05))
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1] or not min(*x.shape, *w.shape):
        raise ValueError(f"{op} takes x [M, K] and w [N, K] with at least one row each, got {x.shape} and {w.shape}.")
    (rows, k), columns = x.shape, w.shape[0]
    if k % K_MULTIPLE or columns % N_MULTIPLE:
        raise ValueError(f"{op} takes K a multiple of {K_MULTIPLE} and N of {N_MULTIPLE}, not K = {k} and N = {columns}; use linear.")
    if x.global_scale.shape not in ((), (rows, 1)) or w.global_scale.shape != ():
        raise ValueError(
            f"{op} takes one global scale of x or [M, 1] = [{rows}, 1] of them, and one of w, "
            f"got {x.global_scale.shape} and {w.global_scale.shape}."
        )
    for name, tensor in (("x", x), ("w", w)):  # kernels that are handed addresses read what the shapes promise
        shape, dtype_of_scales = scales_of(tensor)
        dtypes = [jnp.dtype(a.dtype).name for a in (tensor.data, tensor.scale, tensor.global_scale)]
        if tensor.scale.shape != shape or dtypes != ["uint8", dtype_of_scales, "float32"]:
            raise ValueError(
                f"{op} takes {name} in layout {tensor.layout!r} as uint8 data, {dtype_of_scales} scales {shape} and float32 global scales, "
                f"got {dtypes[0]}, {dtypes[1]} {tensor.scale.shape} and {dtypes[2]}; quantize it, and pack what one device holds."
            )
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{op} returns float32 or bfloat16, not {jnp.dtype(dtype).name}.")
    return rows, columns, k


def scales_of(tensor: NVFP4Tensor) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the block scales that a tensor [rows, K] has in its layout."""
    rows, k = tensor.shape
    if tensor.layout == TCGEN05:
        return (-(-rows // TILE_ROWS), -(-k // (TILE_BLOCKS * NVFP4_BLOCK)), TILE_ROWS * TILE_BLOCKS), "uint8"
    return (rows, k // NVFP4_BLOCK), "float8_e4m3fn"


def tiled_scales(tensor: NVFP4Tensor) -> jax.Array:
    """The block scales in 128 x 4 tiles (`layout.py`), uint8 [ceil(rows/128), ceil(K/64), 512], whatever the tensor's layout."""
    return tensor.scale if tensor.layout == TCGEN05 else tile_scales(tensor.scale)


def linear_scales(tensor: NVFP4Tensor) -> jax.Array:
    """The block scales as float8_e4m3fn [rows, K/16], whatever the tensor's layout."""
    rows, k = tensor.shape
    return untile_scales(tensor.scale, rows, k // NVFP4_BLOCK) if tensor.layout == TCGEN05 else tensor.scale


def apply_global_scales(product: jax.Array, x: NVFP4Tensor, w: NVFP4Tensor, dtype) -> jax.Array:
    """fp32 [M, N] times both global scales, rounded once to dtype. XLA makes one elementwise kernel of it."""
    return (product * x.global_scale * w.global_scale).astype(dtype)
