"""linear, linears and grouped_linear on every native backend against their references: values, edges, invariance, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops
from expert_weights import random_weight

# name: (how the input is given, the weight's format). "raw" inputs are quantized by the op.
PLAIN = lambda x: x  # noqa: E731
FORMS = {
    "bf16": (PLAIN, PLAIN),
    "fp8": (ops.quantize_fp8, ops.quantize_fp8_weight),
    "raw fp8": (ops.Unquantized, ops.quantize_fp8_weight),
    "plain fp8": (PLAIN, ops.quantize_fp8_weight),
    "mxfp4": (ops.quantize_fp8, ops.quantize_mxfp4),
    "raw mxfp4": (ops.Unquantized, ops.quantize_mxfp4),
    "plain mxfp4": (PLAIN, ops.quantize_mxfp4),
    "nvfp4": (ops.quantize_nvfp4_rows, ops.quantize_nvfp4_weight),
    "raw nvfp4": (ops.Unquantized, ops.quantize_nvfp4_weight),
}
REAL_SHAPES = [(4096, 1024), (1024, 7168)]


def cpu(function, *arguments):
    """function on the CPU under the backend xla."""
    device = jax.devices("cpu")[0]
    with jax.default_device(device), ops.backend("xla"):
        return jax.jit(function)(*jax.device_put(arguments, device))


def made(form, x_shape, w_shape, seed=0):
    """(x as the op takes it, w), with rows and blocks of very different sizes, so that a wrong scale shows."""
    rng = np.random.default_rng(seed)

    def normal(shape):
        sizes = np.exp2(rng.integers(-4, 5, (*shape[:-1], -(-shape[-1] // 16))))
        return jnp.asarray(rng.standard_normal(shape) * np.repeat(sizes, 16, -1)[..., : shape[-1]], jnp.bfloat16)

    take, quantize = FORMS[form]
    return cpu(lambda x, w: (take(x), quantize(w)), normal(x_shape), normal(w_shape))


def on_device(*arguments):
    return jax.device_put(arguments, jax.devices()[0])


def linears_of(x, ws):
    """All weights times one input that the op quantizes for each."""
    return ops.linears((ops.Unquantized(x),) * len(ws), ws, (jnp.float32,) * len(ws))


def check(op, arguments, **static):
    function = linears_of if op == "linears_of" else functools.partial(getattr(ops, op), **static)
    got = jax.tree.map(np.asarray, jax.jit(function)(*on_device(*arguments)))
    want = cpu(function, *arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        flat, wanted = (np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in (a, b))
        for row in range(flat.shape[0]):
            assert_close(flat[row], wanted[row], "bf16" if a.dtype == jnp.bfloat16 else "sum")
    return got


@pytest.mark.parametrize("rows", [1, 3, 8, 11])
@pytest.mark.parametrize("form", FORMS)
def test_linear(backend, form, rows):
    check("linear", made(form, (rows, 256), (40, 256)))


@pytest.mark.parametrize("form, k", [("bf16", 72), ("fp8", 208), ("raw fp8", 64), ("mxfp4", 128), ("nvfp4", 64), ("raw nvfp4", 320)])
def test_ragged_sizes(backend, form, k):
    """K that fills no unit, block or scale word; N that fills no tile."""
    check("linear", made(form, (2, k), (19, k)), dtype=jnp.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_whole_units(backend, form):
    """Sizes that the kernels of one format serve: whole tiles and units; more tiles than teams, more units than slots."""
    check("linear", made(form, (2, 1536), (176, 1536)))


@pytest.mark.parametrize(
    "forms", [("raw fp8",) * 3, ("raw nvfp4",) * 2, ("raw fp8", "bf16", "raw fp8"), ("raw mxfp4", "bf16", "raw nvfp4", "raw fp8")]
)
def test_linears_of_whole_units(backend, forms):
    pairs = [made(f, (2, 512), (n, 512), seed=i) for i, (f, n) in enumerate(zip(forms, (96, 16, 48, 160), strict=False))]
    pairs = [(made("bf16", (2, 512), (16, 512), seed=9)[0], w) for _, w in pairs]
    check("linears_of", (pairs[0][0], tuple(w for _, w in pairs)))


@pytest.mark.parametrize(
    "form, n, k", [(f, n, k) for f in FORMS for n, k in REAL_SHAPES] + [("fp8", 256, 16384), ("raw nvfp4", 256, 16384)]
)
def test_real_shapes(backend, form, n, k):
    if backend == "sim":
        pytest.skip("the interpreter runs the small shapes only")
    x, _ = made(form, (16, k), (16, k))
    w = random_weight(form.split()[-1], n, k)
    want = np.asarray(cpu(ops.linear, x, w))
    x, w = on_device(x, w)
    for rows in (1, 4, 16):
        got = np.asarray(jax.jit(ops.linear)(jax.tree.map(lambda a: a[:rows], x), w))
        for row in range(rows):
            assert_close(got[row], want[row], "sum")


def test_leading_axes_and_dtypes(backend):
    x, w = made("bf16", (2, 3, 128), (24, 128))
    assert check("linear", (x, w), dtype=jnp.bfloat16).shape == (2, 3, 24)


@pytest.mark.parametrize("rows", [1, 5])
def test_linears(backend, rows):
    """Products of every format in one launch, sharing inputs, of different N and K."""
    forms = ["raw fp8", "bf16", "raw nvfp4", "raw mxfp4", "bf16", "fp8"]
    sizes = [(40, 256), (100, 256), (16, 256), (272, 256), (8, 256), (24, 128)]
    pairs = [made(f, (rows, k), (n, k), seed=i) for i, (f, (n, k)) in enumerate(zip(forms, sizes, strict=True))]
    shared = pairs[1][0]
    xs = (ops.Unquantized(shared), shared, ops.Unquantized(shared), ops.Unquantized(shared), shared, pairs[5][0])
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32, jnp.bfloat16)
    xs, ws = on_device(xs, tuple(w for _, w in pairs))
    got = jax.jit(lambda x, last, ws: ops.linears((ops.Unquantized(x), x, ops.Unquantized(x), ops.Unquantized(x), x, last), ws, dtypes))(
        xs[1], xs[5], ws
    )
    want = cpu(lambda xs, ws: ops.linears(xs, ws, dtypes), xs, ws)
    for a, b, dtype in zip(got, want, dtypes, strict=True):
        assert a.dtype == dtype
        for row in range(rows):
            assert_close(a[row], b[row], "bf16" if dtype == jnp.bfloat16 else "sum")


@pytest.mark.parametrize("form", ["bf16", "plain fp8", "nvfp4", "raw nvfp4", "fp8"])
def test_grouped_linear(backend, form):
    check("grouped_linear", made(form, (3, 5, 128), (5, 40, 128)))


@pytest.mark.parametrize("form, groups, n, k", [("plain fp8", 8, 1024, 4096), ("bf16", 16, 1024, 4096), ("raw nvfp4", 8, 1024, 4096)])
@pytest.mark.parametrize("rows", [1, 16])
def test_grouped_real_shapes(backend, form, groups, n, k, rows):
    if backend == "sim":
        pytest.skip("the interpreter runs the small shapes only")
    x, _ = made(form, (rows, groups, k), (groups, 16, k))
    check("grouped_linear", (x, random_weight(form.split()[-1], groups, n, k)), dtype=jnp.bfloat16)


@pytest.mark.parametrize("form", ["bf16", "raw fp8", "plain fp8", "raw mxfp4", "raw nvfp4"])
def test_batch_invariance(backend, form):
    """The bits of a row depend neither on the number of rows nor on its place or its neighbours."""
    n, k = (40, 256) if backend == "sim" else (1024, 4096)
    x, w = on_device(*made(form, (16, k), (n, k)))
    run = jax.jit(ops.linear)
    alone = [np.asarray(run(jax.tree.map(lambda a: a[i : i + 1], x), w))[0] for i in (0, 3, 15)]
    for rows in (2, 7, 16):
        order = np.roll(np.arange(16), 5)[:rows]
        for slot in {0, rows - 1}:
            for row, bits in zip((0, 3, 15), alone, strict=True):
                picked = order.copy()
                picked[slot] = row
                together = run(jax.tree.map(lambda a: a[picked], x), w)
                assert_bits(np.asarray(together)[slot], bits)


@pytest.mark.parametrize("form", ["bf16", "raw fp8", "plain fp8", "raw nvfp4"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(backend, form, value):
    """A row that is not finite stays so where it is, and its neighbours do not notice."""
    x, w = made("bf16", (3, 256), (24, 256))
    x = jnp.asarray(np.asarray(x, np.float32)).at[1, 77].set(value).astype(jnp.bfloat16)
    x, w = cpu(lambda x, w: (FORMS[form][0](x), FORMS[form][1](w)), x, w)
    got, want = (np.asarray(v) for v in (jax.jit(ops.linear)(*on_device(x, w)), cpu(ops.linear, x, w)))
    assert (np.isnan(got) == np.isnan(want)).all() and (np.isinf(got) == np.isinf(want)).all()
    for row in (0, 2):
        assert_close(got[row], want[row], "sum")


@pytest.mark.parametrize("quantize, form", [(ops.quantize_fp8, "fp8"), (ops.quantize_fp8, "mxfp4"), (ops.quantize_nvfp4_rows, "nvfp4")])
def test_quantizes_like_the_quantizers(backend, quantize, form):
    """The same bits whether the op or the reference has quantized the input: all sizes, ties, zeros, tiny and huge rows."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6, 1024)) * np.exp2(rng.integers(-12, 12, (6, 64))).repeat(16, -1) * np.logspace(-30, 30, 6)[:, None]
    x[2, ::3] = 0
    x[3] = rng.integers(-24, 25, 1024) / 4  # ties of e2m1
    x[3, 0] = 6 * 448
    x = jnp.asarray(x, jnp.bfloat16)
    _, w = made(form, (1, 1024), (48, 1024))
    given = cpu(quantize, x)
    run = jax.jit(ops.linear)
    got = np.asarray(run(*on_device(ops.Unquantized(x), w)))
    assert np.isfinite(got).all()
    assert_bits(got, np.asarray(run(*on_device(given, w))))


