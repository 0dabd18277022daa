"""The product by cuDNN: what JAX lowers, what XLA makes of it for a B200, refusals wherever that would be dequantization, and, on a
B200, the numbers of every implementation.

Not seen without a device: that cuDNN has a plan for a shape, its numbers, and whether XLA's choice there is that for a described device.
"""

import re
import types

import gpu_compiler
import jax
import jax.numpy as jnp
import matmul_operands
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops
from ffi_kernels import bench, cudnn, layout, library, vendor
from ffi_kernels.cute import gemm

HERE_IS_NONE = r"cudnn.nvfp4_matmul runs on an sm_100a device \(B200\) and the ops traced now are for .*; use nvfp4_matmul.*\."


@pytest.fixture
def b200(monkeypatch):
    """The ops traced in the test are for sm_100a, with or without a device."""
    monkeypatch.setenv("DSV4_BACKEND", "sm_100a")


@pytest.fixture
def compiled():
    """What XLA's CUDA compiler makes of the product, for each described device."""
    if (sentence := gpu_compiler.missing()) is not None:
        pytest.skip(sentence)
    return gpu_compiler.compiled("cudnn")


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["cute", "cudnn"])
def test_refused_where_no_b200_is(monkeypatch, name):
    monkeypatch.delenv("DSV4_BACKEND", raising=False)
    monkeypatch.setattr(library, "of_device", lambda: None)
    function, refusal = vendor.implementations()[name]
    assert re.fullmatch(HERE_IS_NONE.replace("cudnn", name), refusal)
    with pytest.raises(NotImplementedError, match=re.escape(refusal)):
        function(*matmul_operands.operands(4, 32, 64))


@pytest.mark.parametrize("other", ["sm_90a", "xla", "sim"])
def test_another_backend_is_no_b200(monkeypatch, other):
    monkeypatch.setenv("DSV4_BACKEND", other)
    monkeypatch.setattr(library, "of_device", lambda: "sm_90a")
    assert "are for sm_90a" in cudnn.why_not()
    monkeypatch.setattr(library, "of_device", lambda: None)
    assert ("are for sm_90a" if other == "sm_90a" else "are for a device of another kind") in cudnn.why_not()


