"""Decode attention in plain jnp: a composition of `reference.py`, and the `xla` backend. Contract: `decode_attention.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels import reference


def _values(entries, at: tuple, seen: jax.Array, rope: int) -> jax.Array:
    """The entries [B, n, ...] at these indices as numbers, zero where they are not seen."""
    return jnp.where(seen[..., None], reference.kv_values(jax.tree.map(lambda e: e[at], entries), rope), 0)


def _window(window, fresh, start: jax.Array, positions: jax.Array, valid: jax.Array, rope: int):
    """Keys [B, T, W, K] in ring order, as the ring stands once each token is written, and what is seen: bool [B, T, W]."""
    size, tokens = jax.tree.leaves(window)[0].shape[1], positions.shape[1]
    rows, slots = jnp.arange(positions.shape[0])[:, None, None], jnp.arange(size, dtype=jnp.int32)
    last = positions[..., None]
    held = last - (last - slots) % size
    seen = (held >= 0) & (last >= 0) & valid[..., None]  # far below 0, held wraps around
    new = held >= start[:, None, None]
    fresh_at = rows, jnp.clip(held - start[:, None, None], 0, tokens - 1)
    keys = jnp.where(
        new[..., None], _values(fresh, fresh_at, seen, rope), _values(window, (rows, slots), seen, rope).astype(_dtype(fresh))
    )
    return keys, seen


def _dtype(entries):
    return entries.dtype if isinstance(entries, jax.Array) else jnp.bfloat16


def _log_sum(q: jax.Array, keys: list, seen: list) -> jax.Array:
    """log sum exp of the scores of what is seen, fp32 [B, T, H]; -inf where nothing is."""
    forms = {3: "bthk,bsk->bths", 4: "bthk,btsk->bths"}
    scores = [
        jnp.where(m[:, :, None], jnp.einsum(forms[k.ndim], q, k, precision="highest", preferred_element_type=jnp.float32), -jnp.inf)
        for k, m in zip(keys, seen, strict=True)
    ]  # fmt: skip
    return jax.nn.logsumexp(jnp.concatenate(scores, -1) * q.shape[-1] ** -0.5, axis=-1)


def decode_attention(
    q, window, fresh, compressed, picked, sink, start, length, cos, sin, *, ratio: int, return_lse: bool = False
):  # fmt: skip
    """`attention` of each token over its window and compressed entries, then `rope` by the opposite angles."""
    batch, tokens, _, channels = q.shape
    rope = 2 * cos.shape[-1]
    positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    valid = jnp.arange(tokens) < length[:, None]
    own, own_seen = _window(window, fresh, start, positions, valid, rope)
    shared, shared_seen = jnp.zeros((batch, 0, channels), own.dtype), jnp.zeros((batch, tokens, 0), bool)
    if compressed is not None:
        entries = jax.tree.leaves(compressed)[0].shape[1]
        if picked is None:
            closed = jnp.where(valid, (positions + 1) // ratio, 0)
            shared_seen = jnp.arange(entries) < closed[..., None]
            shared = _values(compressed, (slice(None),), shared_seen.any(1), rope)
        else:
            seen = (picked >= 0) & (picked < entries) & valid[..., None]
            at = jnp.arange(batch)[:, None, None], jnp.where(seen, picked, 0)
            own = jnp.concatenate([own, _values(compressed, at, seen, rope)], axis=2)
            own_seen = jnp.concatenate([own_seen, seen], axis=2)
    out = reference.attention(q, shared, shared_seen, sink, own, own_seen)
    out = reference.rope(jnp.where(valid[..., None, None], out, 0), cos[:, :, None], -sin[:, :, None])
    return (out, _log_sum(q, [shared, own], [shared_seen, own_seen])) if return_lse else out
