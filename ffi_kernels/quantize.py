"""Quantize, dequantize, convert: contracts, checks, launches. The formats are the classes of `tensor.py`.

Kernels: `native/cuda/quantize.cu`. What a fused op needs to hand out a quantized row (`code_shapes`, `collect_codes`,
...) is here too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ffi_kernels import reference
from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import launch, native
from ffi_kernels.tensor import (
    FP8_BLOCK, KV_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, FP8Activation, FP8KVCache, FP8Tensor, MXFP4Tensor, NVFP4Tensor,
    require_layout,
)  # fmt: skip


def _require_float(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} takes floating-point input, got {x.dtype}; quantize the values, not their codes.")


def _require_multiple(name: str, x: jax.Array, block: int) -> None:
    if x.ndim == 0 or x.shape[-1] % block:
        raise ValueError(f"{name} needs the last axis to be a multiple of {block}, got shape {x.shape}; pad it with zeros.")


def quantize_fp8(x: jax.Array) -> FP8Activation:
    """Activation float [..., K] -> e4m3 with one e8m0 scale per row and 128 channels (facts section 3)."""
    _require_float("quantize_fp8", x)
    return implementation("quantize_fp8")(x)


def quantize_fp8_weight(w: jax.Array) -> FP8Tensor:
    """Weight float [..., N, K] -> e4m3 with one e8m0 scale per 128 x 128."""
    _require_float("quantize_fp8_weight", w)
    return reference.quantize_fp8_weight(w)


def quantize_mxfp4(x: jax.Array) -> MXFP4Tensor:
    """float [..., K], K a multiple of 32 -> e2m1 with one e8m0 scale per 32 channels."""
    _require_float("quantize_mxfp4", x)
    _require_multiple("quantize_mxfp4", x, MXFP4_BLOCK)
    return implementation("quantize_mxfp4")(x)


def quantize_nvfp4_rows(x: jax.Array, amax: jax.Array | None = None) -> NVFP4Tensor:
    """Activation float [..., K], K a multiple of 16 -> NVFP4 with one global scale per row.

    amax: float [..., 1], the largest magnitude of the row, where x holds only a shard of it.
    """
    _require_float("quantize_nvfp4_rows", x)
    _require_multiple("quantize_nvfp4_rows", x, NVFP4_BLOCK)
    return implementation("quantize_nvfp4_rows")(x, amax)


def quantize_nvfp4_weight(w: jax.Array) -> NVFP4Tensor:
    """Weight float [..., N, K], K a multiple of 16 -> NVFP4 with one global scale per matrix."""
    _require_float("quantize_nvfp4_weight", w)
    _require_multiple("quantize_nvfp4_weight", w, NVFP4_BLOCK)
    return reference.quantize_nvfp4_weight(w)


def mxfp4_to_nvfp4(w: MXFP4Tensor) -> tuple[NVFP4Tensor, jax.Array]:
    """The same numbers as NVFP4, and the int32 count of blocks whose scale NVFP4 cannot hold (they become zero)."""
    require_layout("mxfp4_to_nvfp4", w)
    return reference.mxfp4_to_nvfp4(w)


def dequantize(t) -> jax.Array:
    """Any array of `tensor.QUANTIZED` but a cache, or a plain one -> fp32 of its logical shape."""
    require_layout("dequantize", t)
    return implementation("dequantize")(t)


def swiglu_quantize(gate: jax.Array, up: jax.Array, weight: jax.Array | None, limit: float, dtype, quantize: str):
    """`swiglu` and its result quantized: (h [..., F] in dtype, FP8Activation for 'fp8' | NVFP4Tensor per row for 'nvfp4')."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu_quantize needs gate and up of one shape, got {gate.shape} and {up.shape}.")
    check_quantize("swiglu_quantize", quantize, gate.shape[-1])
    return implementation("swiglu_quantize")(gate, up, weight, limit, dtype, quantize)


