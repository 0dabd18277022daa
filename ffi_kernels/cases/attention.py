"""Cases of decode attention: layers of each kind, short and long contexts, several sequences and tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes

# name: ratio, context in tokens, sequences, tokens per sequence
_WORK = {
    "window": (0, 8192, 1, 1),
    "csa": (4, 8192, 1, 1),
    "csa two tokens": (4, 8192, 1, 2),
    "csa batch 4": (4, 8192, 4, 1),
    "csa batch 16": (4, 8192, 16, 1),
    "csa batch 64": (4, 8192, 64, 1),
    "hca 8K": (128, 8192, 1, 1),
    "hca 1M": (128, 1048576, 1, 1),
    "hca 1M batch 4": (128, 1048576, 4, 1),
}


def _make(key, shapes: Shapes, ratio: int, context: int, batch: int, tokens: int, form: str) -> tuple:
    keys = iter(jax.random.split(key, 9))
    k, rope = shapes.head_dim, shapes.rope_dim

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    def cache(count):
        return ops.encode_kv(normal(batch, count, k), rope) if form == "fp8" else normal(batch, count, k)

    entries = context // ratio if ratio else 0
    with ops.backend("xla"):
        window, fresh, compressed = cache(shapes.window), cache(tokens), cache(entries) if ratio else None
    picked = None
    if ratio == 4:
        scores = jax.random.uniform(next(keys), (batch, tokens, entries))
        picked = jax.lax.top_k(scores, min(shapes.index_topk, entries))[1].astype(jnp.int32)
    start = jnp.full((batch,), context - tokens, jnp.int32)
    angles = jax.random.uniform(next(keys), (batch, tokens, rope // 2), jnp.float32, -3, 3)
    sink = jax.random.normal(next(keys), (shapes.heads,), jnp.float32)
    length = jnp.full((batch,), tokens, jnp.int32)
    return normal(batch, tokens, shapes.heads, k), window, fresh, compressed, picked, sink, start, length, jnp.cos(angles), jnp.sin(angles)


def _case(shapes: Shapes, name: str, form: str) -> Case:
    ratio, context, batch, tokens = _WORK[name]
    seen = shapes.window + (min(shapes.index_topk, context // 4) if ratio == 4 else context // ratio if ratio else 0)
    rows, k = batch * tokens, shapes.head_dim
    entry = k + shapes.rope_dim + 8 if form == "fp8" else 2 * k
    return Case(
        name=f"decode attention {name}{'' if form == 'fp8' else ' bf16'}",
        op="decode_attention",
        make=functools.partial(_make, shapes=shapes, ratio=ratio, context=context, batch=batch, tokens=tokens, form=form),
        run=functools.partial(ops.decode_attention, ratio=ratio),
        # tokens of one sequence share its window, and all its entries where none are picked
        bytes=batch * entry * (seen + (tokens - 1) * (1 + (seen - shapes.window if ratio == 4 else 0))) + rows * shapes.heads * k * 4,
        flops=rows * shapes.heads * seen * k * 4,
        bounds="two bf16",
        rows=rows,
    )


def cases(shapes: Shapes) -> list[Case]:
    """Every kind of layer in the FP8 cache; the bf16 cache once."""
    return [_case(shapes, name, "fp8") for name in _WORK] + [_case(shapes, "csa", "bf16")]
