"""The parts every block uses: linear with any weight, RoPE tables, embedding, head.

`linear` is the only place where the type of a weight picks an op and quantizes its input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import ffi_kernels as ops
from dsv4_jax.config import rope_frequencies
from dsv4_jax.sharding import Context


def quantize_input(ctx: Context, x: jax.Array, w, split: bool = False):
    """x [..., K] in the format that weight `w` takes; `split`: K is a shard of the row over `tensor`."""
    if isinstance(w, ops.NVFP4Tensor):
        amax = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32)
        return ops.quantize_nvfp4_rows(x, ctx.pmax(amax) if split else amax)
    if isinstance(w, (ops.FP8Tensor, ops.MXFP4Tensor)):
        return ops.quantize_fp8(x)
    return x


def linear(ctx: Context, x: jax.Array, *weights, split: bool = False):
    """x [..., K] times each weight [N, K] transposed -> [..., N] in the activation dtype (a tuple for several).

    The input is quantized once per format. `split`: K is a shard, and the products are summed over `tensor`.
    """
    inputs = {}
    outputs = []
    for w in weights:
        kind = ops.FP8Tensor if isinstance(w, ops.MXFP4Tensor) else type(w)
        if kind not in inputs:
            inputs[kind] = quantize_input(ctx, x, w, split)
        out = ops.linear(inputs[kind], w)
        outputs.append(ops.round_to(ctx.psum(out) if split else out, ctx.recipe.activation_dtype))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def grouped_linear(ctx: Context, x: jax.Array, w) -> jax.Array:
    """x [..., G, K], w [G, N, K] -> [..., G, N] in the activation dtype. FP8 weights take plain input here (wo_a)."""
    x = quantize_input(ctx, x, w) if isinstance(w, ops.NVFP4Tensor) else x
    return ops.round_to(ops.grouped_linear(x, w), ctx.recipe.activation_dtype)


def rope_angles(ctx: Context, ratio: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin fp32 [..., R/2] at int32 positions [...], for a layer with this compress ratio."""
    frequencies = jnp.asarray(np.asarray(rope_frequencies(ctx.config, ratio), np.float32))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def norm(ctx: Context, x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """RMSNorm with the model's epsilon."""
    return ops.rms_norm(x, weight, ctx.config.rms_norm_eps)


def embed(ctx: Context, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """tokens int32 [...] -> [..., D]; columns are split over `tensor`. An id outside the vocabulary gives nan."""
    known = (tokens >= 0) & (tokens < ctx.config.vocab_size)
    rows = jnp.take(table, jnp.where(known, tokens, 0), axis=0)
    rows = jnp.where(known[..., None], rows, jnp.nan).astype(ctx.recipe.activation_dtype)
    return ctx.gather_last(rows)


def to_streams(ctx: Context, x: jax.Array) -> jax.Array:
    """[..., D] -> the residual [..., M, D]: M equal streams."""
    return jnp.repeat(x[..., None, :], ctx.config.hc_mult, axis=-2)


def head(ctx: Context, streams: jax.Array, hc: dict, norm_weight: jax.Array, table: jax.Array) -> jax.Array:
    """Residual [..., M, D] -> logits fp32 [..., V]; vocabulary rows are split over `tensor`."""
    c = ctx.config
    x = ops.hc_head(streams, hc["fn"], hc["base"], hc["scale"], eps=c.hc_eps, norm_eps=c.rms_norm_eps)
    return ctx.gather_last(ops.linear(norm(ctx, x, norm_weight), table))
