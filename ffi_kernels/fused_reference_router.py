"""Routing as one op in plain jnp: what `route_tokens` means, and its `xla` backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels import reference


def route_tokens(x: jax.Array, gate: jax.Array, bias, table, tokens, count: int, scale: float):
    """`router_scores` and `route`; hash routing by row `tokens` of the table, both clipped into range."""
    fixed = table if tokens is None or table is None else jnp.take(table, jnp.clip(tokens, 0, table.shape[0] - 1), axis=0)
    if fixed is not None:
        fixed = jnp.clip(fixed, 0, gate.shape[0] - 1)
    return reference.route(reference.router_scores(x, gate), bias, None if bias is not None else fixed, count, scale)