def encode_kv(kv: jax.Array, rope_dim: int) -> FP8KVCache:
    """float [..., K] -> the 584-byte cache format (facts section 5); K - rope_dim must be a multiple of 64."""
    _require_float("encode_kv", kv)
    if (kv.shape[-1] - rope_dim) % KV_BLOCK:
        raise ValueError(
            f"the FP8 cache stores head_dim - rope_dim = {kv.shape[-1] - rope_dim} channels in blocks of {KV_BLOCK}, "
            "which does not divide it; use the bf16 recipe."
        )
    return implementation("encode_kv")(kv, rope_dim)


def kv_values(cache: FP8KVCache | jax.Array, rope_dim: int) -> jax.Array:
    """Entries of a cache in either format, as bf16 (FP8KVCache) or unchanged (plain) [..., K]."""
    return implementation("kv_values")(cache, rope_dim)


# --- native: rows that a fused op quantizes ------------------------------------------------------------------------

CODE_FORMATS = {None: 0, "fp8": 1, "nvfp4": 2}  # `quantize` of the fused ops, and its number in the kernels
VECTOR = 8  # channels per thread
_MAX_ROW = 1024 * VECTOR
_QUANTIZER_THREADS = 256


def check_quantize(op: str, quantize: str, channels: int) -> None:
    """ValueError unless `quantize` is 'fp8' or 'nvfp4' and the latter's blocks divide a row of `channels`."""
    if quantize not in ("fp8", "nvfp4"):
        raise ValueError(f"{op} quantizes to 'fp8' or 'nvfp4', got {quantize!r}.")
    if quantize == "nvfp4" and channels % NVFP4_BLOCK:
        raise ValueError(f"{op} to NVFP4 needs a multiple of {NVFP4_BLOCK} channels, got {channels}; use 'fp8'.")


def suffix_of(op: str, x: jax.Array) -> str:
    """'bf16' or 'fp32', as the kernels are named; ValueError for another dtype."""
    names = {jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.float32): "fp32"}
    if x.dtype not in names:
        raise ValueError(f"{op} on {current()} takes bf16 or fp32, got {x.dtype}; convert it, or use backend('xla').")
    return names[x.dtype]


