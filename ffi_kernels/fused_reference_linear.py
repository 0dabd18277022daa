"""Several products at once, of packed operands, and the experts of a MoE in plain jnp: compositions of `reference.py`, and
the `xla` backend.

Contracts: `linear.py`, `matmul.py`, `experts.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels import layout, numerics, reference
from ffi_kernels.tensor import NVFP4Tensor, Unquantized


def linears(xs: tuple, ws: tuple, dtypes: tuple) -> tuple:
    """Every x times its w, rounded to its dtype."""
    return tuple(reference.linear(x, w, dtype) for x, w, dtype in zip(xs, ws, dtypes, strict=True))


def nvfp4_matmul(x: NVFP4Tensor, w: NVFP4Tensor, dtype=jnp.bfloat16) -> jax.Array:
    """x [M, K] times w [N, K] transposed, both in tcgen05 tiles, rounded to dtype."""
    return reference.linear(layout.unpack_tcgen05(x), layout.unpack_tcgen05(w), dtype)


def gathered_linear(x, w, ids: jax.Array) -> jax.Array:
    """x [T, 1 or X, K], w [E, N, K], ids int32 [T, X] -> fp32 [T, X, N]: slot (t, x) uses the matrix ids[t, x]."""
    picked = jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0, mode="clip"), w)
    a, b = reference._operands(x, picked)
    a = jnp.broadcast_to(a, (*ids.shape, a.shape[-1]))
    out = jnp.einsum("txk,txnk->txn", a, b, precision="highest", preferred_element_type=jnp.float32)
    if isinstance(x, NVFP4Tensor):
        out = out * x.global_scale
    return out * picked.global_scale[..., None] if isinstance(picked, NVFP4Tensor) else out


def _taken_down(h: jax.Array, w, row_max):
    """h as w2 takes it; the scale of an NVFP4 row is that of the whole row."""
    if row_max is None or not isinstance(w, NVFP4Tensor):
        return reference.as_taken(Unquantized(h), w)
    return reference.quantize_nvfp4_rows(h, row_max(jnp.abs(h).max(-1, keepdims=True).astype(jnp.float32)))


def _shared_expert(x: jax.Array, w: dict, limit: float, row_max) -> jax.Array:
    gate, up = (reference.linear(Unquantized(x), w[name]) for name in ("w1", "w3"))
    return reference.linear(_taken_down(reference.swiglu(gate, up, None, limit, x.dtype), w["w2"], row_max), w["w2"])


def experts(x, routed: dict, shared: dict | None, ids, weights, limit: float, dtype=jnp.float32, row_max=None) -> jax.Array:
    """The matrices that each token picked, by gathered products; a slot of weight zero adds nothing."""
    inputs = jax.tree.map(lambda a: a[:, None], reference.as_taken(Unquantized(x), routed["w1"]))
    gate, up = (gathered_linear(inputs, routed[name], ids) for name in ("w1", "w3"))
    h = reference.swiglu(gate, up, weights[..., None], limit, x.dtype)
    y = gathered_linear(_taken_down(h, routed["w2"], row_max), routed["w2"], ids)
    total = jnp.where((weights != 0)[..., None], y, 0.0).sum(1)
    if shared is not None:
        total = total + _shared_expert(x, shared, limit, row_max)
    return numerics.round_to(total, dtype)
