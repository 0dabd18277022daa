"""The compressor of a chunk: rows that wait for commit, and the entries of the blocks that close. Contract, checks, launch.

Formulas: `fused_reference_entries.py`; kernels: `native/cuda/compressor.cu`. Not here: the projections before it, the
rings (`entries.commit_rows`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.entries import (
    LatentPart, check_fp8_entry, check_latent, check_native_hadamard, check_native_row, hadamard_scale, latent_part, require_dtype,
)  # fmt: skip
from ffi_kernels.launch import launch, native
from ffi_kernels.tensor import MXFP4_BLOCK, FP8KVCache, MXFP4Tensor

MAX_JOBS = 2  # of one launch: the entries and the index keys of a layer
MAX_TOKENS = 4  # of a decode step
_CLUSTER = 8  # CTAs that pool the 128 rows of one sequence
_THREADS = 256  # of a CTA


class Compression(NamedTuple):
    """What one compressor works on. channels = 2 * width for ratio 4, else width.

    kv, score: fp32 [B, T, channels], this chunk's products, score without ape; ape: fp32 [ratio, channels]. state_kv,
    state_score: fp32 [B, rows, channels], 8 rows for ratio 4, else ratio; position p lies in row p % rows.
    norm_weight: [width]. entries: the cache, [B, C, width] plain, FP8KVCache, or MXFP4Tensor (index keys: these are
    rotated by the Hadamard transform first).
    """

    kv: jax.Array
    score: jax.Array
    ape: jax.Array
    state_kv: jax.Array
    state_score: jax.Array
    norm_weight: jax.Array
    entries: Any

    @property
    def width(self) -> int:
        """Channels of an entry."""
        return self.norm_weight.shape[0]


def compress_append(jobs: Sequence[Compression], start, length, cos, sin, *, ratio: int, eps: float) -> list[tuple]:
    """Pool, norm, rotate and store the blocks that close among the first `length` of the tokens at start, start + 1, ...

    start, length: int32 [B]. cos, sin: fp32 [B, n, R/2], n = (T - 1) // ratio + 1, the angles at the positions
    (start // ratio + i) * ratio of the entries i < n. jobs share them, B and T: a CSA layer's entries and index keys.
    Per job returns (entries, updated in place when donated; kv and score + ape fp32 [B, T, channels], the rows that wait
    for `commit_rows`). An entry beyond the capacity C, or before 0, is dropped. ValueError for shapes that do not fit.
    """
    for job in jobs:
        _check(job, start, length, cos, sin, ratio)
    return implementation("compress_append")(jobs, start, length, cos, sin, ratio=ratio, eps=eps)


def attention_inputs_and_compress(latent, jobs: Sequence[Compression], start, length, cos, sin, *, ratio, eps, kv_format, quantize):
    """`entries.attention_inputs` and `compress_append` of one layer in one launch, as neither needs the other.

    latent: (qr, kv, q_weight, kv_weight, cos, sin) as `attention_inputs` takes them; the rest as `compress_append`, with one eps.
    Returns what the two return: ((normed, quantized, entry), [(entries, kv, score), ...]).
    """
    check_latent(*latent, kv_format, quantize)
    for job in jobs:
        _check(job, start, length, cos, sin, ratio)
    return implementation("attention_inputs_and_compress")(
        latent, jobs, start, length, cos, sin, ratio=ratio, eps=eps, kv_format=kv_format, quantize=quantize
    )


def _check(job: Compression, start, length, cos, sin, ratio: int) -> None:
    batch, tokens, channels = job.kv.shape
    rope = 2 * cos.shape[-1]
    wanted = {
        "score": (batch, tokens, channels),
        "ape": (ratio, channels),
        "state_kv": (batch, 8 if ratio == 4 else ratio, channels),
        "state_score": (batch, 8 if ratio == 4 else ratio, channels),
        "norm_weight": (channels // 2 if ratio == 4 else channels,),
    }
    got = {name: getattr(job, name).shape for name in wanted}
    angles = (batch, (tokens - 1) // ratio + 1, rope // 2)
    wanted |= {"start": (batch,), "length": (batch,), "cos": angles, "sin": angles}
    got |= {"start": start.shape, "length": length.shape, "cos": cos.shape, "sin": sin.shape}
    if isinstance(job.entries, FP8KVCache):
        check_fp8_entry(job.width, rope)
        wanted["entries.data"], got["entries.data"] = job.width + rope, job.entries.data.shape[-1]
    else:
        wanted["entries"], got["entries"] = job.width, job.entries.shape[-1]
    if isinstance(job.entries, MXFP4Tensor) and (job.width & (job.width - 1) or job.width % MXFP4_BLOCK):
        raise ValueError(f"index keys in FP4 need a power of two of at least {MXFP4_BLOCK} channels, got {job.width}.")
    for name, shape in wanted.items():
        if got[name] != shape:
            raise ValueError(f"compress_append of kv {job.kv.shape} at ratio {ratio} needs {name} {shape}, got {got[name]}.")


@native("compress_append")
def _compress_append(jobs, start, length, cos, sin, *, ratio, eps):
    nothing = LatentPart([None] * 6, [None] * 6, [0] * 8, lambda outputs: None)
    return _launch("compress_append", nothing, 0, jobs, start, length, cos, sin, ratio, eps)[1]


@native("attention_inputs_and_compress")
def _attention_inputs_and_compress(latent, jobs, start, length, cos, sin, *, ratio, eps, kv_format, quantize):
    op, qr = "attention_inputs_and_compress", latent[0]
    if qr.shape[-1] > 8 * _THREADS:
        raise ValueError(
            f"{op} on {current()} takes at most {8 * _THREADS} channels of qr, got {qr.shape[-1]}; call attention_inputs and "
            "compress_append instead."
        )
    part = latent_part(op, *latent, eps=eps, kv_format=kv_format, quantize=quantize)
    return _launch(op, part, qr.shape[0] * qr.shape[1], jobs, start, length, cos, sin, ratio, eps)


def _launch(op: str, latent: LatentPart, rows: int, jobs, start, length, cos, sin, ratio: int, eps: float):
    """One launch for all jobs and the latent rows of a layer -> (what latent.collect makes, results of the jobs)."""
    (batch, tokens), rope = jobs[0].kv.shape[:2], 2 * cos.shape[-1]
    if ratio not in (4, 128) or tokens > MAX_TOKENS or len(jobs) > MAX_JOBS:
        raise ValueError(
            f"{op} on {current()} takes ratio 4 or 128, at most {MAX_TOKENS} tokens and {MAX_JOBS} jobs, got ratio {ratio}, "
            f"{tokens} tokens and {len(jobs)} jobs; trace prompts under backend('xla')."
        )
    require_dtype(op, jnp.float32, cos=cos, sin=sin)
    require_dtype(op, jnp.int32, start=start, length=length)
    inputs, outputs, scalars, aliases = [], [], [], {}
    for i in range(MAX_JOBS):
        more = _native_job(op, jobs[i], rope, ratio) if i < len(jobs) else ([None] * 8, [None] * 3, [0] * 5)
        aliases |= {len(inputs) + 6 + k: len(outputs) + k for k in (0, 1) if more[0][6 + k] is not None}
        inputs, outputs, scalars = inputs + more[0], outputs + more[1], scalars + more[2]
    cluster = 1 if ratio == 4 else _CLUSTER
    results = launch(
        op, "compressor", f"compress_append_{ratio}",
        grid=(cluster * (batch * len(jobs) + -(-2 * rows // cluster)),), cluster=(cluster, 1, 1), block=_THREADS,
        inputs=[*inputs, cos, sin, start, length, *latent.inputs], outputs=[*outputs, *latent.outputs],
        scalars=[*scalars, batch, len(jobs), tokens, rope, float(eps), *latent.scalars], aliases=aliases,
    )  # fmt: skip
    done = []
    for i, job in enumerate(jobs):
        data, scale, score = results[3 * i : 3 * i + 3]
        done.append((data if scale is None else type(job.entries)(data, scale), job.kv, score))
    return latent.collect(results[3 * MAX_JOBS :]), done


def _native_job(op: str, job: Compression, rope: int, ratio: int) -> tuple[list, list, list]:
    """Inputs, outputs and scalars of one job, in the order of JobInputs, JobOutputs and JobShape in compressor.cu."""
    require_dtype(op, jnp.float32, kv=job.kv, score=job.score, ape=job.ape, state_kv=job.state_kv, state_score=job.state_score)
    require_dtype(op, jnp.bfloat16, norm_weight=job.norm_weight)
    check_native_row(op, job.width, rope)
    if ratio == 128 and job.width % 32:
        raise ValueError(f"{op} on {current()} pools a multiple of 32 channels at ratio 128, got {job.width}; use backend('xla').")
    if isinstance(job.entries, MXFP4Tensor):
        check_native_hadamard(op, job.width)
    elif not isinstance(job.entries, FP8KVCache):
        require_dtype(op, jnp.bfloat16, entries=job.entries)
    data, scale = (*jax.tree.leaves(job.entries), None)[:2]
    kind = {FP8KVCache: 1, MXFP4Tensor: 2}.get(type(job.entries), 0)
    shapes = [x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (data, scale, job.score)]
    scalars = [job.width, data.shape[1], kind, 0 if scale is None else scale.shape[-1], hadamard_scale(job.width)]
    return [*job[:6], data, scale], shapes, scalars
