"""Routing and SwiGLU: contracts, checks, dispatch. The experts' products are `linear.gathered_linear`."""

from __future__ import annotations

import jax

from ffi_kernels.dispatch import implementation


def router_scores(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x [T, D], gate [E, D] -> sqrt(softplus(x gate^T)), fp32 [T, E]."""
    if x.shape[-1] != gate.shape[-1]:
        raise ValueError(f"router_scores got x {x.shape} and gate {gate.shape}; their last axes must agree.")
    return implementation("router_scores")(x, gate)


def route(scores: jax.Array, bias: jax.Array | None, fixed: jax.Array | None, count: int, scale: float):
    """scores fp32 [T, E] -> (ids int32 [T, X], weights fp32 [T, X]); exactly one of bias [E] and fixed [T, X] is given."""
    if (bias is None) == (fixed is None):
        raise ValueError("route needs either a bias (learned routing) or fixed expert ids (hash routing), not both or none.")
    return implementation("route")(scores, bias, fixed, count, scale)


def swiglu(gate: jax.Array, up: jax.Array, weight: jax.Array | None, limit: float, dtype) -> jax.Array:
    """silu(min(gate, limit)) * clamp(up, +-limit) * weight, in fp32 from inputs rounded to dtype; rounded to dtype."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu needs gate and up of one shape, got {gate.shape} and {up.shape}.")
    return implementation("swiglu")(gate, up, weight, limit, dtype)
