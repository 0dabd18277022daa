"""The experts of a MoE for few tokens: contract, checks, dispatch, and the native launches (`experts.cu`): two for one token, else three.

Not here: which experts a token picks (`router.py`); prompts, whose tokens pass every expert in turn (dsv4_jax).
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import MAX_ROWS, MAX_SHARED_BYTES, launch, native
from ffi_kernels.tensor import NVFP4Tensor, Unquantized, require_layout

tile = importlib.import_module("ffi_kernels.linear")  # the package has a function of that name


def experts(
    x, routed: dict, shared: dict | None, ids: jax.Array, weights: jax.Array, limit: float, dtype=jnp.float32, row_max=None
) -> jax.Array:
    """The picked experts of each token and the shared one: x [R, D] -> [R, D], fp32 or rounded once to bf16.

    routed: {"w1", "w3": [E, F, D], "w2": [E, D, F]}, linear weights of any format; shared: {"w1", "w3": [F', D], "w2": [D, F']} or
    None, perhaps of another format and width. ids int32 [R, X], those outside [0, E) are clipped; weights fp32 [R, X].
    Per slot: h = silu(min(w1 x, limit)) * clip(w3 x, +-limit) * weight, with both products rounded to x.dtype and h too;
    x and h in the format that w1 and w2 take (`Unquantized`). Slots of weight zero add nothing; the others are summed
    in slot order, and the shared expert last. row_max: where F is a shard, a function that turns the largest magnitudes
    of local rows of h, fp32 [..., 1], into those of whole rows (NVFP4 has a scale per row). Raises ValueError for shapes
    or formats that do not fit, natively also for row_max with NVFP4: nothing leaves the kernel between its products.
    """
    _check(x, routed, shared, ids, weights, dtype)
    return implementation("experts")(x, routed, shared, ids, weights, limit, dtype, row_max)


def _check(x, routed, shared, ids, weights, dtype) -> None:
    experts_, width, hidden = routed["w1"].shape
    parts = [(routed, (experts_, width, hidden), (experts_, hidden, width))]
    if shared is not None:
        own = shared["w1"].shape[0]
        parts.append((shared, (own, hidden), (hidden, own)))
    for w, up, down in parts:
        require_layout("experts", *w.values())
        shapes = tuple(w[name].shape for name in ("w1", "w3", "w2"))
        if shapes != (up, up, down) or type(w["w1"]) is not type(w["w3"]):
            raise ValueError(f"experts needs w1 and w3 {up} of one format and w2 {down}, got {shapes}.")
    if x.ndim != 2 or x.shape[1] != hidden or ids.shape != weights.shape or ids.ndim != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"experts takes x [R, {hidden}] with ids and weights [R, X], got {x.shape}, {ids.shape}, {weights.shape}.")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"experts returns float32 or bfloat16, not {jnp.dtype(dtype).name}.")


SLOTS = 128  # picks of all tokens of a launch
STAGED = 6 * 4096  # elements of the inputs that experts_down stages for one token; experts_up a third of them
# One token's step on one machine, for which the work is split: the order of the sums must depend on neither routing nor machine.
TYPICAL_GROUPS, TYPICAL_CTAS = (6, 1), 132  # matrices of the routed experts and of the shared one
GROUPS_BYTES = 3 * 4 * SLOTS + (SLOTS + MAX_ROWS) * (4 + 4 + tile.COLUMNS) + 16  # Groups of expert_groups.cuh


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The routed experts or the shared one as one of the kernels reads them."""

    weights: tuple  # matrices [(E,) N, K] of one format
    format: int
    n: int
    k: int

    def part(self, name: str) -> list:
        if self.format == tile.BF16_WEIGHT:
            return [w if name == "data" else None for w in self.weights]
        return [getattr(w, name, None) for w in self.weights]

    @property
    def tiles(self) -> int:
        return -(-self.n // tile.TILE_ROWS)


def _kind(x: jax.Array, weights: tuple) -> _Kind:
    form = tile.weight_format("experts", weights[0])
    tile.input_of("experts", Unquantized(x), form)
    return _Kind(weights, form, *weights[0].shape[-2:])


def _name(kinds: list[_Kind], apart: bool) -> str:
    """The kernel that serves these weights: the less it must know, the shorter it is (the end of experts.cu)."""
    formats, name = {kind.format for kind in kinds}, "ragged"
    if all(tile.is_whole(kind.format, kind.n, kind.k) for kind in kinds):
        if formats <= {tile.MXFP4_WEIGHT, tile.FP8_WEIGHT}:
            name = "official"
        elif len(formats) == 1:
            name = {tile.BF16_WEIGHT: "bf16", tile.NVFP4_WEIGHT: "nvfp4"}[formats.pop()]
    return name + "_apart" * apart


def _each(kinds: list[_Kind], value) -> list[int]:
    """value(kind) of the routed and the shared experts, zero for a shared expert that is not there."""
    return [value(kinds[0]), value(kinds[1]) if len(kinds) > 1 else 0]


class _Shares(NamedTuple):
    """How the warps of a CTA share the work: see Shares and Team of the kernels."""

    splits: list[int]  # log2 of the warps that share 16 rows of a matrix, of both kinds; the order of the sums
    routed_warps: int  # those of the routed experts where they are served beside the shared one


def _apart(kinds: list[_Kind], rows: int, slots: int, elements: int) -> bool:
    """Whether some warps serve the shared expert while others serve the routed ones: of one token, if all inputs, of so many elements,
    have the same form."""
    forms = {tile.FP8_WEIGHT if kind.format == tile.MXFP4_WEIGHT else kind.format for kind in kinds}
    return rows == 1 and slots <= 32 and elements <= STAGED and len(kinds) == 2 and len(forms) == 1


def _shares(kinds: list[_Kind], matrices: int, jobs) -> _Shares:
    """The shares with which a CTA is done soonest with one token, if meeting the other warps of a team costs as much as 1.5 units of K.

    jobs(kind, groups): how many times a CTA goes through 16 rows of `matrices` matrices.
    """

    def cost(kind: _Kind, groups: int, warps: int, split: int) -> float:
        units = -(-tile.row_bytes(kind.format, kind.k) // tile.UNIT_BYTES)
        return -(-jobs(kind, groups) // (warps // split)) * (matrices * -(-units // split) + 1.5)

    def best(number: int, warps: int) -> tuple[float, int]:
        splits = [s for s in (1, 2, 4, 8, 16) if warps % s == 0]
        return min((cost(kinds[number], TYPICAL_GROUPS[number], warps, s), s) for s in splits)

    if len(kinds) == 1:
        return _Shares([best(0, tile.WARPS)[1].bit_length() - 1, 0], 0)
    warps = min((max(best(0, w)[0], best(1, tile.WARPS - w)[0]), w) for w in range(1, tile.WARPS))[1]
    return _Shares([best(0, warps)[1].bit_length() - 1, best(1, tile.WARPS - warps)[1].bit_length() - 1], warps)


def _arrays(kinds: list[_Kind], count: int) -> list:
    """Inputs data, scale, global_scale, each [kind][matrix] with None for what is not there."""
    parts = []
    for name in ("data", "scale", "global_scale"):
        of_kinds = [kind.part(name) for kind in kinds] + [[None] * count]
        parts += of_kinds[0] + of_kinds[1]
    return parts


def _fixed_bytes(products: int) -> int:
    """Rings and partial sums; `products` of each tile are summed at once."""
    return tile.RING_BYTES + products * tile.PARTIAL_BYTES


def _columns(rows: int, k: int, products: int) -> tuple[int, int]:
    """(tokens of an expert at once, as many as fit; shared bytes), where each has a column of K elements."""
    fixed = _fixed_bytes(products) + (GROUPS_BYTES + 4 * tile.COLUMNS + 15) // 16 * 16
    for most in (8, 4, 2, 1):
        columns = min(rows, most)
        shared = fixed + tile.column_space_bytes(k, columns)
        if shared <= MAX_SHARED_BYTES:
            return columns, shared
    raise ValueError(
        f"experts on {current()} needs {shared} bytes of shared memory for inputs of {k} elements, a CTA has {MAX_SHARED_BYTES}; "
        "use backend('xla')."
    )


def _up(x, kinds: list[_Kind], ids, weights, experts_: int, limit: float) -> list[jax.Array]:
    """h bf16 [R, X, F], and [R, F'] of the shared expert."""
    rows, hidden = x.shape
    columns, shared = _columns(rows, hidden, 2)
    shares = _shares(kinds, 2, lambda k, groups: -(-k.tiles * groups // TYPICAL_CTAS))
    apart = _apart(kinds, rows, ids.shape[1], 3 * tile.padded(hidden))
    h = [jax.ShapeDtypeStruct((rows, ids.shape[1], kinds[0].n), jnp.bfloat16)]
    h.append(jax.ShapeDtypeStruct((rows, kinds[1].n), jnp.bfloat16) if len(kinds) > 1 else None)
    return launch(
        "experts", "experts", f"experts_up_{_name(kinds, apart)}",
        grid=(tile.CTAS[current()], 1, 1), block=32 * tile.WARPS, shared_bytes=shared,
        inputs=[x, ids, weights, *_arrays(kinds, 2)], outputs=h, early=[0] if apart else [], late=True,
        scalars=[
            rows, ids.shape[1], experts_, hidden, columns,
            *_each(kinds, lambda k: k.format), *_each(kinds, lambda k: k.n),
            *shares.splits, *_each(kinds, lambda k: k.tiles), shares.routed_warps,
            float(limit),
        ],
    )  # fmt: skip


def _down(h: list, kinds: list[_Kind], ids, weights, experts_: int, dtype) -> jax.Array:
    rows, slots = ids.shape
    hidden, tiles, widest = kinds[0].n, kinds[0].tiles, max(k.k for k in kinds)
    ctas = min(tile.CTAS[current()], tiles)  # of one token
    of_cta = -(-tiles // ctas)
    space = tile.column_space_bytes(widest, 1)
    of_token = _fixed_bytes(1) + (GROUPS_BYTES + 15) // 16 * 16 + (slots + 1) * (of_cta * tile.TILE_ROWS * 4 + 4 * tile.COLUMNS + space)
    staged = sum(tile.padded(k.k) * count for k, count in zip(kinds, (slots, 1), strict=False))
    apart = of_token <= MAX_SHARED_BYTES and _apart(kinds, rows, slots, staged)
    columns, shared = (1, of_token) if apart else _columns(rows, widest, 1)
    shares = _shares(kinds, 1, lambda k, groups: -(-k.tiles // TYPICAL_CTAS) * groups)
    out = jax.ShapeDtypeStruct((rows, hidden), dtype)
    products = launch(
        "experts", "experts", f"experts_down_{_name(kinds, apart)}",
        grid=(ctas if apart else tile.CTAS[current()], 1, 1), block=32 * tile.WARPS, shared_bytes=shared,
        inputs=[*h, ids, weights, *_arrays(kinds, 1)], early=[2, 3],
        outputs=[out if apart else jax.ShapeDtypeStruct((rows, slots + 1, hidden), jnp.float32)],
        scalars=[
            rows, slots, experts_, hidden, columns,
            *_each(kinds, lambda k: k.format), *_each(kinds, lambda k: k.k),
            *shares.splits, shares.routed_warps,
            of_cta, space, int(dtype == jnp.bfloat16),
        ],
    )[0]  # fmt: skip
    if apart:
        return products
    return launch(
        "experts", "experts", "experts_sum", grid=(-(-hidden // 128), rows, 1), block=128, inputs=[products, weights], outputs=[out],
        scalars=[slots, hidden, int(len(kinds) > 1), int(dtype == jnp.bfloat16)],
    )[0]  # fmt: skip


@native("experts")
def _experts(x, routed, shared, ids, weights, limit, dtype, row_max):
    rows, slots = ids.shape
    if row_max is not None and any(isinstance(w["w2"], NVFP4Tensor) for w in (routed, shared or {"w2": None})):
        raise ValueError(
            f"experts on {current()} cannot scale rows of NVFP4 that are split over devices; split whole experts "
            "(expert_sharding='experts'), use another recipe, or backend('xla')."
        )
    if not 1 <= rows <= MAX_ROWS or rows * slots > SLOTS:
        raise ValueError(
            f"experts on {current()} serves 1 to {MAX_ROWS} tokens and {SLOTS} picks, not {rows} tokens with {slots} each; trace "
            "prompts under backend('xla')."
        )
    ids, weights = ids.astype(jnp.int32), weights.astype(jnp.float32)
    parts = [routed] if shared is None else [routed, shared]
    up, down = ([_kind(x, tuple(part[name] for name in names)) for part in parts] for names in (("w1", "w3"), ("w2",)))
    h = _up(x, up, ids, weights, routed["w1"].shape[0], limit)
    return _down(h, down, ids, weights, routed["w1"].shape[0], dtype)
