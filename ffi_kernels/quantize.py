"""Quantize, dequantize, convert: contracts, checks, dispatch. The formats are the classes of `tensor.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import implementation
from ffi_kernels.tensor import KV_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, FP8Activation, FP8KVCache, FP8Tensor, MXFP4Tensor, NVFP4Tensor


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
    return implementation("quantize_fp8_weight")(w)


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
    return implementation("quantize_nvfp4_weight")(w)


def mxfp4_to_nvfp4(w: MXFP4Tensor) -> tuple[NVFP4Tensor, jax.Array]:
    """The same numbers as NVFP4, and the int32 count of blocks whose scale NVFP4 cannot hold (they become zero)."""
    return implementation("mxfp4_to_nvfp4")(w)


def dequantize(t) -> jax.Array:
    """Any array of `tensor.QUANTIZED` but a cache, or a plain one -> fp32 of its logical shape."""
    return implementation("dequantize")(t)


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
