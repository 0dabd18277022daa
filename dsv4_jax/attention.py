"""Attention of one block: window, plus compressed entries chosen by the indexer (CSA) or all of them (HCA).

Follows facts section 2, "Attention". Heads and o-groups are split over `tensor`; the single KV head is not.
A decode step attends per token (`ops.decode_attention`); a prompt chunk shares keys between its tokens under masks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import Chunk, LayerCache, Pending, ring_positions
from dsv4_jax.compressor import compress
from dsv4_jax.config import CSA
from dsv4_jax.indexer import picked_entries
from dsv4_jax.layers import grouped_linear, input_format, linear, linears, rope_angles
from dsv4_jax.sharding import Context

# A prompt chunk reads all compressed entries under a mask, rather than gathering each token's own, up to this many
# times index_topk of them: one shared read is cheaper than T gathers until the cache is much longer than a selection.
_DENSE_FACTOR = 4


def attention(ctx: Context, w: dict, cache: LayerCache, x: jax.Array, quantized, chunk: Chunk, ratio: int):
    """x [B, T, D] (and the same in the format of wq_a's input, or None) -> (output [B, T, D], cache, Pending rows).

    The cache returned holds the new compressed entries and index keys.
    """
    c, (batch, tokens) = ctx.config, x.shape[:2]
    cos, sin = rope_angles(ctx, ratio, chunk.positions)
    qr, kv, for_compressors, head_weights = _projections(ctx, w, x, quantized, ratio)
    latent, static = (qr, kv, w["q_norm"], w["kv_norm"], cos, sin), {
        "eps": c.rms_norm_eps, "kv_format": ctx.recipe.kv, "quantize": input_format(w["wq_b"])
    }  # fmt: skip
    if ratio:
        (qr, qr_quantized, kv), cache, pending = compress(ctx, w, cache, latent, for_compressors, chunk, ratio, static)
    else:
        (qr, qr_quantized, kv), pending = ops.attention_inputs(*latent, **static), Pending(None)
    pending = dataclasses.replace(pending, window=kv)

    # A selection has no gradient; in training the scores are fitted to the attention, not the trunk to the scores.
    of_indexer = (w["indexer"]["wq_b"],) if ratio == CSA else ()
    q, *index_q = linears(ctx, (qr, *[jax.lax.stop_gradient(qr)] * len(of_indexer)), qr_quantized, w["wq_b"], *of_indexer)
    index_q = index_q[0].reshape(batch, tokens, c.index_n_heads, c.index_head_dim) if index_q else None
    q, index_q = ops.queries(
        q.reshape(batch, tokens, -1, c.head_dim), index_q, cos, sin, eps=c.rms_norm_eps, fp4=ctx.recipe.index == "fp4"
    )
    ctx.save("q", q)
    picked = picked_entries(ctx, cache.index, index_q, head_weights, chunk) if ratio == CSA else None

    attend = _decode if chunk.is_decode else _prompt
    o = attend(ctx, w, cache, q, kv, picked, chunk, ratio, cos, sin)
    o = o.reshape(batch, tokens, c.o_groups // ctx.tensor_size, -1)
    return linear(ctx, grouped_linear(ctx, o, w["wo_a"]).reshape(batch, tokens, -1), w["wo_b"], split=True), cache, pending


def _projections(ctx: Context, w: dict, x: jax.Array, quantized, ratio: int):
    """All products of the block's input: (qr, kv, [(kv, score) fp32 per compressor], head weights of the indexer or None)."""
    low, wide = ctx.recipe.activation_dtype, jnp.float32
    compressors = [w["compressor"]] if ratio else []
    still = jax.lax.stop_gradient(x)
    xs, weights, dtypes = [x, x], [w["wq_a"], w["wkv"]], [low, low]
    if ratio == CSA:
        compressors.append(w["indexer"]["compressor"])
    for i, compressor in enumerate(compressors):
        xs += [still if i else x] * 2
        weights += [compressor["wkv"], compressor["wgate"]]
        dtypes += [wide, wide]
    if ratio == CSA:
        xs.append(still)
        weights.append(w["indexer"]["weights_proj"])
        dtypes.append(low)
    qr, kv, *rest = linears(ctx, tuple(xs), quantized, *weights, dtypes=tuple(dtypes))
    return qr, kv, list(zip(rest[0:-1:2], rest[1::2])) if ratio == CSA else list(zip(rest[0::2], rest[1::2])), rest[-1] if ratio == CSA else None


def _decode(ctx: Context, w, cache: LayerCache, q, kv, picked, chunk: Chunk, ratio: int, cos, sin):
    return ops.decode_attention(
        q, cache.window, kv, cache.compressed, picked, w["attn_sink"], chunk.start, chunk.length, cos, sin, ratio=ratio
    )


def _prompt(ctx: Context, w, cache: LayerCache, q, kv, picked, chunk: Chunk, ratio: int, cos, sin):
    """The ring and the chunk itself under a mask, and the compressed entries: all under a mask, or each token's picked."""
    rope = ctx.config.qk_rope_head_dim
    shared, own = [_window(ctx, cache, kv, chunk)], (None, None)
    if ratio:
        entries = jax.tree.leaves(cache.compressed)[0].shape[1]
        if picked is None or entries <= _DENSE_FACTOR * ctx.config.index_topk:
            shared.append((ops.kv_values(cache.compressed, rope), _closed_or_picked(chunk, ratio, entries, picked)))
        else:
            rows = jnp.arange(picked.shape[0])[:, None, None]
            at = jnp.maximum(picked, 0)
            own = ops.kv_values(jax.tree.map(lambda e: e[rows, at], cache.compressed), rope), picked >= 0
    keys = jnp.concatenate([k for k, _ in shared], axis=-2)
    mask = jnp.concatenate([m for _, m in shared], axis=-1)
    o = ops.attention(q, keys, mask, w["attn_sink"], *own)
    return ops.rope(o, cos[:, :, None], -sin[:, :, None])


def _window(ctx: Context, cache: LayerCache, kv, chunk: Chunk):
    """Keys [B, W + T, K] of the ring and of the chunk itself, and who sees what: bool [B, T, W + T]."""
    size = ctx.config.sliding_window
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), cache.window, kv)
    old = ring_positions(size, chunk.start)
    held = jnp.concatenate([old, chunk.positions], axis=1)[:, None]
    present = jnp.concatenate([old >= 0, chunk.valid], axis=1)[:, None]
    at = chunk.positions[..., None]
    return ops.kv_values(both, ctx.config.qk_rope_head_dim), present & (held <= at) & (held > at - size)


def _closed_or_picked(chunk: Chunk, ratio: int, entries: int, picked) -> jax.Array:
    """bool [B, T, entries]: the picked entries, or all whose block has closed."""
    if picked is None:
        return jnp.arange(entries) < jnp.where(chunk.valid, (chunk.positions + 1) // ratio, 0)[..., None]
    rows, columns = jnp.arange(picked.shape[0])[:, None, None], jnp.arange(picked.shape[1])[None, :, None]
    mask = jnp.zeros((*picked.shape[:2], entries), bool)
    return mask.at[rows, columns, jnp.where(picked < 0, entries, picked)].set(True, mode="drop")
