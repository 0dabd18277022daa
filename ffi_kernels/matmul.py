"""Products of many tokens on the tensor cores of sm_100a: contract, checks, and the native launch (`native/sm100a/matmul.cu`).

Both operands are NVFP4 with their block scales in tcgen05 tiles (`layout.pack_tcgen05`). Not here: products of a few tokens,
and other formats (`linear.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import TensorMap, launch, native
from ffi_kernels.layout import TCGEN05
from ffi_kernels.linear import CTAS
from ffi_kernels.tensor import NVFP4Tensor, require_layout

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
    NotImplementedError on sm_90a, whose tensor cores know no FP4.
    """
    for name, t in (("x", x), ("w", w)):
        if not isinstance(t, NVFP4Tensor):
            raise TypeError(f"nvfp4_matmul multiplies two NVFP4Tensors, but {name} is a {type(t).__name__}; quantize it first.")
    require_layout("nvfp4_matmul", x, w, accepted=(TCGEN05,))
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"nvfp4_matmul takes x [M, K] and w [N, K], got {x.shape} and {w.shape}.")
    (rows, k), columns = x.shape, w.shape[0]
    if min(rows, k, columns) < 1:
        raise ValueError(f"nvfp4_matmul got an empty x {x.shape} or w {w.shape}; M, N and K are at least 1.")
    if k % 32 or columns % 8:
        raise ValueError(
            f"nvfp4_matmul takes K a multiple of 32 and N a multiple of 8, not K = {k} and N = {columns}; pad them, or use linear."
        )
    if x.global_scale.shape not in ((), (rows, 1)) or w.global_scale.shape != ():
        raise ValueError(
            f"nvfp4_matmul takes one global scale of x or [M, 1] = [{rows}, 1] of them, and one of w, "
            f"got {x.global_scale.shape} and {w.global_scale.shape}."
        )
    for name, t in (("x", x), ("w", w)):
        wanted = (-(-t.shape[0] // TILE), -(-k // MULTIPLY_K), 512)
        if t.scale.shape != wanted or [a.dtype for a in (t.data, t.scale, t.global_scale)] != [jnp.uint8, jnp.uint8, jnp.float32]:
            raise ValueError(
                f"nvfp4_matmul takes {name} as uint8 data, uint8 scales {wanted} and float32 global scales, got {t.data.dtype.name} data, "
                f"{t.scale.dtype.name} scales {t.scale.shape} and {t.global_scale.dtype.name} global scales; make it by layout.pack_tcgen05."
            )
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"nvfp4_matmul returns float32 or bfloat16, not {jnp.dtype(dtype).name}.")
    return implementation("nvfp4_matmul")(x, w, dtype)


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
