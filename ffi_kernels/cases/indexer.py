"""Cases of the indexer: scores of 8K, 32K, 128K and 1M tokens of context, and the selection from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes

ENTRIES = {"8k": 2048, "32k": 8192, "128k": 32768, "1m": 262144}  # of one sequence: a quarter of its tokens


def cases(shapes: Shapes) -> list[Case]:
    """index_scores with FP4 and bf16 entries, top_entries with fp32 and bf16 scores; batch 1 and more."""
    heads, channels, count = shapes.index_heads, shapes.index_dim, shapes.index_topk
    found = []
    for form, context, batch, tokens in [
        ("fp4", "8k", 1, 1), ("fp4", "32k", 1, 1), ("fp4", "128k", 1, 1), ("fp4", "1m", 1, 1), ("fp4", "8k", 1, 4), ("fp4", "1m", 1, 4),
        ("fp4", "32k", 16, 1), ("fp4", "128k", 16, 1), ("bf16", "128k", 1, 1), ("bf16", "1m", 1, 1),
    ]:  # fmt: skip
        found.append(_scores(form, context, batch, tokens, heads, channels))
    for form, context, batch in [("fp32", "32k", 1), ("fp32", "128k", 1), ("fp32", "1m", 1), ("bf16", "1m", 1), ("fp32", "128k", 16)]:
        found.append(_top(form, context, batch, count))
    return found


def _scores(form: str, context: str, batch: int, tokens: int, heads: int, channels: int) -> Case:
    entries = ENTRIES[context]

    def make(key):
        a, b, c = jax.random.split(key, 3)
        q = jax.random.normal(a, (batch, tokens, heads, channels), jnp.bfloat16)
        keys = jax.random.normal(b, (batch, entries, channels), jnp.bfloat16)
        if form == "fp4":
            with ops.backend("xla"):
                q = ops.dequantize(ops.quantize_mxfp4(q)).astype(jnp.bfloat16)
                keys = ops.quantize_mxfp4(keys)
        weights = jax.random.normal(c, (batch, tokens, heads), jnp.float32) * (heads * channels) ** -0.5
        return q, keys, weights, jnp.full((batch, tokens), entries, jnp.int32)

    return Case(
        name=f"index_scores {form} {context}" + (f" B{batch}" if batch > 1 else "") + (f" T{tokens}" if tokens > 1 else ""),
        op="index_scores", make=make, run=ops.index_scores, rows=batch * tokens, bounds="sum",
        bytes=batch * entries * (channels * 17 // 32 if form == "fp4" else 2 * channels) + 4 * batch * tokens * entries,
        flops=2 * batch * tokens * entries * heads * channels,
    )  # fmt: skip


def _top(form: str, context: str, batch: int, count: int) -> Case:
    entries, dtype = ENTRIES[context], jnp.float32 if form == "fp32" else jnp.bfloat16

    def make(key):
        scores = jax.random.normal(key, (batch, 1, entries), jnp.float32)
        return jax.nn.relu(scores + 1).astype(dtype), jnp.full((batch, 1), entries, jnp.int32)  # many exact ties at 0

    def run(scores, visible):
        return ops.top_entries(scores, visible, count)

    return Case(
        name=f"top_entries {count} {form} {context}" + (f" B{batch}" if batch > 1 else ""), op="top_entries", make=make, run=run,
        rows=batch, bounds="exact", bytes=batch * (entries * dtype.dtype.itemsize + 4 * count), flops=0,
        peer=lambda scores, visible: jax.lax.top_k(scores, count)[1],
    )  # fmt: skip
