"""The indexer of CSA layers: which compressed entries a token attends to (paper section 2.3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import Chunk, CompressorState, append
from dsv4_jax.compressor import compress
from dsv4_jax.config import CSA
from dsv4_jax.layers import linear
from dsv4_jax.sharding import Context


def select(ctx: Context, w: dict, keys, state: CompressorState, x: jax.Array, qr: jax.Array, chunk: Chunk, angles):
    """x [B, T, D], qr [B, T, q_lora] -> (entries int32 [B, T, X], -1 for none; keys; pending rows).

    Appends the index keys of the blocks that close here, scores every visible key, keeps the best index_topk.
    """
    c = ctx.config
    # A selection has no gradient; in training the scores are fitted to the attention, not the trunk to the scores.
    x, qr = jax.lax.stop_gradient(x), jax.lax.stop_gradient(qr)
    q = linear(ctx, qr, w["wq_b"]).reshape(*qr.shape[:2], c.index_n_heads, c.index_head_dim)
    q = ops.rope(q, *(a[:, :, None] for a in angles))
    fresh, index, closed, pending = compress(ctx, w["compressor"], state, x, chunk, CSA)
    if ctx.recipe.index == "fp4":
        q = ops.dequantize(ops.quantize_mxfp4(ops.hadamard(q))).astype(q.dtype)
        fresh = ops.quantize_mxfp4(ops.hadamard(fresh))
    keys = append(keys, fresh, index, closed)
    head_weights = linear(ctx, x, w["weights_proj"]).astype(jnp.float32)
    head_weights = head_weights * (c.index_head_dim**-0.5 * c.index_n_heads**-0.5)
    scores = ops.index_scores(q, keys, head_weights)
    visible = jnp.where(chunk.valid, (chunk.positions + 1) // CSA, 0)
    ctx.save("index_scores", scores)
    return ops.top_entries(scores, visible, c.index_topk), keys, pending
