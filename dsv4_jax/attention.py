"""Attention of one block: window, plus compressed entries chosen by the indexer (CSA) or all of them (HCA).

Follows facts section 2, "Attention". Heads and o-groups are split over `tensor`; the single KV head is not.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import Chunk, LayerCache, Pending, append, ring_positions
from dsv4_jax.compressor import compress
from dsv4_jax.config import HCA
from dsv4_jax.indexer import select
from dsv4_jax.layers import grouped_linear, linear, norm, rope_angles
from dsv4_jax.sharding import Context

# A prompt chunk reads all compressed entries under a mask, rather than gathering each token's own, up to this many
# times index_topk of them: one shared read is cheaper than T gathers until the cache is much longer than a selection.
_DENSE_FACTOR = 4


def attention(ctx: Context, w: dict, cache: LayerCache, x: jax.Array, chunk: Chunk, ratio: int):
    """x [B, T, D] -> (output [B, T, D], cache with the new compressed entries, Pending rows)."""
    c, batch, tokens = ctx.config, x.shape[0], x.shape[1]
    cos, sin = rope_angles(ctx, ratio, chunk.positions)
    per_head = cos[:, :, None], sin[:, :, None]

    qr, kv = linear(ctx, x, w["wq_a"], w["wkv"])
    qr = norm(ctx, qr, w["q_norm"])
    q = linear(ctx, qr, w["wq_b"]).reshape(batch, tokens, -1, c.head_dim)
    q = ops.rope(norm(ctx, q, None), *per_head)
    kv = _store(ctx, ops.rope(norm(ctx, kv, w["kv_norm"]), cos, sin))

    cache, picked, pending = _compressed(ctx, w, cache, x, qr, chunk, ratio, (cos, sin))
    pending = dataclasses.replace(pending, window=kv)
    shared, own = _visible_entries(ctx, cache, kv, picked, chunk, ratio)
    ctx.save("q", q)
    o = ops.attention(q, *shared, w["attn_sink"], *own)
    o = ops.rope(o, per_head[0], -per_head[1])

    groups = c.o_groups // ctx.tensor_size
    o = grouped_linear(ctx, o.reshape(batch, tokens, groups, -1), w["wo_a"])
    return linear(ctx, o.reshape(batch, tokens, -1), w["wo_b"], split=True), cache, pending


def _store(ctx: Context, kv: jax.Array):
    """Entries in the format of the cache."""
    return kv if ctx.recipe.kv == "plain" else ops.encode_kv(kv, ctx.config.qk_rope_head_dim)


def _compressed(ctx, w, cache: LayerCache, x, qr, chunk: Chunk, ratio: int, angles):
    """Append what this chunk closes. Returns (cache, picked int32 [B, T, X] or None for all, Pending)."""
    if not ratio:
        return cache, None, Pending(None)
    fresh, index, closed, rows = compress(ctx, w["compressor"], cache.compressor, x, chunk, ratio)
    cache = dataclasses.replace(cache, compressed=append(cache.compressed, _store(ctx, fresh), index, closed))
    ctx.save("compressed", cache.compressed)
    if ratio == HCA:
        return cache, None, Pending(None, rows)
    picked, keys, index_rows = select(ctx, w["indexer"], cache.index, cache.index_compressor, x, qr, chunk, angles)
    ctx.save("topk", picked)
    return dataclasses.replace(cache, index=keys), picked, Pending(None, rows, index_rows)


def _visible_entries(ctx: Context, cache: LayerCache, kv, picked, chunk: Chunk, ratio: int):
    """What the tokens attend to: ((keys [B, S, K], mask [B, T, S]) shared, (keys [B, T, X, K], mask [B, T, X]) own).

    Own are the window in a decode step, and the picked entries unless a prompt chunk masks all of them.
    """
    rope = ctx.config.qk_rope_head_dim
    shared, own = [], [_window_of_each(ctx, cache, kv, chunk)] if chunk.is_decode else []
    if not chunk.is_decode:
        shared.append(_window_of_all(ctx, cache, kv, chunk))
    if ratio:
        entries = jax.tree.leaves(cache.compressed)[0].shape[1]
        few = not chunk.is_decode and entries <= _DENSE_FACTOR * ctx.config.index_topk
        if picked is None or few:
            shared.append((ops.kv_values(cache.compressed, rope), _closed_or_picked(chunk, ratio, entries, picked)))
        else:
            rows = jnp.arange(picked.shape[0])[:, None, None]
            at = jnp.maximum(picked, 0)
            own.append((ops.kv_values(jax.tree.map(lambda e: e[rows, at], cache.compressed), rope), picked >= 0))
    batch, tokens = chunk.positions.shape
    nothing = jnp.zeros((batch, 0, ctx.config.head_dim), ctx.recipe.activation_dtype), jnp.zeros((batch, tokens, 0), bool)
    both = [nothing if not part else part[0] if len(part) == 1 else _join(part) for part in (shared, own)]
    return both[0], both[1] if own else (None, None)


def _join(parts):
    return jnp.concatenate([k for k, _ in parts], axis=-2), jnp.concatenate([m for _, m in parts], axis=-1)


def _window_of_all(ctx: Context, cache: LayerCache, kv, chunk: Chunk):
    """Keys [B, W + T, K] of the ring and of the chunk itself, and who sees what: bool [B, T, W + T]."""
    size = ctx.config.sliding_window
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), cache.window, kv)
    old = ring_positions(size, chunk.start)
    held = jnp.concatenate([old, chunk.positions], axis=1)[:, None]
    present = jnp.concatenate([old >= 0, chunk.valid], axis=1)[:, None]
    at = chunk.positions[..., None]
    return ops.kv_values(both, ctx.config.qk_rope_head_dim), present & (held <= at) & (held > at - size)


def _window_of_each(ctx: Context, cache: LayerCache, kv, chunk: Chunk):
    """Keys [B, T, W, K]: the ring as it stands when each token of the chunk has been written, and what is in it."""
    size = ctx.config.sliding_window
    held = jax.vmap(lambda end: ring_positions(size, end), in_axes=1, out_axes=1)(chunk.positions + 1)  # [B, T, W]
    start = chunk.start[:, None, None]
    rows, slots = jnp.arange(held.shape[0])[:, None, None], jnp.arange(size)
    fresh = jnp.clip(held - start, 0, chunk.positions.shape[1] - 1)

    def pick(old, new):
        return jnp.where((held >= start)[..., None], new.astype(old.dtype)[rows, fresh], old[:, None, slots])

    return ops.kv_values(jax.tree.map(pick, cache.window, kv), ctx.config.qk_rope_head_dim), held >= 0


def _closed_or_picked(chunk: Chunk, ratio: int, entries: int, picked) -> jax.Array:
    """bool [B, T, entries]: the picked entries, or all whose block has closed."""
    if picked is None:
        return jnp.arange(entries) < jnp.where(chunk.valid, (chunk.positions + 1) // ratio, 0)[..., None]
    rows, columns = jnp.arange(picked.shape[0])[:, None, None], jnp.arange(picked.shape[1])[None, :, None]
    mask = jnp.zeros((*picked.shape[:2], entries), bool)
    return mask.at[rows, columns, jnp.where(picked < 0, entries, picked)].set(True, mode="drop")
