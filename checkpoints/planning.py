"""What a conversion will do, decided from headers alone: the target format of every tensor, the arrays, and the tasks.

Not here: reading values (`transcode.py`), running the tasks (`conversion.py`).
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from checkpoints import layout, names
from checkpoints.layout import StoredArray
from checkpoints.matching import Matched, Piece, source_shape
from checkpoints.reader import Source, SourceError
from dsv4_jax import params, precision
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import Param
from dsv4_jax.precision import Recipe
from dsv4_jax.sharding import TENSOR, axis_rules

LOSSLESS = "lossless"
STRICT = ("official", LOSSLESS)  # recipes that promise the published bits
RECIPE_NAMES = ("official", "nvfp4", "bf16", "fp32", LOSSLESS)
# Conversions that keep every number, as far as the formats tell; what depends on values is checked when they are read.
_KEEPS = {
    ("mxfp4", "nvfp4"), ("int64", "int32"), ("fp8", "bfloat16"), ("mxfp4", "bfloat16"), ("fp8", "float32"),
    ("mxfp4", "float32"), ("nvfp4", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One matrix or vector to convert: rows [row, row + rows) of the piece's source, seen as [all rows, columns].

    lead: its index on the first axis of the parameter's arrays, or None. target: the format to write. bound: of ids.
    """

    name: str
    piece: Piece
    lead: int | None
    row: int
    rows: int
    columns: int
    vector: bool
    target: str
    arrays: dict[str, StoredArray]
    bound: int

    @property
    def nbytes(self) -> int:
        """Bytes of the source that it reads."""
        whole = source_rows(self.piece.parts["data"].shape)
        return self.piece.nbytes * self.rows // max(whole, 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion: tasks in the order of the source's files, and the arrays that they fill."""

    config: ModelConfig
    recipe: Recipe
    strict: bool
    split: int
    matched: Matched
    forms: dict[str, str]  # path -> target format
    arrays: dict[str, dict[str, StoredArray]]  # path -> part -> array
    tasks: list[Task]

    @property
    def all_arrays(self) -> list[StoredArray]:
        return [array for parts in self.arrays.values() for array in parts.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that will be written."""
        return sum(array.nbytes for array in self.all_arrays)

    def bytes_per_device(self, tensor: int, expert_sharding: str) -> int:
        """Bytes of weights on each device of a mesh with this `tensor`; ValueError where a weight cannot be split so."""
        rules, sizes = axis_rules(expert_sharding), {TENSOR: tensor}
        return sum(
            layout.bytes_per_device(array, self.matched.declared[path].axes, rules, sizes)
            for path, parts in self.arrays.items()
            for array in parts.values()
        )


def source_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor seen as a matrix [rows, last axis]; a vector has one column."""
    rows = 1
    for n in shape[:-1] if len(shape) > 1 else shape:
        rows *= n
    return rows


def make_plan(source: Source, matched: Matched, recipe: str | Recipe, split: int, allow_inexact: bool) -> Plan:
    """The plan of converting a matched source. ValueError listing every tensor that the recipe cannot hold."""
    strict = (recipe if isinstance(recipe, str) else recipe.name) in STRICT
    recipe = lossless_recipe(matched) if recipe == LOSSLESS else precision.get(recipe)
    forms, arrays, tasks, problems = {}, {}, [], []
    lossy: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for path, param in matched.declared.items():
        target = forms[path] = params.storage(param, recipe)
        try:
            arrays[path] = layout.arrays_of(path, param.shape, param.axes, target, split)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        for piece in matched.pieces[path]:
            if strict and not allow_inexact and piece.form != target and (piece.form, target) not in _KEEPS:
                lossy[param.role, piece.form, target].append(piece.parts["data"].name)
            tasks += _tasks(piece, param, target, arrays[path])
    if problems:
        raise SourceError(source.directory, problems, "Choose --recipe bf16, which every shape allows.")
    if lossy:
        raise SourceError(source.directory, [_loss(recipe, *key, found) for key, found in lossy.items()], _advice(matched))
    order = {name: i for i, name in enumerate(source.files)}
    tasks.sort(key=lambda t: (order.get(t.piece.parts["data"].file, 0), t.piece.parts["data"].offset, t.row))
    return Plan(matched.config, recipe, strict, split, matched, forms, arrays, tasks)


def _loss(recipe: Recipe, role: str, form: str, target: str, found: list[str]) -> str:
    return (
        f"{len(found)} tensors ({found[0]}, ...) are {form}, and recipe {recipe.name} stores {role} as {target}, which cannot "
        "hold them without loss"
    )


def _advice(matched: Matched) -> str:
    kept = lossless_recipe(matched)
    fp32_scales = any(p.form == "fp8" and p.parts["scale"].dtype != "F8_E8M0" for pieces in matched.pieces.values() for p in pieces)
    lossless = f"--recipe lossless, which keeps every bit (linear={kept.linear}, wo_a={kept.wo_a}, experts={kept.experts}), "
    return f"Use {'' if fp32_scales else lossless}--recipe nvfp4 or bf16, or --allow-inexact to requantize and report the error."


def lossless_recipe(matched: Matched) -> Recipe:
    """The recipe whose formats hold every weight of the source as it is published."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for path, pieces in matched.pieces.items():
        found[matched.declared[path].role] |= {piece.form for piece in pieces}

    def kind(role: str, *choices: str) -> str:
        forms = found[role] or {choices[0]}
        if forms <= {"mxfp4", "nvfp4"} and len(forms) == 2:
            return "nvfp4"  # MXFP4 becomes NVFP4 without loss
        return next((c for c in choices if forms == {c}), "plain")

    linear, wo_a = kind("linear", "fp8", "nvfp4"), kind("wo_a", "fp8", "nvfp4")
    experts = kind("experts", "mxfp4", "nvfp4")
    wide = any("float32" in found[role] for role in ("plain", "linear", "wo_a", "experts"))
    caches: dict[str, Any] = {} if wide or "plain" in (linear, wo_a, experts) else {"kv": "fp8", "index": "fp4"}
    return Recipe(LOSSLESS, "float32" if wide else "bfloat16", linear, wo_a, experts, **caches)


def _tasks(piece: Piece, param: Param, target: str, arrays: dict[str, StoredArray]) -> list[Task]:
    name = piece.parts["data"].name
    shape = source_shape(param, piece.transform)
    bound = param.bound if param.role == "int32" else 0

    def task(lead: int | None, row: int, rows: int, label: str = "") -> Task:
        columns = shape[-1] if len(shape) > 1 else 1
        return Task(name + label, piece, lead, row, rows, columns, len(shape) == 1, target, arrays, bound)

    if piece.transform == names.EXPERT:
        return [task(piece.expert, 0, shape[0])]
    if piece.transform == names.SAME:
        return [task(None, 0, shape[0])]
    leads, rows = param.shape[:2]
    stride = shape[1] if piece.transform in (names.FIRST_HALF, names.SECOND_HALF) else rows
    first = rows if piece.transform == names.SECOND_HALF else 0
    return [task(i, i * stride + first, rows, f"[{i}, {piece.path.rpartition('.')[2]}]") for i in range(leads)]
