"""The product by NVIDIA's operator in the CuTe DSL: refusals, the choice of the tile, the bytes it is handed, and the call that JAX lowers.

The operator is compiled for sm_100a while JAX lowers, so everything up to the cubin is seen without a GPU; it is not run, see
`test_cudnn.py` for the numbers on a B200. `pytest -rA` shows what was compiled, how long that took and what it needs.
"""

import importlib.metadata
import re
import subprocess
import sys
import time
import types

import cubin_resources
import gpu_compiler
import jax
import jax.numpy as jnp
import matmul_operands
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops
from ffi_kernels import layout, matmul, vendor
from ffi_kernels.cute import gemm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the operator uses what the DSL has deprecated
TARGET = "CuteDSLRT_NvJaxCutlassCall"
SPEC = jax.sharding.PartitionSpec


@pytest.fixture
def b200(monkeypatch):
    """The ops traced in the test are for sm_100a, with or without a device."""
    monkeypatch.setenv("DSV4_BACKEND", "sm_100a")


@pytest.fixture
def operator(b200):
    """The module that calls the operator; needs the packages of the extra `blackwell`."""
    if (sentence := gemm.why_not()) is not None:
        pytest.skip(sentence)
    from ffi_kernels.cute import operator

    return operator


@pytest.fixture
def stand_in(b200, monkeypatch):
    """Puts a function in the operator's place that keeps what it is given, and multiplies in jnp."""
    kept = types.SimpleNamespace()

    def product(x, x_scale, w, w_scale, dtype, tile, cluster, clusters):
        kept.__dict__.update(x=x, x_scale=x_scale, w=w, w_scale=w_scale, dtype=dtype, tile=tile, cluster=cluster, clusters=clusters)
        x, w = (ops.NVFP4Tensor(d, s, jnp.float32(1), layout.TCGEN05) for d, s in ((x, x_scale), (w, w_scale)))
        with ops.backend("xla"):
            return ops.linear(*map(layout.unpack_tcgen05, (x, w)), dtype)

    import ffi_kernels.cute

    monkeypatch.setattr(ffi_kernels.cute, "operator", types.SimpleNamespace(product=product), raising=False)
    return kept


