"""Ops of DeepSeek-V4: one meaning (`reference.py`), several implementations. Knows no model.

>>> import ffi_kernels as ops
>>> y = ops.linear(ops.quantize_nvfp4_rows(x), ops.quantize_nvfp4_weight(w))
"""

from ffi_kernels.attention import attention, compress_pool
from ffi_kernels.chain import chained
from ffi_kernels.compressor import Compression, attention_inputs_and_compress, compress_append
from ffi_kernels.decode_attention import decode_attention
from ffi_kernels.dispatch import backend, backends, current
from ffi_kernels.entries import attention_inputs, commit_rows, queries
from ffi_kernels.experts import experts
from ffi_kernels.indexer import index_scores, top_entries
from ffi_kernels.hyper_connections import hc_head, hc_head_norm, hc_post, hc_post_pre_norm, hc_pre, hc_pre_norm
from ffi_kernels.linear import gathered_linear, grouped_linear, linear, linears
from ffi_kernels.matmul import nvfp4_matmul
from ffi_kernels.moe import route, router_scores, swiglu
from ffi_kernels.norm import hadamard, rms_norm, rms_norm_quantize, rope
from ffi_kernels.numerics import round_to
from ffi_kernels.quantize import (
    dequantize, encode_kv, kv_values, mxfp4_to_nvfp4, quantize_fp8, quantize_fp8_weight, quantize_mxfp4,
    quantize_nvfp4_rows, quantize_nvfp4_weight, swiglu_quantize,
)  # fmt: skip
from ffi_kernels.router import route_tokens
from ffi_kernels.tensor import QUANTIZED, FP8Activation, FP8KVCache, FP8Tensor, MXFP4Tensor, NVFP4Tensor, Unquantized

__all__ = [
    "QUANTIZED", "Compression", "FP8Activation", "FP8KVCache", "FP8Tensor", "MXFP4Tensor", "NVFP4Tensor", "Unquantized", "attention", "attention_inputs", "attention_inputs_and_compress", "backend",
    "backends", "chained", "commit_rows", "compress_append", "compress_pool", "current", "decode_attention", "dequantize", "encode_kv", "experts", "gathered_linear", "grouped_linear", "hadamard",
    "hc_head", "hc_head_norm", "hc_post", "hc_post_pre_norm", "hc_pre", "hc_pre_norm", "index_scores", "kv_values", "linear", "linears", "mxfp4_to_nvfp4", "nvfp4_matmul", "quantize_fp8",
    "quantize_fp8_weight", "quantize_mxfp4", "quantize_nvfp4_rows", "quantize_nvfp4_weight", "queries", "rms_norm", "rms_norm_quantize", "rope",
    "round_to", "route", "route_tokens", "router_scores", "swiglu", "swiglu_quantize", "top_entries",
]  # fmt: skip