@pytest.mark.parametrize("name", matmul_operands.LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_to_the_scaled_dot_and_nothing_dequantized(b200, name, dtype):
    x, w = matmul_operands.shapes_of(100, 160, 352, name)
    text = lowered(lambda x, w: cudnn.nvfp4_matmul(x, w, dtype), x, w)
    assert re.findall(r"custom_call @([\w$]+)", text) == [cudnn.LOWERED]
    operands = "tensor<1x100x352xf4E2M1FN>, tensor<1x160x352xf4E2M1FN>, tensor<1x100x22xf8E4M3FN>, tensor<1x160x22xf8E4M3FN>"
    assert f": ({operands}) -> tensor<1x100x160xf32>" in text, "packed elements, linear scales, an fp32 product"
    assert "dot_general" not in text and not re.search(r"stablehlo.convert .*f[48]E", text)
    assert text.count("stablehlo.multiply") == 2, "the two global scales"
    rounded = re.findall(r"stablehlo.convert .*-> tensor<100x160xbf16>", text)
    assert len(rounded) == (dtype == jnp.bfloat16)


def test_elements_keep_their_order():
    """Bitcasts put the low nibble first, as NVFP4 data has it."""
    x = matmul_operands.operand(3, 64, 0, row_scales=False)
    ones = ops.NVFP4Tensor(x.data, jnp.ones_like(x.scale), jnp.float32(1))
    assert_bits(cudnn.elements(x.data).astype(jnp.float32), ops.dequantize(ones))


def test_lowers_inside_shard_map_without_collectives(b200):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    x, w = matmul_operands.shapes_of(64, 512, 256)
    spec = jax.sharding.PartitionSpec
    weight = ops.NVFP4Tensor(spec("tensor"), spec("tensor"), spec(), layout.TCGEN05)
    f = jax.shard_map(cudnn.nvfp4_matmul, mesh=mesh, in_specs=(spec(), weight), out_specs=spec(None, "tensor"), check_vma=False)
    text = lowered(f, x, w)
    assert re.findall(r"custom_call @([\w$]+).*-> (tensor\S+)", text) == [(cudnn.LOWERED, "tensor<1x64x128xf32>")]
    assert not re.search(r"all_gather|all_reduce|collective|reduce_scatter", text)


def test_xla_gives_the_product_to_cudnn_on_a_b200(compiled):
    b200 = compiled["B200"]
    assert b200["refusal"] is None
    for text in (b200["whole"], b200["ragged"]):
        assert re.findall(r'custom_call_target="([^"]+)"', text) == [cudnn.COMPILED]
        assert not re.search(r" (dot|convert)\(f[48]e", text) and " dot(" not in text
        assert len(re.findall(r"^ .* fusion\(.*calls=%fused_convert", text, re.M)) == 1, "global scales and rounding in one kernel"
    assert " pad(" not in b200["whole"] and " pad(" in b200["ragged"], "cuDNN takes multiples of 128 rows"


@pytest.mark.parametrize("device", ["B200 with cuDNN 9.9", "H200"])
def test_refused_where_xla_would_dequantize(compiled, device):
    sentence = r"cudnn.nvfp4_matmul: XLA dequantizes \[256, 1024\] x \[512, 1024\] on .* instead of calling cuDNN, .*\."
    assert re.fullmatch(sentence, compiled[device]["refusal"])


def test_xla_brings_scales_into_the_tiles_of_the_layout(compiled):
    """The rearrangement before the custom call, read from the HLO and applied here, gives the bytes of `layout.tile_scales`."""
    rows, _, k = gpu_compiler.SHAPE
    text = compiled["B200"]["whole"]
    blocks = k // 16
    (after, dims) = re.search(rf"f8e4m3fn\[(1,{rows // 128},{blocks // 4},32,4,4)\]\S* transpose\(.*dimensions={{([\d,]+)}}", text).groups()
    after, dims = ([int(n) for n in group.split(",")] for group in (after, dims))
    before = [0] * len(dims)
    for to, source in enumerate(dims):
        before[source] = after[to]
    scale = np.random.default_rng(0).integers(0, 127, (rows, blocks), np.uint8)
    tiles = scale.reshape(before).transpose(dims).reshape(rows // 128, blocks // 4, 512)
    assert_bits(tiles, layout.tile_scales(jnp.asarray(scale)))


def test_on_a_b200_the_compiler_is_asked(monkeypatch):
    """With a device, its compiler decides, also when the caller is being traced under a mesh."""
    device = types.SimpleNamespace(platform="gpu", compute_capability="10.0")
    texts = {(4, 32, 64): f'custom_call_target="{cudnn.COMPILED}"', (4, 64, 64): "dot(", cudnn.PROBE: "dot("}
    monkeypatch.setattr(library, "default_device", lambda: device)
    monkeypatch.setattr(cudnn, "optimized_hlo", lambda m, n, k, on: texts[m, n, k])
    monkeypatch.setattr(cudnn, "why_not_on", cudnn.why_not_on.__wrapped__)
    assert "XLA dequantizes" in vendor.implementations()["cudnn"].refusal
    good, bad = (matmul_operands.shapes_of(4, n, 64) for n in (32, 64))
    assert cudnn.LOWERED in lowered(cudnn.nvfp4_matmul, *good)
    with pytest.raises(NotImplementedError, match=r"XLA dequantizes \[4, 64\] x \[64, 64\]"):
        lowered(cudnn.nvfp4_matmul, *bad)

    def fails(*_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no plan\nmore")

    monkeypatch.setattr(cudnn, "optimized_hlo", fails)
    assert cudnn.why_not().startswith("cudnn.nvfp4_matmul: XLA cannot compile") and "UNIMPLEMENTED: no plan;" in cudnn.why_not()


def test_the_compiler_can_be_asked_from_inside_a_trace(monkeypatch):
    """`why_not_on` compiles while its caller is traced in a shard_map of a global mesh: here an ordinary product, for the CPU."""
    monkeypatch.setattr(cudnn, "_product", lambda x, w, *_: jnp.dot(x, w.T))
    mesh = jax.make_mesh((8,), ("tensor",))
    seen = []

    def body(x):
        seen.append(cudnn.why_not_on.__wrapped__(jax.devices()[0], 128, 128, 64))
        return x

    spec = jax.sharding.PartitionSpec("tensor")
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        jax.jit(jax.shard_map(body, in_specs=spec, out_specs=spec)).trace(x)
    assert len(seen) == 1 and "XLA dequantizes [128, 64] x [128, 64]" in seen[0]


@pytest.mark.parametrize("function", [gemm.nvfp4_matmul, cudnn.nvfp4_matmul], ids=["cute", "cudnn"])
def test_operands_outside_the_contract_are_refused(b200, function):
    x, w = matmul_operands.operands(4, 32, 64, "linear")
    with pytest.raises(TypeError, match="multiplies two NVFP4Tensors, but x is a"):
        function(x.data, w)
    with pytest.raises(ValueError, match=r"takes x \[M, K\] and w \[N, K\].*got \(4, 64\) and \(32, 128\)"):
        function(x, matmul_operands.operand(32, 128, 0, row_scales=False))
    with pytest.raises(ValueError, match="K a multiple of 32 and N of 8, not K = 48 and N = 20"):
        function(*matmul_operands.shapes_of(4, 20, 48, "linear"))
    with pytest.raises(ValueError, match=r"one global scale of x or \[M, 1\] = \[4, 1\]"):
        function(ops.NVFP4Tensor(x.data, x.scale, jnp.ones(4)), w)
    with pytest.raises(ValueError, match="returns float32 or bfloat16, not float16"):
        function(x, w, jnp.float16)
    with pytest.raises(ValueError, match="layout 'tcgen05_gate_up'"):
        function(x, layout.pack_gate_up(w, w))
    tiles = layout.tile_scales(w.scale)
    wrong = [(w.scale[:31], "linear", r"\(32, 4\)"), (tiles[:, :0], layout.TCGEN05, r"\(1, 1, 512\)"), (tiles, "linear", r"\(32, 4\)")]
    for scale, name, shape in wrong:
        with pytest.raises(ValueError, match=rf"takes w in layout '{name}' as uint8 data, .* scales {shape} and float32 .*, got uint8"):
            function(x, ops.NVFP4Tensor(w.data, scale, w.global_scale, name))


@pytest.mark.parametrize("name", vendor.NAMES)
def test_selftest_and_benchmark_stand_them_beside_ours(monkeypatch, name):
    """What cannot run is no failure; what runs is compared with the reference (here jnp stands in for it, right and wrong)."""
    if (missing := library.why_not("sm_100a")) is not None:
        pytest.skip(missing)
    (_, case), = bench.chosen("flash", f"wq_a/R=128/{name}$", "sm_100a")

    def stand(factor, refusal=None):
        def product(x, w, dtype=jnp.bfloat16):
            return (factor * ops.linear(layout.unpack_tcgen05(x), layout.unpack_tcgen05(w), jnp.float32)).astype(dtype)

        def on_xla(x, w):
            with ops.backend("xla"):
                return product(x, w)

        monkeypatch.setattr(vendor, "implementations", lambda: {name: vendor.Implementation(on_xla, refusal)})

    stand(1)
    assert bench.check(case, "sm_100a") == {"verdict": "ok"}
    stand(1.1)
    assert "ok" != bench.check(case, "sm_100a")["verdict"] and not bench.check(case, "sm_100a")["verdict"].startswith(bench.NOT_HERE)
    stand(1, "it is not installed.")
    assert bench.check(case, "sm_100a") == {"verdict": "not here: it is not installed."}
    row, = bench.time_cases("flash", f"wq_a/R=128/{name}$", "sm_100a")
    assert row["error"] == "not here: it is not installed."


# --- on a B200: every implementation against the dequantized product ------------------------------------------------

SHAPES = [(1, 32, 32), (100, 160, 352), (128, 4096, 4096), (300, 1536, 7168), (2048, 2048, 512)]


@pytest.fixture(params=["cute", "cudnn"])
def implementation(request):
    function, refusal = vendor.implementations()[request.param]
    if refusal is not None:
        strict = request.config.getoption("--require-gpu") and library.of_device() in (None, vendor.ARCH)
        (pytest.fail if strict else pytest.skip)(refusal)
    return function


@pytest.mark.gpu
@pytest.mark.parametrize("name", matmul_operands.LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_sums_are_exact(implementation, shape, name):
    """Products of quarter integers, far from 2**24: one result whatever the order of the sum."""
    x, w = matmul_operands.operands(*shape, "linear", exact=True)
    want = matmul_operands.wanted(x, w)
    tensors = (matmul_operands.in_layout(t, name) for t in (x, w))
    assert_bits(jax.jit(lambda x, w: implementation(x, w, jnp.float32))(*tensors), want.astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bounds", [(jnp.float32, "sum"), (jnp.bfloat16, "bf16")])
@pytest.mark.parametrize("row_scales", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_the_dequantized_product(implementation, shape, row_scales, dtype, bounds):
    x, w = matmul_operands.operands(*shape, "linear", row_scales=row_scales)
    got = jax.jit(lambda x, w: implementation(x, w, dtype))(*(layout.pack_tcgen05(t) for t in (x, w)))
    assert_close(got, matmul_operands.wanted(x, w), bounds)
