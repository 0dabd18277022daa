"""One block: mHC around attention, mHC around the experts (facts section 2)."""

from __future__ import annotations

import dataclasses
import functools

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


def block(ctx: Context, name: str, w: dict, cache: LayerCache, residual: Residual, tokens, chunk: Chunk, ratio: int):
    """residual of streams [B, T, M, D], tokens int32 [B, T] -> (residual, cache, Pending).

    Blocks of one kind and shape are traced once, unless `ctx.record` asks for what is inside.
    """
    if ctx.record is None:
        return _traced_once(ctx, w, cache, residual, tokens, chunk, ratio, ops.current())
    inner = Context(ctx.config, ctx.recipe, ctx.mesh, ctx.expert_sharding, {})
    result = _block(inner, w, cache, residual, tokens, chunk, ratio)
    ctx.record.update({f"{name}.{site}": value for site, value in inner.record.items()})
    return result


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


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _traced_once(ctx: Context, w, cache, residual, tokens, chunk, ratio, backend):
    with ops.backend(backend):
        return ops.chained(lambda *arrays: _block(ctx, *arrays, ratio))(w, cache, residual, tokens, chunk)
