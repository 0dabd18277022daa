"""Cases of the quantizers by themselves and of SwiGLU: one token, and enough rows to show the bandwidth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes

_MANY = 4096  # rows
_CODE_BYTES = {"quantize_fp8": 1 + 1 / 128, "quantize_mxfp4": 0.5 + 1 / 32, "quantize_nvfp4_rows": 0.5 + 1 / 16}


def _make_rows(key, rows: int, width: int) -> tuple:
    return (jax.random.normal(key, (rows, width), jnp.bfloat16),)


def _make_codes(key, rows: int, width: int, quantize: str) -> tuple:
    with ops.backend("xla"):
        return (getattr(ops, quantize)(*_make_rows(key, rows, width)),)


def _make_products(key, rows: int, width: int) -> tuple:
    keys = jax.random.split(key, 3)
    gate, up = (4 * jax.random.normal(k, (rows, width), jnp.float32) for k in keys[:2])
    return gate, up, jax.random.uniform(keys[2], (rows, 1), jnp.float32)


def _swiglu(gate, up, weight, limit: float, quantize: str):
    return ops.swiglu_quantize(gate, up, weight, limit, jnp.bfloat16, quantize)


def _quantizer(name: str, rows: int, width: int) -> Case:
    return Case(
        f"{name} {rows} rows of {width}", name, functools.partial(_make_rows, rows=rows, width=width), getattr(ops, name),
        bytes=int(rows * width * (2 + _CODE_BYTES[name])), flops=3 * rows * width, bounds="exact", rows=rows,
    )  # fmt: skip


def _dequantizer(name: str, rows: int, width: int) -> Case:
    return Case(
        f"dequantize {name.removeprefix('quantize_')} {rows} rows of {width}", "dequantize",
        functools.partial(_make_codes, rows=rows, width=width, quantize=name), ops.dequantize,
        bytes=int(rows * width * (4 + _CODE_BYTES[name])), flops=2 * rows * width, bounds="exact", rows=rows,
    )  # fmt: skip


def cases(shapes: Shapes) -> list[Case]:
    """Every quantizer on one row and on many, its inverse on many, SwiGLU of one token's experts."""
    width, experts = shapes.expert_width, shapes.per_token + 1
    swiglu = [
        Case(
            f"swiglu_quantize {experts} experts {quantize}", "swiglu_quantize",
            functools.partial(_make_products, rows=experts, width=width),
            functools.partial(_swiglu, limit=10.0, quantize=quantize),
            bytes=int(experts * width * (10 + size)), flops=10 * experts * width, bounds="bf16",
            same=lambda outputs: outputs[0],
        )
        for quantize, size in (("fp8", _CODE_BYTES["quantize_fp8"]), ("nvfp4", _CODE_BYTES["quantize_nvfp4_rows"]))
    ]  # fmt: skip
    return [
        *(_quantizer(name, rows, shapes.hidden) for name in _CODE_BYTES for rows in (1, _MANY)),
        *(_dequantizer(name, _MANY, shapes.hidden) for name in _CODE_BYTES),
        *swiglu,
    ]
