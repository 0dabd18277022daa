"""The operator behind `gemm.py`, as a cutlass_call. The only file here that imports `cutlass`.

The operator is nvidia-cutlass-operators' PersistentDenseBlockScaledGemmOperator (BSD-3): batched A [M, K] x B [N, K] with block
scales, for sm_100. A persistent grid of clusters works through the tiles of the result; in each CTA one warp loads elements and
scales by TMA into a ring of shared memory, one issues tcgen05.mma on tensor memory, four convert the accumulators and store them by
TMA. The package lists 36 tiles and clusters of it for NVFP4; `gemm.py` picks among these. What is called is the operator's kernel
class, because the operator's own interface launches from Python. Importing it imports torch, by its package's doing.

Its epilogue is a function of elements that are already rounded to the type of the result, and sees no array, so global scales cannot be
given to it: `gemm.nvfp4_matmul` takes fp32 results and applies them outside. Compiled with the DSL's default optimization, as its
maintainers do; no tile has a stack (`tests/ffi_kernels/test_cute.py`).
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import jax
from cutlass.cute.nvgpu.common import OperandMajorMode
from cutlass.jax import TensorSpec, cutlass_call
from cutlass.operators.providers.cutedsl.gemm.sm100_dense_blockscaled_static_persistent import PersistentDenseBlockScaledGemmKernel

from ffi_kernels.tensor import NVFP4_BLOCK

OPTIONS = "--gpu-arch sm_100a"
ELEMENTS = TensorSpec(static=True, ptr_assumed_align=16)  # alignments that the operator asks for, in bytes
SCALES = TensorSpec(static=True, ptr_assumed_align=32)


@cute.jit
def _launch(
    stream: cuda.CUstream, x: cute.Tensor, x_scale: cute.Tensor, w: cute.Tensor, w_scale: cute.Tensor, out: cute.Tensor, *,
    problem: cutlass.Constexpr, tile: cutlass.Constexpr, cluster: cutlass.Constexpr, clusters: cutlass.Constexpr,
):  # fmt: skip
    layouts = (OperandMajorMode.K, OperandMajorMode.K, cutlass.tensor_utils.LayoutEnum.ROW_MAJOR)
    PersistentDenseBlockScaledGemmKernel(NVFP4_BLOCK, tile, cluster)(
        cute.recast_ptr(x.iterator, dtype=cutlass.Float4E2M1FN), cute.recast_ptr(w.iterator, dtype=cutlass.Float4E2M1FN),
        cute.recast_ptr(x_scale.iterator, dtype=cutlass.Float8E4M3FN), cute.recast_ptr(w_scale.iterator, dtype=cutlass.Float8E4M3FN),
        out.iterator, layouts, tuple(cutlass.Int32(n) for n in (*problem, 1)), clusters, stream,
    )  # fmt: skip


def product(x, x_scale, w, w_scale, dtype, tile: tuple[int, int], cluster: tuple[int, int], clusters: int) -> jax.Array:
    """x uint8 [M, K/2] times w uint8 [N, K/2] transposed -> [M, N], scales in 128 x 4 tiles, rounded once to dtype.

    tile: rows and columns of the result that one tensor core instruction (of two CTAs, for 256 rows) makes; cluster: CTAs; clusters: how
    many of them the grid has at most.
    """
    (rows, half), columns = x.shape, w.shape[0]
    problem = (rows, columns, 2 * half)
    call = cutlass_call(
        _launch, output_shape_dtype=jax.ShapeDtypeStruct((rows, columns), dtype),
        input_spec=(ELEMENTS, SCALES, ELEMENTS, SCALES), output_spec=(ELEMENTS,),
        compile_options=OPTIONS, compile_key=__name__,  # shapes, types, options and what follows are in the key anyway
        problem=problem, tile=tile, cluster=cluster, clusters=clusters,
    )  # fmt: skip
    return call(x, x_scale, w, w_scale)
