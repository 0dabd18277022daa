"""Quantized arrays: pytrees that say which format they hold.

Here: `NVFP4Tensor`, `MXFP4Tensor`, `FP8Tensor` (weights), `FP8Activation`, `Unquantized`; each lists its invariants.
Not here: how values are rounded (`numerics.py`) or blocks scaled (`reference.py`), layouts other than linear
(`layout.py`).
All are [..., rows, K] with blocks along K, the contraction axis, and `.shape` is the logical shape.
FP4 data is packed two to a byte and e8m0 scales are their biased exponent bytes, both uint8, because that is
what crosses the FFI and what every storage library can hold.
"""

from __future__ import annotations

import dataclasses

import jax

FP8_BLOCK = 128  # weights: 128 x 128; activations: 1 x 128
NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
LINEAR = "linear"  # the layout that the docstrings below describe; an op that takes another one says so


def _register(cls):
    """A frozen dataclass and pytree: its arrays are children; `layout`, where it has one, is static."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(
        cls, data_fields=[n for n in names if n != "layout"], meta_fields=[n for n in names if n == "layout"]
    )


@_register
class NVFP4Tensor:
    """value = e2m1(data) * e4m3(scale) * global_scale.

    data: uint8 [..., K/2], even K in the low nibble; scale: float8_e4m3fn [..., K/16], never negative, zero for a
    block that is all zero; global_scale: float32. A weight has one global scale per matrix (shape = the leading
    axes before [rows, K]); an activation has one per row (shape [..., 1]), so that no row depends on another.
    """

    data: jax.Array
    scale: jax.Array
    global_scale: jax.Array
    layout: str = LINEAR

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], 2 * self.data.shape[-1])


@_register
class MXFP4Tensor:
    """value = e2m1(data) * 2**(scale - 127).

    data: uint8 [..., K/2], even K in the low nibble; scale: uint8 [..., K/32], biased exponents, 255 never occurs.
    """

    data: jax.Array
    scale: jax.Array
    layout: str = LINEAR

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], 2 * self.data.shape[-1])


@_register
class FP8Tensor:
    """A weight: value = e4m3(data) * 2**(scale - 127), one scale per 128 x 128 block, the last ones partial.

    data: float8_e4m3fn [..., N, K]; scale: uint8 [..., ceil(N/128), ceil(K/128)], biased exponents.
    """

    data: jax.Array
    scale: jax.Array
    layout: str = LINEAR

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


@_register
class FP8Activation:
    """value = e4m3(data) * 2**(scale - 127), one scale per row and 128 consecutive K, the last block partial.

    data: float8_e4m3fn [..., K]; scale: uint8 [..., ceil(K/128)], biased exponents.
    """

    data: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


@_register
class Unquantized:
    """A plain activation that the op itself brings into the format its weight takes.

    data: bf16 or fp32 [..., K]. FP8 and MXFP4 weights take `quantize_fp8` of it, NVFP4 weights `quantize_nvfp4_rows`, plain
    weights the array as it is.
    """

    data: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


@_register
class FP8KVCache:
    """Key-value entries in the compact format: the leading "nope" channels in e4m3, the RoPE channels in bf16.

    data: uint8 [..., nope + 2 * rope], the e4m3 bytes and then the little-endian bf16 bytes; scale: uint8
    [..., S], biased exponents of the 64-channel blocks of the nope part, S = their number rounded up to 8 (the pad
    is zero). An entry of DeepSeek-V4 (448 + 64 channels) takes 576 + 8 = 584 bytes.
    """

    data: jax.Array
    scale: jax.Array


KV_BLOCK = 64
QUANTIZED = (NVFP4Tensor, MXFP4Tensor, FP8Tensor, FP8Activation, FP8KVCache)


def array_fields(kind: type) -> tuple[str, ...]:
    """Names of the arrays of a quantized class, in order: ('data', 'scale', ...); () for a plain array."""
    return tuple(f.name for f in dataclasses.fields(kind) if f.name != "layout") if kind in QUANTIZED else ()


def layout_of(tensor) -> str:
    """The layout of a weight; plain arrays are linear (what jax.Array calls its layout is another thing)."""
    return getattr(tensor, "layout", LINEAR) if isinstance(tensor, QUANTIZED) else LINEAR


def require_layout(op: str, *tensors, accepted: tuple[str, ...] = (LINEAR,)) -> None:
    """ValueError unless every tensor lies in a layout that `op` takes; plain arrays are linear."""
    for tensor in tensors:
        layout = layout_of(tensor)
        if layout not in accepted:
            raise ValueError(
                f"{op} got a {type(tensor).__name__} in layout {layout!r}, but takes {' or '.join(map(repr, accepted))} on "
                "this backend; unpack the model (dsv4_jax.pack.unpack), or pack_for the arch that the backend runs on."
            )
