"""Compression and attention: contracts, checks, dispatch. Formulas: `reference.py`."""

from __future__ import annotations

import jax

from ffi_kernels.dispatch import implementation


def compress_pool(kv: jax.Array, score: jax.Array) -> jax.Array:
    """kv, score fp32 [..., rows, w] -> fp32 [..., w]: softmax over the rows, per channel; a score of -inf drops a row."""
    if kv.shape != score.shape:
        raise ValueError(f"compress_pool needs a score per value: kv {kv.shape}, score {score.shape}.")
    return implementation("compress_pool")(kv, score)


def attention(q, keys, mask, sink, picked=None, picked_mask=None) -> jax.Array:
    """q [B, T, H, K] over keys [B, S, K] (mask bool [B, T, S]) and optionally entries of each token's own
    [B, T, X, K] (picked_mask bool [B, T, X]); sink fp32 [H] -> [B, T, H, K] in q.dtype. Key = value."""
    if mask.shape != (*q.shape[:2], keys.shape[1]) or sink.shape != (q.shape[2],):
        raise ValueError(f"attention got q {q.shape}, keys {keys.shape}, mask {mask.shape}, sink {sink.shape}.")
    if (picked is None) != (picked_mask is None) or (picked is not None and picked.shape[:3] != picked_mask.shape):
        raise ValueError("attention takes picked [B, T, X, K] and picked_mask [B, T, X] together, or neither.")
    return implementation("attention")(q, keys, mask, sink, picked, picked_mask)
