"""One block: mHC around attention, mHC around the experts (facts section 2)."""

from __future__ import annotations

import functools

import jax

import ffi_kernels as ops
from dsv4_jax.attention import attention
from dsv4_jax.cache import Chunk, LayerCache
from dsv4_jax.layers import norm
from dsv4_jax.moe import moe
from dsv4_jax.sharding import Context


def block(ctx: Context, name: str, w: dict, cache: LayerCache, streams, tokens, chunk: Chunk, ratio: int):
    """streams [B, T, M, D], tokens int32 [B, T] -> (streams, cache, Pending).

    Blocks of one kind and shape are traced once, unless `ctx.record` asks for what is inside.
    """
    if ctx.record is None:
        return _traced_once(ctx, w, cache, streams, tokens, chunk, ratio)
    inner = Context(ctx.config, ctx.recipe, ctx.mesh, ctx.expert_sharding, {})
    result = _block(inner, w, cache, streams, tokens, chunk, ratio)
    ctx.record.update({f"{name}.{site}": value for site, value in inner.record.items()})
    return result


def _block(ctx: Context, w: dict, cache: LayerCache, streams, tokens, chunk: Chunk, ratio: int):
    ctx.save("streams", streams)
    with jax.named_scope("attention"):
        x, post, comb = _hc_pre(ctx, streams, w["hc_attn"])
        x = norm(ctx, x, w["attn_norm"])
        ctx.save("attn_in", x)
        x, cache, pending = attention(ctx, w["attn"], cache, x, chunk, ratio)
        ctx.save("attn", x)
        streams = ops.hc_post(streams, x, post, comb)
    with jax.named_scope("experts"):
        x, post, comb = _hc_pre(ctx, streams, w["hc_ffn"])
        x = norm(ctx, x, w["ffn_norm"])
        ctx.save("ffn_in", x)
        x = moe(ctx, w["ffn"], x, tokens)
        ctx.save("ffn", x)
        streams = ops.hc_post(streams, x, post, comb)
    return streams, cache, pending


def _hc_pre(ctx: Context, streams: jax.Array, hc: dict):
    c = ctx.config
    return ops.hc_pre(
        streams, hc["fn"], hc["base"], hc["scale"],
        iterations=c.hc_sinkhorn_iters, eps=c.hc_eps, norm_eps=c.rms_norm_eps,
    )  # fmt: skip


_traced_once = functools.partial(jax.jit, static_argnums=(0, 6))(_block)
