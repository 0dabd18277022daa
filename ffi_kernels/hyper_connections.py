"""Hyper-connections (mHC): contracts, checks, launches. Formulas: `reference.py`; kernel: `native/cuda/hyper_connections.cu`.

What lies between two sublayers is one op: `hc_post_pre_norm` mixes the last sublayer's output into the streams, makes
the next one's input and norms and quantizes it. Letters: R rows (B * T), M streams, D model.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import MAX_ROWS, launch, native
from ffi_kernels.quantize import CODE_FORMATS, check_quantize, code_shapes, collect_codes, suffix_of

_STREAMS = 4  # that the kernels know
_CLUSTERS = 4  # of a launch at most, so that all of them run at once on any device
_MAX_CLUSTER = 16  # CTAs
_BLOCK = 128  # channels; a CTA owns 1, 2 or 4 blocks
_THREADS = 768


def hc_pre(streams, fn, base, scale, *, iterations: int, eps: float, norm_eps: float):
    """mHC before a sublayer: streams [..., M, D] -> (input [..., D], post fp32 [..., M], comb fp32 [..., M, M]).

    fn fp32 [(2 + M) M, M D], base fp32 [(2 + M) M], scale fp32 [3]; `iterations` Sinkhorn iterations.
    """
    _check_mix("hc_pre", streams, fn, base, scale)
    return implementation("hc_pre")(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)


def hc_post(streams: jax.Array, f: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    """mHC after a sublayer: new X_k = post_k f + sum_j comb[j, k] X_j; [..., M, D] in streams.dtype."""
    _check_sublayer("hc_post", streams, f, post, comb)
    return implementation("hc_post")(streams, f, post, comb)


def hc_head(streams, fn, base, scale, *, eps: float, norm_eps: float) -> jax.Array:
    """The last collapse: streams [..., M, D] -> [..., D]; fn fp32 [M, M D], base fp32 [M], scale fp32 [1]."""
    _check_mix("hc_head", streams, fn, base, scale, head=True)
    return implementation("hc_head")(streams, fn, base, scale, eps=eps, norm_eps=norm_eps)


def hc_pre_norm(
    streams, fn, base, scale, norm_weight, *, iterations: int, eps: float, norm_eps: float, quantize: str | None = None
):
    """hc_pre, then rms_norm of its input with norm_weight [D], then quantized: None, 'fp8' or 'nvfp4' (per row).

    Returns (x [..., D] in streams.dtype, FP8Activation | NVFP4Tensor | None, post fp32 [..., M], comb fp32 [..., M, M]).
    """
    _check_mix("hc_pre_norm", streams, fn, base, scale, norm_weight, quantize=quantize)
    static = {"iterations": iterations, "eps": eps, "norm_eps": norm_eps, "quantize": quantize}
    return implementation("hc_pre_norm")(streams, fn, base, scale, norm_weight, **static)


def hc_post_pre_norm(
    streams, f, post, comb, fn, base, scale, norm_weight,
    *, iterations: int, eps: float, norm_eps: float, quantize: str | None = None,
):  # fmt: skip
    """hc_post of one site, then hc_pre_norm of the next: (new streams [..., M, D], x, quantized or None, post, comb)."""
    _check_sublayer("hc_post_pre_norm", streams, f, post, comb)
    _check_mix("hc_post_pre_norm", streams, fn, base, scale, norm_weight, quantize=quantize)
    static = {"iterations": iterations, "eps": eps, "norm_eps": norm_eps, "quantize": quantize}
    return implementation("hc_post_pre_norm")(streams, f, post, comb, fn, base, scale, norm_weight, **static)


def hc_head_norm(streams, fn, base, scale, norm_weight, *, eps: float, norm_eps: float) -> jax.Array:
    """hc_head, then rms_norm with norm_weight [D]: [..., D] in streams.dtype."""
    _check_mix("hc_head_norm", streams, fn, base, scale, norm_weight, head=True)
    return implementation("hc_head_norm")(streams, fn, base, scale, norm_weight, eps=eps, norm_eps=norm_eps)


def _check_mix(op: str, streams, fn, base, scale, norm_weight=None, *, head: bool = False, quantize: str | None = None) -> None:
    m, d = streams.shape[-2:]
    mixes, scales = (m, 1) if head else ((2 + m) * m, 3)
    if fn.shape != (mixes, m * d) or base.shape != (mixes,) or scale.shape != (scales,):
        raise ValueError(
            f"{op} with {m} streams of {d} needs fn {(mixes, m * d)}, base [{mixes}], scale [{scales}]; "
            f"got {fn.shape}, {base.shape}, {scale.shape}."
        )
    if norm_weight is not None and norm_weight.shape != (d,):
        raise ValueError(f"{op} with streams of {d} needs a norm_weight of as many channels, got {norm_weight.shape}.")
    if quantize is not None:
        check_quantize(op, quantize, d)


def _check_sublayer(op: str, streams, f, post, comb) -> None:
    *leading, m, d = streams.shape
    wanted = ((*leading, d), (*leading, m), (*leading, m, m))
    if (f.shape, post.shape, comb.shape) != wanted:
        raise ValueError(
            f"{op} of streams {streams.shape} needs f of shape {wanted[0]}, post {wanted[1]}, comb {wanted[2]}; "
            f"got {f.shape}, {post.shape}, {comb.shape}."
        )


# --- native --------------------------------------------------------------------------------------------------------


def _require(op: str, streams, activations, fp32) -> int:
    """Rows of `streams`; ValueError unless activations have its dtype and what is `fp32` is that."""
    *leading, m, d = streams.shape
    if m != _STREAMS or d % 16:
        raise ValueError(
            f"{op} on {current()} mixes {_STREAMS} streams of a multiple of 16 channels, got {m} of {d}; use backend('xla')."
        )
    for wanted, arrays in ((streams.dtype, activations), (jnp.dtype(jnp.float32), fp32)):
        for x in arrays:
            if x.dtype != wanted:
                raise ValueError(
                    f"{op} on {current()} with {streams.dtype} streams needs {wanted} for an input of shape {x.shape}, got "
                    f"{x.dtype}; use backend('xla')."
                )
    return math.prod(leading)


def _geometry(op: str, rows: int, channels: int) -> tuple[int, int, int]:
    """(blocks per CTA, CTAs per cluster, rows per cluster)."""
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(
            f"{op} on {current()} serves decode steps of 1 to {MAX_ROWS} rows (sequences times tokens), got {rows}; trace "
            "prompts under backend('xla')."
        )
    blocks = -(-channels // _BLOCK)
    each = next((n for n in (1, 2, 4) if n * _MAX_CLUSTER >= blocks), None)
    if each is None:
        raise ValueError(
            f"{op} on {current()} takes at most {4 * _MAX_CLUSTER * _BLOCK} channels, got {channels}; use backend('xla')."
        )
    cluster = max(2, 1 << (-(-blocks // each) - 1).bit_length())  # st.async is illegal in a launch without clusters
    return each, cluster, -(-rows // _CLUSTERS)


def _mix(op: str, streams, sublayer, fn, base, scale, norm_weight, *, iterations, eps, norm_eps, quantize, head=False):
    f, post, comb = sublayer or (None, None, None)
    extra = ([f], [post, comb]) if sublayer else ([], [])
    rows = _require(op, streams, [norm_weight, *extra[0]], [fn, base, scale, *extra[1]])
    if streams.dtype != jnp.bfloat16:
        raise ValueError(f"{op} on {current()} takes bf16 streams, got {streams.dtype}; use backend('xla') for such a recipe.")
    if not (head or (iterations >= 1 and eps >= 1e-9)):
        raise ValueError(
            f"{op} on {current()} needs at least one Sinkhorn iteration and eps >= 1e-9 (it multiplies four sums before it "
            f"inverts them), got {iterations} and {eps}; use backend('xla')."
        )
    *leading, m, d = streams.shape
    each, cluster, rows_per_cluster = _geometry(op, rows, d)
    shape = jax.ShapeDtypeStruct
    outputs = [
        shape((*leading, d), streams.dtype),
        shape(streams.shape, streams.dtype) if sublayer else None,
        None if head else shape((*leading, m), jnp.float32),
        None if head else shape((*leading, m, m), jnp.float32),
        *code_shapes((*leading, d), quantize),
    ]
    x, new_streams, post, comb, *codes = launch(
        op, "hyper_connections", f"hc_{'head' if head else 'pre'}_norm_{each}_{1 if rows_per_cluster == 1 and not head else 4}",
        grid=(-(-rows // rows_per_cluster) * cluster,), block=_THREADS, cluster=(cluster,),
        inputs=[streams, *(sublayer or (None, None, None)), fn, base, scale, norm_weight], outputs=outputs,
        scalars=[rows, d, rows_per_cluster, cluster, iterations, CODE_FORMATS[quantize], float(eps), float(norm_eps), 1 / d],
    )  # fmt: skip
    return new_streams, x, collect_codes(codes, quantize), post, comb


@native("hc_pre_norm")
def _native_hc_pre_norm(streams, fn, base, scale, norm_weight, **static):
    return _mix("hc_pre_norm", streams, None, fn, base, scale, norm_weight, **static)[1:]


@native("hc_post_pre_norm")
def _native_hc_post_pre_norm(streams, f, post, comb, fn, base, scale, norm_weight, **static):
    return _mix("hc_post_pre_norm", streams, (f, post, comb), fn, base, scale, norm_weight, **static)


@native("hc_head_norm")
def _native_hc_head_norm(streams, fn, base, scale, norm_weight, *, eps: float, norm_eps: float):
    static = {"iterations": 1, "eps": eps, "norm_eps": norm_eps, "quantize": None}
    return _mix("hc_head_norm", streams, None, fn, base, scale, norm_weight, head=True, **static)[1]


@native("hc_post")
def _native_hc_post(streams, f, post, comb):
    rows, d = _require("hc_post", streams, [f], [post, comb]), streams.shape[-1]
    return launch(
        "hc_post", "hyper_connections", f"hc_post_{suffix_of('hc_post', streams)}", grid=(-(-rows * d // 4 // 128),), block=128,
        inputs=[streams, f, post, comb], outputs=[jax.ShapeDtypeStruct(streams.shape, streams.dtype)], scalars=[rows, d],
    )[0]  # fmt: skip
