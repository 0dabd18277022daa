"""The compressor: blocks of 4 or 128 tokens become one entry each (paper section 2.3, facts section 2).

One function serves the key-value entries and, at its own width, the indexer's keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import Chunk, CompressorState
from dsv4_jax.config import CSA
from dsv4_jax.layers import norm, rope_angles
from dsv4_jax.sharding import Context


def compress(ctx: Context, w: dict, state: CompressorState, x: jax.Array, chunk: Chunk, ratio: int):
    """Emit the entries of the blocks that close in this chunk.

    x [B, T, D]. Returns (entries [B, n, width], index int32 [B, n], closed bool [B, n], pending rows), where n is the
    most blocks that T tokens can close; entries are normed and rotated, index is their place in the cache.
    """
    wide = x.astype(jnp.float32)
    tokens, rows = x.shape[1], state.kv.shape[1]
    kv = ops.linear(wide, w["wkv"].astype(jnp.float32))
    score = ops.linear(wide, w["wgate"].astype(jnp.float32)) + w["ape"][chunk.positions % ratio]
    pending = CompressorState(kv, score)

    blocks = (tokens - 1) // ratio + 1
    index = chunk.start[:, None] // ratio + jnp.arange(blocks, dtype=jnp.int32)
    span = 2 * ratio if ratio == CSA else ratio  # ratio 4 also pools the block before
    positions = (index + 1)[..., None] * ratio - span + jnp.arange(span, dtype=jnp.int32)  # [B, n, span]
    start = chunk.start[:, None, None]
    place = jnp.where(positions < start, positions % rows, jnp.minimum(rows + positions - start, rows + tokens - 1))

    def gather(old, new):
        both = jnp.concatenate([old, new], axis=1)
        picked = jnp.take_along_axis(both, place.reshape(place.shape[0], -1, 1), axis=1)
        picked = picked.reshape(*place.shape, -1)
        if ratio != CSA:
            return picked
        width = picked.shape[-1] // 2  # the block before contributes its first channels, this block its last
        return jnp.concatenate([picked[:, :, :ratio, :width], picked[:, :, ratio:, width:]], axis=2)

    scores = jnp.where(positions[..., None] >= 0, gather(state.score, score), -jnp.inf)
    pooled = ops.round_to(ops.compress_pool(gather(state.kv, kv), scores), ctx.recipe.activation_dtype)
    entries = ops.rope(norm(ctx, pooled, w["norm"]), *rope_angles(ctx, ratio, index * ratio))
    return entries, index, (index + 1) * ratio <= chunk.end[:, None], pending
