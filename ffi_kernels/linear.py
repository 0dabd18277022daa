"""Matrix products with weights of every format: contracts, checks, dispatch, and the native launch (`linear.cu`).

Inputs are already quantized where the recipe quantizes, or `Unquantized`, so that every backend computes the same
function. Weights are linear, unless an implementation names the layouts it takes in its attribute `layouts`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import MAX_ROWS, MAX_SHARED_BYTES, launch, native
from ffi_kernels.tensor import (
    FP8_BLOCK, LINEAR, MXFP4_BLOCK, NVFP4_BLOCK, FP8Activation, FP8Tensor, MXFP4Tensor, NVFP4Tensor, Unquantized,
    require_layout,
)  # fmt: skip

# weight format -> the activation formats that an op accepts for it
_ACCEPTED = {
    NVFP4Tensor: (NVFP4Tensor, Unquantized),
    MXFP4Tensor: (FP8Activation, Unquantized, jax.Array),
    FP8Tensor: (FP8Activation, Unquantized, jax.Array),
    jax.Array: (jax.Array, Unquantized),
}


def _check(name: str, x, w, weight_rank: int, dtype=jnp.float32) -> None:
    kind = next((k for k in _ACCEPTED if isinstance(w, k)), None)
    if kind is None or not isinstance(x, _ACCEPTED[kind]):
        accepted = " or ".join(k.__name__ for k in _ACCEPTED.get(kind, ()))
        raise TypeError(
            f"{name} got an input of type {type(x).__name__} for a weight of type {type(w).__name__}"
            + (f", which takes {accepted}; quantize the input first." if accepted else "; it is not a weight format.")
        )
    require_layout(name, x)
    require_layout(name, w, accepted=getattr(implementation(name), "layouts", (LINEAR,)))
    if len(w.shape) != weight_rank or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"{name} contracts the last axes of x {x.shape} and of a rank-{weight_rank} weight, got weight {w.shape}."
        )
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{name} returns float32 or bfloat16, not {jnp.dtype(dtype).name}.")


def linear(x, w, dtype=jnp.float32) -> jax.Array:
    """x [..., K] times w [N, K] transposed -> [..., N], accumulated in fp32, then fp32 or rounded once to bf16."""
    _check("linear", x, w, 2, dtype)
    return implementation("linear")(x, w, dtype)


def linears(xs: tuple, ws: tuple, dtypes: tuple) -> tuple[jax.Array, ...]:
    """Up to 8 products in one launch: linear(xs[i], ws[i], dtypes[i]) for each i.

    All inputs have the same leading axes. Pass the same array (or the same quantized arrays) to the products that share an
    input: it is then read and quantized once per format.
    """
    if not (1 <= len(ws) <= PRODUCTS and len(xs) == len(ws) == len(dtypes)):
        raise ValueError(f"linears takes 1 to {PRODUCTS} weights with an input and a dtype each, got {len(xs)}, {len(ws)}, {len(dtypes)}.")
    for x, w, dtype in zip(xs, ws, dtypes, strict=True):
        _check("linears", x, w, 2, dtype)
    if len({x.shape[:-1] for x in xs}) > 1:
        raise ValueError(f"linears needs inputs with the same leading axes, got {', '.join(str(x.shape) for x in xs)}.")
    return implementation("linears")(tuple(xs), tuple(ws), tuple(dtypes))


def grouped_linear(x, w, dtype=jnp.float32) -> jax.Array:
    """x [..., G, K], w [G, N, K] -> [..., G, N], fp32 or rounded once to bf16."""
    _check("grouped_linear", x, w, 3, dtype)
    if x.shape[-2] != w.shape[0]:
        raise ValueError(f"grouped_linear got {x.shape[-2]} groups of input for {w.shape[0]} groups of weight.")
    return implementation("grouped_linear")(x, w, dtype)


def gathered_linear(x, w, ids: jax.Array) -> jax.Array:
    """x [T, 1 or X, K], w [E, N, K], ids int32 [T, X] in [0, E) -> fp32 [T, X, N]. Ids outside are clipped."""
    _check("gathered_linear", x, w, 3)
    if x.shape[0] != ids.shape[0] or x.shape[1] not in (1, ids.shape[1]):
        raise ValueError(f"gathered_linear got x {x.shape} for ids {ids.shape}; x must be [T, 1 or X, K].")
    return implementation("gathered_linear")(x, w, ids)


# --- native: what tile.cuh and stage.cuh need to know ------------------------------------------------------------

PRODUCTS = 8  # of one launch
INPUTS = 4  # forms of inputs of one launch
PARTS = 160  # of the tiles of one launch
WARPS, TILE_ROWS, COLUMNS = 16, 16, 8  # of a CTA; of a warp's tile; tokens of a product
UNIT_BYTES = 256  # of a row of a weight, in a slot
RING_BYTES = WARPS * 2 * TILE_ROWS * (UNIT_BYTES + 32)  # of a CTA: two slots for each warp, with scales
PARTIAL_BYTES = 2 * WARPS * TILE_ROWS * COLUMNS * 4
AMAX_BYTES = 4 * 64  # a word for each row of input that a CTA stages
MACHINE_WARPS = 1600  # what split_of wants to keep busy, on every arch: about 3/4 of the warps of an H200
CTAS = {"sm_90a": 132, "sm_100a": 148, "sim": 4}  # multiprocessors of H200 and B200; few where they take turns
BF16_WEIGHT, FP8_WEIGHT, MXFP4_WEIGHT, NVFP4_WEIGHT = range(4)
FP8_PLAIN, MXFP4_PLAIN = 4, 5  # kinds: the format of a weight whose input is in the form it takes, or these
KERNELS = {BF16_WEIGHT: "bf16", FP8_WEIGHT: "fp8", MXFP4_WEIGHT: "mxfp4", NVFP4_WEIGHT: "nvfp4", FP8_PLAIN: "fp8_plain"}
# format -> bits of an element, what K must be a multiple of
_FORMATS = {BF16_WEIGHT: (16, 8), FP8_WEIGHT: (8, 16), MXFP4_WEIGHT: (4, 128), NVFP4_WEIGHT: (4, 64)}


def weight_format(op: str, w) -> int:
    """The kernels' number of a weight's format. ValueError if they cannot read the weight."""
    kinds = {FP8Tensor: FP8_WEIGHT, MXFP4Tensor: MXFP4_WEIGHT, NVFP4Tensor: NVFP4_WEIGHT}
    found = kinds.get(type(w), BF16_WEIGHT)
    if found == BF16_WEIGHT and w.dtype != jnp.bfloat16:
        raise ValueError(f"{op} on {current()} reads plain weights in bfloat16, not {w.dtype}; use backend('xla') for the fp32 recipe.")
    multiple = _FORMATS[found][1]
    if w.shape[-1] % multiple:
        raise ValueError(
            f"{op} on {current()} reads a {type(w).__name__ if found else 'bfloat16'} weight with K a multiple of {multiple}, "
            f"not K = {w.shape[-1]}; use backend('xla')."
        )
    return found


def row_bytes(form: int, k: int) -> int:
    """Bytes of a row of a weight of K elements, without scales."""
    return k * _FORMATS[form][0] // 8


def is_whole(form: int, n: int, k: int) -> bool:
    """Whether a weight consists of whole tiles and units, with rows of scales that start on 16 bytes (FP8: with whole words of scales)."""
    words = form != FP8_WEIGHT or -(-n // FP8_BLOCK) * -(-k // FP8_BLOCK) % 4 == 0
    return n % TILE_ROWS == 0 and row_bytes(form, k) % UNIT_BYTES == 0 and words


def split_of(form: int, n: int, k: int, matrices: int = 1) -> int:
    """Warps that share 16 rows of a weight [matrices, N, K]: so many that all multiprocessors' warps have rows, and each at most
    8 units of K. It fixes the order of the sums, so it depends on nothing but the weight."""
    units = -(-row_bytes(form, k) // UNIT_BYTES)
    tiles = -(-n // TILE_ROWS) * matrices
    split = 1
    while 2 * split <= min(WARPS, units) and (units > 8 * split or tiles * split < MACHINE_WARPS):
        split *= 2
    return split


def padded(k: int) -> int:
    """Elements of a row of inputs in shared memory (stage.cuh)."""
    return -(-k // 512) * 512


def column_space_bytes(k: int, columns: int) -> int:
    """Shared memory of the inputs of `columns` tokens, their scales and factors (stage.cuh)."""
    return columns * (2 * padded(k) + 16) + padded(k) // FP8_BLOCK * COLUMNS * 4 + COLUMNS * 4


@dataclasses.dataclass(frozen=True)
class Input:
    """One input as stage.cuh reads it: arrays (data, scale, global scale), rows of k elements, the kind of its products."""

    arrays: tuple
    k: int
    groups: int
    kind: int

    def key(self) -> tuple:
        """Equal for inputs that are the same in shared memory."""
        form = {MXFP4_WEIGHT: FP8_WEIGHT, MXFP4_PLAIN: FP8_PLAIN}.get(self.kind, self.kind)
        return (*map(id, self.arrays), form)


def input_of(op: str, x, weight: int, groups: int = 1) -> Input:
    """How a weight of this format takes x. ValueError if the kernels cannot read x."""
    k = x.shape[-1]
    if isinstance(x, (FP8Activation, NVFP4Tensor)):
        return Input((x.data, x.scale, getattr(x, "global_scale", None)), k, groups, weight)
    data = x.data if isinstance(x, Unquantized) else x
    if data.dtype != jnp.bfloat16:
        raise ValueError(f"{op} on {current()} reads plain inputs in bfloat16, not {data.dtype}; use backend('xla') for the fp32 recipe.")
    plain = {} if isinstance(x, Unquantized) else {FP8_WEIGHT: FP8_PLAIN, MXFP4_WEIGHT: MXFP4_PLAIN}
    return Input((data, None, None), k, groups, plain.get(weight, weight))


@dataclasses.dataclass(frozen=True)
class _Product:
    w: object
    weight: int  # format
    kind: int
    n: int
    k: int
    groups: int
    input: int  # index
    dtype: object

    @property
    def split(self) -> int:
        return split_of(self.weight, self.n, self.k, self.groups)

    @property
    def tiles(self) -> int:  # per group
        return -(-self.n // TILE_ROWS)

    @property
    def tile_bytes(self) -> int:
        scale = {MXFP4_WEIGHT: self.k // MXFP4_BLOCK, NVFP4_WEIGHT: self.k // NVFP4_BLOCK}.get(self.weight, 0)
        return TILE_ROWS * (row_bytes(self.weight, self.k) + scale)


def _begins(products: list[_Product], parts: int) -> list[int]:
    """The first tile of each of `parts` runs of tiles, and their number: a tile belongs to the share of bytes it starts in."""
    ends = np.cumsum(np.concatenate([np.full(p.tiles * p.groups, p.tile_bytes, np.int64) for p in products]))
    starts = np.concatenate([[0], ends[:-1]])
    return [int(np.searchsorted(starts, ends[-1] * part // parts, "left")) for part in range(parts)] + [len(ends)]


def _part(products: list[_Product], begin: int, end: int) -> int:
    """LinearPart of linear.cu: the first product, the inputs and the groups of these tiles, packed."""
    if begin == end:
        return 0
    starts = np.cumsum([0] + [p.tiles * p.groups for p in products])
    touched = [i for i in range(len(products)) if max(begin, starts[i]) < min(end, starts[i + 1])]
    inputs = sum({1 << products[i].input for i in touched})
    groups = [tile // products[0].tiles if products[0].groups > 1 else 0 for tile in (begin, end - 1)]
    return touched[0] | inputs << 4 | groups[0] << 8 | groups[1] << 16


def _plan(op: str, rows: int, inputs: list[Input], products: list[_Product]):
    """(tokens per CTA, first tile of each part, byte offset of each input, shared bytes) for R rows."""
    tiles = sum(p.tiles * p.groups for p in products)
    for columns in (c for c in (8, 4, 2, 1) if c == 1 or rows > c // 2):
        columns = min(columns, rows)
        begins = _begins(products, min(max(CTAS[current()] // -(-rows // columns), 1), tiles))
        resident = 1
        if inputs[0].groups > 1:  # always alone
            of_group = products[0].tiles
            resident = max((end - 1) // of_group - begin // of_group + 1 for begin, end in zip(begins, begins[1:]) if end > begin)
        sizes = [column_space_bytes(i.k, columns) * resident for i in inputs]
        shared = RING_BYTES + PARTIAL_BYTES + AMAX_BYTES + sum(sizes)
        if shared <= MAX_SHARED_BYTES and columns * resident * len(inputs) <= AMAX_BYTES // 4:
            return columns, begins, [sum(sizes[:i]) for i in range(len(sizes))], shared
    raise ValueError(
        f"{op} on {current()} needs {shared} bytes of shared memory for inputs of K = {[i.k for i in inputs]}, a CTA has "
        f"{MAX_SHARED_BYTES}; split the products into several calls, or use backend('xla')."
    )


def _kernel(products: list[_Product]) -> str:
    """The kernel that serves these products: the less it must know, the shorter it is (the end of linear.cu)."""
    if not all(is_whole(p.weight, p.n, p.k) for p in products):
        return "ragged"
    kinds = {p.kind for p in products}
    if kinds == {FP8_WEIGHT, BF16_WEIGHT}:
        return "many_fp8_bf16"
    name = KERNELS.get(kinds.pop()) if len(kinds) == 1 else None
    if len(products) == 1:
        return name or "many"
    return f"many_{name}" if name in ("fp8", "nvfp4") else "many"


def _launch(op: str, leading: tuple, inputs: list[Input], products: list[_Product]) -> list[jax.Array]:
    rows = math.prod(leading)
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{op} on {current()} serves 1 to {MAX_ROWS} tokens, not {rows}; trace prompts under backend('xla').")
    if len(inputs) > INPUTS:
        raise ValueError(f"{op} on {current()} takes {INPUTS} different inputs in one launch, not {len(inputs)}; call it twice.")
    columns, begins, offsets, shared = _plan(op, rows, inputs, products)
    token_groups, parts = -(-rows // columns), len(begins) - 1

    def filled(values, count, fill=None):
        return [*values, *[fill] * (count - len(values))]

    outputs = [jax.ShapeDtypeStruct((*leading, *([p.groups] if p.groups > 1 else []), p.n), p.dtype) for p in products]
    arrays = [filled([i.arrays[part] for i in inputs], INPUTS) for part in range(3)]
    matrices = [(p.w,) if p.weight == BF16_WEIGHT else (p.w.data, p.w.scale, getattr(p.w, "global_scale", None)) for p in products]
    weights = [filled([filled(part, 3)[i] for part in matrices], PRODUCTS) for i in range(3)]
    first = np.cumsum([0] + [p.tiles * p.groups for p in products])
    of_products = [
        [p.kind, p.input, p.n, p.groups, p.split.bit_length() - 1, p.tiles, int(p.dtype == jnp.bfloat16), first[i]]
        for i, p in enumerate(products)
    ] + [[0] * 7 + [first[-1]]] * (PRODUCTS + 1 - len(products))
    of_inputs = filled([[i.kind, i.k, i.groups, offset] for i, offset in zip(inputs, offsets, strict=True)], INPUTS, [0] * 4)
    results = launch(
        op, "linear", f"linear_{_kernel(products)}",
        grid=(token_groups, parts, 1), block=32 * WARPS, shared_bytes=shared,
        inputs=sum(arrays + weights, []), outputs=filled(outputs, PRODUCTS),
        scalars=[
            len(products), rows, columns, max(i.k for i in inputs), *sum(of_products, []), *sum(of_inputs, []),
            *filled(begins, PARTS + 1, 0), *filled([_part(products, *tiles) for tiles in zip(begins, begins[1:])], PARTS, 0),
        ],
    )  # fmt: skip
    return list(results[: len(products)])


@native("linears")
def _linears(xs: tuple, ws: tuple, dtypes: tuple) -> tuple:
    return _products("linears", xs, ws, dtypes)


@native("linear")
def _linear(x, w, dtype):
    return _products("linear", (x,), (w,), (dtype,))[0]


def _products(op: str, xs: tuple, ws: tuple, dtypes: tuple) -> tuple:
    inputs, index, products = [], {}, []
    for x, w, dtype in zip(xs, ws, dtypes, strict=True):
        weight = weight_format(op, w)
        taken = input_of(op, x, weight)
        if taken.key() not in index:
            index[taken.key()] = len(inputs)
            inputs.append(taken)
        products.append(_Product(w, weight, taken.kind, *w.shape, 1, index[taken.key()], dtype))
    return tuple(_launch(op, xs[0].shape[:-1], inputs, products))


@native("grouped_linear")
def _grouped_linear(x, w, dtype):
    weight = weight_format("grouped_linear", w)
    groups, n, k = w.shape
    taken = input_of("grouped_linear", x, weight, groups)
    out = _launch("grouped_linear", x.shape[:-2], [taken], [_Product(w, weight, taken.kind, n, k, groups, 0, dtype)])[0]
    return out.reshape(*x.shape[:-2], groups, n)
