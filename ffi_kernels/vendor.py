"""Implementations of `nvfp4_matmul` that NVIDIA maintains: what they have in common, and which of them can run.

Their contract is that of `matmul.py`, but for the layouts: linear or 'tcgen05', whatever the kernel behind them takes.
`cute/gemm.py` calls an operator of nvidia-cutlass-operators, `cudnn.py` cuDNN through `jax.nn.scaled_matmul`. Both run on sm_100a
only and stand beside the kernels of this project: as oracles, and as the bar to beat.
Here: the layouts of scales, the global scales, `implementations`, which `selftest` and `bench kernels` run too. Not here: checks
(`matmul.py`), products of a few tokens and other formats (`linear.py`).
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from ffi_kernels import dispatch
from ffi_kernels.layout import TCGEN05, tile_scales, untile_scales
from ffi_kernels.tensor import LINEAR, NVFP4_BLOCK, NVFP4Tensor

ARCH = "sm_100a"
LAYOUTS = (LINEAR, TCGEN05)
NAMES = ("cute", "cudnn")


class Implementation(NamedTuple):
    """function(x, w, dtype), and a sentence that says why it cannot run here, or None."""

    function: Callable[..., jax.Array]
    refusal: str | None


def implementations() -> dict[str, Implementation]:
    """What stands beside this project's kernels, by name: 'cute' and 'cudnn'. Asking imports and compiles next to nothing
    except on an sm_100a device, where one small product is compiled to see what XLA makes of `cudnn`."""
    from ffi_kernels import cudnn
    from ffi_kernels.cute import gemm

    return {name: Implementation(module.nvfp4_matmul, module.why_not()) for name, module in zip(NAMES, (gemm, cudnn), strict=True)}


def why_not_device(op: str) -> str | None:
    """None if an op traced now is lowered for sm_100a, else a sentence."""
    arch = dispatch.arch()
    if arch == ARCH:
        return None
    return (
        f"{op} runs on an {ARCH} device (B200) and the ops traced now are for {arch or 'a device of another kind'}; "
        "use nvfp4_matmul with backend('xla'), or DSV4_BACKEND=sm_100a to lower without a device."
    )


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
