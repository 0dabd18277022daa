"""nvfp4_matmul on the tcgen05 kernels against the reference: exact sums bit for bit, all schedules, ragged sizes, refusals.

Codes are any, block scales and global scales powers of two: then every sum is exact in fp32, in any order. Not here: what
ptxas makes of the kernels (`test_cubins.py`), tensor maps (`test_launch.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops
from ffi_kernels import bench, layout, library, matmul

BF16, F32 = jnp.bfloat16, jnp.float32

# M, N, K: with the 4 CTAs that the interpreter has, the first two take single CTAs, the others pairs
SINGLE = [(100, 72, 96), (300, 648, 1312)]  # less than a tile and a stage; 18 tiles, 5.1 stages
PAIRS = [(130, 8, 32), (200, 136, 1600), (512, 392, 320)]  # the least; 6.3 stages; 8 tiles for 2 pairs


@pytest.fixture(params=["sim", pytest.param("sm_100a", marks=pytest.mark.gpu)])
def backend(request):
    """A backend that has the op, forced for the whole test (sm_90a: see the refusals)."""
    import backends

    with ops.backend(backends.require(request, request.param)):
        yield request.param


@functools.cache
def operand(rows: int, k: int, *, seed: int, row_scales: bool, exact: bool = True) -> ops.NVFP4Tensor:
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.integers(-2, 3, (rows, k // 16))) if exact else rng.uniform(0.01, 400, (rows, k // 16))
    shape = (rows, 1) if row_scales else ()
    global_scale = np.exp2(rng.integers(-3, 4, shape)) if exact else rng.uniform(1e-3, 1e-2, shape)
    linear = ops.NVFP4Tensor(
        jnp.asarray(rng.integers(0, 256, (rows, k // 2), np.uint8)), jnp.asarray(scale.astype(ml_dtypes.float8_e4m3fn)),
        jnp.asarray(global_scale, F32),
    )  # fmt: skip
    return layout.pack_tcgen05(linear)


def operands(shape, row_scales=True, exact=True):
    m, n, k = shape
    return operand(m, k, seed=1, row_scales=row_scales, exact=exact), operand(n, k, seed=2, row_scales=False, exact=exact)


@functools.cache
def wanted(shape, dtype, row_scales=True, exact=True) -> np.ndarray:
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        return np.asarray(jax.jit(lambda x, w: ops.nvfp4_matmul(x, w, dtype))(*operands(shape, row_scales, exact)))


def native(x, w, dtype) -> np.ndarray:
    """The op over nan: its result takes the place of an array of nan that is given away."""
    poison = jnp.full((x.shape[0], w.shape[0]), jnp.nan, dtype)
    at = poison.unsafe_buffer_pointer()
    run = jax.jit(lambda poison, x, w: ops.nvfp4_matmul(x, w, dtype), donate_argnums=0, keep_unused=True)
    out = run(poison, x, w)
    assert out.unsafe_buffer_pointer() == at
    return np.asarray(out)


@pytest.mark.parametrize("row_scales", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", SINGLE + PAIRS, ids=str)
def test_exact_sums(backend, shape, dtype, row_scales):
    if backend == "sim":
        assert matmul.ctas_of_a_tile(*shape[:2], matmul.CTAS[backend]) == (1 if shape in SINGLE else 2)
    assert_bits(native(*operands(shape, row_scales), dtype), wanted(shape, dtype, row_scales))


@pytest.mark.parametrize("shape, dtype", [((300, 648, 800), F32), ((130, 264, 1600), BF16)], ids=str)
def test_every_schedule(backend, shape, dtype, monkeypatch):
    """Asynchronous work at once, as late as can be, and at random: the same bits, and no hazard in any."""
    if backend != "sim":
        pytest.skip("a device has one schedule, that of test_exact_sums")
    assert matmul.ctas_of_a_tile(*shape[:2], matmul.CTAS["sim"]) == (1 if shape[0] == 300 else 2)
    x, w = operands(shape)
    run = jax.jit(lambda x, w: ops.nvfp4_matmul(x, w, dtype)).lower(x, w).compile()
    for schedule in ["eager", "lazy", *(f"random seed={seed}" for seed in range(1, 25))]:
        monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
        assert_bits(np.asarray(run(x, w)), wanted(shape, dtype))


@pytest.mark.parametrize("dtype, bounds", [(BF16, "bf16"), (F32, "sum")])
@pytest.mark.parametrize("shape", [(100, 200, 416), (260, 136, 1600)], ids=str)
def test_random_values(backend, shape, dtype, bounds):
    got, want = native(*operands(shape, exact=False), dtype), wanted(shape, dtype, exact=False)
    assert got.dtype == want.dtype
    assert_close(got, want, bounds)


def test_quantized_activations_and_weights(backend):
    """The whole way of a linear layer: rows quantized with a global scale each, a packed weight."""
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.standard_normal(s) * np.exp2(rng.integers(-6, 7, (s[0], 1))), BF16) for s in ((140, 512), (96, 512)))
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        linear = jax.jit(ops.quantize_nvfp4_rows)(x), jax.jit(ops.quantize_nvfp4_weight)(w)
        want = np.asarray(jax.jit(ops.linear)(*linear))
    got = native(*map(layout.pack_tcgen05, linear), F32)
    for row in range(len(want)):
        assert_close(got[row], want[row], "sum")


def test_not_finite(backend):
    """A scale that is nan spoils its row alone, a global scale of inf makes its row inf or nan."""
    x, w = operands((130, 72, 320))
    codes = np.asarray(layout.unpack_tcgen05(x).scale).copy()
    codes.view(np.uint8)[7, 3] = 0x7F
    factors = np.asarray(x.global_scale).copy()
    factors[9] = np.inf
    x = ops.NVFP4Tensor(x.data, layout.tile_scales(jnp.asarray(codes)), jnp.asarray(factors), x.layout)
    got = native(x, w, F32)
    assert np.isnan(got[7]).all() and not np.isfinite(got[9]).any()
    others = np.delete(np.arange(130), (7, 9))
    assert_bits(got[others], wanted((130, 72, 320), F32)[others])


def test_rows_do_not_depend_on_their_neighbours(backend):
    """The bits of a row are the same alone, among others, and at another place."""
    x, w = operands((260, 136, 608), exact=False)
    together = native(x, w, F32)
    linear = layout.unpack_tcgen05(x)
    for rows in (slice(131, 132), slice(60, 200)):
        part = ops.NVFP4Tensor(linear.data[rows], linear.scale[rows], linear.global_scale[rows])
        assert_bits(native(layout.pack_tcgen05(part), w, F32), together[rows])


def test_in_a_loop_and_under_a_condition(backend):
    """Buffers move between executions: the maps are encoded anew from their addresses."""
    x, w = operands((100, 128, 256))
    run = jax.jit(lambda x, w: jax.lax.fori_loop(0, 3, lambda i, s: s + ops.nvfp4_matmul(x, w, F32), jnp.zeros((100, 128), F32)))
    assert_bits(np.asarray(run(x, w)), 3 * wanted((100, 128, 256), F32))
    zeros = jnp.zeros((100, 128), F32)
    ways = jax.jit(lambda p, x, w: jax.lax.cond(p, lambda: ops.nvfp4_matmul(x, w, F32), lambda: zeros))
    assert_bits(np.asarray(ways(True, x, w)), wanted((100, 128, 256), F32))
    assert not np.asarray(ways(False, x, w)).any()


def test_pairs_where_they_take_no_more_waves():
    assert matmul.ctas_of_a_tile(128, 4096, 148) == 1  # a pair would multiply 128 rows that are not there
    assert matmul.ctas_of_a_tile(129, 4096, 148) == 2
    assert matmul.ctas_of_a_tile(8192, 7168, 148) == 2
    assert matmul.ctas_of_a_tile(384, 128 * 49, 148) == 1  # 147 tiles in one wave, 98 of pairs in two


X, W = operands((4, 8, 64))
REFUSED = {
    "plain array": (X.data, W, F32, TypeError, "multiplies two NVFP4Tensors, but x is a .*; quantize it first"),
    "linear scales": (layout.unpack_tcgen05(X), W, F32, ValueError, "NVFP4Tensor in layout 'linear', but takes 'tcgen05'"),
    "gate and up": (X, layout.pack_gate_up(*[layout.unpack_tcgen05(W)] * 2), F32, ValueError, "in layout 'tcgen05_gate_up', but takes 'tcgen05'"),
    "other K": (X, operand(8, 96, seed=2, row_scales=False), F32, ValueError, r"takes x \[M, K\] and w \[N, K\] .* got \(4, 64\) and \(8, 96\)"),
    "odd N": (X, operand(7, 64, seed=2, row_scales=False), F32, ValueError, "K a multiple of 32 and N of 8, not K = 64 and N = 7"),
    "odd K": (operand(4, 48, seed=1, row_scales=True), operand(8, 48, seed=2, row_scales=False), F32, ValueError, "not K = 48 and N = 8"),
    "rows of w": (X, operand(8, 64, seed=2, row_scales=True), F32, ValueError, r"and one of w, got \(4, 1\) and \(8, 1\)"),
    "cut scales": (dataclasses.replace(X, scale=X.scale[:, :, :256]), W, F32, ValueError, r"uint8 scales \(1, 1, 512\) .* and pack what one device holds"),
    "dtype": (X, W, jnp.float16, ValueError, "returns float32 or bfloat16, not float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    x, w, dtype, error, words = REFUSED[case]
    with ops.backend("xla"), pytest.raises(error, match=words):
        ops.nvfp4_matmul(x, w, dtype)


def test_sm_90a_has_no_such_kernel():
    """On any machine that has the build: nothing falls back to another kernel, and the selftest of a Hopper device has no case."""
    if (missing := library.why_not("sm_90a")) is not None:
        pytest.skip(missing)
    with ops.backend("sm_90a"), pytest.raises(NotImplementedError, match="op 'nvfp4_matmul' has no implementation on backend 'sm_90a'"):
        ops.nvfp4_matmul(X, W)
    with pytest.raises(ValueError, match="matches none of the .* cases of sm_90a"):
        bench.chosen("flash", "nvfp4_matmul", "sm_90a")
    assert len(bench.chosen("flash,pro", "nvfp4_matmul", "sm_100a")) == 3 * 20  # ours, and two that NVIDIA maintains
    assert len(bench.chosen("flash,pro", "nvfp4_matmul", "sim")) == 20
    images = {path.name for path in library.directory().glob("matmul.*")}
    assert images == {"matmul.sm_100a.cubin", "matmul.sm_100a.ptx"}
