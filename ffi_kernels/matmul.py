"""Products of many tokens on the tensor cores of sm_100a: contract, checks, and the native launch (`native/sm100a/matmul.cu`).

Both operands are NVFP4 with their block scales in tcgen05 tiles (`layout.pack_tcgen05`). Not here: products of a few tokens,
and other formats (`linear.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import TensorMap, launch, native
from ffi_kernels.layout import TCGEN05, TILE_BLOCKS, TILE_ROWS
from ffi_kernels.linear import CTAS
from ffi_kernels.tensor import NVFP4_BLOCK, NVFP4Tensor, require_layout

K_MULTIPLE, N_MULTIPLE = 32, 8  # 16 bytes of a row of elements, and of a row of a bf16 result, which TMA copies

# Of the kernel. A CTA works on TILE rows of x at a time, a pair of CTAs on twice as many; a tile has TILE rows of w.
TILE = 128
STAGE_K, MULTIPLY_K = 256, 64  # K of a stage of the ring, and of one product
STAGES = {1: 5, 2: 6}  # of one CTA, of a pair
THREADS = 192
BOX_ROWS, BOX_BYTES = 32, 128  # of the result


def nvfp4_matmul(x: NVFP4Tensor, w: NVFP4Tensor, dtype=jnp.bfloat16) -> jax.Array:
    """x [M, K] times w [N, K] transposed -> [M, N], both NVFP4 in the layout 'tcgen05'.

    Products of dequantized blocks are exact and accumulated in fp32; the sum times x's global scale (float32, one or [M, 1]) and
    then times w's (one) is rounded once to dtype, float32 or bfloat16. TypeError for other formats; ValueError for other layouts,
    shapes or dtypes, K that is not a multiple of 32 or N that is not one of 8 (rows of 16 bytes, which TMA copies);
    NotImplementedError on sm_90a, whose tensor cores know no FP4. `vendor.py` has the products that NVIDIA maintains.
    """
    check("nvfp4_matmul", x, w, dtype, accepted=(TCGEN05,))
    return implementation("nvfp4_matmul")(x, w, dtype)


def check(op: str, x: NVFP4Tensor, w: NVFP4Tensor, dtype, accepted: tuple[str, ...]) -> tuple[int, int, int]:
    """(M, N, K) of a product by the contract of `nvfp4_matmul`, in one of the accepted layouts. TypeError or ValueError for anything else."""
    for name, tensor in (("x", x), ("w", w)):
        if not isinstance(tensor, NVFP4Tensor):
            raise TypeError(f"{op} multiplies two NVFP4Tensors, but {name} is a {type(tensor).__name__}; quantize it first.")
    require_layout(op, x, w, accepted=accepted)
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1] or not min(*x.shape, *w.shape):
        raise ValueError(f"{op} takes x [M, K] and w [N, K] with at least one row each, got {x.shape} and {w.shape}.")
    (rows, k), columns = x.shape, w.shape[0]
    if k % K_MULTIPLE or columns % N_MULTIPLE:
        raise ValueError(f"{op} takes K a multiple of {K_MULTIPLE} and N of {N_MULTIPLE}, not K = {k} and N = {columns}; pad them, or use linear.")
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


def ctas_of_a_tile(rows: int, columns: int, ctas: int) -> int:
    """2 if pairs of CTAs take M rows and N columns in no more waves than single ones on a device of so many CTAs, else 1."""
    if rows <= TILE:
        return 1
    across = -(-columns // TILE)
    single, pairs = (-(-(-(-rows // (group * TILE)) * across) // (ctas // group)) for group in (1, 2))
    return 2 if pairs <= single else 1


def _operand_maps(data: int, scale: int, rows: int, k: int, box_rows: int) -> list[TensorMap]:
    """Of an operand's packed elements and its scale tiles; `data` and `scale` are their numbers among the buffers."""
    tiles = (-(-rows // TILE), -(-k // MULTIPLY_K))
    return [
        TensorMap(data, "uint8", (rows, k // 2), (box_rows, STAGE_K // 2), swizzle=128),
        TensorMap(scale, "uint32", (*tiles, 128), (1, STAGE_K // MULTIPLY_K, 128)),
    ]


@native("nvfp4_matmul", "sm_100a", "sim")
def _nvfp4_matmul(x: NVFP4Tensor, w: NVFP4Tensor, dtype) -> jax.Array:
    (rows, k), columns = x.shape, w.shape[0]
    group = ctas_of_a_tile(rows, columns, CTAS[current()])
    tiles = -(-rows // (group * TILE)) * -(-columns // TILE)
    bf16 = dtype == jnp.bfloat16
    stage_bytes = (TILE + TILE // group) * STAGE_K // 2 + 2 * STAGE_K // MULTIPLY_K * 512
    out_bytes = 4 * 2 * BOX_ROWS * BOX_BYTES  # two boxes of each epilogue warp
    barrier_bytes = 8 * (2 * STAGES[group] + 4) + 8
    out = TensorMap(6, jnp.dtype(dtype).name, (rows, columns), (BOX_ROWS, BOX_BYTES // jnp.dtype(dtype).itemsize), swizzle=128)
    return launch(
        "nvfp4_matmul", "matmul", f"nvfp4_matmul_{'one' if group == 1 else 'pair'}_{'bf16' if bf16 else 'fp32'}",
        grid=(group * min(tiles, CTAS[current()] // group),), block=THREADS, cluster=(group,),
        shared_bytes=STAGES[group] * stage_bytes + out_bytes + barrier_bytes,
        inputs=[x.data, x.scale, x.global_scale, w.data, w.scale, w.global_scale],
        outputs=[jax.ShapeDtypeStruct((rows, columns), dtype)],
        scalars=[rows, columns, -(-k // MULTIPLY_K), int(x.global_scale.shape != ())],
        tensor_maps=[*_operand_maps(0, 1, rows, k, TILE), *_operand_maps(3, 4, columns, k, TILE // group), out],
    )[0]  # fmt: skip
