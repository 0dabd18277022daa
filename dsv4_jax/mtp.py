"""The multi-token-prediction block: from the residual of token p and token p + 1, predict token p + 2."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.block import Residual, block
from dsv4_jax.cache import Chunk, LayerCache
from dsv4_jax.layers import embed, head, kernels_for, linear, norm
from dsv4_jax.sharding import Context


def mtp(ctx: Context, weights: dict, cache: LayerCache, hidden: jax.Array, next_tokens: jax.Array, chunk: Chunk):
    """hidden [B, T, M, D] of the tokens at chunk.positions, next_tokens int32 [B, T] that follow them.

    X = e_proj enorm(embed(next token)) broadcast over the streams + h_proj hnorm(hidden), each stream normed.
    Returns (streams [B, T, M, D], cache, Pending); `mtp_logits` of the streams predicts the token after next.
    """
    w = weights["mtp"]
    with kernels_for(*next_tokens.shape):
        e = linear(ctx, norm(ctx, embed(ctx, weights["embed"], next_tokens), w["enorm"]), w["e_proj"])
        h = linear(ctx, norm(ctx, hidden, w["hnorm"]), w["h_proj"])
        x = ops.round_to(e[..., None, :].astype(jnp.float32) + h.astype(jnp.float32), ctx.recipe.activation_dtype)
        residual, cache, pending = block(ctx, "mtp", w, cache, Residual(x), next_tokens, chunk, 0)
        return residual.settled(), cache, pending


def mtp_logits(ctx: Context, weights: dict, streams: jax.Array) -> jax.Array:
    """Streams [..., M, D] of the MTP block -> logits fp32 [..., V], through the shared head."""
    w = weights["mtp"]
    return head(ctx, streams, w["hc_head"], w["norm"], weights["head"])
