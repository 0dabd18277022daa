"""Every op on every backend against a float64 statement in numpy that shares no code with `reference.py`.

Here: values and refusals of shapes. Not here: quantizers (`test_quantize.py`), the choice of a backend
(`test_dispatch.py`). Inputs are quantized once and both sides consume them, so the bounds measure the op.
"""

import functools

import backends
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops
from ffi_kernels import dispatch

HIDDEN = (256, 4096, 7168)
BF16, F32, F64 = ml_dtypes.bfloat16, np.float32, np.float64
SIZES = [(256, F32), (256, BF16), (4096, BF16), (7168, BF16)]  # the widths of DeepSeek-V4 in the dtype it runs in


@pytest.fixture(params=["xla", "sim", pytest.param("sm_90a", marks=pytest.mark.gpu), pytest.param("sm_100a", marks=pytest.mark.gpu)])
def call(request):
    """call(op, *arrays, **static): the op compiled on each backend of this build. What a backend lacks is refused."""
    name = backends.require(request, request.param)

    def call(op, *arrays, **static):
        with ops.backend(name):
            function = functools.partial(getattr(ops, op), **static)
            if op not in dispatch._OPS[name]:
                with pytest.raises(NotImplementedError, match=f"op '{op}' has no implementation on backend '{name}'"):
                    jax.eval_shape(function, *arrays)
                pytest.skip(f"backend {name} has no {op}; its refusal was asserted")
            try:
                return jax.tree.map(np.asarray, jax.jit(function)(*arrays))
            except ValueError as error:  # a native op that lacks this dtype or shape says what to do
                if name == "xla" or "backend('xla')" not in str(error):
                    raise
                pytest.skip(f"refused in a sentence: {error}")

    return call


