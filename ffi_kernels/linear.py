"""Matrix products with weights of every format: contracts, checks, dispatch.

Inputs are already quantized where the recipe quantizes, so that every backend computes the same function.
"""

from __future__ import annotations

import jax

from ffi_kernels.dispatch import implementation
from ffi_kernels.tensor import FP8Activation, FP8Tensor, MXFP4Tensor, NVFP4Tensor

# weight format -> the activation formats that an op accepts for it
_ACCEPTED = {
    NVFP4Tensor: (NVFP4Tensor,),
    MXFP4Tensor: (FP8Activation, jax.Array),
    FP8Tensor: (FP8Activation, jax.Array),
    jax.Array: (jax.Array,),
}


def _check(name: str, x, w, weight_rank: int) -> None:
    kind = next((k for k in _ACCEPTED if isinstance(w, k)), None)
    if kind is None or not isinstance(x, _ACCEPTED[kind]):
        accepted = " or ".join(k.__name__ for k in _ACCEPTED.get(kind, ()))
        raise TypeError(
            f"{name} got an input of type {type(x).__name__} for a weight of type {type(w).__name__}"
            + (f", which takes {accepted}; quantize the input first." if accepted else "; it is not a weight format.")
        )
    if len(w.shape) != weight_rank or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"{name} contracts the last axes of x {x.shape} and of a rank-{weight_rank} weight, got weight {w.shape}."
        )


def linear(x, w) -> jax.Array:
    """x [..., K] times w [N, K] transposed -> fp32 [..., N], accumulated in fp32."""
    _check("linear", x, w, 2)
    return implementation("linear")(x, w)


def grouped_linear(x, w) -> jax.Array:
    """x [..., G, K], w [G, N, K] -> fp32 [..., G, N]."""
    _check("grouped_linear", x, w, 3)
    if x.shape[-2] != w.shape[0]:
        raise ValueError(f"grouped_linear got {x.shape[-2]} groups of input for {w.shape[0]} groups of weight.")
    return implementation("grouped_linear")(x, w)


def gathered_linear(x, w, ids: jax.Array) -> jax.Array:
    """x [T, 1 or X, K], w [E, N, K], ids int32 [T, X] in [0, E) -> fp32 [T, X, N]. Ids outside are clipped."""
    _check("gathered_linear", x, w, 3)
    if x.shape[0] != ids.shape[0] or x.shape[1] not in (1, ids.shape[1]):
        raise ValueError(f"gathered_linear got x {x.shape} for ids {ids.shape}; x must be [T, 1 or X, K].")
    return implementation("gathered_linear")(x, w, ids)
