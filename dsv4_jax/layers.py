"""The parts every block uses: linear with any weight, RoPE tables, embedding, head.

`linear` is the only place where the type of a weight picks an op and quantizes its input.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

import ffi_kernels as ops
from dsv4_jax.cache import DECODE_TOKENS
from dsv4_jax.config import rope_frequencies
from dsv4_jax.sharding import Context


NATIVE_ROWS = 16  # tokens of a step that the native kernels serve


def kernels_for(batch: int, tokens: int):
    """Context in which a call over [B, T] tokens is traced: native kernels serve decode steps, prompts run on xla."""
    few = tokens <= DECODE_TOKENS and batch * tokens <= NATIVE_ROWS
    return contextlib.nullcontext() if few else ops.backend("xla")


def input_format(w) -> str | None:
    """The format in which weight `w` takes its input: 'fp8', 'nvfp4', or None for the activation dtype."""
    return {ops.NVFP4Tensor: "nvfp4", ops.FP8Tensor: "fp8", ops.MXFP4Tensor: "fp8"}.get(type(w))


_FORMAT = {ops.FP8Activation: "fp8", ops.NVFP4Tensor: "nvfp4"}


def op_input(ctx: Context, x: jax.Array, quantized, w, split: bool):
    """x [..., K] as the op takes it for weight `w`: `quantized` where that is its format, else to be quantized by the op."""
    wanted = input_format(w)
    if wanted is None:
        return x
    if quantized is not None and _FORMAT[type(quantized)] == wanted:
        return quantized
    if wanted == "nvfp4" and split and ctx.tensor_size > 1:  # the row's largest magnitude may lie on another device
        amax = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32)
        return ops.quantize_nvfp4_rows(x, ctx.pmax(amax))
    return ops.Unquantized(x)


def linears(ctx: Context, x, quantized, *weights, dtypes=None) -> tuple[jax.Array, ...]:
    """x [..., K] times each weight [N, K] transposed, in one launch -> [..., N] each, in the activation dtype or `dtypes`.

    quantized: the same x in the format of some of the weights, or None. x: one array, or one per weight.
    """
    xs = x if isinstance(x, tuple) else (x,) * len(weights)
    inputs = tuple(op_input(ctx, one, quantized, w, False) for one, w in zip(xs, weights, strict=True))
    return ops.linears(inputs, weights, dtypes or (ctx.recipe.activation_dtype,) * len(weights))


def linear(ctx: Context, x: jax.Array, w, split: bool = False) -> jax.Array:
    """x [..., K] times w [N, K] transposed -> [..., N] in the activation dtype.

    `split`: K is a shard, and the products are summed over `tensor`.
    """
    if not split or ctx.tensor_size == 1:
        return ops.linear(op_input(ctx, x, None, w, False), w, ctx.recipe.activation_dtype)
    return ops.round_to(ctx.psum(ops.linear(op_input(ctx, x, None, w, True), w)), ctx.recipe.activation_dtype)


def grouped_linear(ctx: Context, x: jax.Array, w) -> jax.Array:
    """x [..., G, K], w [G, N, K] -> [..., G, N] in the activation dtype. FP8 weights take plain input here (wo_a)."""
    x = ops.Unquantized(x) if isinstance(w, ops.NVFP4Tensor) else x
    return ops.grouped_linear(x, w, ctx.recipe.activation_dtype)


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
    batch, tokens = (*streams.shape[:-2], 1)[:2]
    with kernels_for(batch, tokens):
        x = ops.hc_head_norm(streams, hc["fn"], hc["base"], hc["scale"], norm_weight, eps=c.hc_eps, norm_eps=c.rms_norm_eps)
        return ctx.gather_last(ops.linear(x, table))
