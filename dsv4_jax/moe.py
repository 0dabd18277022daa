"""Mixture of experts of one block: routing by score or by token id, routed experts, shared expert (facts section 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import DECODE_TOKENS
from dsv4_jax.layers import linears, op_input
from dsv4_jax.sharding import TENSOR, Context

def moe(ctx: Context, w: dict, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """x [B, T, D], tokens int32 [B, T] (hash routing) -> [B, T, D].

    A decode step gathers the matrices that each token picked; a prompt chunk passes every expert in turn.
    """
    c = ctx.config
    flat = x.reshape(-1, x.shape[-1])
    gate = w["gate"]
    ids, weights = ops.route_tokens(
        flat, gate["weight"], gate.get("bias"), gate.get("tid2eid"), tokens.reshape(-1),
        count=c.num_experts_per_tok, scale=c.routed_scaling_factor,
    )  # fmt: skip
    ctx.save("experts", ids)

    experts = w["experts"]
    local = experts["w1"].shape[0]
    if local != c.n_routed_experts:  # whole experts are split over `tensor`: the others' slots weigh nothing here
        ids = ids - jax.lax.axis_index(TENSOR) * local
        mine = (ids >= 0) & (ids < local)
        ids, weights = jnp.where(mine, ids, 0), jnp.where(mine, weights, 0.0)

    alone = ctx.tensor_size == 1
    if x.shape[1] <= DECODE_TOKENS:
        dtype = ctx.recipe.activation_dtype if alone else jnp.float32
        # The shared expert is always split over its width, so its rows of h are shards on any mesh.
        row_max = None if alone else ctx.pmax
        y = ops.experts(flat, experts, w["shared_experts"], ids, weights, c.swiglu_limit, dtype, row_max)
    else:
        y = _every_expert(ctx, experts, flat, ids, weights) + _expert(ctx, w["shared_experts"], flat, None, split=True)
    y = ops.round_to(ctx.psum(y), ctx.recipe.activation_dtype)
    return y.reshape(x.shape)


def _expert(ctx: Context, w: dict, x: jax.Array, weight: jax.Array | None, split: bool) -> jax.Array:
    """One SwiGLU expert: x [T, D], weight fp32 [T] or None -> fp32 [T, D], unsummed over `tensor`."""
    gate, up = linears(ctx, x, None, w["w1"], w["w3"], dtypes=(jnp.float32, jnp.float32))
    weight = None if weight is None else weight[:, None]
    h = ops.swiglu(gate, up, weight, ctx.config.swiglu_limit, ctx.recipe.activation_dtype)
    return ops.linear(op_input(ctx, h, None, w["w2"], split), w["w2"])


def _every_expert(ctx, w, x, ids, weights) -> jax.Array:
    """Sum over experts in order of their id; a token that did not pick an expert passes with weight zero."""
    split = ctx.expert_sharding == "width"

    def body(total, numbered):
        e, one = numbered
        weight = jnp.where(ids == e, weights, 0.0).sum(-1)
        return total + jnp.where((weight != 0)[:, None], _expert(ctx, one, x, weight, split), 0.0), None

    return jax.lax.scan(body, jnp.zeros(x.shape, jnp.float32), (jnp.arange(w["w1"].shape[0]), w))[0]
