"""Cases of hyper-connections, RMSNorm, RoPE and the Hadamard transform at the widths of a model."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes

_STATIC = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
_CODE_BYTES = {None: 0.0, "fp8": 1 + 1 / 128, "nvfp4": 0.5 + 1 / 16}  # per channel


def _site(keys, shapes: Shapes, mixes: int) -> tuple:
    width = shapes.streams * shapes.hidden
    fn = jax.random.normal(next(keys), (mixes, width), jnp.float32) * width**-0.5
    scale = 1 + jax.random.normal(next(keys), (3 if mixes > shapes.streams else 1,), jnp.float32)
    weight = (1 + 0.3 * jax.random.normal(next(keys), (shapes.hidden,))).astype(jnp.bfloat16)
    return fn, jax.random.normal(next(keys), (mixes,), jnp.float32), scale, weight


def _make_mix(key, shapes: Shapes, rows: int, *, after: bool, mixes: int) -> tuple:
    """streams, with `after` the sublayer output, post and comb, and with `mixes` the weights of the site."""
    keys = iter(jax.random.split(key, 8))
    m = shapes.streams
    inputs = (jax.random.normal(next(keys), (rows, m, shapes.hidden), jnp.bfloat16),)
    if after:
        inputs += (
            jax.random.normal(next(keys), (rows, shapes.hidden), jnp.bfloat16),
            jax.random.uniform(next(keys), (rows, m), jnp.float32, 0, 2),
            jax.nn.softmax(jax.random.normal(next(keys), (rows, m, m), jnp.float32)),
        )
    return inputs + (_site(keys, shapes, mixes) if mixes else ())


def _checked_codes(quantize: str | None, codes_at: int, outputs):
    """The outputs, with 1 in place of codes that are exactly those of the input beside them."""
    if quantize is None:
        return outputs
    outputs = list(outputs)
    want = (ops.quantize_fp8 if quantize == "fp8" else ops.quantize_nvfp4_rows)(outputs[codes_at - 1])
    pairs = zip(jax.tree.leaves(outputs[codes_at]), jax.tree.leaves(want), strict=True)
    outputs[codes_at] = jnp.stack([(a == b).all() for a, b in pairs]).astype(jnp.float32)
    return outputs


def _hyper(shapes: Shapes, op: str, rows: int, quantize: str | None = None) -> Case:
    after, head = op in ("hc_post", "hc_post_pre_norm"), op == "hc_head_norm"
    mixes = 0 if op == "hc_post" else shapes.streams if head else (2 + shapes.streams) * shapes.streams
    static = {} if op == "hc_post" else {"eps": 1e-6, "norm_eps": 1e-6} if head else {**_STATIC, "quantize": quantize}
    m, d = shapes.streams, shapes.hidden
    streams, mixing = 2 * rows * m * d, 4 * rows * (m + m * m)
    moved = streams + 4 * mixes * (m * d + 1) + (2 * d if mixes else 0)  # what every op but hc_post reads
    moved += (streams + 2 * rows * d + mixing if after else 0) + (2 * rows * d if mixes else 0)
    moved += (mixing if mixes > m else 0) + int(rows * d * _CODE_BYTES[quantize])
    return Case(
        name=f"{op} {rows} rows{f' {quantize}' if quantize else ''}",
        op=op,
        make=functools.partial(_make_mix, shapes=shapes, rows=rows, after=after, mixes=mixes),
        run=functools.partial(getattr(ops, op), **static),
        bytes=moved,
        flops=rows * m * d * (2 * mixes + (2 * m if after else 0)),
        bounds="two bf16" if mixes else "bf16",
        rows=rows,
        same=functools.partial(_checked_codes, quantize, 2 if after else 1),
    )


def _make_normal(key, *shape) -> tuple:
    return (jax.random.normal(key, shape, jnp.bfloat16),)


def _make_normed(key, rows: int, width: int) -> tuple:
    return (*_make_normal(key, rows, width), jnp.linspace(0.5, 1.5, width).astype(jnp.bfloat16))


def _make_rotated(key, shapes: Shapes, rows: int) -> tuple:
    x, angle = jax.random.split(key)
    theta = jax.random.uniform(angle, (rows, 1, shapes.rope_dim // 2), jnp.float32, -3, 3)
    return (*_make_normal(x, rows, shapes.heads, shapes.head_dim), jnp.cos(theta), jnp.sin(theta))


def _rms(shapes: Shapes, rows: int, width: int, quantize: str | None) -> Case:
    if quantize is None:
        run = functools.partial(ops.rms_norm, eps=1e-6)
    else:
        run = functools.partial(ops.rms_norm_quantize, eps=1e-6, quantize=quantize)
    return Case(
        name=f"{'rms_norm_quantize' if quantize else 'rms_norm'} {rows} rows of {width}{f' {quantize}' if quantize else ''}",
        op="rms_norm_quantize" if quantize else "rms_norm",
        make=functools.partial(_make_normed, rows=rows, width=width),
        run=run,
        bytes=int(rows * width * (4 + _CODE_BYTES[quantize])) + 2 * width,
        flops=4 * rows * width,
        bounds="bf16",
        rows=rows,
        same=functools.partial(_checked_codes, quantize, 1),
    )


def cases(shapes: Shapes) -> list[Case]:
    """One token for every op; 4 and 16 rows for what lies between two sublayers."""
    h, k, rope = shapes.heads, shapes.head_dim, shapes.rope_dim
    between = [_hyper(shapes, "hc_post_pre_norm", rows, "fp8") for rows in (1, 4, 16)]
    inner = (1, shapes.index_heads, shapes.index_dim)
    return [
        *(_hyper(shapes, "hc_pre_norm", 1, quantize) for quantize in (None, "fp8", "nvfp4")),
        _hyper(shapes, "hc_pre_norm", 16, "nvfp4"),
        *between,
        *(_hyper(shapes, "hc_post", rows) for rows in (1, 16)),
        _hyper(shapes, "hc_head_norm", 1),
        _rms(shapes, 1, shapes.hidden, None),
        _rms(shapes, 1, shapes.q_lora, "fp8"),
        _rms(shapes, 16, shapes.q_lora, "nvfp4"),
        Case(
            "rope of the queries", "rope", functools.partial(_make_rotated, shapes=shapes, rows=1), ops.rope,
            bytes=4 * h * k + 4 * rope, flops=3 * h * rope, bounds="bf16",
        ),
        Case(
            "hadamard of the index queries", "hadamard", lambda key: _make_normal(key, *inner), ops.hadamard,
            bytes=4 * math.prod(inner), flops=math.prod(inner) * (shapes.index_dim.bit_length() - 1), bounds="bf16",
        ),
    ]  # fmt: skip
