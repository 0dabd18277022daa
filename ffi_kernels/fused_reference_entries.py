"""The fused ops of `entries.py` and `compressor.py` in plain jnp: compositions of `reference.py`, and the `xla` backend.

What is fused is only what runs in one launch; every rounding point is that of the ops composed here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels import numerics, reference
from ffi_kernels.tensor import FP8KVCache, MXFP4Tensor

_QUANTIZERS = {None: lambda x: None, "fp8": reference.quantize_fp8, "nvfp4": reference.quantize_nvfp4_rows}


def attention_inputs(qr, kv, q_weight, kv_weight, cos, sin, *, eps: float, kv_format: str, quantize: str | None):
    """(RMSNorm(qr), the same quantized, RoPE(RMSNorm(kv)) in the format of the cache)."""
    normed = reference.rms_norm(qr, q_weight, eps)
    kv = reference.rope(reference.rms_norm(kv, kv_weight, eps), cos, sin)
    entry = kv if kv_format == "plain" else reference.encode_kv(kv, 2 * cos.shape[-1])
    return normed, _QUANTIZERS[quantize](normed), entry


def queries(q, index_q, cos, sin, *, eps: float, fp4: bool):
    """(RoPE(RMSNorm(q)) per head, RoPE(index_q), rotated by Hadamard and rounded to MXFP4 if fp4)."""
    angles = cos[:, :, None], sin[:, :, None]
    q = reference.rope(reference.rms_norm(q, None, eps), *angles)
    if index_q is None:
        return q, None
    index_q = reference.rope(index_q, *angles)
    if fp4:
        rounded = reference.quantize_mxfp4(reference.hadamard(index_q))
        index_q = reference.dequantize(rounded).astype(index_q.dtype)
    return q, index_q


def _write(buffer: jax.Array, values: jax.Array, slot: jax.Array, valid: jax.Array) -> jax.Array:
    """buffer [B, n, ...] with values [B, k, ...] at int32 slot [B, k], where valid and inside."""
    slot = jnp.where(valid & (slot >= 0), slot, buffer.shape[1])
    rows = jnp.arange(slot.shape[0])[:, None]
    return buffer.at[rows, slot].set(values.astype(buffer.dtype), mode="drop")


def _closing_entries(job, score, start, index, cos, sin, ratio: int, eps: float) -> jax.Array:
    """Pool, norm and rotate the blocks `index` int32 [B, n]: [B, n, width] in the dtype of the entries."""
    rows, tokens = job.state_kv.shape[1], job.kv.shape[1]
    span = 2 * ratio if ratio == 4 else ratio  # ratio 4 also pools the block before
    positions = (index + 1)[..., None] * ratio - span + jnp.arange(span, dtype=jnp.int32)  # [B, n, span]
    since = positions - start[:, None, None]
    place = jnp.where(since < 0, positions % rows, rows + jnp.minimum(since, tokens - 1))

    def gather(old, new):
        both = jnp.concatenate([old, new], axis=1)
        picked = jnp.take_along_axis(both, place.reshape(place.shape[0], -1, 1), axis=1).reshape(*place.shape, -1)
        if ratio != 4:
            return picked
        width = picked.shape[-1] // 2  # the block before contributes its first channels, this block its last
        return jnp.concatenate([picked[:, :, :ratio, :width], picked[:, :, ratio:, width:]], axis=2)

    scores = jnp.where(positions[..., None] >= 0, gather(job.state_score, score), -jnp.inf)
    dtype = jnp.bfloat16 if isinstance(job.entries, (FP8KVCache, MXFP4Tensor)) else job.entries.dtype
    pooled = numerics.round_to(reference.compress_pool(gather(job.state_kv, job.kv), scores), dtype)
    return reference.rope(reference.rms_norm(pooled, job.norm_weight, eps), cos, sin)


def compress_append(jobs, start, length, cos, sin, *, ratio: int, eps: float):
    """Per job: (entries with the blocks that close in this chunk, rows that wait for commit: kv and score + ape)."""
    results = []
    for job in jobs:
        tokens = job.kv.shape[1]
        positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        score = job.score + job.ape[positions % ratio]
        blocks = (tokens - 1) // ratio + 1
        index = start[:, None] // ratio + jnp.arange(blocks, dtype=jnp.int32)
        values = _closing_entries(job, score, start, index, cos, sin, ratio, eps)
        if isinstance(job.entries, MXFP4Tensor):
            values = reference.quantize_mxfp4(reference.hadamard(values))
        elif isinstance(job.entries, FP8KVCache):
            values = reference.encode_kv(values, 2 * cos.shape[-1])
        closed = (index + 1) * ratio <= (start + jnp.minimum(length, tokens))[:, None]
        entries = jax.tree.map(lambda old, new, at=index, ok=closed: _write(old, new, at, ok), job.entries, values)
        results.append((entries, job.kv, score))
    return results


def attention_inputs_and_compress(latent, jobs, start, length, cos, sin, *, ratio, eps, kv_format, quantize):
    """Both, of one layer."""
    made = attention_inputs(*latent, eps=eps, kv_format=kv_format, quantize=quantize)
    return made, compress_append(jobs, start, length, cos, sin, ratio=ratio, eps=eps)


def commit_rows(rings, rows, start, length):
    """Rings with the rows of the first `length` tokens at slot position % size; of several rounds the last survives."""

    def commit(ring, new):
        tokens = new.shape[1]
        positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        counts = (jnp.arange(tokens) < length[:, None]) & (positions >= 0)
        last_round = positions >= (start + jnp.minimum(length, tokens))[:, None] - ring.shape[1]
        return _write(ring, new, positions % ring.shape[1], counts & last_round)

    return jax.tree.map(commit, rings, rows)
