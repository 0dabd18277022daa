"""Decode state: what a sequence carries from token to token.

Two kinds of storage behave differently, and speculative decoding rests on it:
* Compressed entries and index keys are append-only arrays. An entry is visible only once the position says that its
  block has closed, so a chunk may write entries for tokens that are later rejected: they are written again.
* The window ring and the open blocks of the compressors are overwritten in place. A chunk never touches them; it
  returns its rows as `Pending`, and `commit` writes those of the accepted tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.config import CSA, HCA, ModelConfig
from dsv4_jax.precision import Recipe
from ffi_kernels.tensor import KV_BLOCK, MXFP4_BLOCK

# Up to this many tokens per sequence (the current one and its drafts) a call is a decode step: each token reads
# entries and experts of its own, in an order that does not depend on how many tokens share the call.
DECODE_TOKENS = 4

def _pytree(meta: tuple[str, ...] = ()):
    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))

    return register


@_pytree()
class CompressorState:
    """Rows of a compressor's open block (and, for ratio 4, of the block before): fp32 [B, rows, channels] each.

    rows = 8 (ratio 4) or 128 (ratio 128); the row of position p is p % rows. `score` starts at -inf.
    """

    kv: jax.Array
    score: jax.Array


@_pytree()
class LayerCache:
    """Cache of one block. Entries are [B, n, K] plain or FP8KVCache; index keys [B, n, K_I] plain or MXFP4Tensor.

    window: ring of the last `sliding_window` entries; position p lies in slot p % window.
    compressed, index: entry j closes at position (j + 1) * ratio - 1; None where the layer has none.
    compressor, index_compressor: their open blocks; None likewise.
    """

    window: Any
    compressed: Any = None
    index: Any = None
    compressor: CompressorState | None = None
    index_compressor: CompressorState | None = None


@_pytree()
class Pending:
    """Rows of one chunk that wait for `commit`: entries [B, T, ...] and compressor rows fp32 [B, T, channels]."""

    window: Any
    compressor: CompressorState | None = None
    index_compressor: CompressorState | None = None


@_pytree(meta=("max_len",))
class DecodeState:
    """Everything a batch of sequences carries; immutable, donated by `prefill` and `decode_step`.

    position: int32 [B], tokens committed so far, hence the position of the next one. layers: one LayerCache per layer.
    mtp: cache of the MTP block, whose row p pairs the residual of token p with token p + 1, or None when the state was
    made without it. hidden: the residual streams [B, M, D] of the last committed token, None likewise.
    max_len: capacity in tokens (static). Logits at or beyond it are nan.

    A new sequence starts from a fresh state: `init_state(model, batch=2, max_len=4096)`.
    """

    position: jax.Array
    layers: tuple[LayerCache, ...]
    mtp: LayerCache | None
    hidden: jax.Array | None
    max_len: int


@_pytree()
class Chunk:
    """Where the tokens of one call stand: T tokens per sequence, of which the first `length` count.

    start: int32 [B]; length: int32 [B]; positions: int32 [B, T]; valid: bool [B, T].
    """

    start: jax.Array
    length: jax.Array
    positions: jax.Array
    valid: jax.Array

    @classmethod
    def make(cls, start: jax.Array, length: jax.Array, tokens: int) -> "Chunk":
        positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        valid = (jnp.arange(tokens) < length[:, None]) & (positions >= 0)
        return cls(start, length, positions, valid)

    @property
    def is_decode(self) -> bool:
        """Whether the call is a decode step (static)."""
        return self.positions.shape[1] <= DECODE_TOKENS

    @property
    def end(self) -> jax.Array:
        """int32 [B]: the position after the last token that counts."""
        return self.start + self.length


def _entries(recipe: Recipe, config: ModelConfig, batch: int, count: int):
    rope, k = config.qk_rope_head_dim, config.head_dim
    if recipe.kv == "plain":
        return jnp.zeros((batch, count, k), recipe.activation_dtype)
    blocks = (k - rope) // KV_BLOCK
    return ops.FP8KVCache(
        jnp.zeros((batch, count, k + rope), jnp.uint8), jnp.zeros((batch, count, blocks + -blocks % 8), jnp.uint8)
    )


def _index_keys(recipe: Recipe, config: ModelConfig, batch: int, count: int):
    k = config.index_head_dim
    if recipe.index == "plain":
        return jnp.zeros((batch, count, k), recipe.activation_dtype)
    return ops.MXFP4Tensor(
        jnp.zeros((batch, count, k // 2), jnp.uint8), jnp.zeros((batch, count, k // MXFP4_BLOCK), jnp.uint8)
    )


def _open_blocks(batch: int, ratio: int, width: int) -> CompressorState:
    shape = (batch, 8, 2 * width) if ratio == CSA else (batch, HCA, width)
    return CompressorState(jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32))


def init_layer(config: ModelConfig, recipe: Recipe, ratio: int, batch: int, max_len: int) -> LayerCache:
    """The empty cache of one block."""
    window = _entries(recipe, config, batch, config.sliding_window)
    if not ratio:
        return LayerCache(window)
    count = max(max_len // ratio, 1)
    cache = LayerCache(
        window, _entries(recipe, config, batch, count), compressor=_open_blocks(batch, ratio, config.head_dim)
    )
    if ratio != CSA:
        return cache
    return dataclasses.replace(
        cache,
        index=_index_keys(recipe, config, batch, count),
        index_compressor=_open_blocks(batch, ratio, config.index_head_dim),
    )


def init(config: ModelConfig, recipe: Recipe, batch: int, max_len: int, mtp: bool) -> DecodeState:
    """The empty state of `batch` sequences of at most `max_len` tokens."""
    layers = tuple(init_layer(config, recipe, ratio, batch, max_len) for ratio in config.layer_ratios)
    hidden = jnp.zeros((batch, config.hc_mult, config.hidden_size), recipe.activation_dtype) if mtp else None
    mtp_cache = init_layer(config, recipe, 0, batch, max_len) if mtp else None
    return DecodeState(jnp.zeros((batch,), jnp.int32), layers, mtp_cache, hidden, max_len)


_RINGS = ("window", "compressor", "index_compressor")


def commit(caches: tuple[LayerCache, ...], pending: tuple[Pending, ...], chunk: Chunk) -> tuple[LayerCache, ...]:
    """The caches of several blocks after accepting the first `chunk.length` tokens of the chunk that produced `pending`."""

    def rings(parts, like):
        return [{n: getattr(p, n) for n in _RINGS if getattr(c, n) is not None} for p, c in zip(parts, like, strict=True)]

    new = ops.commit_rows(rings(caches, caches), rings(pending, caches), chunk.start, chunk.length)
    return tuple(dataclasses.replace(cache, **ring) for cache, ring in zip(caches, new, strict=True))


def ring_positions(size: int, start: jax.Array) -> jax.Array:
    """int32 [B, size]: the position that each slot of a ring holds before `start`; negative where it is empty."""
    slots = jnp.arange(size, dtype=jnp.int32)
    last = start[:, None] - 1
    return last - (last - slots) % size


def bytes_per_token(config: ModelConfig, recipe: Recipe) -> float:
    """Bytes of state that one more token of context needs, over all layers, from the shapes (facts section 5)."""
    span = HCA * 64
    sizes = []
    for max_len in (span, 2 * span):
        state = jax.eval_shape(lambda n=max_len: init(config, recipe, 1, n, mtp=False))
        sizes.append(sum(t.size * t.dtype.itemsize for t in jax.tree.leaves(state)))
    return (sizes[1] - sizes[0]) / span
