"""Our checkpoints -> the official layout: config.json, tokenizer.json, safetensors in shards, and their index.

Every weight keeps its format and its bits: FP8 and MXFP4 as published; NVFP4 in ModelOpt's spelling (without the static
input_scale, which this package never had); others plain. Headers are computed first, then every tensor is written to its
place, experts a few at a time. Not here: names (`names.py`), reading a published directory (`reader.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator

import jax
import numpy as np

from checkpoints import matching, names, store
from checkpoints.reader import INDEX
from checkpoints.reading import Reader
from checkpoints.restore import stored_leaves
from dsv4_jax import pack, params
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Model
from ffi_kernels.tensor import FP8_BLOCK, array_fields

SHARD_BYTES = 5 * 10**9
SLAB_BYTES = 256 * 2**20  # of experts that are in memory at a time, or one expert if it is larger
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
# format -> part of ours -> (suffix of the published name, dtype code)
_SPELLING = {
    "fp8": {"data": (".weight", "F8_E4M3"), "scale": (".scale", "F8_E8M0")},
    "mxfp4": {"data": (".weight", "I8"), "scale": (".scale", "F8_E8M0")},
    "nvfp4": {"data": (".weight", "U8"), "scale": (".weight_scale", "F8_E4M3"), "global_scale": (".weight_scale_2", "F32")},
    "bfloat16": {"": (".weight", "BF16")}, "float32": {"": (".weight", "F32")}, "int32": {"": (".weight", "I64")},
}  # fmt: skip
_ITEMSIZE = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F32": 4, "I64": 8}


@dataclasses.dataclass
class _Out:
    """One published tensor: where its values come from and where its bytes go."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    part: str
    expert: int | None
    regrouped: bool = False  # FP8 scales of wo_a whose blocks span groups
    file: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]


