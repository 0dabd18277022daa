"""Cases of the cache's entries: what a step makes of its latent projections, the compressors, the rings of a model.

Cache entries and index queries that are rounded to 8 or 4 bits are compared in tests/: a bf16 rounding that falls the
other way moves them by a whole step, which no bound of a sum describes. Here the plain formats stand for them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes
from ffi_kernels.compressor import Compression, attention_inputs_and_compress, compress_append
from ffi_kernels.entries import attention_inputs, commit_rows, queries

_EPS = 1e-6
_STEPS = ((1, 1), (4, 1), (16, 1), (1, 4))  # B, T
_CAPACITY = 64  # entries of a cache: nothing but the written one is touched


def _normal(key, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(key, shape, dtype)


def _angles(key, *leading, rope: int):
    angle = jax.random.uniform(key, (*leading, rope // 2), jnp.float32, -3.0, 3.0)
    return jnp.cos(angle), jnp.sin(angle)


def _make_latent(key, s: Shapes, batch: int, tokens: int) -> tuple:
    k = jax.random.split(key, 5)
    return (
        _normal(k[0], batch, tokens, s.q_lora), _normal(k[1], batch, tokens, s.head_dim), _normal(k[2], s.q_lora),
        _normal(k[3], s.head_dim), *_angles(k[4], batch, tokens, rope=s.rope_dim),
    )  # fmt: skip


def _make_heads(key, s: Shapes, batch: int, tokens: int) -> tuple:
    k = jax.random.split(key, 3)
    return (
        _normal(k[0], batch, tokens, s.heads, s.head_dim), _normal(k[1], batch, tokens, s.index_heads, s.index_dim),
        *_angles(k[2], batch, tokens, rope=s.rope_dim),
    )  # fmt: skip


def _cache(kind: str, batch: int, count: int, width: int, rope: int):
    if kind == "plain":
        return jnp.zeros((batch, count, width), jnp.bfloat16)
    if kind == "fp4":
        return ops.MXFP4Tensor(jnp.zeros((batch, count, width // 2), jnp.uint8), jnp.zeros((batch, count, width // 32), jnp.uint8))
    return ops.FP8KVCache(jnp.zeros((batch, count, width + rope), jnp.uint8), jnp.zeros((batch, count, 8), jnp.uint8))


def _make_jobs(key, s: Shapes, batch: int, tokens: int, ratio: int, kinds: tuple[str, ...], closes: bool) -> tuple:
    jobs = []
    for kind, width in zip(kinds, (s.head_dim, s.index_dim), strict=False):
        channels, rows = (2 * width, 8) if ratio == 4 else (width, ratio)
        key, *k = jax.random.split(key, 7)
        chunk, ring = (batch, tokens, channels), (batch, rows, channels)
        fp32 = [_normal(i, *shape, dtype=jnp.float32) for i, shape in zip(k, (chunk, chunk, (ratio, channels), ring, ring), strict=False)]
        jobs.append(Compression(*fp32, _normal(k[5], width), _cache(kind, batch, _CAPACITY, width, s.rope_dim)))
    start = jnp.full((batch,), 3 * ratio - tokens if closes else 2 * ratio, jnp.int32)
    length = jnp.full((batch,), tokens if closes else 1, jnp.int32)
    return jobs, start, length, *_angles(key, batch, 1, rope=s.rope_dim)


def _job_bytes(s: Shapes, batch: int, tokens: int, ratio: int, kinds: tuple[str, ...], closes: bool) -> int:
    total = 0
    for kind, width in zip(kinds, (s.head_dim, s.index_dim), strict=False):
        channels, rows = (2 * width, 8) if ratio == 4 else (width, ratio)
        entry = {"plain": 2 * width, "fp8": width + s.rope_dim + 8, "fp4": width * 17 // 32}[kind]
        pooled = 8 * rows * width + 2 * width + entry if closes else 0  # kv and score of each row, the norm, the entry
        total += batch * (tokens * channels * 8 + pooled) + 4 * min(tokens, ratio) * channels
    return total


def _make_rings(key, s: Shapes, batch: int, tokens: int) -> tuple:
    """Rings of the 61 layers that Pro has: 30 with a compressor of ratio 4, the others of ratio 128."""
    window, wide = [(s.window, s.head_dim + s.rope_dim, jnp.uint8), (s.window, 8, jnp.uint8)], jnp.float32
    shapes = 61 * window + 31 * 2 * [(128, s.head_dim, wide)]
    shapes += 30 * (2 * [(8, 2 * s.head_dim, wide)] + 2 * [(8, 2 * s.index_dim, wide)])
    rings = [jnp.zeros((batch, n, width), dtype) for n, width, dtype in shapes]
    rows = [jnp.full((batch, tokens, width), i % 100, dtype) for i, (_, width, dtype) in enumerate(shapes)]
    return rings, rows, jnp.full((batch,), 1000, jnp.int32), jnp.full((batch,), tokens, jnp.int32)


def _make_entries(key, s: Shapes, rows: int) -> tuple:
    return (_normal(key, rows, s.head_dim),)


def _make_cache(key, s: Shapes, rows: int) -> tuple:
    with ops.backend("xla"):
        return (ops.encode_kv(*_make_entries(key, s, rows), s.rope_dim),)


def _latent_cases(s: Shapes, batch: int, tokens: int) -> list[Case]:
    rows, found = batch * tokens, []
    entry = {"fp8": s.head_dim + s.rope_dim + 8, "plain": 2 * s.head_dim}
    for quantize, kv_format in (("fp8", "fp8"), ("nvfp4", "fp8"), (None, "plain")):
        size = {"fp8": 1 + 1 / 128, "nvfp4": 0.5 + 1 / 16, None: 0}[quantize]
        found.append(Case(
            f"attention_inputs {quantize or 'plain'} B={batch} T={tokens}", "attention_inputs",
            functools.partial(_make_latent, s=s, batch=batch, tokens=tokens),
            functools.partial(attention_inputs, eps=_EPS, kv_format=kv_format, quantize=quantize),
            bytes=int(rows * (s.q_lora * (4 + size) + 2 * s.head_dim + 4 * s.rope_dim + entry[kv_format])),
            flops=10 * rows * (s.q_lora + s.head_dim), bounds="two bf16", rows=rows,
            same=(lambda out: out[0]) if quantize else (lambda out: (out[0], out[2])),
        ))  # fmt: skip
    return found


def _head_cases(s: Shapes, batch: int, tokens: int) -> list[Case]:
    rows, channels = batch * tokens, s.heads * s.head_dim + s.index_heads * s.index_dim
    return [
        Case(
            f"queries {'fp4' if fp4 else 'plain'} B={batch} T={tokens}", "queries",
            functools.partial(_make_heads, s=s, batch=batch, tokens=tokens), functools.partial(queries, eps=_EPS, fp4=fp4),
            bytes=rows * (4 * channels + 4 * s.rope_dim), flops=12 * rows * channels, bounds="two bf16", rows=rows,
            same=(lambda out: out[0]) if fp4 else (lambda out: out),
        )
        for fp4 in (True, False)
    ]  # fmt: skip


def _compressor_cases(s: Shapes, batch: int, tokens: int) -> list[Case]:
    found = []
    for ratio, kinds in ((4, ("fp8", "fp4")), (4, ("plain", "plain")), (128, ("fp8",)), (128, ("plain",))):
        coded = kinds[0] == "fp8"
        for closes in (True, False):
            if not closes and (not coded or tokens == ratio):
                continue  # as many tokens as a block has always close one
            found.append(Case(
                f"compress_append ratio={ratio} {'coded' if coded else 'plain'} {'closing' if closes else 'open'} B={batch} T={tokens}",
                "compress_append",
                functools.partial(_make_jobs, s=s, batch=batch, tokens=tokens, ratio=ratio, kinds=kinds, closes=closes),
                functools.partial(compress_append, ratio=ratio, eps=_EPS),
                bytes=_job_bytes(s, batch, tokens, ratio, kinds, closes), flops=20 * batch * len(kinds) * s.head_dim * ratio,
                bounds="two bf16", rows=batch * tokens, same=(lambda out: [job[1:] for job in out]) if coded else (lambda out: out),
            ))  # fmt: skip
    return found


def _layer_case(s: Shapes, batch: int, tokens: int, ratio: int) -> Case:
    """Everything that follows the first products of a layer, which usually closes no block."""
    kinds, part = ("fp8", "fp4") if ratio == 4 else ("fp8",), functools.partial
    latent, jobs = part(_make_latent, s=s, batch=batch, tokens=tokens), part(_make_jobs, s=s, batch=batch, tokens=tokens, ratio=ratio)
    apart = [next(c for c in _latent_cases(s, batch, tokens) if c.name.startswith("attention_inputs fp8"))]
    return Case(
        f"attention_inputs_and_compress ratio={ratio} B={batch} T={tokens}", "attention_inputs_and_compress",
        lambda key: (latent(key), *jobs(key, kinds=kinds, closes=False)),
        part(attention_inputs_and_compress, ratio=ratio, eps=_EPS, kv_format="fp8", quantize="fp8"),
        bytes=apart[0].bytes + _job_bytes(s, batch, tokens, ratio, kinds, False), flops=apart[0].flops, bounds="two bf16",
        rows=batch * tokens, same=lambda out: (out[0][0], [job[1:] for job in out[1]]),
    )  # fmt: skip


def _ring_case(s: Shapes, batch: int, tokens: int) -> Case:
    make = functools.partial(_make_rings, s=s, batch=batch, tokens=tokens)
    rows = jax.eval_shape(make, jax.random.key(0))[1]
    return Case(
        f"commit_rows of 61 layers B={batch} T={tokens}", "commit_rows", make, commit_rows,
        bytes=2 * sum(x.size * x.dtype.itemsize for x in rows), flops=0, bounds="exact", rows=batch * tokens,
    )  # fmt: skip


def cases(shapes: Shapes) -> list[Case]:
    """Every op at one token, several sequences, and several tokens; the format by itself on many rows."""
    s, many, found = shapes, 4096, []
    for step in _STEPS:
        found += [*_latent_cases(s, *step), *_head_cases(s, *step), *_compressor_cases(s, *step)]
        found += [*(_layer_case(s, *step, ratio) for ratio in (4, 128)), _ring_case(s, *step)]
    entry = dict(bytes=many * (3 * s.head_dim + s.rope_dim + 8), flops=4 * many * s.head_dim, bounds="exact", rows=many)
    for op, make in ((ops.encode_kv, _make_entries), (ops.kv_values, _make_cache)):
        run = functools.partial(op, rope_dim=s.rope_dim)
        found.append(Case(f"{op.__name__} {many} rows", op.__name__, functools.partial(make, s=s, rows=many), run, **entry))
    return found