def normal(seed, *shape, dtype=F32, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def wide(x):
    return np.asarray(x).astype(F64)


def kind_of(dtype, fp32="sum"):
    return "bf16" if dtype == BF16 else fp32


def values(t):
    """What a quantized array means, float64, decoded by ml_dtypes."""
    if not isinstance(t, ops.QUANTIZED):
        return wide(t)
    if isinstance(t, (ops.NVFP4Tensor, ops.MXFP4Tensor)):
        codes = np.stack([np.asarray(t.data) & 15, np.asarray(t.data) >> 4], -1).reshape(t.shape)
        elements = codes.view(ml_dtypes.float4_e2m1fn).astype(F64)
    else:
        elements = wide(t.data)
    if isinstance(t, ops.NVFP4Tensor):
        total = wide(t.global_scale)
        total = total if total.ndim == elements.ndim else total[..., None, None]
        return elements * np.repeat(wide(t.scale), 16, -1) * total
    scale = np.repeat(np.ldexp(1.0, np.asarray(t.scale, np.int32) - 127), 32 if isinstance(t, ops.MXFP4Tensor) else 128, -1)
    if isinstance(t, ops.FP8Tensor):
        scale = np.repeat(scale, 128, -2)[..., : t.shape[-2], :]
    return elements * scale[..., : t.shape[-1]]


# --- linear ------------------------------------------------------------------------------------------------------

AS_BF16, AS_FP32 = jnp.bfloat16, jnp.float32
FORMATS = {
    "bf16": (AS_BF16, AS_BF16),
    "fp32": (AS_FP32, AS_FP32),
    "bf16 x fp32": (AS_BF16, AS_FP32),
    "fp8 x fp8": (ops.quantize_fp8, ops.quantize_fp8_weight),
    "bf16 x fp8": (AS_BF16, ops.quantize_fp8_weight),
    "fp32 x fp8": (AS_FP32, ops.quantize_fp8_weight),
    "fp8 x mxfp4": (ops.quantize_fp8, ops.quantize_mxfp4),
    "bf16 x mxfp4": (AS_BF16, ops.quantize_mxfp4),
    "nvfp4": (ops.quantize_nvfp4_rows, ops.quantize_nvfp4_weight),
}


def operands(form, x_shape, w_shape):
    quantize_x, quantize_w = FORMATS[form]
    # rows of very different sizes, so that a scale applied to the wrong row shows
    x = normal(1, *x_shape) * np.logspace(-2, 2, x_shape[0], dtype=F32).reshape(-1, *[1] * (len(x_shape) - 1))
    w = normal(2, *w_shape) * np.logspace(-1, 1, w_shape[0], dtype=F32).reshape(-1, *[1] * (len(w_shape) - 1))
    return jax.jit(quantize_x)(x), jax.jit(quantize_w)(w)


@pytest.mark.parametrize(
    "form, k", [(f, 256) for f in FORMATS] + [(f, k) for f in ("fp8 x mxfp4", "nvfp4") for k in HIDDEN[1:]]
)
def test_linear(call, form, k):
    x, w = operands(form, (3, k), (200, k))
    got = call("linear", x, w)
    assert got.dtype == jnp.float32
    want = values(x) @ values(w).T
    for row in range(3):
        assert_close(got[row], want[row], "sum")


@pytest.mark.parametrize("form", ["bf16", "fp8 x fp8", "bf16 x fp8", "bf16 x mxfp4", "nvfp4"])
def test_grouped_linear(call, form):
    x, w = operands(form, (2, 3, 4, 256), (4, 130, 256))
    assert_close(call("grouped_linear", x, w), np.einsum("btgk,gnk->btgn", values(x), values(w)), "sum")


@pytest.mark.parametrize("form, shared", [*((f, True) for f in FORMATS), ("bf16", False), ("fp8 x mxfp4", False), ("nvfp4", False)])
def test_gathered_linear(call, form, shared):
    """Ids repeat, skip experts, and lie outside [0, E): those are clipped."""
    ids = np.array([[0, 4, 2], [4, 4, 4], [-7, 2, 99]], np.int32)
    x, w = operands(form, (3, 1 if shared else 3, 256), (5, 130, 256))
    picked = values(w)[np.clip(ids, 0, 4)]
    want = np.einsum("txk,txnk->txn", np.broadcast_to(values(x), (3, 3, 256)), picked)
    got = call("gathered_linear", x, w, ids)
    for slot in np.ndindex(3, 3):
        assert_close(got[slot], want[slot], "sum")


# --- norm, rope, hadamard ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d, dtype", SIZES)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(call, dtype, weighted, d):
    x = (normal(1, 2, 3, d) * np.array([[1e-3], [1], [1e3]], F32)).astype(dtype)
    x[1, 1] = 0
    weight = normal(2, d, dtype=BF16) if weighted else None
    want = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    got = call("rms_norm", x, weight, eps=1e-6)
    assert got.dtype == dtype
    assert_close(got, want * wide(weight) if weighted else want, kind_of(dtype))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rope(call, dtype):
    x = normal(1, 2, 5, 3, 512, dtype=dtype)
    angle = np.random.default_rng(2).uniform(-1e4, 1e4, (2, 5, 1, 32)).astype(F32)
    cos, sin = np.cos(angle), np.sin(angle)
    pairs = wide(x)[..., 448:].reshape(2, 5, 3, 32, 2) @ np.array([1, 1j])
    turned = pairs * (wide(cos) + 1j * wide(sin))
    got = call("rope", x, cos, sin)
    assert got.dtype == dtype
    assert_bits(got[..., :448], x[..., :448])
    assert_close(got[..., 448:], np.stack([turned.real, turned.imag], -1).reshape(2, 5, 3, 64), kind_of(dtype, "fp32"))
    assert_close(call("rope", got, cos, -sin), wide(x), "two bf16" if dtype == BF16 else "fp32")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("n", [1, 32, 128])
def test_hadamard(call, dtype, n):
    x = normal(n, 3, 5, n, dtype=dtype)
    matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) * n**-0.5
    got = call("hadamard", x)
    assert_close(got, wide(x) @ matrix, kind_of(dtype))
    assert_close(call("hadamard", call("hadamard", x.astype(F32))), wide(x), "sum")