def test_zeros(backend):
    for form in ("raw fp8", "raw nvfp4", "raw mxfp4", "bf16"):
        x, w = made(form, (2, 256), (24, 256))
        x = jax.tree.map(jnp.zeros_like, x)
        assert not np.asarray(jax.jit(ops.linear)(*on_device(x, w))).any()


def test_refusals(backend):
    x, w = made("bf16", (2, 256), (24, 256))
    with pytest.raises(ValueError, match="1 to 16 tokens, not 17; trace prompts under backend"):
        jax.eval_shape(ops.linear, jnp.zeros((17, 256), jnp.bfloat16), w)
    with pytest.raises(ValueError, match="plain inputs in bfloat16, not float32"):
        jax.eval_shape(ops.linear, x.astype(jnp.float32), w)
    with pytest.raises(ValueError, match="plain weights in bfloat16, not float32"):
        jax.eval_shape(ops.linear, x, w.astype(jnp.float32))
    with pytest.raises(ValueError, match="K a multiple of 8, not K = 20"):
        jax.eval_shape(ops.linear, x[:, :20], w[:, :20])
    with pytest.raises(ValueError, match="returns float32 or bfloat16, not float16"):
        jax.eval_shape(functools.partial(ops.linear, dtype=jnp.float16), x, w)
    with pytest.raises(ValueError, match="takes 1 to 8 weights"):
        ops.linears((x,) * 9, (w,) * 9, (jnp.float32,) * 9)
    with pytest.raises(ValueError, match="same leading axes"):
        ops.linears((x, x[:1]), (w, w), (jnp.float32,) * 2)