def lowered(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def custom_calls(lowering) -> list[tuple[str, bytes]]:
    """(target, embedded module) of every custom call in a lowered program."""
    found = []

    def visit(operation):
        for block in (block for region in operation.regions for block in region.blocks):
            for inner in (child.operation for child in block.operations):
                if inner.name == "stablehlo.custom_call":
                    name = inner.attributes["call_target_name"].value
                    config = inner.attributes["mhlo.backend_config"] if "mhlo.backend_config" in inner.attributes else {}
                    found.append((name, config["module"].value_bytes if "module" in config else b""))
                visit(inner)

    visit(lowering.compiler_ir("stablehlo").operation)
    return found


# --- without the packages ---------------------------------------------------------------------------------------------


def test_importing_the_ops_imports_no_cutlass():
    program = (
        "import sys, ffi_kernels, ffi_kernels.vendor, ffi_kernels.cudnn, ffi_kernels.cute.gemm as g; ffi_kernels.vendor.implementations();"
        "print([m for m in sys.modules if m.split('.')[0] in ('cutlass', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=gpu_compiler.ROOT)
    assert done.stdout.strip() == "[]"


def test_missing_packages_are_named(b200, monkeypatch):
    def all_but_one(name):
        if name == "nvidia-cutlass-operators":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", all_but_one)
    sentence = r"cute.nvfp4_matmul needs nvidia-cutlass-operators, not installed here; pip install 'dsv4-jax\[blackwell\]', .*\."
    assert re.fullmatch(sentence, vendor.implementations()["cute"].refusal)
    with pytest.raises(NotImplementedError, match=sentence):
        gemm.nvfp4_matmul(*matmul_operands.operands(4, 32, 64))


def test_a_width_that_the_operator_does_not_assume_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr(gemm, "why_not", lambda: None)
    with pytest.raises(NotImplementedError, match="N a multiple of 32, which its layouts assume, not N = 40"):
        gemm.nvfp4_matmul(*matmul_operands.operands(4, 40, 64))


@pytest.mark.parametrize(
    "rows, columns, width",
    [
        (1, 4096, 64), (256, 4096, 64), (512, 4096, 128), (1024, 4096, 128), (8192, 4096, 192), (512, 129280, 192),
        (1, 7168, 128), (2048, 512, 64), (4096, 7168, 192),
    ],
)  # fmt: skip
def test_the_width_of_the_tile(rows, columns, width):
    assert gemm.tile_columns(rows, columns) == width


@pytest.mark.parametrize("rows", [1, 128, 1000, 8192])
@pytest.mark.parametrize("columns", [64, 512, 1536, 4096, 7168, 129280])
def test_a_narrower_tile_is_taken_only_for_fewer_or_fuller_waves(rows, columns):
    def waves(width):
        return -(-(-(-rows // gemm.ROWS) * -(-columns // width)) // gemm.PAIRS)

    chosen = gemm.tile_columns(rows, columns)
    for wider in (width for width in gemm.COLUMNS if width > chosen):
        assert waves(chosen) * chosen < waves(wider) * wider


@pytest.mark.parametrize("name", matmul_operands.LAYOUTS)
@pytest.mark.parametrize("rows, columns, k", [(1, 32, 32), (100, 160, 352), (128, 128, 256), (300, 64, 96)])
def test_the_operator_is_handed_the_layout_and_its_product_is_scaled_once(stand_in, monkeypatch, rows, columns, k, name):
    monkeypatch.setattr(gemm, "why_not", lambda: None)
    x, w = matmul_operands.operands(rows, columns, k, "linear")
    got = gemm.nvfp4_matmul(*(matmul_operands.in_layout(t, name) for t in (x, w)), jnp.float32)
    padded = rows + -rows % 32
    assert stand_in.x.shape == (padded, k // 2) and stand_in.w.shape == (columns, k // 2) and stand_in.dtype == jnp.float32
    assert_bits(stand_in.x[:rows], x.data)
    assert not np.asarray(stand_in.x[rows:]).any() and stand_in.w is w.data
    assert_bits(stand_in.x_scale, layout.tile_scales(x.scale))
    assert_bits(stand_in.w_scale, layout.tile_scales(w.scale))
    assert (stand_in.tile, stand_in.cluster, stand_in.clusters) == ((256, gemm.tile_columns(rows, columns)), (2, 1), 74)
    assert_close(got, matmul_operands.wanted(x, w), "sum")


@pytest.mark.parametrize("row_scales", [True, False])
def test_global_scales_come_before_the_rounding(stand_in, monkeypatch, row_scales):
    monkeypatch.setattr(gemm, "why_not", lambda: None)
    x, w = matmul_operands.operands(40, 64, 128, row_scales=row_scales)
    exact = gemm.nvfp4_matmul(x, w, jnp.float32)
    assert_bits(gemm.nvfp4_matmul(x, w), exact.astype(jnp.bfloat16))
    assert stand_in.dtype == jnp.float32, "so the operator must not round to bf16"
    assert_bits(gemm.block_scaled_product(x, w, jnp.float32) * x.global_scale * w.global_scale, exact)


# --- with the packages ------------------------------------------------------------------------------------------------


def test_the_tiles_are_among_those_that_the_package_lists(operator):
    import cutlass
    from cutlass.operators import ScaleMode, ScaleSwizzleMode
    from cutlass.operators.providers.cutedsl.gemm.sm100_dense_blockscaled_static_persistent import PersistentDenseBlockScaledGemmOperator

    def ours(metadata):
        a, b, out = metadata.operands.A, metadata.operands.B, metadata.operands.out
        kinds = {(t.dtype, t.scale.dtype, t.mode.name) for t in (a, b)}
        nvfp4 = {(cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, ScaleMode.Blockwise1x16.name)}
        return kinds == nvfp4 and out.stride == (0, 0, 1) and out.dtype in (cutlass.Float32, cutlass.BFloat16)

    found = [o.metadata for o in PersistentDenseBlockScaledGemmOperator.generate_operators(ours, target_sm="100a")]
    for out in (cutlass.Float32, cutlass.BFloat16):
        listed = {(m.design.tile_shape[:2], m.design.cluster_shape[:2]) for m in found if m.operands.out.dtype is out}
        assert {((gemm.ROWS, width), gemm.CLUSTER) for width in gemm.COLUMNS} <= listed
    for a in (m.operands.A for m in found):
        assert a.swizzle is ScaleSwizzleMode.Swizzle32x4x4 and a.quantized.divisibility == matmul.K_MULTIPLE
        assert a.quantized.ptr_alignment_bytes == operator.ELEMENTS.ptr_assumed_align
        assert a.scale.ptr_alignment_bytes == operator.SCALES.ptr_assumed_align
    assert max(m.operands.out.divisibility for m in found) == matmul.N_MULTIPLE


@pytest.mark.parametrize("rows, k", [(32, 32), (160, 352), (256, 512)])
def test_scales_lie_where_the_operator_reads_them(operator, rows, k):
    """Every offset of the layout that the operator gives its scales, from the DSL's public function, and its size."""
    import cutlass
    import cutlass.cute as cute
    from cutlass.operators import ScaledOperand, ScaleMode, ScaleSwizzleMode
    from cutlass.utils.blockscaled_layout import tile_atom_to_shape_SF

    offsets = np.zeros((rows, k // 16), np.int64)

    @cute.jit
    def collect(rows: cutlass.Constexpr, k: cutlass.Constexpr):
        scales = tile_atom_to_shape_SF((rows, k, 1), 16)
        for row, block in np.ndindex(offsets.shape):
            offsets[row, block] = scales((row, 16 * block, 0))

    cute.compile(collect, rows, k, options=operator.OPTIONS)
    scale = np.random.default_rng(0).integers(1, 127, offsets.shape, np.uint8)
    tiles = np.asarray(layout.tile_scales(jnp.asarray(scale))).reshape(-1)
    assert_bits(tiles[offsets], scale)
    assert tiles.size == ScaledOperand.numel_scale((1, rows, k), ScaleMode.Blockwise1x16, ScaleSwizzleMode.Swizzle32x4x4)


def test_the_operator_gets_each_array_in_its_place(operator, monkeypatch):
    """Its kernel takes pointers in another order than the call; here each array has an alignment of its own, which its pointer keeps."""
    import cutlass
    from cutlass.jax import TensorSpec, cutlass_call

    seen = []

    class Recorded(operator.PersistentDenseBlockScaledGemmKernel):
        def __call__(self, *arguments):
            *pointers, layouts, problem, clusters, _ = arguments
            kinds = [(p.value_type, p.alignment) for p in pointers]  # plain values: the pointers end with the compilation
            seen.append((kinds, [layout.name for layout in layouts], [n.value for n in problem], clusters))
            super().__call__(*arguments)

    def with_alignments(function, **options):
        *inputs, out = (TensorSpec(static=True, ptr_assumed_align=n) for n in (16, 32, 64, 128, 256))
        return cutlass_call(function, **{**options, "input_spec": tuple(inputs), "output_spec": (out,)})

    monkeypatch.setattr(operator, "PersistentDenseBlockScaledGemmKernel", Recorded)
    monkeypatch.setattr(operator, "cutlass_call", with_alignments)
    lowered(gemm.nvfp4_matmul, *matmul_operands.shapes_of(96, 160, 352))
    x, x_scale, w, w_scale, out = 16, 32, 64, 128, 256
    f4, f8 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN
    kinds = [(f4, x), (f4, w), (f8, x_scale), (f8, w_scale), (cutlass.Float32, out)]
    assert seen[0] == (kinds, ["K", "K", "ROW_MAJOR"], [96, 160, 352, 1], 74)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiles_for_sm_100a_without_a_gpu(operator, monkeypatch, dtype):
    """One custom call with the cubin in it, for each tile: no stack, and shared memory that a CTA has."""
    made = []

    class Recorded(operator.PersistentDenseBlockScaledGemmKernel):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(operator, "PersistentDenseBlockScaledGemmKernel", Recorded)
    for rows, width in ((256, 64), (1024, 128), (8192, 192)):
        began = time.process_time()
        lowering = lowered(lambda x, w: gemm.block_scaled_product(x, w, dtype), *matmul_operands.shapes_of(rows, 4096, 4096))
        seconds = time.process_time() - began
        ((target, module),) = custom_calls(lowering)
        assert target.startswith(TARGET) and module.startswith(b"\x7fELF")
        assert lowering.out_info.shape == (rows, 4096) and lowering.out_info.dtype == dtype
        operands = [f"tensor<{n}x2048xui8>, tensor<{n // 128}x64x512xui8>" for n in (rows, 4096)]
        assert f"({', '.join(operands)})" in lowering.as_text()
        (cubin,) = cubin_resources.cubins(module)
        needs = cubin_resources.resources(cubin)
        kernel = made[-1]
        assert kernel.mma_tiler[:2] == (gemm.ROWS, width) and kernel.cluster_shape_mn == gemm.CLUSTER and kernel.use_2cta_instrs
        shared = needs["shared_bytes"] + kernel.shared_storage.size_in_bytes()
        assert (needs["arch"], needs["kernels"], needs["stack"]) == (100, 1, 0)
        assert 0 < needs["registers"] <= 65536 // kernel.threads_per_cta and shared <= 227 * 1024
        print(
            f"{jnp.dtype(dtype).name} [{rows}, 4096] x [4096, 4096]: tile {gemm.ROWS} x {width}, cluster {kernel.cluster_shape_mn}, "
            f"{kernel.num_ab_stage} stages, {needs['registers']} registers of {kernel.threads_per_cta} threads, {shared} bytes of shared "
            f"memory, {needs['code_bytes']} bytes of code; traced and compiled in {seconds:.2f} s of CPU"
        )


def test_the_same_program_has_the_same_module(operator):
    """Compile caches and reruns rely on it."""
    import cutlass.jax

    shapes = matmul_operands.shapes_of(64, 128, 256)
    ((_, first),) = custom_calls(lowered(gemm.nvfp4_matmul, *shapes))
    cutlass.jax.release_compile_cache()
    ((_, second),) = custom_calls(lowered(gemm.nvfp4_matmul, *shapes))
    assert first == second


def test_one_call_in_a_loop(operator):
    """The call is in the body of the loop, once."""

    def chain(x, w):
        def step(carry, _):
            product = gemm.nvfp4_matmul(x, ops.NVFP4Tensor(w.data, w.scale, carry, w.layout), jnp.float32)
            return 1 / (1 + jnp.abs(product).max()), None

        return jax.lax.scan(step, w.global_scale, length=3)[0]

    lowering = lowered(chain, *matmul_operands.shapes_of(64, 128, 256))
    assert [target.startswith(TARGET) for target, _ in custom_calls(lowering)] == [True]
    assert lowering.as_text().count("stablehlo.while") == 1


def test_shard_map_gives_each_device_its_part_of_the_weight(operator):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    x, w = matmul_operands.shapes_of(64, 512, 256)
    weight = ops.NVFP4Tensor(SPEC("tensor"), SPEC("tensor"), SPEC(), layout.TCGEN05)
    f = jax.shard_map(gemm.nvfp4_matmul, mesh=mesh, in_specs=(SPEC(), weight), out_specs=SPEC(None, "tensor"), check_vma=False)
    lowering = lowered(f, x, w)
    text = lowering.as_text()
    assert [target.startswith(TARGET) for target, _ in custom_calls(lowering)] == [True]
    assert "mhlo.num_partitions = 8" in text and lowering.out_info.shape == (64, 512)
    assert "(tensor<64x128xui8>, tensor<1x4x512xui8>, tensor<128x128xui8>, tensor<1x4x512xui8>) -> tensor<64x128xf32>" in text
    assert not re.search(r"all_gather|all_reduce|collective|reduce_scatter", text)


def test_no_batch_axis_and_no_cpu(operator):
    """What `cutlass_call` cannot do is an error when tracing or lowering, not a fallback."""
    x, w = matmul_operands.shapes_of(32, 64, 128)
    batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype), x)
    with pytest.raises(NotImplementedError, match="does not support batching"):
        lowered(jax.vmap(gemm.nvfp4_matmul, in_axes=(0, None)), batch, w)
    with pytest.raises(NotImplementedError, match="not found for platform cpu"):
        jax.jit(gemm.nvfp4_matmul).trace(x, w).lower(lowering_platforms=("cpu",))


def test_on_a_b200_it_is_the_call_and_one_kernel_for_scales_and_rounding(operator):
    if (sentence := gpu_compiler.missing()) is not None:
        pytest.skip(sentence)
    compiled = gpu_compiler.compiled("cute")["B200"]
    for text in (compiled["whole"], compiled["ragged"]):
        (target,) = re.findall(r'custom_call_target="([^"]+)"', text)
        assert target.startswith(TARGET)
        assert "transpose" not in text and len(re.findall(r"^ .* fusion\(.*calls=%fused_convert", text, re.M)) == 1
    assert [text.count(" fusion(") for text in (compiled["whole"], compiled["ragged"])] == [1, 2], "ragged rows are padded first"
