"""One block: mHC around attention, mHC around the experts (facts section 2)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Sequence

import jax

import ffi_kernels as ops
from dsv4_jax.attention import attention
from dsv4_jax.cache import Chunk, LayerCache
from dsv4_jax.layers import input_format
from dsv4_jax.moe import moe
from dsv4_jax.sharding import Context


@functools.partial(jax.tree_util.register_dataclass, data_fields=["streams", "sublayer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Residual:
    """What blocks hand on: streams [B, T, M, D], and (output [B, T, D], post, comb) of the last sublayer, which the next block adds
    to them in the launch that reads them anyway (`hc_post_pre_norm`); None before the first block."""

    streams: jax.Array
    sublayer: tuple[jax.Array, jax.Array, jax.Array] | None = None

    def settled(self) -> jax.Array:
        """The streams with the last sublayer's output in them: X of the paper."""
        return self.streams if self.sublayer is None else ops.hc_post(self.streams, *self.sublayer)


TOGETHER = 8  # blocks whose launches are one custom call on native backends: between two calls every multiprocessor falls idle


def blocks(
    ctx: Context, names: Sequence[str], weights: Sequence[dict], layers: Sequence[LayerCache], residual: Residual, tokens, chunk: Chunk,
    ratios: Sequence[int],
):  # fmt: skip
    """Consecutive blocks: residual of streams [B, T, M, D], tokens int32 [B, T] -> (residual, caches, Pendings).

    Runs of blocks of the same kinds and shapes are traced once, unless `ctx.record` asks for what is inside.
    """
    backend, caches, pending = ops.current(), [], []
    together = TOGETHER if backend != "xla" and ctx.record is None else 1
    for first in range(0, len(names), together):
        run = slice(first, first + together)
        arguments = tuple(weights[run]), tuple(layers[run]), residual, tokens, chunk, tuple(ratios[run])
        residual, new, rows = _traced_once(ctx, *arguments, backend) if ctx.record is None else _recorded(ctx, names[first], *arguments)
        caches += new
        pending += rows
    return residual, tuple(caches), tuple(pending)


def block(ctx: Context, name: str, w: dict, cache: LayerCache, residual: Residual, tokens, chunk: Chunk, ratio: int):
    """One of them -> (residual, cache, Pending)."""
    residual, (cache,), (pending,) = blocks(ctx, [name], [w], [cache], residual, tokens, chunk, [ratio])
    return residual, cache, pending


def _recorded(ctx: Context, name: str, *arguments):
    """`_run` of one block, whose values `ctx.record` keeps under its name."""
    inner = Context(ctx.config, ctx.recipe, ctx.mesh, ctx.expert_sharding, {})
    result = _run(inner, *arguments)
    ctx.record.update({f"{name}.{site}": value for site, value in inner.record.items()})
    return result


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _traced_once(ctx: Context, weights, layers, residual, tokens, chunk, ratios, backend):
    with ops.backend(backend):
        return ops.chained(lambda *arrays: _run(ctx, *arrays, ratios))(weights, layers, residual, tokens, chunk)


def _run(ctx: Context, weights, layers, residual, tokens, chunk, ratios):
    caches, pending = [], []
    for w, cache, ratio in zip(weights, layers, ratios, strict=True):
        residual, cache, rows = _block(ctx, w, cache, residual, tokens, chunk, ratio)
        caches.append(cache)
        pending.append(rows)
    return residual, caches, pending


def _block(ctx: Context, w: dict, cache: LayerCache, residual: Residual, tokens, chunk: Chunk, ratio: int):
    with jax.named_scope("attention"):
        streams, x, quantized, post, comb = _enter(ctx, residual, w["hc_attn"], w["attn_norm"], input_format(w["attn"]["wq_a"]))
        ctx.save("streams", streams)
        ctx.save("attn_in", x)
        x, cache, pending = attention(ctx, w["attn"], cache, x, quantized, chunk, ratio)
        ctx.save("attn", x)
    with jax.named_scope("experts"):
        streams, x, _, post, comb = _enter(ctx, Residual(streams, (x, post, comb)), w["hc_ffn"], w["ffn_norm"], None)
        ctx.save("ffn_in", x)
        x = moe(ctx, w["ffn"], x, tokens)
        ctx.save("ffn", x)
    return Residual(streams, (x, post, comb)), cache, pending


def _enter(ctx: Context, residual: Residual, hc: dict, norm_weight, quantize: str | None):
    """(streams, a sublayer's input [B, T, D], that quantized or None, post, comb) of a residual."""
    c = ctx.config
    static = {"iterations": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.rms_norm_eps, "quantize": quantize}
    mix = (hc["fn"], hc["base"], hc["scale"], norm_weight)
    if residual.sublayer is None:
        return residual.streams, *ops.hc_pre_norm(residual.streams, *mix, **static)
    return ops.hc_post_pre_norm(residual.streams, *residual.sublayer, *mix, **static)
