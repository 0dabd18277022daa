"""One block: mHC around attention, mHC around the experts (facts section 2)."""

from __future__ import annotations

import functools

import jax

import ffi_kernels as ops
from dsv4_jax.attention import attention
from dsv4_jax.cache import Chunk, LayerCache
from dsv4_jax.layers import input_format
from dsv4_jax.moe import moe
from dsv4_jax.sharding import Context


def block(ctx: Context, name: str, w: dict, cache: LayerCache, streams, tokens, chunk: Chunk, ratio: int):
    """streams [B, T, M, D], tokens int32 [B, T] -> (streams, cache, Pending).

    Blocks of one kind and shape are traced once, unless `ctx.record` asks for what is inside.
    """
    if ctx.record is None:
        return _traced_once(ctx, w, cache, streams, tokens, chunk, ratio, ops.current())
    inner = Context(ctx.config, ctx.recipe, ctx.mesh, ctx.expert_sharding, {})
    result = _block(inner, w, cache, streams, tokens, chunk, ratio)
    ctx.record.update({f"{name}.{site}": value for site, value in inner.record.items()})
    return result


def _block(ctx: Context, w: dict, cache: LayerCache, streams, tokens, chunk: Chunk, ratio: int):
    ctx.save("streams", streams)
    norm = _hyper_connection(ctx)
    with jax.named_scope("attention"):
        hc, quantize = w["hc_attn"], input_format(w["attn"]["wq_a"])
        x, quantized, post, comb = ops.hc_pre_norm(
            streams, hc["fn"], hc["base"], hc["scale"], w["attn_norm"], quantize=quantize, **norm
        )
        ctx.save("attn_in", x)
        x, cache, pending = attention(ctx, w["attn"], cache, x, quantized, chunk, ratio)
        ctx.save("attn", x)
    with jax.named_scope("experts"):
        hc = w["hc_ffn"]
        streams, x, _, post, comb = ops.hc_post_pre_norm(
            streams, x, post, comb, hc["fn"], hc["base"], hc["scale"], w["ffn_norm"], quantize=None, **norm
        )
        ctx.save("ffn_in", x)
        x = moe(ctx, w["ffn"], x, tokens)
        ctx.save("ffn", x)
        streams = ops.hc_post(streams, x, post, comb)
    return streams, cache, pending


def _hyper_connection(ctx: Context) -> dict:
    c = ctx.config
    return {"iterations": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.rms_norm_eps}


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _traced_once(ctx: Context, w, cache, streams, tokens, chunk, ratio, backend):
    with ops.backend(backend):
        return _block(ctx, w, cache, streams, tokens, chunk, ratio)