# --- hyper-connections -------------------------------------------------------------------------------------------


def mix64(streams, fn):
    x = wide(streams).reshape(*streams.shape[:-2], -1)
    return x @ wide(fn).T / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def hc_inputs(d, dtype, sites):
    streams = normal(1, 2, 3, 4, d, dtype=dtype)
    return streams, normal(2, sites, 4 * d, scale=d**-0.5), normal(3, sites), normal(4, 3 if sites > 4 else 1, scale=0.3)


@pytest.mark.parametrize("d, dtype, iterations", [(256, F32, 1), *((*size, 20) for size in SIZES)])
def test_hc_pre(call, d, dtype, iterations):
    streams, fn, base, scale = hc_inputs(d, dtype, 24)
    y, post, comb = call("hc_pre", streams, fn, base, scale, iterations=iterations, eps=1e-6, norm_eps=1e-6)
    m, b, s = mix64(streams, fn), wide(base), wide(scale)
    pre = sigmoid(m[..., :4] * s[0] + b[:4]) + 1e-6
    c = np.exp((m[..., 8:] * s[2] + b[8:]).reshape(2, 3, 4, 4))
    c = c / c.sum(-1, keepdims=True) + 1e-6
    c = c / (c.sum(-2, keepdims=True) + 1e-6)
    for _ in range(iterations - 1):
        c = c / (c.sum(-1, keepdims=True) + 1e-6)
        c = c / (c.sum(-2, keepdims=True) + 1e-6)
    assert y.dtype == dtype and post.dtype == comb.dtype == jnp.float32
    assert_close(y, np.einsum("btm,btmd->btd", pre, wide(streams)), kind_of(dtype))
    assert_close(post, 2 * sigmoid(m[..., 4:8] * s[1] + b[4:8]), "sum")
    assert_close(comb, c, "sinkhorn")
    assert np.abs(wide(comb).sum(-2) - 1).max() < 1e-4, "the last step normalises the sum over j"
    if iterations == 20:
        assert np.abs(wide(comb).sum(-1) - 1).max() < 1e-3, "twenty iterations make it doubly stochastic"
        assert np.abs(wide(comb) - wide(comb).swapaxes(-1, -2)).max() > 0.01, "this test needs an asymmetric matrix"


@pytest.mark.parametrize("d, dtype", SIZES)
def test_hc_post(call, d, dtype):
    streams, f = normal(1, 2, 3, 4, d, dtype=dtype), normal(2, 2, 3, d, dtype=dtype)
    post, comb = normal(3, 2, 3, 4), normal(4, 2, 3, 4, 4)
    want = [sum(wide(comb)[..., j, k, None] * wide(streams)[..., j, :] for j in range(4)) for k in range(4)]
    want = np.stack(want, -2) + wide(post)[..., None] * wide(f)[..., None, :]
    got = call("hc_post", streams, f, post, comb)
    assert got.dtype == dtype
    assert_close(got, want, kind_of(dtype, "fp32"))
    only = np.zeros_like(comb)
    only[..., 0, 1] = 1  # comb[j, k] carries stream j into stream k
    moved = call("hc_post", streams, np.zeros_like(f), np.zeros_like(post), only)
    assert_bits(moved[..., 1, :], streams[..., 0, :])
    assert not moved[..., [0, 2, 3], :].astype(F32).any()


@pytest.mark.parametrize("d, dtype", SIZES)
def test_hc_head(call, d, dtype):
    streams, fn, base, scale = hc_inputs(d, dtype, 4)
    pre = sigmoid(mix64(streams, fn) * wide(scale) + wide(base)) + 1e-6
    want = np.einsum("btm,btmd->btd", pre, wide(streams))
    assert_close(call("hc_head", streams, fn, base, scale, eps=1e-6, norm_eps=1e-6), want, kind_of(dtype))


