"""RMSNorm, RoPE, Hadamard, hyper-connections: contracts, checks, dispatch. Formulas: `reference.py`."""

from __future__ import annotations

import jax

from ffi_kernels.dispatch import implementation


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """float [..., D], weight [D] or None -> [..., D] in x.dtype; fp32 inside, one rounding."""
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm needs one weight per channel: x {x.shape}, weight {weight.shape}.")
    return implementation("rms_norm")(x, weight, eps)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the last R channels of x [..., K] in interleaved pairs; cos, sin fp32 [..., R/2] broadcast. -sin inverts."""
    if 2 * cos.shape[-1] > x.shape[-1] or cos.shape != sin.shape:
        raise ValueError(f"rope of x {x.shape} got cos {cos.shape} and sin {sin.shape}; they need R/2 <= K/2 channels.")
    return implementation("rope")(x, cos, sin)


def hadamard(x: jax.Array) -> jax.Array:
    """Walsh-Hadamard transform of the last axis (a power of two) times K**-0.5, in x.dtype."""
    if x.shape[-1] & (x.shape[-1] - 1):
        raise ValueError(f"hadamard needs a power of two, got {x.shape[-1]} channels; index_head_dim must be one.")
    return implementation("hadamard")(x)


def hc_pre(streams, fn, base, scale, *, iterations: int, eps: float, norm_eps: float):
    """mHC before a sublayer: streams [..., M, D] -> (input [..., D], post fp32 [..., M], comb fp32 [..., M, M]).

    fn fp32 [(2 + M) M, M D], base fp32 [(2 + M) M], scale fp32 [3]; `iterations` Sinkhorn iterations.
    """
    m, d = streams.shape[-2:]
    if fn.shape != ((2 + m) * m, m * d) or base.shape != fn.shape[:1] or scale.shape != (3,):
        raise ValueError(
            f"hc_pre with {m} streams of {d} needs fn {((2 + m) * m, m * d)}, base [{(2 + m) * m}], scale [3]; "
            f"got {fn.shape}, {base.shape}, {scale.shape}."
        )
    return implementation("hc_pre")(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)


def hc_post(streams: jax.Array, f: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    """mHC after a sublayer: new X_k = post_k f + sum_j comb[j, k] X_j; [..., M, D] in streams.dtype."""
    if f.shape != (*streams.shape[:-2], streams.shape[-1]):
        raise ValueError(f"hc_post needs f of shape {(*streams.shape[:-2], streams.shape[-1])}, got {f.shape}.")
    return implementation("hc_post")(streams, f, post, comb)


def hc_head(streams, fn, base, scale, *, eps: float, norm_eps: float) -> jax.Array:
    """The last collapse: streams [..., M, D] -> [..., D]; fn fp32 [M, M D], base fp32 [M], scale fp32 [1]."""
    return implementation("hc_head")(streams, fn, base, scale, eps=eps, norm_eps=norm_eps)
