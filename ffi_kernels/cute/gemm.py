"""`nvfp4_matmul` by the operator that NVIDIA maintains: contract, refusals, and which tile it gets.

A pair of CTAs makes 256 rows of the result at a time (tcgen05 with cta_group::2), by 64, 128 or 192 columns. 256 rows even for a few
tokens: rows past M are filled by TMA without reading memory, and half of w's tile per CTA is the least shared memory and the
least traffic that the operator's tiles have. How wide is a matter of waves: all tiles of a wave take equally long, and the last wave
may be nearly empty.

| M x N | width | why |
|---|---|---|
| 1 to 256 x 4096 | 64 | a wide tile would leave most pairs without work, and the weight is read by those that work |
| 512, 1024 x 4096 | 128 | half as many tiles fill the pairs as well |
| 8192 x 4096, 512 x 129280 | 192 | many waves: fewer loads for the same products |

`tile_columns` decides, by an estimate that no device has confirmed. Clusters are one pair: what multicast over larger ones gains, and
what they lose where they do not fill a device, only a device can show.
"""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp

from ffi_kernels import matmul, vendor
from ffi_kernels.tensor import NVFP4Tensor

OP = "cute.nvfp4_matmul"
PACKAGES = ("nvidia-cutlass-dsl", "nvidia-cutlass-operators", "torch")  # the operators import torch, of which nothing is used
ROWS, COLUMNS = 256, (64, 128, 192)  # of a tile
CLUSTER = (2, 1)  # CTAs along M and N: the pair
PAIRS = 148 // 2  # of a B200; asking the device would need a driver where there is none
MULTIPLE = 32  # of M and N: the operator's layouts assume it


def why_not() -> str | None:
    """None if `nvfp4_matmul` can be traced here, else a sentence."""
    if (refusal := vendor.why_not_device(OP)) is not None:
        return refusal
    missing = []
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return f"{OP} needs {', '.join(missing)}, not installed here; pip install 'dsv4-jax[blackwell]', or use nvfp4_matmul."
    return None


def tile_columns(rows: int, columns: int) -> int:
    """The width of the tile for a product [M, N]: the one whose waves cost least, the widest of several.

    A step along K loads 128 rows of x and half a tile's columns of w into each CTA, so a tile costs its columns and a constant,
    here 64 columns: an estimate.
    """

    def cost(width: int) -> int:
        tiles = -(-rows // ROWS) * -(-columns // width)
        return -(-tiles // PAIRS) * (width + 64)

    return min(reversed(COLUMNS), key=cost)


def block_scaled_product(x: NVFP4Tensor, w: NVFP4Tensor, dtype) -> jax.Array:
    """x [M, K] times w [N, K] transposed -> [M, N] without the global scales, rounded once to float32 or bfloat16 by the operator.

    Layouts linear (tiled here) or 'tcgen05'. NotImplementedError where `why_not` says so or N is not a multiple of 32;
    TypeError or ValueError for what `nvfp4_matmul` refuses.
    """
    rows, columns, _ = matmul.check(OP, x, w, dtype, vendor.LAYOUTS)
    if (refusal := why_not()) is not None:
        raise NotImplementedError(refusal)
    if columns % MULTIPLE:
        raise NotImplementedError(f"{OP} takes N a multiple of {MULTIPLE}, which its layouts assume, not N = {columns}; use nvfp4_matmul.")
    from ffi_kernels.cute import operator  # imports cutlass

    padding = -rows % MULTIPLE  # never more rows than the last scale tile has
    data = jnp.pad(x.data, ((0, padding), (0, 0))) if padding else x.data
    tile = (ROWS, tile_columns(rows, columns))
    out = operator.product(data, vendor.tiled_scales(x), w.data, vendor.tiled_scales(w), dtype, tile, CLUSTER, PAIRS)
    return out[:rows]


def nvfp4_matmul(x: NVFP4Tensor, w: NVFP4Tensor, dtype=jnp.bfloat16) -> jax.Array:
    """x [M, K] times w [N, K] transposed -> [M, N]: the contract of `matmul.py`; refuses what `block_scaled_product` refuses.

    The operator writes fp32, for the global scales must come before the rounding; XLA applies them in one more kernel.
    """
    matmul.check(OP, x, w, dtype, vendor.LAYOUTS)
    return vendor.apply_global_scales(block_scaled_product(x, w, jnp.float32), x, w, dtype)
