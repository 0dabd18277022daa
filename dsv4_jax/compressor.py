"""The compressors of a block: 4 or 128 tokens become one entry each (paper section 2.3, facts section 2).

A CSA layer has two of one kind: of the key-value entries and, at its own width, of the indexer's keys.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import Chunk, CompressorState, LayerCache, Pending
from dsv4_jax.config import CSA
from dsv4_jax.layers import rope_angles
from dsv4_jax.sharding import Context


def compress(ctx: Context, w: dict, cache: LayerCache, latent: tuple, products: list, chunk: Chunk, ratio: int, static: dict):
    """Append the entries (and index keys) of the blocks that close in this chunk, beside `ops.attention_inputs`.

    latent, static: the arguments of that op, which takes the same launch. products: (kv, score) fp32 [B, T, channels]
    of each compressor. Returns (what attention_inputs returns, cache, Pending without window rows).
    """
    jobs = [_job(w["compressor"], products[0], cache.compressor, cache.compressed)]
    if ratio == CSA:
        jobs.append(jax.lax.stop_gradient(_job(w["indexer"]["compressor"], products[1], cache.index_compressor, cache.index)))
    blocks = (chunk.positions.shape[1] - 1) // ratio + 1
    index = chunk.start[:, None] // ratio + jnp.arange(blocks, dtype=jnp.int32)
    cos, sin = rope_angles(ctx, ratio, index * ratio)
    inputs, done = ops.attention_inputs_and_compress(latent, jobs, chunk.start, chunk.length, cos, sin, ratio=ratio, **static)
    (entries, kv, score), *of_index = done
    ctx.save("compressed", entries)
    cache, pending = dataclasses.replace(cache, compressed=entries), Pending(None, CompressorState(kv, score))
    if of_index:
        keys, kv, score = of_index[0]
        cache = dataclasses.replace(cache, index=keys)
        pending = dataclasses.replace(pending, index_compressor=CompressorState(kv, score))
    return inputs, cache, pending


def _job(w: dict, products, state: CompressorState, entries) -> ops.Compression:
    return ops.Compression(*products, w["ape"], state.kv, state.score, w["norm"], entries)
