"""Ops of DeepSeek-V4: one meaning (`reference.py`), several implementations. Knows no model.

>>> import ffi_kernels as ops
>>> y = ops.linear(ops.quantize_nvfp4_rows(x), ops.quantize_nvfp4_weight(w))
"""

from ffi_kernels.attention import attention, compress_pool, index_scores, top_entries
from ffi_kernels.dispatch import backend, backends, current
from ffi_kernels.linear import gathered_linear, grouped_linear, linear
from ffi_kernels.moe import route, router_scores, swiglu
from ffi_kernels.norm import hadamard, hc_head, hc_post, hc_pre, rms_norm, rope
from ffi_kernels.numerics import round_to
from ffi_kernels.quantize import (
    dequantize, encode_kv, kv_values, mxfp4_to_nvfp4, quantize_fp8, quantize_fp8_weight, quantize_mxfp4,
    quantize_nvfp4_rows, quantize_nvfp4_weight,
)  # fmt: skip
from ffi_kernels.tensor import QUANTIZED, FP8Activation, FP8KVCache, FP8Tensor, MXFP4Tensor, NVFP4Tensor

__all__ = [
    "QUANTIZED", "FP8Activation", "FP8KVCache", "FP8Tensor", "MXFP4Tensor", "NVFP4Tensor", "attention", "backend",
    "backends", "compress_pool", "current", "dequantize", "encode_kv", "gathered_linear", "grouped_linear", "hadamard",
    "hc_head", "hc_post", "hc_pre", "index_scores", "kv_values", "linear", "mxfp4_to_nvfp4", "quantize_fp8",
    "quantize_fp8_weight", "quantize_mxfp4", "quantize_nvfp4_rows", "quantize_nvfp4_weight", "rms_norm", "rope",
    "round_to", "route", "router_scores", "swiglu", "top_entries",
]  # fmt: skip