# --- compressor, indexer, attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, w", [(8, 512), (8, 128), (128, 512)])
def test_compress_pool(call, rows, w):
    """Rows at -inf count for nothing, whatever they hold: the first entry has no previous block."""
    kv, score = normal(1, 3, rows, w), normal(2, 3, rows, w, scale=20)
    score[1, : rows // 2] = score[2, :-1] = -np.inf
    p = np.exp(wide(score) - wide(score).max(-2, keepdims=True))
    got = call("compress_pool", kv, score)
    assert_close(got, (p * wide(kv)).sum(-2) / p.sum(-2), "sum")
    assert_bits(got[2], kv[2, -1])


@pytest.mark.parametrize("form", ["bf16", "fp32", "mxfp4"])
def test_index_scores(call, form):
    q, keys, weights = normal(1, 2, 3, 64, 128, dtype=BF16), normal(2, 2, 33, 128), normal(3, 2, 3, 64)
    if form == "mxfp4":
        q = jax.jit(lambda q: ops.dequantize(ops.quantize_mxfp4(q)).astype(BF16))(q)
        keys = jax.jit(ops.quantize_mxfp4)(keys)
    else:
        keys = keys.astype(BF16 if form == "bf16" else F32)
    dots = np.einsum("bthk,bck->bthc", wide(q), values(keys))
    got = call("index_scores", q, keys, weights)
    assert got.dtype == jnp.float32
    assert_close(got, np.einsum("bthc,bth->btc", np.maximum(dots, 0), wide(weights)), "sum")


@pytest.mark.parametrize("count", [1, 6, 64, 100])
def test_top_entries(call, count):
    """Ties (also of +0 and -0) go to the lower index; -inf is a score; ascending; -1 fills what is not visible."""
    rng = np.random.default_rng(count)
    scores = rng.choice(np.array([-np.inf, -2, -1, -0.0, 0.0, 1, 2, 3.5], F32), (2, 5, 64))
    scores[1, 4] = rng.standard_normal(64)
    visible = np.array([[0, 1, 5, 63, 64], [64, 7, 0, 64, 1000]], np.int32)
    want = np.full((2, 5, min(count, 64)), -1)
    for at in np.ndindex(2, 5):
        best = sorted(range(min(visible[at], 64)), key=lambda i: (-scores[at][i], i))[:count]
        want[at][: len(best)] = sorted(best)
    got = call("top_entries", scores, visible, count=count)
    assert got.dtype == jnp.int32
    assert_close(got, want, "exact")


def attention64(q, keys, mask, sink, picked, picked_mask):
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = wide(keys)[b][mask[b, t]]
        if picked is not None:
            seen = np.concatenate([seen, wide(picked)[b, t][picked_mask[b, t]]])
        if len(seen) and sink[h] != np.inf:
            scores = seen @ wide(q)[b, t, h] * q.shape[-1] ** -0.5
            top = max(scores.max(), float(sink[h]))
            p = np.exp(scores - top)
            out[b, t, h] = p @ seen / (p.sum() + np.exp(float(sink[h]) - top))
    return out


@pytest.mark.parametrize("with_picked", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("k, sharpness", [(512, 1), (64, 40)])
def test_attention(call, with_picked, dtype, k, sharpness):
    """Sinks at both infinities, tokens that see one entry or none, scores far beyond the range of exp."""
    q, keys = normal(1, 2, 4, 5, k, dtype=dtype, scale=sharpness), normal(2, 2, 40, k, dtype=dtype)
    sink = np.array([np.inf, -np.inf, 0.5, -3, 60], F32)
    rng = np.random.default_rng(3)
    mask = rng.random((2, 4, 40)) < 0.5
    mask[0, 1] = mask[0, 2] = mask[1, 3] = False
    mask[1, 3, 17] = True
    picked, picked_mask = None, None
    if with_picked:
        picked, picked_mask = normal(4, 2, 4, 7, k, dtype=dtype), rng.random((2, 4, 7)) < 0.5
        picked_mask[0, 1] = False
    got = call("attention", q, keys, mask, sink, picked, picked_mask)
    want = attention64(q, keys, mask, sink, picked, picked_mask)
    assert got.dtype == dtype
    assert not got[0, 1].astype(F32).any(), "a token that sees nothing yields zeros"
    assert not got[:, :, 0].astype(F32).any(), "a sink at +inf takes everything"
    assert_close(got, want, "two bf16" if dtype == BF16 else "sharp" if sharpness > 1 else "sum")


# --- mixture of experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", HIDDEN)
def test_router_scores(call, d):
    x, gate = normal(1, 3, d, dtype=BF16), normal(2, 32, d, dtype=BF16, scale=d**-0.5)
    assert_close(call("router_scores", x, gate), np.sqrt(np.log1p(np.exp(wide(x) @ wide(gate).T))), "sum")
    huge = call("router_scores", np.ones((1, d), F32), np.outer([300 / d, -300 / d], np.ones(d)).astype(F32))
    assert_close(huge, [[np.sqrt(300), 0]], "sum")


def test_route(call):
    scores, bias = np.abs(normal(1, 5, 16)) + F32(0.1), np.zeros(16, F32)
    bias[[3, 7, 11]] = 100, 50, -100
    ids, weights = call("route", scores, bias, None, count=4, scale=2.5)
    order = np.argsort(-(wide(scores) + wide(bias)), axis=-1)[:, :4]
    assert_close(ids, order, "exact")
    assert ids[:, :2].tolist() == [[3, 7]] * 5, "the bias picks"
    picked = np.take_along_axis(wide(scores), order, -1)
    assert_close(weights, picked / picked.sum(-1, keepdims=True) * 2.5, "fp32")  # and never enters a weight
    tied, even = call("route", np.ones((2, 16), F32), np.zeros(16, F32), None, count=4, scale=1.0)
    assert tied.tolist() == [[0, 1, 2, 3]] * 2 and (even == 0.25).all()
    fixed = np.random.default_rng(2).permuted(np.tile(np.arange(16, dtype=np.int32), (5, 1)), axis=1)[:, :4]
    ids, weights = call("route", scores, None, fixed, count=4, scale=1.5)
    picked = np.take_along_axis(wide(scores), fixed, -1)
    assert_close(ids, fixed, "exact")
    assert_close(weights, picked / picked.sum(-1, keepdims=True) * 1.5, "fp32")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu(call, dtype, weighted):
    """gate is limited from above only, up on both sides; inputs are rounded to dtype before."""
    gate, up = normal(1, 7, 3, 256, scale=8), normal(2, 7, 3, 256, scale=8)
    gate[0, 0, :3], up[0, 0, :3] = [-80, 80, 10], [-80, 80, -10]
    weight = np.abs(normal(3, 7, 3, 1)) if weighted else None
    g, u = np.minimum(wide(gate.astype(dtype)), 10), np.clip(wide(up.astype(dtype)), -10, 10)
    want = g * sigmoid(g) * u * (wide(weight) if weighted else 1)
    got = call("swiglu", gate, up, weight, limit=10.0, dtype=dtype)
    assert got.dtype == dtype
    assert_close(got, want, kind_of(dtype, "fp32"))


# --- refusals ----------------------------------------------------------------------------------------------------

one = jnp.ones
HC = dict(iterations=2, eps=1e-6, norm_eps=1e-6)
MX, NV = ops.MXFP4Tensor(one((4, 16)), one((4, 1))), ops.NVFP4Tensor(one((4, 16)), one((4, 2)), one(()))
A8 = ops.FP8Activation(one((4, 32)), one((4, 1)))
REFUSED = {
    "contraction": (ValueError, r"linear contracts the last axes of x \(2, 16\)", lambda: ops.linear(one((2, 16)), one((4, 32)))),
    "weight rank": (ValueError, r"rank-2 weight, got weight \(1, 4, 32\)", lambda: ops.linear(one((2, 32)), one((1, 4, 32)))),
    "plain x nvfp4": (TypeError, "takes NVFP4Tensor or Unquantized; quantize the input first", lambda: ops.linear(one((2, 32)), NV)),
    "nvfp4 x mxfp4": (TypeError, "type NVFP4Tensor for a weight of type MXFP4Tensor", lambda: ops.linear(NV, MX)),
    "fp8 x plain": (TypeError, "type FP8Activation for a weight", lambda: ops.linear(A8, one((4, 32)))),
    "activation as weight": (TypeError, "FP8Activation; it is not a weight format", lambda: ops.linear(A8, A8)),
    "groups": (ValueError, "got 3 groups of input for 2", lambda: ops.grouped_linear(one((3, 32)), one((2, 4, 32)))),
    "slots": (ValueError, r"x must be \[T, 1 or X, K\]", lambda: ops.gathered_linear(one((2, 2, 32)), one((5, 4, 32)), one((2, 3), int))),
    "norm weight": (ValueError, "one weight per channel", lambda: ops.rms_norm(one((2, 32)), one(16), 1e-6)),
    "rope width": (ValueError, "they need R/2 <= K/2", lambda: ops.rope(one((2, 32)), one((2, 17)), one((2, 17)))),
    "rope sin": (ValueError, "rope of x", lambda: ops.rope(one((2, 32)), one((2, 8)), one((2, 4)))),
    "hadamard": (ValueError, "power of two, got 96", lambda: ops.hadamard(one((2, 96)))),
    "hc_pre": (ValueError, "hc_pre with 4 streams of 8 needs fn", lambda: ops.hc_pre(one((4, 8)), one((24, 16)), one(24), one(3), **HC)),
    "hc_pre scale": (ValueError, "needs fn .*scale", lambda: ops.hc_pre(one((4, 8)), one((24, 32)), one(24), one(1), **HC)),
    "hc_post": (ValueError, r"needs f of shape \(2, 8\)", lambda: ops.hc_post(one((2, 4, 8)), one((2, 4)), one((2, 4)), one((2, 4, 4)))),
    "compress": (ValueError, "needs a score per value", lambda: ops.compress_pool(one((8, 4)), one((8, 5)))),
    "index": (ValueError, "index_scores got q", lambda: ops.index_scores(one((1, 2, 3, 8)), one((1, 5, 8)), one((1, 2, 4)))),
    "visible": (ValueError, "but visible", lambda: ops.top_entries(one((1, 2, 8)), one((1, 3), int), 2)),
    "mask": (ValueError, "attention got q", lambda: ops.attention(one((1, 2, 3, 8)), one((1, 5, 8)), one((1, 2, 4), bool), one(3))),
    "sink": (ValueError, "attention got q", lambda: ops.attention(one((1, 2, 3, 8)), one((1, 5, 8)), one((1, 2, 5), bool), one(2))),
    "router": (ValueError, "their last axes must agree", lambda: ops.router_scores(one((2, 8)), one((4, 9)))),
    "no routing": (ValueError, "not both or none", lambda: ops.route(one((2, 8)), None, None, 2, 1.0)),
    "two routings": (ValueError, "not both or none", lambda: ops.route(one((2, 8)), one(8), one((2, 2), int), 2, 1.0)),
    "swiglu": (ValueError, "gate and up of one shape", lambda: ops.swiglu(one((2, 8)), one((2, 9)), None, 10.0, F32)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_inputs_are_refused_in_a_sentence(case):
    error, sentence, attempt = REFUSED[case]
    with pytest.raises(error, match=sentence):
        attempt()