class _Weights:
    """The weights of a model in memory, or of a checkpoint on disk: their formats, and numpy slices of their arrays."""

    def __init__(self, model: Model | str | Path):
        self.reader: Reader | None = None
        if isinstance(model, Model):
            self.config, self.source, model = model.config, model.source, pack.unpack(model)
            self.leaves: dict[str, Any] = {}
            params.map_params(lambda name, _, leaf: self.leaves.__setitem__(name, leaf), model.config, model.weights)
            if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(model.weights)):
                raise ValueError("other processes hold parts of this model; save it, and export the directory from one process.")
        else:
            directory = store.directory_of(model)
            store.check_files(directory, store.description(directory)["files"])
            self.config, self.source = ModelConfig.from_hf(directory / "config.json"), str(directory)
            self.reader = Reader(directory).__enter__()
            self.leaves = stored_leaves(directory, self.config, self.reader.stored())

    def read(self, path: str, part: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """An array of a weight, or [start, stop) of its first axis."""
        if self.reader is not None:
            return self.reader.rows(f"{path}.{part}" if part else path, start, stop)
        array = getattr(self.leaves[path], part) if part else self.leaves[path]
        return np.asarray(array if start is None else array[start:stop])


def export_hf(
    model: Model | str | Path, directory: str | Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> Path:
    """Write a model, or the checkpoint in a directory of ours, to the new directory `directory` in the official layout.

    Converting the result with the recipe of the model gives the same checkpoint bit for bit, and exporting a converted
    official checkpoint gives the official tensors. Memory: one slab of experts. Nothing half-written appears under
    `directory`. Raises ValueError if it exists, if the model cannot be read, or if FP8 scales of wo_a have no place in
    blocks of 128 rows.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists already; a checkpoint is never overwritten: delete it first or export elsewhere.")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes = {shard_bytes} is no size of a file; give at least the bytes of the largest tensor.")
    weights = _Weights(model)
    outs = list(_outs(weights))
    shards = _shards(outs, shard_bytes)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent.resolve()))
    try:
        for file, members in shards.items():
            _write_header(partial / file, members)
        _write_tensors(partial, weights, outs, progress)
        index = {"metadata": {"total_size": sum(o.nbytes for o in outs)}, "weight_map": {o.name: o.file for o in outs}}
        forms = {params.format_of(leaf) for leaf in weights.leaves.values()}
        for name, content in ((INDEX, index), ("config.json", _config(weights.config, forms))):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer = Path(weights.source or "") / "tokenizer.json"
        if weights.source and tokenizer.is_file():
            shutil.copyfile(tokenizer, partial / "tokenizer.json")
        partial.chmod(0o755)  # mkdtemp keeps everybody else out
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def _config(config: ModelConfig, forms: set[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"torch_dtype": "bfloat16"}
    if "fp8" in forms:
        told["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }  # fmt: skip
    if "mxfp4" in forms:
        told["expert_dtype"] = "fp4"
    return config.to_json() | told


# --- what goes where --------------------------------------------------------------------------------------------


def _outs(weights: _Weights) -> Iterator[_Out]:
    """The published tensors of every weight, in the order of our tree."""
    for path, param in matching.declared(weights.config).items():
        leaf = weights.leaves[path]
        form = params.format_of(leaf)
        parts = array_fields(type(leaf)) or ("",)
        for expert in range(param.shape[0]) if param.role == "experts" else [None]:
            for part in parts:
                suffix, dtype = _SPELLING[form][part]
                shape = tuple((getattr(leaf, part) if part else leaf).shape)
                out = _Out(names.official_name(path, expert, suffix), dtype, shape, path, part, expert)
                if expert is not None:
                    out.shape = shape[1:]
                elif names.row_of(path).transform == names.GROUPS:
                    _without_groups(out, weights, form)
                yield out


def _without_groups(out: _Out, weights: _Weights, form: str) -> None:
    """wo_a [groups, rows, K] is one matrix as published. Its scales are merged where they agree."""
    if out.part == "global_scale":  # one for the matrix, or one per group, which `matching.py` knows as well
        values = weights.read(out.path, out.part)
        out.shape = () if (values == values[0]).all() else values.shape
        return
    groups, rows, width = out.shape
    per_group = weights.leaves[out.path].shape[1]
    if form == "fp8" and out.part == "scale" and per_group % FP8_BLOCK:
        merged = _merged(weights.read(out.path, "scale"), per_group)
        if merged is None and width > 1:
            raise ValueError(
                f"{out.path} has FP8 scales per group of o_lora_rank = {per_group} rows and {FP8_BLOCK} columns, which blocks "
                f"of {FP8_BLOCK} x {FP8_BLOCK} cannot hold; load the model with recipe='bf16' and export that."
            )
        out.regrouped = True
        out.shape, out.dtype = ((groups * per_group, 1), "F32") if merged is None else (merged.shape, out.dtype)
    else:
        out.shape = (groups * rows, width)


def _rows_of_scales(scale: np.ndarray, per_group: int) -> np.ndarray:
    """FP8 scales of wo_a [groups, blocks, K/128] -> the scale of each row, uint8 [groups * rows, K/128]."""
    return np.repeat(scale, FP8_BLOCK, axis=1)[:, :per_group].reshape(-1, scale.shape[-1])


def _merged(scale: np.ndarray, per_group: int) -> np.ndarray | None:
    """Scales per group -> per 128 rows of the whole matrix; None where such a block would need several."""
    rows = _rows_of_scales(scale, per_group)
    first = rows[::FP8_BLOCK]
    return first if (np.repeat(first, FP8_BLOCK, axis=0)[: len(rows)] == rows).all() else None


def _shards(outs: list[_Out], shard_bytes: int) -> dict[str, list[_Out]]:
    """File name -> its tensors; every tensor learns its file. Tensors stay in order; widest items come first in a file,
    so that each lies aligned."""
    groups: list[list[_Out]] = [[]]
    size = 0
    for out in outs:
        size += out.nbytes
        if groups[-1] and size > shard_bytes:
            groups.append([])
            size = out.nbytes
        groups[-1].append(out)
    shards = {}
    for number, members in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards[file] = sorted(members, key=lambda o: -_ITEMSIZE[o.dtype])
        for out in members:
            out.file = file
    return shards


# --- bytes ------------------------------------------------------------------------------------------------------


def _write_header(path: Path, members: list[_Out]) -> None:
    """The header of a safetensors file, and the room behind it; every tensor learns its offset."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for out in members:
        header[out.name] = {"dtype": out.dtype, "shape": list(out.shape), "data_offsets": [at, at + out.nbytes]}
        out.offset, at = at, at + out.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    for out in members:
        out.offset += 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def _write_tensors(directory: Path, weights: _Weights, outs: list[_Out], progress: Progress | None) -> None:
    arrays: dict[tuple[str, str], list[_Out]] = {}
    for out in outs:
        arrays.setdefault((out.path, out.part), []).append(out)
    done, total = 0, sum(out.nbytes for out in outs)
    files: dict[str, int] = {}
    try:
        for (path, part), members in arrays.items():
            step = _slab(weights, path, part, members)
            for start in range(0, len(members), step):
                slab = members[start : start + step]
                if slab[0].expert is None:
                    values = [_published(weights.read(path, part), slab[0], weights)]
                else:
                    values = weights.read(path, part, start, start + len(slab))
                for out, value in zip(slab, values, strict=True):
                    if out.file not in files:
                        files[out.file] = os.open(directory / out.file, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
                    _pwrite(files[out.file], value, out)
                    done += out.nbytes
                if progress:
                    progress(done, total)
    finally:
        for fd in files.values():
            os.close(fd)


def _slab(weights: _Weights, path: str, part: str, members: list[_Out]) -> int:
    """How many experts to read at a time: whole chunks of the stored array, so that none is read twice."""
    chunk = 1 if weights.reader is None else weights.reader.rows_per_chunk(f"{path}.{part}" if part else path)
    return max(chunk, SLAB_BYTES // max(members[0].nbytes, 1) // chunk * chunk)


def _published(values: np.ndarray, out: _Out, weights: _Weights) -> np.ndarray:
    """An array that is no stack of experts, in the shape and dtype it is published with."""
    if out.regrouped:
        per_group = weights.leaves[out.path].shape[1]
        if out.dtype == "F32":
            return np.ldexp(np.float32(1), _rows_of_scales(values, per_group).astype(np.int32) - 127)
        return _merged(values, per_group)
    if out.part == "global_scale" and not out.shape:
        return values.reshape(-1)[:1]
    return values.astype(np.int64) if out.dtype == "I64" else values


def _pwrite(fd: int, value: np.ndarray, out: _Out) -> None:
    view = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    if len(view) != out.nbytes:
        raise RuntimeError(f"{out.name} has {len(view)} bytes, and its header says {out.nbytes}")
    offset = out.offset
    while view:
        count = os.pwrite(fd, view[: 2**30], offset)
        view, offset = view[count:], offset + count
