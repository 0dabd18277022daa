"""A small case for every kernel of ffi_kernels/native, as launches that the interpreter repeats (see sim_launches.py).

Shapes are small but awkward: more tiles than teams, ragged edges, every branch of a format. `CASES[name]()` gives the
launches of a case; a case belongs to one .cu file, the stem of which begins its name.
"""

import contextlib
import importlib
import unittest.mock

import jax
import jax.numpy as jnp
import matmul_operands
import ml_dtypes
import numpy as np
from sim_launches import Launch, record

import ffi_kernels as ops
from expert_weights import random_weight
from ffi_kernels.compressor import Compression, attention_inputs_and_compress, compress_append
from ffi_kernels.decode_attention import Mapping
from ffi_kernels.entries import attention_inputs, commit_rows, queries

BF16, F32, EPS, ROPE = ml_dtypes.bfloat16, np.float32, 1e-6, 64
CASES = {}
RNG = np.random.default_rng(11)


def case(name):
    def add(make):
        def launches() -> list[Launch]:
            global RNG
            RNG = np.random.default_rng([len(name), *name.encode()])  # the same inputs whatever ran before
            made = make()
            assert {launch.module for launch in made} == {name.split()[0]}, name
            return made

        CASES[name] = launches
        return make

    return add


def normal(*shape, dtype=BF16, spread=2):
    """Blocks of 16 of different sizes, so that a wrong row or scale shows."""
    sizes = np.exp2(RNG.integers(-spread, spread + 1, (*shape[:-1], -(-shape[-1] // 16)))).repeat(16, -1)[..., : shape[-1]]
    return jnp.asarray((RNG.standard_normal(shape) * sizes).astype(dtype))


def angles(*leading, rope=ROPE):
    angle = RNG.uniform(-3, 3, (*leading, rope // 2))
    return np.cos(angle).astype(F32), np.sin(angle).astype(F32)


def on_xla(function, *arguments):
    with ops.backend("xla"):
        return jax.jit(function)(*arguments)


@contextlib.contextmanager
def changed(module, **values):
    """Module `module` of ffi_kernels with other values of its constants or functions."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(unittest.mock.patch.object(importlib.import_module(f"ffi_kernels.{module}"), name, value))
        yield


# --- linear, experts -------------------------------------------------------------------------------------------------

INPUT_OF = {"bf16": lambda x: x, "fp8": ops.quantize_fp8, "mxfp4": ops.quantize_fp8, "nvfp4": ops.quantize_nvfp4_rows}
# name: format of the weight, how the input is given, R, N, K
LINEAR = {
    "bf16": ("bf16", "given", 2, 48, 384), "fp8": ("fp8", "raw", 2, 48, 1024), "fp8 given": ("fp8", "given", 3, 32, 512), "mxfp4": ("mxfp4", "raw", 2, 48, 1024),
    "nvfp4": ("nvfp4", "raw", 2, 48, 1024), "nvfp4 given": ("nvfp4", "given", 2, 80, 1024), "fp8 plain": ("fp8", "plain", 2, 32, 512),
    "ragged bf16": ("bf16", "given", 3, 19, 72), "ragged fp8": ("fp8", "raw", 3, 40, 304), "ragged mxfp4": ("mxfp4", "raw", 2, 40, 128),
    "ragged nvfp4": ("nvfp4", "raw", 9, 40, 320), "ragged mxfp4 plain": ("mxfp4", "plain", 2, 19, 256), "ragged nvfp4 given": ("nvfp4", "given", 2, 19, 64),
}  # fmt: skip


def given(how, kind, x):
    return x if how == "plain" else ops.Unquantized(x) if how == "raw" else on_xla(INPUT_OF[kind], x)


def one_linear(kind, how, rows, n, k, **patched):
    with changed("linear", **patched):
        return record(ops.linear, given(how, kind, normal(rows, k)), random_weight(kind, n, k))


for _name, _how in LINEAR.items():
    case(f"linear {_name}")(lambda how=_how: one_linear(*how))


# One CTA, so that its teams take many tiles in turn: a team of 16 warps for each tile, and a warp alone for each.
ONE_CTA = {"CTAS": {"sim": 1}}
for _kind in ("fp8", "mxfp4", "nvfp4"):
    case(f"linear {_kind} turns")(lambda kind=_kind: one_linear(kind, "raw", 1, 48, 8192 if kind != "fp8" else 4096, **ONE_CTA))
    case(f"linear {_kind} alone")(lambda kind=_kind: one_linear(kind, "raw", 1, 32, 2048, **ONE_CTA, MACHINE_WARPS=1))


def several(kinds, sizes, rows=2, k=512, **patched):
    x = normal(rows, k)
    xs = tuple(x if kind == "bf16" else ops.Unquantized(x) for kind in kinds)
    ws = tuple(random_weight(kind, n, k, seed=i) for i, (kind, n) in enumerate(zip(kinds, sizes, strict=True)))
    with changed("linear", **patched):
        return record(ops.linears, xs, ws, (jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32)[: len(ws)])


case("linear many fp8")(lambda: several(("fp8",) * 3, (96, 16, 48)))
case("linear many fp8 bf16")(lambda: several(("fp8", "bf16", "fp8"), (96, 16, 48)))
case("linear many nvfp4")(lambda: several(("nvfp4",) * 2, (96, 32)))
case("linear many")(lambda: several(("mxfp4", "bf16", "nvfp4", "fp8"), (80, 16, 48, 96)))
case("linear many turns")(lambda: several(("bf16", "nvfp4", "mxfp4", "fp8"), (64, 48, 80, 32), **ONE_CTA))
case("linear many ragged")(lambda: several(("bf16", "nvfp4", "mxfp4"), (40, 100, 24), 5, 256))


@case("linear grouped")
def _():
    return record(ops.grouped_linear, normal(3, 5, 128), random_weight("bf16", 5, 40, 128))


def experts(routed, shared, rows, slots, sizes, room=None):
    count, width, hidden, own = sizes
    part = lambda kind, leading, f: {"w1": random_weight(kind, *leading, f, hidden), "w3": random_weight(kind, *leading, f, hidden, seed=1), "w2": random_weight(kind, *leading, hidden, f, seed=2)}  # noqa: E731  # fmt: skip
    ids = np.stack([RNG.permutation(count)[:slots] for _ in range(rows)]).astype(np.int32)
    ids[: max(1, rows // 2), 0] = 1  # several tokens share an expert
    weights = RNG.uniform(0.1, 1.0, ids.shape).astype(F32)
    if rows > 2:
        weights[1, 1] = 0
    if slots > 3:
        weights[0, 1] = 0
    module = importlib.import_module("ffi_kernels.experts")
    most = module.MAX_SHARED_BYTES if room is None else module._fixed_bytes(2) + (module.GROUPS_BYTES + 47) // 16 * 16 + module.tile.column_space_bytes(hidden, room)
    with changed("experts", MAX_SHARED_BYTES=most):
        run = lambda *x: ops.experts(*x, limit=1.5, dtype=jnp.float32)  # noqa: E731
        return record(run, normal(rows, hidden, spread=1), part(routed, (count,), width), part(shared, (), own) if own else None, ids, weights)


EXPERTS = {
    "bf16": ("bf16", "bf16", 2, 2, (3, 256, 256, 128)), "official": ("mxfp4", "fp8", 2, 2, (3, 512, 512, 512)),
    "nvfp4": ("nvfp4", "nvfp4", 2, 2, (3, 512, 512, 512)), "ragged": ("nvfp4", "fp8", 3, 2, (6, 128, 256, 128)),
    "batches": ("nvfp4", "nvfp4", 11, 2, (6, 128, 256, 128), 3), "plain batches": ("bf16", "bf16", 11, 2, (6, 48, 128, 40), 3), "ragged bf16": ("bf16", "bf16", 2, 2, (3, 40, 72, 24)),
    "no shared": ("mxfp4", "mxfp4", 2, 3, (6, 128, 128, 0)), "many": ("bf16", "bf16", 12, 3, (6, 48, 128, 40)),
    "token official": ("mxfp4", "fp8", 1, 3, (5, 512, 512, 512)), "token nvfp4": ("nvfp4", "nvfp4", 1, 3, (5, 512, 512, 512)),
    "token zero": ("nvfp4", "nvfp4", 1, 4, (5, 512, 512, 256)),
    "token bf16": ("bf16", "bf16", 1, 3, (5, 256, 256, 128)), "token ragged": ("nvfp4", "nvfp4", 1, 3, (5, 64, 128, 64)), "token plain": ("bf16", "bf16", 1, 3, (5, 40, 72, 24)), "eight": ("bf16", "bf16", 2, 8, (9, 40, 72, 24)),
}  # fmt: skip
for _name, _how in EXPERTS.items():
    case(f"experts {_name}")(lambda how=_how: experts(*how))


# --- hyper-connections, norm, quantize ---------------------------------------------------------------------------------


def streams(rows, channels):
    comb = RNG.dirichlet(np.ones(4), (rows, 4)).astype(F32)
    return normal(rows, 4, channels), normal(rows, channels), RNG.uniform(0, 2, (rows, 4)).astype(F32), comb


def site(channels, mixes=24):
    fn = RNG.standard_normal((mixes, 4 * channels)).astype(F32) / F32(2 * channels**0.5)
    scale = (RNG.standard_normal(3 if mixes == 24 else 1) + 1).astype(F32)
    return fn, RNG.standard_normal(mixes).astype(F32), scale, (RNG.standard_normal(channels) * 0.3 + 1).astype(BF16)


STATIC = {"iterations": 3, "eps": 1e-6, "norm_eps": 1e-6}
# name: op, rows, channels, quantize
HYPER = {
    "1 1": ("hc_post_pre_norm", 1, 272, "nvfp4"), "1 4": ("hc_post_pre_norm", 6, 272, "fp8"), "pre 1 4": ("hc_pre_norm", 5, 128, None),
    "2 1": ("hc_post_pre_norm", 1, 2176, "fp8"), "2 4": ("hc_pre_norm", 5, 2176, "nvfp4"), "4 1": ("hc_pre_norm", 1, 4352, "nvfp4"), "4 4": ("hc_post_pre_norm", 5, 4352, None),
    "head 1": ("hc_head_norm", 3, 272, ""), "head 2": ("hc_head_norm", 2, 2176, ""), "head 4": ("hc_head_norm", 1, 4352, ""),
}  # fmt: skip


def hyper(op, rows, channels, quantize):
    x = streams(rows, channels)[: 4 if op == "hc_post_pre_norm" else 1]
    static = {k: v for k, v in STATIC.items() if k != "iterations"} if op == "hc_head_norm" else {**STATIC, "quantize": quantize}
    return record(lambda *a: getattr(ops, op)(*a, **static), *x, *site(channels, 4 if op == "hc_head_norm" else 24))


for _name, _how in HYPER.items():
    case(f"hyper_connections {_name}")(lambda how=_how: hyper(*how))


@case("hyper_connections post")
def _():
    x, f, *mixing = streams(3, 272)
    return sum((record(ops.hc_post, x.astype(t), f.astype(t), *mixing) for t in (jnp.bfloat16, jnp.float32)), [])


@case("norm rms")
def _():
    run = lambda x, w: ops.rms_norm(x, w, EPS)  # noqa: E731
    quantized = lambda x, w: [ops.rms_norm_quantize(x, w, EPS, q) for q in ("fp8", "nvfp4")]  # noqa: E731
    return [*record(quantized, normal(3, 528), normal(528)), *record(run, normal(2, 7, dtype=F32), None), *record(run, normal(2, 520, dtype=F32), normal(520, dtype=F32))]


@case("norm rope")
def _():
    found = []
    for dtype in (BF16, F32):
        for width, rope in ((96, 64), (70, 6)):
            cos, sin = angles(3, 1, rope=rope)
            found += record(ops.rope, normal(3, 5, width, dtype=dtype), cos, sin)
    return found


case("norm hadamard")(lambda: [*record(ops.hadamard, normal(3, 128)), *record(ops.hadamard, normal(2, 2048, dtype=F32))])


@case("quantize blocks")
def _():
    return sum((record(op, normal(5, width, dtype=t)) for op, width in ((ops.quantize_fp8, 200), (ops.quantize_mxfp4, 96)) for t in (BF16, F32)), [])


@case("quantize nvfp4")
def _():
    given = record(lambda x: ops.quantize_nvfp4_rows(x, jnp.full((4, 1), 7, jnp.float32)), normal(4, 96, dtype=F32))
    return [*record(ops.quantize_nvfp4_rows, normal(3, 272)), *given, *record(ops.quantize_nvfp4_rows, normal(2, 8208))]


@case("quantize values")
def _():
    made = [on_xla(f, normal(3, 160)) for f in (ops.quantize_fp8, ops.quantize_mxfp4, ops.quantize_nvfp4_rows)]
    return sum((record(ops.dequantize, t) for t in made), [])


@case("quantize swiglu")
def _():
    found = []
    for dtype in (BF16, F32):
        gate, up, weight = normal(3, 272, dtype=F32), normal(3, 272, dtype=F32), RNG.uniform(0.1, 1, (3, 1)).astype(F32)
        found += record(lambda *x, t=dtype: ops.swiglu_quantize(*x, 1.5, jnp.dtype(t), "nvfp4"), gate, up, weight)
        found += record(lambda *x, t=dtype: ops.swiglu_quantize(*x, None, 1.5, jnp.dtype(t), "fp8"), gate, up)
    return found


# --- cache entries, compressor -----------------------------------------------------------------------------------------


def latent(batch, tokens, q=192, width=128):
    return normal(batch, tokens, q), normal(batch, tokens, width), normal(q), normal(width), *angles(batch, tokens)


@case("entries inputs")
def _():
    run = lambda kv, quantize: lambda *x: attention_inputs(*x, eps=EPS, kv_format=kv, quantize=quantize)  # noqa: E731
    return [*record(run("fp8", "nvfp4"), *latent(2, 2)), *record(run("plain", "fp8"), *latent(1, 3, 201, 64)), *record(run("plain", None), *latent(1, 1, 1024, 512))]


@case("entries queries")
def _():
    heads = normal(2, 3, 5, 128), normal(2, 3, 3, 64), *angles(2, 3)
    return [*record(lambda *x: queries(*x, eps=EPS, fp4=True), *heads), *record(lambda *x: queries(*x, eps=EPS, fp4=False), *heads)]


@case("entries kv")
def _():
    found = sum((record(lambda x: ops.encode_kv(x, ROPE), normal(5, 192, dtype=t)) for t in (BF16, F32)), [])
    return found + record(lambda x: ops.kv_values(x, ROPE), on_xla(lambda x: ops.encode_kv(x, ROPE), normal(5, 320)))


@case("entries commit")
def _():
    start, length, found = np.int32([0, 126, 9, -1, 2**31 - 3]), np.int32([2, 4, 0, 3, 9]), []
    for count in (3, 11, 70):
        shapes = [((128, 36), np.uint8), ((8, 24), F32), ((5,), F32)] + [((3, 7), np.uint8)] * (count - 3)
        rings = [jnp.asarray(RNG.integers(0, 99, (5, *shape)), dtype) for shape, dtype in shapes]
        rows = [jnp.asarray(RNG.integers(100, 199, (5, 4, *shape[1:])), dtype) for shape, dtype in shapes]
        found += record(commit_rows, rings, rows, start, length)
    return found


def job(batch, tokens, ratio, width, kind):
    channels, rows = (2 * width, 8) if ratio == 4 else (width, 128)
    values = normal(batch, 4, width)
    entries = values if kind == "plain" else on_xla(ops.quantize_mxfp4, values) if kind == "fp4" else on_xla(lambda x: ops.encode_kv(x, ROPE), values)
    fp32 = [RNG.standard_normal(s).astype(F32) for s in ((batch, tokens, channels), (batch, tokens, channels), (ratio, channels), (batch, rows, channels), (batch, rows, channels))]
    return Compression(*fp32, normal(width), entries)


def compress(ratio, kinds, tokens, with_inputs):
    batch = 3
    place = np.int32([ratio - tokens, 2 * ratio - 1, 1]), np.full(batch, tokens, np.int32), *angles(batch, 1)
    jobs = [job(batch, tokens, ratio, 128, kind) for kind in kinds]
    if not with_inputs:
        return record(lambda j, *x: compress_append(j, *x, ratio=ratio, eps=EPS), jobs, *place)
    run = lambda a, j, *x: attention_inputs_and_compress(a, j, *x, ratio=ratio, eps=EPS, kv_format=kinds[0], quantize="fp8")  # noqa: E731
    return record(run, latent(batch, tokens), jobs, *place)


case("compressor 4")(lambda: compress(4, ("fp8", "fp4"), 2, True))
case("compressor 4 plain")(lambda: compress(4, ("plain",), 3, False))
case("compressor 128")(lambda: compress(128, ("fp8",), 2, True))
case("compressor 128 plain")(lambda: compress(128, ("plain",), 1, False))


# --- router, indexer, top entries, attention -----------------------------------------------------------------------------


@case("router learned")
def _():
    found = []
    for dtype, rows, experts_, hidden in ((BF16, 1, 40, 264), (BF16, 5, 40, 264), (F32, 1, 300, 128), (F32, 6, 40, 136)):
        args = normal(rows, hidden), normal(experts_, hidden, dtype=dtype) / 16, (RNG.permutation(experts_) * 0.05).astype(F32)
        found += record(lambda *x: ops.route_tokens(*x, None, None, count=6, scale=2.5), *args)
    return found


@case("router hash")
def _():
    table, tokens = RNG.integers(0, 40, (50, 6)).astype(np.int32), np.int32([-5, 7, 2**31 - 1])
    tables = ((table, tokens), (table[:3], None))
    return sum((record(lambda x, g, t=t: ops.route_tokens(x, g, None, *t, count=6, scale=1.5), normal(3, 264), normal(40, 264, dtype=d) / 16) for t, d in zip(tables, (BF16, F32), strict=True)), [])


def index_scores(form, batch, tokens, heads, entries, wide=False):
    spread = 2 if form == "bf16" else 0  # alike: integers times powers of two, as the kernel wants them
    q, keys, weights = normal(batch, tokens, heads, 128, spread=spread), normal(batch, entries, 128, spread=spread), RNG.standard_normal((batch, tokens, heads)).astype(F32)
    if form == "fp4":
        q = jnp.asarray(on_xla(lambda x: ops.dequantize(ops.quantize_mxfp4(x)), q), jnp.bfloat16)
        keys = on_xla(ops.quantize_mxfp4, keys)
        if wide:
            scale = np.where(np.arange(entries)[:, None] % 2, RNG.integers(90, 160, keys.scale.shape), RNG.integers(125, 129, keys.scale.shape))
            keys = ops.MXFP4Tensor(keys.data, jnp.asarray(scale, jnp.uint8))  # entries that are integers between those that are not
        q = q.at[0, 0, -1, 64:].multiply(2.0**-9) if wide else q  # a head that is no integers
    visible = RNG.integers(0, entries // 2, (batch, tokens)).astype(np.int32)
    visible[-1, -1] = entries + 5
    return record(ops.index_scores, q, keys, weights, visible)


def index_scores_of(backends, multiprocessors, *arguments):
    with changed("indexer", WGMMA=backends, _MULTIPROCESSORS_OTHERS=multiprocessors):
        return index_scores("fp4", *arguments)


case("indexer 16")(lambda: index_scores("fp4", 2, 2, 16, 70))
case("indexer 64")(lambda: index_scores_of((), 132, 1, 3, 64, 64))
case("indexer wide")(lambda: index_scores("fp4", 1, 2, 16, 40, True))
case("indexer_wgmma one")(lambda: index_scores_of(["sim"], 2, 2, 1, 20, 331))  # a CTA takes several tiles
case("indexer_wgmma many")(lambda: index_scores("fp4", 1, 3, 64, 70))
case("indexer_wgmma wide")(lambda: index_scores("fp4", 1, 2, 20, 40, True))
case("indexer_bf16 16")(lambda: index_scores("bf16", 2, 2, 16, 70))
case("indexer_bf16 64")(lambda: index_scores("bf16", 1, 2, 64, 40))


def top(dtype, entries, count):
    scores = RNG.choice(RNG.standard_normal(entries // 3), (2, 1, entries)).astype(dtype)  # ties
    scores[1, 0, -13:] = 99  # behind what is visible
    return record(lambda s, v: ops.top_entries(s, v, count), jnp.asarray(scores), np.int32([[entries], [entries - 13]]))


case("topk f32")(lambda: [*top(F32, 9001, 64), *top(F32, 61, 16)])
case("topk cluster")(lambda: top(F32, 16500, 300))  # more than a CTA holds
case("topk bf16")(lambda: [*top(BF16, 4100, 100), *top(BF16, 300, 300)])


def attention(kind, form, heads, channels, shape, tokens=2, window=21, entries=37, picks=50, parts=(1, 1)):
    starts, lengths = np.int32([0, window + 1, 128 * entries - 2]), np.int32([tokens, 1, tokens])
    batch, rope = 3, 64
    cache = lambda n: on_xla(lambda x: ops.encode_kv(x, rope), normal(batch, n, channels)) if form == "fp8" else normal(batch, n, channels)  # noqa: E731
    picked = RNG.integers(-2, entries + 3, (batch, tokens, picks)).astype(np.int32) if kind == "csa" else None
    args = (
        normal(batch, tokens, heads, channels), cache(window), cache(tokens), None if kind == "window" else cache(entries), picked,
        RNG.standard_normal(heads).astype(F32), starts, lengths, *angles(batch, tokens, rope=rope),
    )  # fmt: skip
    with changed("decode_attention", mapping_of=lambda *of: Mapping(*shape), parts_of=lambda keys: parts):
        return record(lambda *x: ops.decode_attention(*x, ratio={"window": 0, "csa": 4, "hca": 128}[kind], return_lse=True), *args)


case("attention fp8 csa")(lambda: attention("csa", "fp8", 8, 128, (16, 1, 1), window=16, entries=40, picks=24))
case("attention fp8 hca 32")(lambda: attention("hca", "fp8", 35, 256, (32, 2, 1)))
case("attention fp8 tiles")(lambda: attention("csa", "fp8", 19, 128, (16, 1, 1), tokens=1, window=40, entries=400, picks=380, parts=(1, 2)))
case("attention bf16 hca parts")(lambda: attention("hca", "bf16", 8, 128, (16, 1, 1), window=40, entries=63, parts=(3, 2)))
case("attention bf16 window")(lambda: attention("window", "bf16", 8, 128, (16, 1, 1)))
case("attention bf16 csa 32")(lambda: attention("csa", "bf16", 19, 256, (32, 1, 1), tokens=1))
case("attention fp8 teams")(lambda: attention("csa", "fp8", 19, 256, (16, 1, 4), tokens=1, window=80, entries=400, picks=500, parts=(1, 8)))
case("attention_64 tiles")(lambda: attention("csa", "fp8", 67, 512, (64, 1, 1), tokens=1, window=20, entries=400, picks=220, parts=(1, 2)))
case("attention_64 chain")(lambda: attention("csa", "fp8", 35, 512, (64, 1, 4, 2), window=20, entries=300, picks=190, parts=(1, 8)))
case("attention_64 clusters")(lambda: attention("csa", "fp8", 35, 512, (64, 1, 1, 2), tokens=1, window=20, entries=300, picks=190, parts=(3, 2)))
case("attention bf16 teams")(lambda: attention("hca", "bf16", 8, 256, (16, 1, 4), window=40, entries=150, parts=(1, 4)))


# name: M, N, K, dtype. With 4 CTAs, or 2 pairs, each takes several tiles, of which the last is ragged, and its ring turns over
MATMUL = {"one": (300, 648, 800, F32), "one bf16": (100, 72, 96, BF16), "pair": (512, 392, 320, BF16), "pair fp32": (200, 136, 1600, F32)}


def matmul(rows, columns, k, dtype):
    return record(lambda x, w: ops.nvfp4_matmul(x, w, dtype), *matmul_operands.operands(rows, columns, k, exact=True))


for _name, _how in MATMUL.items():
    case(f"matmul {_name}")(lambda how=_how: matmul(*how))


def all_launches(names=None) -> dict[str, list[Launch]]:
    """Records every case (or those named); a minute of CPU time in all."""
    found = {name: CASES[name]() for name in names or CASES}
    jax.clear_caches()
    return found
