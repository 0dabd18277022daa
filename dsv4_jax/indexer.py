"""The indexer of CSA layers: which compressed entries a token attends to (paper section 2.3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import Chunk
from dsv4_jax.config import CSA
from dsv4_jax.sharding import Context


def picked_entries(ctx: Context, keys, q: jax.Array, head_weights: jax.Array, chunk: Chunk) -> jax.Array:
    """The entries a token attends to: int32 [B, T, X], -1 for none.

    keys: the index cache [B, C, K_I]; q [B, T, H_I, K_I] as `ops.queries` makes it; head_weights [B, T, H_I]. Scores
    every entry whose block has closed and keeps the best index_topk.
    """
    c = ctx.config
    visible = jnp.where(chunk.valid, (chunk.positions + 1) // CSA, 0)
    scores = ops.index_scores(q, keys, head_weights, visible, c.index_head_dim**-0.5 * c.index_n_heads**-0.5)
    ctx.save("index_scores", scores)
    picked = ops.top_entries(scores, visible, c.index_topk)
    ctx.save("topk", picked)
    return picked
