"""Cases of the router: learned and hash routing, one token and more."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes

SCALE = 1.5


def cases(shapes: Shapes) -> list[Case]:
    """route_tokens with a bias or a table, 1, 4 and 16 rows."""
    return [_case(shapes, kind, rows) for kind in ("learned", "hash") for rows in (1, 4, 16)]


def _case(shapes: Shapes, kind: str, rows: int) -> Case:
    hidden, experts, count = shapes.hidden, shapes.experts, shapes.per_token

    def make(key):
        a, b, c, d = jax.random.split(key, 4)
        x = jax.random.normal(a, (rows, hidden), jnp.bfloat16)
        gate = jax.random.normal(b, (experts, hidden), jnp.bfloat16) * jnp.bfloat16(hidden**-0.5)
        if kind == "learned":
            # Steps much wider than the rounding of a score: no near tie whose winner depends on an order of summation.
            bias = 0.01 * jax.random.permutation(c, experts).astype(jnp.float32)
            return x, gate, bias, None, None
        table = jax.random.randint(c, (shapes.vocab, count), 0, experts, jnp.int32)
        return x, gate, None, table, jax.random.randint(d, (rows,), 0, shapes.vocab, jnp.int32)

    def run(x, gate, bias, table, tokens):
        return ops.route_tokens(x, gate, bias, table, tokens, count=count, scale=SCALE)

    read = experts if kind == "learned" else rows * count
    return Case(
        name=f"route_tokens {kind} R{rows}", op="route_tokens", make=make, run=run, rows=rows, bounds="sum",
        bytes=2 * read * hidden + 2 * rows * hidden, flops=2 * read * hidden * (rows if kind == "learned" else 1),
    )  # fmt: skip
