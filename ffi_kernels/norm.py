"""RMSNorm, RoPE, Hadamard: contracts, checks, launches. Formulas: `reference.py`; kernels: `native/cuda/norm.cu`.

Not here: hyper-connections (`hyper_connections.py`), per-head norm with rotation (`entries.py`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import implementation
from ffi_kernels.launch import launch, native
from ffi_kernels.quantize import (
    CODE_FORMATS, VECTOR, check_quantize, code_shapes, collect_codes, row_threads, suffix_of,
)  # fmt: skip

_MAX_HADAMARD = 4096


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """float [..., D], weight [D] or None -> [..., D] in x.dtype; fp32 inside, one rounding."""
    _check_weight("rms_norm", x, weight)
    return implementation("rms_norm")(x, weight, eps)


def rms_norm_quantize(x: jax.Array, weight: jax.Array | None, eps: float, quantize: str):
    """rms_norm and its result quantized: (y [..., D], FP8Activation for 'fp8' | NVFP4Tensor per row for 'nvfp4')."""
    _check_weight("rms_norm_quantize", x, weight)
    check_quantize("rms_norm_quantize", quantize, x.shape[-1])
    return implementation("rms_norm_quantize")(x, weight, eps, quantize)


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


def _check_weight(op: str, x: jax.Array, weight: jax.Array | None) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"{op} needs one weight per channel: x {x.shape}, weight {weight.shape}.")


# --- native --------------------------------------------------------------------------------------------------------


def _launch_rms_norm(op: str, x, weight, eps: float, quantize: str | None):
    width = x.shape[-1]
    if weight is not None:
        suffix_of(op, weight)
    y, *codes = launch(
        op, "norm", f"rms_norm_{suffix_of(op, x)}", grid=(math.prod(x.shape[:-1]),), block=row_threads(op, width),
        inputs=[x, weight], outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype), *code_shapes(x.shape, quantize)],
        scalars=[width, int(weight is not None and weight.dtype == jnp.float32), CODE_FORMATS[quantize], float(eps)],
    )  # fmt: skip
    return y, collect_codes(codes, quantize)


@native("rms_norm")
def _native_rms_norm(x, weight, eps: float):
    return _launch_rms_norm("rms_norm", x, weight, eps, None)[0]


@native("rms_norm_quantize")
def _native_rms_norm_quantize(x, weight, eps: float, quantize: str):
    return _launch_rms_norm("rms_norm_quantize", x, weight, eps, quantize)


def _angle_lines(cos: jax.Array, sin: jax.Array, leading: tuple[int, ...]):
    """cos and sin as [count, R/2], and how often a line repeats: row r of x takes line (r // repeat) % count."""
    axes = (1,) * (len(leading) - cos.ndim + 1) + cos.shape[:-1]
    stop = next((i + 1 for i in reversed(range(len(axes))) if axes[i] != 1), 0)
    start = next((i for i in range(stop) if axes[i] != 1), stop)
    if axes[start:stop] != leading[start:stop]:  # an axis of 1 between others
        cos, sin = (jnp.broadcast_to(t, (*leading, t.shape[-1])) for t in (cos, sin))
        start, stop = 0, len(leading)
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]), math.prod(leading[stop:])


@native("rope")
def _native_rope(x, cos, sin):
    width, rope_dim = x.shape[-1], 2 * cos.shape[-1]
    if width % 2 or cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        raise ValueError(
            f"rope's kernel rotates pairs of an even number of channels by fp32 angles, got {width} channels and {cos.dtype} "
            "angles; use backend('xla')."
        )
    cos, sin, repeat = _angle_lines(cos, sin, x.shape[:-1])
    channels = VECTOR if width % VECTOR == 0 and rope_dim % VECTOR == 0 else 2
    rows = math.prod(x.shape[:-1])
    return launch(
        "rope", "norm", f"rope_{suffix_of('rope', x)}_{channels}", grid=(-(-rows * width // channels // 128),), block=128,
        inputs=[x, cos, sin], outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        scalars=[rows, width, rope_dim, repeat, cos.shape[0]],
    )[0]  # fmt: skip


@native("hadamard")
def _native_hadamard(x):
    width = x.shape[-1]
    if width > _MAX_HADAMARD:
        raise ValueError(f"hadamard's kernel holds at most {_MAX_HADAMARD} channels, got {width}; use backend('xla').")
    return launch(
        "hadamard", "norm", f"hadamard_{suffix_of('hadamard', x)}", grid=(math.prod(x.shape[:-1]),),
        block=min(512, max(32, width // 2)), shared_bytes=4 * width,
        inputs=[x], outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype)], scalars=[width, width**-0.5],
    )[0]  # fmt: skip
