"""What a directory of weights holds, told from headers: shapes, formats, bytes, bytes per device. No tensor is read.

`inspect` understands every published format (as `matching.py` does) and the checkpoints of this package; `tree` draws
what it found. Not here: whether a conversion to some recipe is possible (`planning.py`).
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import layout, matching, names, store
from checkpoints.reader import open_source
from checkpoints.reading import Reader, size_text
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import Param
from dsv4_jax.sharding import DATA, TENSOR, axis_rules, check_mesh

if TYPE_CHECKING:
    from rich.tree import Tree


_HALVES = (names.FIRST_HALF, names.SECOND_HALF)  # two parameters in one tensor


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter: our dotted name, logical shape, format ('mxfp4'; 'mxfp4+nvfp4' where experts differ), bytes that it
    takes in the directory, and bytes on each device of the mesh in the same format (None without a mesh)."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    nbytes_per_device: int | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found. kind: whose format the directory has. mesh: axis -> size, or None. notices: sentences."""

    path: str
    kind: str
    config: ModelConfig
    tensors: list[Tensor]
    files: int
    mesh: dict[str, int] | None
    expert_sharding: str
    notices: list[str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes_per_device(self) -> int | None:
        return None if self.mesh is None else sum(tensor.nbytes_per_device for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes_of_format(self) -> dict[str, int]:
        """Format -> bytes, the largest first."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            found[tensor.format] = found.get(tensor.format, 0) + tensor.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "path": self.path, "kind": self.kind, "files": self.files, "parameters": self.parameters, "bytes": self.nbytes,
            "bytes_per_device": self.nbytes_per_device, "bytes_of_format": self.bytes_of_format, "mesh": self.mesh,
            "expert_sharding": self.expert_sharding, "notices": self.notices, "config": self.config.to_json(),
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "format": t.format, "bytes": t.nbytes, "bytes_per_device": t.nbytes_per_device}
                for t in self.tensors
            ],
        }  # fmt: skip


def inspect(path: str | Path, mesh: dict[str, int] | None = None, expert_sharding: str = "width") -> Inspection:
    """What the directory `path` (or "tiny") holds.

    mesh: sizes of the axes 'data' and 'tensor' of a mesh that need not exist, to tell bytes per device. ValueError says
    what is wrong with the directory or the mesh; for published tensors that fit no model it lists them.
    """
    directory = Path(path)
    try:
        there = os.listdir(directory) if str(path) != store.EMBEDDED and os.path.isdir(directory) else None
    except OSError as error:
        raise ValueError(f"{path} cannot be listed ({error.strerror}); make it readable, or copy it.") from None
    if there is None or "dsv4.json" in there:
        found = _own(store.directory_of(path))
    elif "config.json" not in there and not any(".safetensors" in name for name in there):
        raise ValueError(
            f"{path} holds neither dsv4.json (a checkpoint of this package) nor config.json and .safetensors files (a "
            "published one); give the directory of a model."
        )
    else:
        found = _published(directory)
    kind, config, weights, files, notices = found
    sizes = None
    if mesh is not None:
        from jax.sharding import AbstractMesh

        sizes = {DATA: mesh.get(DATA, 1), TENSOR: mesh.get(TENSOR, 1)}
        check_mesh(config, AbstractMesh(tuple(sizes.values()), tuple(sizes)), expert_sharding)
    rules = axis_rules(expert_sharding)
    tensors, whole = [], []
    for name, (param, form, nbytes, arrays) in weights.items():
        held = None
        if sizes is not None:
            splits = [_split(shape, param, rules, sizes) for shape, _ in arrays]
            if None in splits:
                whole.append(name)
            held = sum(math.prod(shape) * itemsize // (n or 1) for n, (shape, itemsize) in zip(splits, arrays, strict=True))
        tensors.append(Tensor(name, param.shape, form, nbytes, held))
    if whole:
        notices = [*notices, f"{len(whole)} tensors have parts that tensor={sizes[TENSOR]} does not divide in this format, and are "
                   f"counted whole (the first is {whole[0]}); another recipe or a smaller mesh splits them"]  # fmt: skip
    return Inspection(str(path), kind, config, tensors, files, sizes, expert_sharding, notices)


def _split(shape: tuple[int, ...], param: Param, rules, sizes: dict[str, int]) -> int | None:
    """In how many parts an array of a parameter is split over the mesh; None where an axis does not divide."""
    parts = [(n, sizes.get(rules.get(axis) or "", 1)) for n, axis in zip(shape, param.axes)]
    return None if any(n % k for n, k in parts) else math.prod(k for _, k in parts)


# name -> parameter, format, bytes in the directory, and (shape, itemsize) of the arrays it has when restored
_Weights = dict[str, tuple[Param, str, int, list[tuple[tuple[int, ...], int]]]]


def _own(directory: Path) -> tuple[str, ModelConfig, _Weights, int, list[str]]:
    """A checkpoint of this package."""
    import jax

    from checkpoints.restore import stored_leaves
    from dsv4_jax import params

    description, config = store.description(directory), ModelConfig.from_hf(directory / "config.json")
    with Reader(directory) as reader:
        leaves = stored_leaves(directory, config, reader.stored())
    weights: _Weights = {}
    declared = matching.declared(config)
    for name, leaf in leaves.items():
        arrays = [(array.shape, array.dtype.itemsize) for array in jax.tree.leaves(leaf)]
        weights[name] = (declared[name], params.format_of(leaf), params.nbytes(leaf), arrays)
    kind = f"dsv4_jax checkpoint (format_version {description['format_version']}, recipe {description['recipe']['name']})"
    return kind, config, weights, len(description["files"]), []


def _published(directory: Path) -> tuple[str, ModelConfig, _Weights, int, list[str]]:
    """A directory of safetensors in any of the published formats."""
    with open_source(directory, headers_only=True) as source:
        matched = matching.match(source)
        files, present = len(source.files), set(source.tensors)
    weights: _Weights = {}
    for path, param in matched.declared.items():
        pieces = matched.pieces[path]
        forms = sorted({piece.form for piece in pieces})
        arrays = []
        for form in forms:  # experts may differ: those of one format are counted together
            count = sum(piece.form == form for piece in pieces)
            shape = param.shape if len(forms) == 1 else (count, *param.shape[1:])
            stored = layout.stored_parts(shape, "int32" if form == "int64" else form)
            arrays += [(part, dtype.itemsize) for part, dtype in stored.values()]
        nbytes = sum(piece.nbytes // (2 if piece.transform in _HALVES else 1) for piece in pieces)
        weights[path] = (param, "+".join(forms), nbytes, arrays)
    notices = list(matched.notices)
    if matched.dropped:
        notices.append(f"{len(matched.dropped)} tensors are of no use here and are left out (the first is {matched.dropped[0]})")
    return _kind(present, matched), matched.config, weights, files, notices


def _kind(present: set[str], matched: matching.Matched) -> str:
    """Whose format it is, for people: what counts is decided tensor by tensor."""
    if any(name.startswith("model.") for name in present):
        spelling = "transformers"
    else:
        spelling = "official"
    if any(name.endswith(".weight_global_scale") for name in present):
        return f"compressed-tensors NVFP4 ({spelling} names)"
    if any(name.endswith(".weight_scale_2") for name in present):
        return f"ModelOpt NVFP4 ({spelling} names)"
    forms = {piece.form for pieces in matched.pieces.values() for piece in pieces}
    quantized = [text for form, text in (("fp8", "FP8"), ("mxfp4", "MXFP4")) if form in forms]
    return f"{spelling} ({' + '.join(quantized) or 'not quantized'})"


# --- for people -------------------------------------------------------------------------------------------------


def tree(found: Inspection) -> Tree:
    """The parameters as a rich tree; layers that are alike are drawn once."""
    from rich.tree import Tree

    mesh = "" if found.mesh is None else f", {size_text(found.nbytes_per_device)} on each device of data={found.mesh[DATA]} x tensor={found.mesh[TENSOR]}"
    root = Tree(
        f"[bold]{_escape(found.path)}[/bold]  {_escape(found.kind)}: {_count(found.parameters)} parameters, "
        f"{size_text(found.nbytes)} in {found.files} files{mesh}"
    )
    nested: dict[str, Any] = {}
    for tensor in found.tensors:
        *parents, last = tensor.name.split(".")
        at = nested
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = tensor
    layers = nested.pop("layers", {})
    root.add("by format: " + ", ".join(f"[green]{form}[/green] {size_text(n)}" for form, n in found.bytes_of_format.items()))
    _add(root, nested)
    alike: dict[tuple, list[str]] = {}
    for number, layer in layers.items():
        alike.setdefault(_signature(layer), []).append(number)
    for numbers in alike.values():
        layer = layers[numbers[0]]
        count = f"  [dim]{len(numbers)} alike, each[/dim]" if len(numbers) > 1 else ""
        branch = root.add(f"[bold]layers.{_ranges(numbers)}[/bold]{count}  {_sum(layer)}")
        _add(branch, layer)
    return root


def _leaves(node) -> list[Tensor]:
    return [node] if isinstance(node, Tensor) else [leaf for child in node.values() for leaf in _leaves(child)]


def _signature(layer: dict) -> tuple:
    return tuple((t.name.split(".", 2)[2], t.shape, t.format, t.nbytes) for t in _leaves(layer))


def _sum(node) -> str:
    leaves = _leaves(node)
    held = [t.nbytes_per_device for t in leaves]
    return size_text(sum(t.nbytes for t in leaves)) + ("" if None in held else f", {size_text(sum(held))} per device")


def _add(branch: Tree, node: dict) -> None:
    for name, child in node.items():
        if isinstance(child, Tensor):
            branch.add(f"{name}  [cyan]{_escape(str(list(child.shape)))}[/cyan]  [green]{child.format}[/green]  {_sum(child)}")
        else:
            _add(branch.add(f"[bold]{name}[/bold]  {_sum(child)}"), child)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _ranges(numbers: list[str]) -> str:
    """Ascending numbers, shortened: 2, 4, ..., 40 (every second one) or 0-1.

    >>> _ranges(["0", "1"]), _ranges(["2", "4", "6", "8"]), _ranges(["3", "7", "8"])
    ('0-1', '2, 4, ..., 8', '3, 7, 8')
    """
    values = [int(n) for n in numbers]
    step = values[1] - values[0] if len(values) > 1 else 0
    if len(values) > 1 and step == 1 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    if len(values) > 3 and values == list(range(values[0], values[-1] + 1, step)):
        return f"{values[0]}, {values[1]}, ..., {values[-1]}"
    return ", ".join(map(str, values))


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
