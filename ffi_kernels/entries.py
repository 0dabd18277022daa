"""What a decode step makes of its latent projections, and what it keeps: contracts, checks, native launches.

Window entries, query heads, the cache format, the rings. Formulas: `fused_reference_entries.py`; kernels:
`native/cuda/entries.cu`. Not here: compressed entries (`compressor.py`). Native kernels hold a row of at most 512
channels in one warp, and take any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import launch, native
from ffi_kernels.quantize import CODE_FORMATS, check_quantize, code_shapes, collect_codes, row_threads
from ffi_kernels.tensor import KV_BLOCK, MXFP4_BLOCK, FP8KVCache

MAX_ROW = 512  # channels that a warp holds
_WARPS = 4  # rows or heads to a CTA
_FORMATS = {"plain": 0, "fp8": 1}
_RINGS_OF_A_LAUNCH = (8, 64, 320)  # one kernel each: their parameters grow with it


def attention_inputs(qr, kv, q_weight, kv_weight, cos, sin, *, eps: float, kv_format: str, quantize: str | None):
    """The two latent projections of a step, ready for use: qr [B, T, Q], kv [B, T, K], both bf16 (any float on xla).

    q_weight [Q] and kv_weight [K] are the norms' weights; cos, sin fp32 [B, T, R/2] rotate the last R channels of kv.
    Returns (RMSNorm(qr), the same as FP8Activation ('fp8'), NVFP4Tensor by rows ('nvfp4') or None (None), RoPE(RMSNorm(kv))
    [B, T, K] plain ('plain') or as FP8KVCache ('fp8')). ValueError for shapes or formats that do not fit.
    """
    check_latent(qr, kv, q_weight, kv_weight, cos, sin, kv_format, quantize)
    return implementation("attention_inputs")(
        qr, kv, q_weight, kv_weight, cos, sin, eps=eps, kv_format=kv_format, quantize=quantize
    )


def check_latent(qr, kv, q_weight, kv_weight, cos, sin, kv_format: str, quantize: str | None) -> None:
    """ValueError unless these are arguments of `attention_inputs`."""
    if kv_format not in _FORMATS:
        raise ValueError(f"attention_inputs got kv_format {kv_format!r}, which is not one of {', '.join(_FORMATS)}.")
    if qr.shape[:2] != kv.shape[:2] or q_weight.shape != qr.shape[-1:] or kv_weight.shape != kv.shape[-1:]:
        raise ValueError(f"attention_inputs got qr {qr.shape}, kv {kv.shape}, weights {q_weight.shape} and {kv_weight.shape}.")
    _check_angles("attention_inputs", kv, cos, sin)
    if kv_format == "fp8":
        check_fp8_entry(kv.shape[-1], 2 * cos.shape[-1])
    if quantize is not None:
        check_quantize("attention_inputs", quantize, qr.shape[-1])


def queries(q, index_q, cos, sin, *, eps: float, fp4: bool):
    """Query heads: q [B, T, H, K] and the indexer's index_q [B, T, Hi, Ki] or None, bf16 (any float on xla).

    cos, sin fp32 [B, T, R/2] rotate the last R channels of every head. Returns (RoPE(RMSNorm(q)) without a weight, RoPE(index_q)); with
    fp4 the latter goes through the Hadamard transform and MXFP4, and comes back as the numbers MXFP4 holds.
    """
    _check_angles("queries", q, cos, sin)
    if index_q is not None:
        _check_angles("queries", index_q, cos, sin)
        width = index_q.shape[-1]
        if fp4 and (width & (width - 1) or width % MXFP4_BLOCK):
            raise ValueError(f"queries in FP4 need a power of two of at least {MXFP4_BLOCK} channels, got index_q {index_q.shape}.")
    return implementation("queries")(q, index_q, cos, sin, eps=eps, fp4=fp4)


def commit_rows(rings, rows, start: jax.Array, length: jax.Array):
    """Rings [B, n, ...] with the rows [B, T, ...] of the first `length` tokens at slot position % n, in place when donated.

    rings and rows: pytrees of one structure (all rings of a model at once: one launch); start, length int32 [B], the
    position of row 0 and how many rows count. Of positions that share a slot the last survives; rows at negative
    positions are dropped. ValueError for shapes that do not fit.
    """
    if jax.tree.structure(rings) != jax.tree.structure(rows):
        raise ValueError(f"commit_rows got rings {jax.tree.structure(rings)} but rows {jax.tree.structure(rows)}.")
    for ring, new in zip(jax.tree.leaves(rings), jax.tree.leaves(rows), strict=True):
        fits = ring.ndim >= 2 and new.ndim >= 2 and (ring.shape[0], *ring.shape[2:]) == (new.shape[0], *new.shape[2:])
        if not fits or ring.dtype != new.dtype or start.shape != ring.shape[:1] or length.shape != ring.shape[:1]:
            raise ValueError(
                f"commit_rows got a ring {ring.shape} {ring.dtype} for rows {new.shape} {new.dtype}, start {start.shape}, length "
                f"{length.shape}; they are [B, n, ...], [B, T, ...] of one dtype, [B] and [B]."
            )
    return implementation("commit_rows")(rings, rows, start, length)


def _check_angles(op: str, x, cos, sin) -> None:
    if cos.shape != sin.shape or cos.shape[:2] != x.shape[:2] or cos.ndim != 3 or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"{op} of {x.shape} got cos {cos.shape} and sin {sin.shape}; they are [B, T, R/2] with R of its channels.")


def check_fp8_entry(width: int, rope: int) -> None:
    """ValueError unless FP8KVCache holds entries of `width` channels of which the last `rope` are rotated."""
    if (width - rope) % KV_BLOCK:
        raise ValueError(
            f"the FP8 cache stores head_dim - rope_dim = {width - rope} channels in blocks of {KV_BLOCK}, which does not "
            "divide it; use the bf16 recipe."
        )


# --- native -----------------------------------------------------------------------------------------------------


def check_native_row(op: str, width: int, rope: int = 0) -> None:
    """ValueError unless one warp can hold the row."""
    if width > MAX_ROW or width % 8 or rope % 8:
        raise ValueError(
            f"{op} on {current()} takes rows of at most {MAX_ROW} channels, of which and of whose rotated ones there is a "
            f"multiple of 8, got {width} with {rope} rotated; use backend('xla')."
        )


def require_dtype(op: str, dtype, **arrays) -> None:
    """ValueError that names the first of `arrays` that is not of `dtype`; None passes."""
    for name, x in arrays.items():
        if x is not None and x.dtype != dtype:
            raise ValueError(f"{op} on {current()} takes {name} in {jnp.dtype(dtype)}, got {x.dtype}; convert it, or use backend('xla').")


def entry_shapes(kind: str, leading: tuple[int, ...], width: int, rope: int) -> tuple:
    """Shapes of (data, scale) of entries [*leading, width] in a format of `kv_format`; scale is None for plain ones."""
    if kind == "plain":
        return jax.ShapeDtypeStruct((*leading, width), jnp.bfloat16), None
    blocks = (width - rope) // KV_BLOCK
    data = jax.ShapeDtypeStruct((*leading, width + rope), jnp.uint8)
    return data, jax.ShapeDtypeStruct((*leading, blocks + -blocks % 8), jnp.uint8)


class LatentPart(NamedTuple):
    """What the latent projections add to a launch, in the order of LatentInputs, LatentOutputs and LatentShape."""

    inputs: list
    outputs: list
    scalars: list
    collect: Callable[[Sequence[jax.Array | None]], tuple]  # the outputs -> what `attention_inputs` returns


def latent_part(op: str, qr, kv, q_weight, kv_weight, cos, sin, *, eps, kv_format, quantize) -> LatentPart:
    """Arguments of `attention_inputs` as a part of a launch of `op`; ValueError for what kernels do not take."""
    q_width, width, rope = qr.shape[-1], kv.shape[-1], 2 * cos.shape[-1]
    require_dtype(op, jnp.bfloat16, qr=qr, kv=kv, q_weight=q_weight, kv_weight=kv_weight)
    require_dtype(op, jnp.float32, cos=cos, sin=sin)
    check_native_row(op, width, rope)
    leading, rows = qr.shape[:2], qr.shape[0] * qr.shape[1]
    data, scale = entry_shapes(kv_format, leading, width, rope)

    def collect(outputs):
        normed, *codes, entry, entry_scale = outputs
        return normed, collect_codes(codes, quantize), entry if kv_format == "plain" else FP8KVCache(entry, entry_scale)

    return LatentPart(
        [qr, kv, q_weight, kv_weight, cos, sin],
        [jax.ShapeDtypeStruct(qr.shape, qr.dtype), *code_shapes(qr.shape, quantize), data, scale],
        [
            rows, q_width, width, rope, CODE_FORMATS[quantize], _FORMATS[kv_format], 0 if scale is None else scale.shape[-1],
            float(eps),
        ],
        collect,
    )  # fmt: skip


@native("attention_inputs")
def _attention_inputs(qr, *arrays, **static):
    part = latent_part("attention_inputs", qr, *arrays, **static)
    return part.collect(launch(
        "attention_inputs", "entries", "attention_inputs", grid=(2 * qr.shape[0] * qr.shape[1],),
        block=row_threads("attention_inputs", qr.shape[-1]), inputs=part.inputs, outputs=part.outputs, scalars=part.scalars,
    ))  # fmt: skip


@native("queries")
def _queries(q, index_q, cos, sin, *, eps, fp4):
    op, (batch, tokens, heads, width), rope = "queries", q.shape, 2 * cos.shape[-1]
    require_dtype(op, jnp.bfloat16, q=q, index_q=index_q)
    require_dtype(op, jnp.float32, cos=cos, sin=sin)
    check_native_row(op, width, rope)
    index_heads, index_width = (0, 0) if index_q is None else index_q.shape[2:]
    check_native_row(op, index_width, rope)
    if index_q is not None and fp4:
        check_native_hadamard(op, index_width)
    return launch(
        op, "entries", "queries", grid=(-(-batch * tokens * (heads + index_heads) // _WARPS),), block=32 * _WARPS,
        inputs=[q, index_q, cos, sin],
        outputs=[x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, index_q)],
        scalars=[
            batch * tokens, heads, width, index_heads, index_width, rope, bool(fp4), float(eps), hadamard_scale(index_width),
        ],
    )  # fmt: skip


def check_native_hadamard(op: str, width: int) -> None:
    """ValueError unless a kernel can transform a row of `width` channels, a power of two."""
    if not MXFP4_BLOCK <= width <= 256:
        raise ValueError(
            f"{op} on {current()} transforms rows of {MXFP4_BLOCK} to 256 channels, got {width}; use backend('xla')."
        )


def hadamard_scale(width: int) -> float:
    """What makes the transform of `width` channels orthonormal; 0 for none."""
    return float(width) ** -0.5 if width else 0.0


@native("encode_kv")
def _encode_kv(kv, rope_dim):
    width, leading = kv.shape[-1], kv.shape[:-1]
    check_native_row("encode_kv", width, rope_dim)
    if kv.dtype not in (jnp.bfloat16, jnp.float32):
        require_dtype("encode_kv", jnp.bfloat16, kv=kv)
    rows = kv.size // width
    data, scale = entry_shapes("fp8", leading, width, rope_dim)
    return FP8KVCache(*launch(
        "encode_kv", "entries", "encode_kv_bf16" if kv.dtype == jnp.bfloat16 else "encode_kv_fp32",
        grid=(-(-rows // _WARPS),), block=32 * _WARPS, inputs=[kv], outputs=[data, scale],
        scalars=[rows, width, rope_dim, scale.shape[-1]],
    ))  # fmt: skip


@native("kv_values")
def _kv_values(cache, rope_dim):
    if not isinstance(cache, FP8KVCache):
        return cache
    *leading, size = cache.data.shape
    nope = size - 2 * rope_dim
    if nope % 8 or rope_dim % 8:
        raise ValueError(
            f"kv_values on {current()} takes a multiple of 8 of both kinds of channels, got {nope} in FP8 and {rope_dim} rotated; "
            "use backend('xla')."
        )
    rows = cache.data.size // size
    (values,) = launch(
        "kv_values", "entries", "kv_values", grid=(-(-rows // _WARPS),), block=32 * _WARPS, inputs=[cache.data, cache.scale],
        outputs=[jax.ShapeDtypeStruct((*leading, nope + rope_dim), jnp.bfloat16)],
        scalars=[rows, nope, rope_dim, cache.scale.shape[-1]],
    )  # fmt: skip
    return values


@native("commit_rows")
def _commit_rows(rings, rows, start, length):
    require_dtype("commit_rows", jnp.int32, start=start, length=length)
    leaves, structure = jax.tree.flatten(rings)
    news = jax.tree.leaves(rows)
    done = []
    while len(done) < len(leaves):
        done += _commit_some(leaves[len(done) :], news[len(done) :], start, length)
    return jax.tree.unflatten(structure, done)


def _commit_some(rings, rows, start, length) -> list:
    """One launch over as many rings as fit and share T with the first."""
    tokens, most = rows[0].shape[1], _RINGS_OF_A_LAUNCH[-1]
    count = next((i for i, new in enumerate(rows[:most]) if new.shape[1] != tokens), min(len(rows), most))
    capacity = next(c for c in _RINGS_OF_A_LAUNCH if count <= c)
    rings, rows, rest = rings[:count], rows[:count], [None] * (capacity - count)
    sizes = [ring.shape[1] for ring in rings]
    nbytes = [ring.size // (ring.shape[0] * ring.shape[1]) * ring.dtype.itemsize for ring in rings]
    zeros = [0] * len(rest)
    return list(launch(
        "commit_rows", "entries", f"commit_rows_{capacity}", grid=(count, start.shape[0]), block=256,
        inputs=[*rings, *rest, *rows, *rest, start, length],
        outputs=[*(jax.ShapeDtypeStruct(ring.shape, ring.dtype) for ring in rings), *rest],
        scalars=[*sizes, *zeros, *nbytes, *zeros, tokens],
        aliases={i: i for i in range(count)},
    )[:count])  # fmt: skip
