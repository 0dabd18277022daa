"""Fused norm, hyper-connection and SwiGLU ops in plain jnp: compositions of `reference.py`, and their `xla` backend.

Rounding points are those of the parts. Contracts: `norm.py`, `hyper_connections.py`, `quantize.py`.
"""

from __future__ import annotations

import jax

from ffi_kernels import reference


def _quantized(x: jax.Array, quantize: str | None):
    if quantize is None:
        return None
    return reference.quantize_fp8(x) if quantize == "fp8" else reference.quantize_nvfp4_rows(x)


def rms_norm_quantize(x, weight, eps: float, quantize: str):
    """y = rms_norm(x), and y quantized."""
    y = reference.rms_norm(x, weight, eps)
    return y, _quantized(y, quantize)


def swiglu_quantize(gate, up, weight, limit: float, dtype, quantize: str):
    """h = swiglu(...), and h quantized."""
    h = reference.swiglu(gate, up, weight, limit, dtype)
    return h, _quantized(h, quantize)


def hc_pre_norm(streams, fn, base, scale, norm_weight, *, iterations: int, eps: float, norm_eps: float, quantize: str | None):
    """hc_pre, rms_norm of the sublayer input, quantize: (x, quantized or None, post, comb)."""
    y, post, comb = reference.hc_pre(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)
    x = reference.rms_norm(y, norm_weight, norm_eps)
    return x, _quantized(x, quantize), post, comb


def hc_post_pre_norm(
    streams, f, post, comb, fn, base, scale, norm_weight,
    *, iterations: int, eps: float, norm_eps: float, quantize: str | None,
):  # fmt: skip
    """hc_post, then hc_pre_norm of the next site: (new streams, x, quantized or None, post, comb)."""
    streams = reference.hc_post(streams, f, post, comb)
    static = {"iterations": iterations, "eps": eps, "norm_eps": norm_eps, "quantize": quantize}
    return streams, *hc_pre_norm(streams, fn, base, scale, norm_weight, **static)


def hc_head_norm(streams, fn, base, scale, norm_weight, *, eps: float, norm_eps: float) -> jax.Array:
    """hc_head, then rms_norm."""
    return reference.rms_norm(reference.hc_head(streams, fn, base, scale, eps=eps, norm_eps=norm_eps), norm_weight, norm_eps)
