"""Mixture of experts of one block: routing by score or by token id, routed experts, shared expert (facts section 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from dsv4_jax.cache import DECODE_TOKENS
from dsv4_jax.layers import quantize_input
from dsv4_jax.sharding import TENSOR, Context

def moe(ctx: Context, w: dict, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """x [B, T, D], tokens int32 [B, T] (hash routing) -> [B, T, D].

    A decode step gathers the matrices that each token picked; a prompt chunk passes every expert in turn.
    """
    c = ctx.config
    flat = x.reshape(-1, x.shape[-1])
    gate = w["gate"]
    scores = ops.router_scores(flat, gate["weight"])
    fixed = None
    if "tid2eid" in gate:
        fixed = jnp.take(gate["tid2eid"], jnp.clip(tokens.reshape(-1), 0, c.vocab_size - 1), axis=0)
    ids, weights = ops.route(scores, gate.get("bias"), fixed, c.num_experts_per_tok, c.routed_scaling_factor)
    ctx.save("experts", ids)

    experts = w["experts"]
    local = experts["w1"].shape[0]
    if local != c.n_routed_experts:  # whole experts are split over `tensor`: the others' slots weigh nothing here
        ids = ids - jax.lax.axis_index(TENSOR) * local
        mine = (ids >= 0) & (ids < local)
        ids, weights = jnp.where(mine, ids, 0), jnp.where(mine, weights, 0.0)

    split = ctx.expert_sharding == "width"
    routed = (_gathered if x.shape[1] <= DECODE_TOKENS else _every_expert)(ctx, experts, flat, ids, weights, split)
    shared = _expert(ctx, w["shared_experts"], flat, None, split=True)
    y = ops.round_to(ctx.psum(routed + shared), ctx.recipe.activation_dtype)
    return y.reshape(x.shape)


def _expert(ctx: Context, w: dict, x: jax.Array, weight: jax.Array | None, split: bool) -> jax.Array:
    """One SwiGLU expert: x [T, D], weight fp32 [T] or None -> fp32 [T, D], unsummed over `tensor`."""
    inputs = quantize_input(ctx, x, w["w1"])
    gate, up = ops.linear(inputs, w["w1"]), ops.linear(inputs, w["w3"])
    weight = None if weight is None else weight[:, None]
    h = ops.swiglu(gate, up, weight, ctx.config.swiglu_limit, ctx.recipe.activation_dtype)
    return ops.linear(quantize_input(ctx, h, w["w2"], split), w["w2"])


def _every_expert(ctx, w, x, ids, weights, split) -> jax.Array:
    """Sum over experts in order of their id; a token that did not pick an expert passes with weight zero."""
    def body(total, numbered):
        e, one = numbered
        weight = jnp.where(ids == e, weights, 0.0).sum(-1)
        return total + jnp.where((weight != 0)[:, None], _expert(ctx, one, x, weight, split), 0.0), None

    return jax.lax.scan(body, jnp.zeros(x.shape, jnp.float32), (jnp.arange(w["w1"].shape[0]), w))[0]


def _gathered(ctx, w, x, ids, weights, split) -> jax.Array:
    """The picked experts only, by gathered products."""
    inputs = jax.tree.map(lambda a: a[:, None], quantize_input(ctx, x, w["w1"]))
    gate, up = ops.gathered_linear(inputs, w["w1"], ids), ops.gathered_linear(inputs, w["w3"], ids)
    h = ops.swiglu(gate, up, weights[..., None], ctx.config.swiglu_limit, ctx.recipe.activation_dtype)
    y = ops.gathered_linear(quantize_input(ctx, h, w["w2"], split), w["w2"], ids)
    return jnp.where((weights != 0)[..., None], y, 0.0).sum(1)