def row_threads(op: str, channels: int) -> int:
    """Threads of a CTA that holds a row in registers; ValueError if it is too long."""
    if channels > _MAX_ROW:
        raise ValueError(f"{op} on {current()} holds rows of at most {_MAX_ROW} channels, got {channels}; use backend('xla').")
    return -(-channels // (32 * VECTOR)) * 32


def code_shapes(shape: tuple[int, ...], quantize: str | None) -> list[jax.ShapeDtypeStruct | None]:
    """Outputs of a launch for the codes, block scales and global scales of an activation of this shape."""
    *leading, channels = shape
    struct = jax.ShapeDtypeStruct
    if quantize == "fp8":
        return [struct(shape, jnp.float8_e4m3fn), struct((*leading, -(-channels // FP8_BLOCK)), jnp.uint8), None]
    if quantize == "nvfp4":
        return [
            struct((*leading, channels // 2), jnp.uint8),
            struct((*leading, channels // NVFP4_BLOCK), jnp.float8_e4m3fn),
            struct((*leading, 1), jnp.float32),
        ]
    return [None, None, None]


def collect_codes(codes, quantize: str | None) -> FP8Activation | NVFP4Tensor | None:
    """The arrays of `code_shapes`, as the tensor they are."""
    if quantize is None:
        return None
    return FP8Activation(*codes[:2]) if quantize == "fp8" else NVFP4Tensor(*codes)


# --- native: the ops -----------------------------------------------------------------------------------------------


def _quantize_blocks(op: str, x: jax.Array, threads: int, outputs) -> tuple:
    """A kernel whose CTA of 256 threads needs `threads` of them in all."""
    width = x.shape[-1]
    return launch(
        op, "quantize", f"{op}_{suffix_of(op, x)}", grid=(-(-threads // _QUANTIZER_THREADS),), block=_QUANTIZER_THREADS,
        inputs=[x], outputs=outputs, scalars=[x.size // width, width],
    )  # fmt: skip


@native("quantize_fp8")
def _native_quantize_fp8(x):
    outputs = code_shapes(x.shape, "fp8")[:2]
    return FP8Activation(*_quantize_blocks("quantize_fp8", x, outputs[1].size * FP8_BLOCK // VECTOR, outputs))


@native("quantize_mxfp4")
def _native_quantize_mxfp4(x):
    *leading, k = x.shape
    outputs = [jax.ShapeDtypeStruct((*leading, k // n), jnp.uint8) for n in (2, MXFP4_BLOCK)]
    return MXFP4Tensor(*_quantize_blocks("quantize_mxfp4", x, x.size // VECTOR, outputs))


@native("quantize_nvfp4_rows")
def _native_quantize_nvfp4_rows(x, amax):
    *leading, k = x.shape
    if amax is not None:
        amax = jnp.broadcast_to(amax.astype(jnp.float32), (*leading, 1))
    codes = launch(
        "quantize_nvfp4_rows", "quantize", f"quantize_nvfp4_{suffix_of('quantize_nvfp4_rows', x)}",
        grid=(math.prod(leading),), block=row_threads("quantize_nvfp4_rows", min(k, _MAX_ROW)),
        inputs=[x, amax], outputs=code_shapes(x.shape, "nvfp4"), scalars=[k],
    )  # fmt: skip
    return collect_codes(codes, "nvfp4")


@native("dequantize")
def _native_dequantize(t):
    if isinstance(t, jax.Array):
        return t.astype(jnp.float32)
    *leading, k = t.shape
    rows, threads = math.prod(leading), math.prod(leading) * -(-k // VECTOR)
    how = dict(grid=(-(-threads // _QUANTIZER_THREADS),), block=_QUANTIZER_THREADS, outputs=[jax.ShapeDtypeStruct(t.shape, jnp.float32)])
    if isinstance(t, (FP8Activation, FP8Tensor)):
        per_scale = FP8_BLOCK if isinstance(t, FP8Tensor) else 1
        matrix_rows = leading[-1] if isinstance(t, FP8Tensor) else rows
        scalars = [rows, matrix_rows, k, per_scale]
        return launch("dequantize", "quantize", "dequantize_fp8", inputs=[t.data, t.scale], scalars=scalars, **how)[0]
    scale, per_global = None, 1
    if isinstance(t, NVFP4Tensor):
        scale = t.global_scale
        if scale.ndim == t.data.ndim:
            scale = jnp.broadcast_to(scale, (*leading, 1))
        else:
            scale, per_global = jnp.broadcast_to(scale, leading[:-1]), leading[-1]
    return launch(
        "dequantize", "quantize", "dequantize_fp4", inputs=[t.data, t.scale, scale], scalars=[rows, k, per_global], **how
    )[0]


def _launch_swiglu(op: str, gate, up, weight, limit: float, dtype, quantize: str | None):
    if gate.dtype != jnp.float32 or up.dtype != jnp.float32:
        raise ValueError(f"{op} on {current()} takes fp32 products, got {gate.dtype} and {up.dtype}; use backend('xla').")
    *leading, width = gate.shape
    if weight is not None:
        if weight.shape[-1:] != (1,):
            raise ValueError(f"{op} on {current()} takes one weight per row [..., 1], got {weight.shape}; use backend('xla').")
        weight = jnp.broadcast_to(weight.astype(jnp.float32), (*leading, 1))
    out = jax.ShapeDtypeStruct(gate.shape, dtype)
    h, *codes = launch(
        op, "quantize", f"swiglu_{suffix_of(op, out)}", grid=(math.prod(leading),), block=row_threads(op, width),
        inputs=[gate, up, weight], outputs=[out, *code_shapes(gate.shape, quantize)],
        scalars=[width, CODE_FORMATS[quantize], float(limit)],
    )  # fmt: skip
    return h, collect_codes(codes, quantize)


@native("swiglu")
def _native_swiglu(gate, up, weight, limit: float, dtype):
    return _launch_swiglu("swiglu", gate, up, weight, limit, dtype, None)[0]


@native("swiglu_quantize")
def _native_swiglu_quantize(gate, up, weight, limit: float, dtype, quantize: str):
    return _launch_swiglu("swiglu_quantize", gate, up, weight, limit, dtype, quantize)
