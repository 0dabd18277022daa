"""Routing of tokens to experts as one op: contract, checks, native launch. Formula: `fused_reference_router.py`. Kernels:
`router.cu`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import MAX_ROWS, launch, native

MAX_EXPERTS, MAX_PICKED = 512, 8
_ROWS = 4  # that share a read of the gate
_MULTIPROCESSORS = 132  # a grid of so many CTAs reads the gate at the speed of the memory


def route_tokens(
    x: jax.Array, gate: jax.Array, bias: jax.Array | None, table: jax.Array | None, tokens: jax.Array | None, *, count: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Experts of each token and their weights (facts section 2, MoE): `router_scores` and `route` in one.

    x [R, D]; gate [E, D]. Learned routing: bias fp32 [E], and the best `count` of sqrt(softplus(x gate^T)) + bias, best
    first, ties to the lower id. Hash routing: bias None, table int32 [V, X = count], tokens int32 [R]; tokens None means
    that row r of the table is for row r of x. Hostile tokens and ids are clipped. Returns (ids int32 [R, X], weights
    fp32 [R, X] = scores of the ids / their sum * scale). ValueError if shapes disagree, or if a native backend lacks them
    (x not bf16, more than 16 rows, 512 experts or 8 picks, D not a multiple of 8).
    """
    rows, experts = x.shape[0], gate.shape[0]
    if x.ndim != 2 or x.shape[1:] != gate.shape[1:] or not 1 <= count <= experts:
        raise ValueError(f"route_tokens picks {count} experts from x {x.shape} and gate {gate.shape}; these do not fit.")
    if (bias is None) == (table is None):
        raise ValueError("route_tokens needs either a bias (learned routing) or a table (hash routing), not both or none.")
    if table is not None and (table.shape[1] != count or (table.shape[0] if tokens is None else tokens.shape[0]) != rows):
        what = "no tokens" if tokens is None else f"tokens {tokens.shape}"
        raise ValueError(f"route_tokens got x {x.shape}, {count} picks, table {table.shape} and {what}; these do not fit.")
    return implementation("route_tokens")(x, gate, bias, table, tokens, count, scale)


@native("route_tokens")
def _route_tokens(x, gate, bias, table, tokens, count, scale):
    (rows, hidden), experts = x.shape, gate.shape[0]
    if rows > MAX_ROWS or experts > MAX_EXPERTS or count > MAX_PICKED or hidden % 8:
        raise ValueError(
            f"route_tokens on {current()} takes at most {MAX_ROWS} rows, {MAX_EXPERTS} experts and {MAX_PICKED} picks, and D "
            f"in multiples of 8; got x {x.shape}, gate {gate.shape}, {count} picks; trace prompts under backend('xla')."
        )
    if x.dtype != jnp.bfloat16 or gate.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"route_tokens on {current()} takes bf16 x and a bf16 or fp32 gate, got {x.dtype} and {gate.dtype}; use "
            "backend('xla') or a recipe in bf16."
        )
    form = "bf16" if gate.dtype == jnp.bfloat16 else "f32"
    outputs = [jax.ShapeDtypeStruct((rows, count), jnp.int32), jax.ShapeDtypeStruct((rows, count), jnp.float32)]
    if bias is None:
        return launch(
            "route_tokens", "router", f"route_fixed_{form}", grid=(rows,), block=128 * count,
            inputs=[x, gate, table.astype(jnp.int32), None if tokens is None else tokens.astype(jnp.int32)], outputs=outputs,
            scalars=[hidden, experts, count, table.shape[0], float(scale)], late=True,
        )  # fmt: skip
    per_cta = min(4, -(-experts // _MULTIPROCESSORS))
    together = 1 if rows == 1 else _ROWS
    scores = launch(
        "route_tokens", "router", f"router_scores_{form}_{together}", grid=(-(-experts // per_cta), -(-rows // together)),
        block=128 * per_cta, shared_bytes=16 * per_cta * together,
        inputs=[x, gate], outputs=[jax.ShapeDtypeStruct((rows, experts), jnp.float32)],
        scalars=[rows, hidden, experts, per_cta], late=True,
    )  # fmt: skip
    return launch(
        "route_tokens", "router", f"route_scores_{256 if experts <= 256 else 512}", grid=(rows,), block=32,
        inputs=[*scores, bias.astype(jnp.float32)], outputs=outputs, scalars=[experts, count, float(scale)],
    )  # fmt: skip
