"""The indexer's scores and selection: contracts, checks, native launches. Formulas: `reference.py`. Kernels: `indexer.cu` and
`indexer_wgmma.cu` (FP4 keys), `indexer_bf16.cu`, `topk.cu`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import launch, native
from ffi_kernels.tensor import MXFP4Tensor, require_layout

CHANNELS = 128  # K of every published indexer, and of the native kernels
MAX_HEADS, MAX_TOKENS = 64, 16
MAX_ENTRIES = 16 * 16384  # of one row: a cluster of 16 CTAs with 16 scores per thread; the longest context / 4
_MULTIPROCESSORS = {"sm_100a": 148}
_MULTIPROCESSORS_OTHERS = 132
WGMMA = ("sm_90a", "sim")  # where more than 16 heads and FP4 keys take indexer_wgmma.cu
_SPAN = 8192  # scores per CTA of topk.cu, which could hold 16384, until there are 16 of them


def index_scores(q: jax.Array, keys, head_weights: jax.Array, visible: jax.Array | None = None, weight_scale: float = 1.0) -> jax.Array:
    """score = sum_h relu(q_h . k) * (w_h * weight_scale) (facts section 2, Indexer): how much a token wants each compressed entry.

    q bf16 or fp32 [B, T, H, K]; keys [B, C, K], plain or MXFP4Tensor; head_weights fp32 or bf16 [B, T, H]; visible
    int32 [B, T] or None -> fp32 [B, T, C]. Entries from `visible` on are unspecified: a native kernel stops there. ValueError
    if shapes disagree, or if a native backend lacks them (K other than 128, more than 64 heads or 16 tokens).
    """
    if q.shape[-1] != keys.shape[-1] or q.shape[0] != keys.shape[0] or head_weights.shape != q.shape[:3]:
        raise ValueError(f"index_scores got q {q.shape}, keys {keys.shape}, head_weights {head_weights.shape}.")
    if visible is not None and visible.shape != q.shape[:2]:
        raise ValueError(f"index_scores got q {q.shape} but visible {visible.shape}, which must be {q.shape[:2]}.")
    return implementation("index_scores")(q, keys, head_weights, visible, weight_scale)


def top_entries(scores: jax.Array, visible: jax.Array, count: int) -> jax.Array:
    """The best `count` of the first `visible` entries, in ascending order of their index.

    scores fp32 or bf16 [B, T, C]; visible int32 [B, T], clamped to [0, C] -> int32 [B, T, min(count, C)], -1 behind the
    last where fewer are visible. Ties go to the lower index, +0 and -0 tie, nan is better than any number. ValueError
    if shapes disagree, count is not positive, or a native backend gets more than 262,144 entries.
    """
    if visible.shape != scores.shape[:2] or count < 1:
        raise ValueError(f"top_entries got scores {scores.shape}, count {count} (at least 1), but visible {visible.shape}.")
    return implementation("top_entries")(scores, visible, count)


class ScoresKernel(NamedTuple):
    module: str
    name: str
    threads: int
    tile: int  # entries that a warp or warpgroup takes at a time
    resident: int  # CTAs that share a multiprocessor
    token_bytes: int  # of shared memory: a token's queries
    bytes: int  # and what there is besides


def scores_kernel(quantized: bool, tokens: int, heads: int) -> ScoresKernel:
    """The kernel of index_scores on the current backend."""
    rows = 1 if heads <= 16 else 4  # tiles of 16 heads
    if not quantized:
        return ScoresKernel("indexer_bf16", f"index_scores_bf16_{16 * rows}", 256, 32, 2, rows * (8 * 512 + 8 * 8), 0)
    if heads > 16 and current() in WGMMA:
        name = "index_scores_fp4_one" if tokens == 1 else "index_scores_fp4_many"
        return ScoresKernel("indexer_wgmma", name, 512, 64, 1, 64 * 128 + 4 * 4 * 20, 4)
    return ScoresKernel("indexer", f"index_scores_fp4_{16 * rows}", 256, 32, 2, rows * (4 * 512 + 8 * 8), 0)


@native("index_scores")
def _index_scores(q, keys, head_weights, visible, weight_scale):
    (batch, tokens, heads, channels), entries = q.shape, keys.shape[1]
    quantized = isinstance(keys, MXFP4Tensor)
    require_layout("index_scores", keys)
    if channels != CHANNELS or heads > MAX_HEADS or tokens > MAX_TOKENS:
        raise ValueError(
            f"index_scores on {current()} takes K = {CHANNELS}, at most {MAX_HEADS} heads and {MAX_TOKENS} tokens per "
            f"sequence, got q {q.shape}; trace prompts and other shapes under backend('xla')."
        )
    if q.dtype != jnp.bfloat16 or not (quantized or keys.dtype == jnp.bfloat16) or head_weights.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"index_scores on {current()} takes bf16 queries, bf16 or MXFP4 keys and fp32 or bf16 weights, got {q.dtype}, "
            f"{'MXFP4' if quantized else keys.dtype} and {head_weights.dtype}; use backend('xla') or a recipe in bf16."
        )
    if not entries:
        return jnp.zeros((batch, tokens, 0), jnp.float32)
    kernel = scores_kernel(quantized, tokens, heads)
    data, scale = (keys.data, keys.scale) if quantized else (keys, None)
    resident = kernel.resident * _MULTIPROCESSORS.get(current(), _MULTIPROCESSORS_OTHERS)
    return launch(
        "index_scores", kernel.module, kernel.name,
        grid=(min(-(-entries // kernel.tile), max(1, resident // batch)), batch), block=kernel.threads,
        shared_bytes=tokens * kernel.token_bytes + kernel.bytes,
        inputs=[q, data, scale, head_weights, None if visible is None else visible.astype(jnp.int32)],
        outputs=[jax.ShapeDtypeStruct((batch, tokens, entries), jnp.float32)],
        scalars=[tokens, heads, entries, head_weights.dtype == jnp.bfloat16, float(weight_scale)],
    )[0]  # fmt: skip


@native("top_entries")
def _top_entries(scores, visible, count):
    batch, tokens, entries = scores.shape
    if entries > MAX_ENTRIES:
        raise ValueError(
            f"top_entries on {current()} selects from at most {MAX_ENTRIES} entries, got {entries}; use backend('xla')."
        )
    if scores.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"top_entries on {current()} takes fp32 or bf16 scores, got {scores.dtype}; convert them.")
    count = min(count, entries)
    if not count:
        return jnp.zeros((batch, tokens, 0), jnp.int32)
    ctas = 1
    while ctas < 16 and ctas * _SPAN < entries:
        ctas *= 2
    return launch(
        "top_entries", "topk", "top_entries_bf16" if scores.dtype == jnp.bfloat16 else "top_entries_f32",
        grid=(ctas, batch * tokens), cluster=(ctas, 1, 1), block=1024,
        inputs=[scores, visible.astype(jnp.int32)],
        outputs=[jax.ShapeDtypeStruct((batch, tokens, count), jnp.int32)],
        scalars=[entries, count],
    )[0]  # fmt: skip
