"""Models on disk: the files of a checkpoint, how it is saved, and what can be told about one before reading it.

One layout. A model is a directory:
  config.json      the configuration, in the official spelling
  dsv4.json        {format_version, recipe, formats, metadata, files}; formats is a summary for people, role ->
                   formats; files is weights/... -> [bytes, crc32 or null if the checkpoint is large]
  tokenizer.json   if it was given
  weights/         an Orbax checkpoint: one array per name, 'layers.3.attn.wkv' for a plain tensor and
                   'layers.3.attn.wkv.data', '.scale', '.global_scale' for the parts of a quantized one
The format of a tensor is told by its parts, so a checkpoint may mix formats.
Not here: loading (`restore.py`), published safetensors and their names (`reader.py`, `names.py`), converting them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints import layout
from checkpoints.reader import printable, read_json_file
from dsv4_jax import pack, params
from dsv4_jax.model import Model
from dsv4_jax.precision import Recipe
from ffi_kernels.tensor import array_fields

FORMAT_VERSION = 1
EMBEDDED = "tiny"
LARGEST_DESCRIPTION = 2**28  # bytes of dsv4.json
MOST_FILES = 2**22  # Pro that was cut for 64 devices has 794,630
CHECKED_BYTES = 2**30  # larger checkpoints are checked by the sizes of their files only, not by their contents


# --- save -------------------------------------------------------------------------------------------------------


def save(model: Model, path: str | Path, *, tokenizer_json: str | None = None, metadata: dict | None = None) -> None:
    """Write a model, its weights in the formats they have and in the linear layout, to the new directory `path`.

    tokenizer_json: the contents of a tokenizer.json. metadata: anything JSON can hold. Nothing half-written appears
    under `path`: everything goes to a sibling directory that is renamed at the end. Raises ValueError if `path`
    exists or the tokenizer is not JSON.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; a checkpoint is never overwritten: delete it first or save elsewhere.")
    if tokenizer_json is not None:
        _parse_json(tokenizer_json, "tokenizer_json", "pass the contents of a tokenizer.json, not its path")
    split = max(layout.DEFAULT_SPLIT, model.context.tensor_size)
    arrays, formats = _named_arrays(pack.unpack(model), split)
    content = {
        "format_version": FORMAT_VERSION,
        "recipe": dataclasses.asdict(model.recipe),
        "formats": formats,
        "metadata": metadata or {},
    }
    json.dumps(content)  # before anything is written: metadata may not be JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent.resolve()))
    try:
        _write_arrays(partial / "weights", arrays)
        files = sorted(f for f in (partial / "weights").rglob("*") if f.is_file())
        thorough = sum(f.stat().st_size for f in files) <= CHECKED_BYTES
        sizes = {f.relative_to(partial).as_posix(): [f.stat().st_size, crc32_of(f) if thorough else None] for f in files}
        content["files"] = sizes
        if tokenizer_json is not None:
            (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, value in (("config.json", model.config.to_json()), ("dsv4.json", content)):
            (partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp keeps everybody else out
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _named_arrays(model: Model, split: int) -> tuple[dict[layout.StoredArray, jax.Array], dict[str, list[str]]]:
    """(how an array is stored -> the array, role -> formats that occur)."""
    arrays: dict[layout.StoredArray, jax.Array] = {}
    formats: dict[str, set[str]] = {}

    def add(name: str, param: params.Param, leaf) -> None:
        formats.setdefault(param.role, set()).add(params.format_of(leaf))
        parts = array_fields(type(leaf))
        for key, array in {f"{name}.{part}": getattr(leaf, part) for part in parts}.items() if parts else [(name, leaf)]:
            chunks = layout.chunk_shape(array.shape, array.dtype.itemsize, param.axes, split)
            arrays[layout.StoredArray(key, array.shape, array.dtype, chunks)] = array

    params.map_params(add, model.config, model.weights)
    return arrays, {role: sorted(found) for role, found in sorted(formats.items())}


def _write_arrays(directory: Path, arrays: dict[layout.StoredArray, jax.Array]) -> None:
    """Small arrays together in one OCDBT database, which is a handful of files; else each in chunks of its own."""
    if all(stored.chunk_count == 1 for stored in arrays):
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer(use_ocdbt=True) as checkpointer:
            tree = {stored.name: array for stored, array in arrays.items()}
            checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(tree))
        return
    directory.mkdir()
    for stored, array in arrays.items():
        stored.create(directory)
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                start = tuple(s.start or 0 for s in shard.index)
                stored.write(directory, start, np.asarray(shard.data))
    layout.write_orbax_metadata(directory, arrays)


def crc32_of(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


# --- what is there ----------------------------------------------------------------------------------------------


def directory_of(path: str | Path) -> Path:
    """The directory of a model of this package ("tiny": the embedded one); ValueError if there is none at `path`."""
    embedded = str(path) == EMBEDDED
    directory = Path(__file__).parent / EMBEDDED if embedded else Path(path)
    if not os.path.exists(directory):
        if embedded:
            raise ValueError(f"the embedded model is not part of this installation ({directory} does not exist).")
        raise ValueError(f'{path} does not exist; give a directory written by checkpoints.save, or "{EMBEDDED}".')
    if not os.path.isdir(directory):
        raise ValueError(f"{path} is a file; give the directory of a model written by checkpoints.save.")
    if not os.path.lexists(directory / "dsv4.json"):
        if any(directory.glob("*.safetensors*")):
            raise ValueError(
                f"{path} is a Hugging Face checkpoint (safetensors), not one of this package; convert it first "
                "(dsv4 convert), and load what that wrote."
            )
        raise ValueError(
            f"{path} is not a model of this package: it holds no dsv4.json; was it written by checkpoints.save?"
        )
    return directory


def _parse_json(text: str, what: str, way_out: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not readable JSON ({error}); {way_out}.") from error


def description(directory: Path) -> dict[str, Any]:
    """The contents of dsv4.json, whose version, recipe and files are known to be there."""
    path = directory / "dsv4.json"
    found, _ = read_json_file(
        path, LARGEST_DESCRIPTION, containers=MOST_FILES, way_out="the checkpoint is damaged: copy or save it again"
    )
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {printable(repr(version))}, but this package reads {FORMAT_VERSION} only; load it with the "
            "package that wrote it, or save it again with this one."
        )
    recipe, files = found.get("recipe"), found.get("files")
    complete = isinstance(recipe, dict) and set(recipe) == {f.name for f in dataclasses.fields(Recipe)}
    if not complete or not isinstance(files, dict) or not all(map(_is_file_of_weights, files.items())):
        raise ValueError(f"{path} lacks the recipe or the files of the checkpoint; it is damaged: copy or save it again.")
    return found


def _is_file_of_weights(item: tuple[str, Any]) -> bool:
    """Whether an entry of `files` names a file below weights/, with its size and its crc32 or null."""
    name, value = item
    below = name.isprintable() and name.startswith("weights/") and ".." not in name.split("/")
    return below and isinstance(value, list) and [type(v) for v in value] in ([int, int], [int, type(None)])


def check_files(directory: Path, files: dict[str, list[int | None]]) -> None:
    """ValueError naming the first file of the checkpoint that is missing, cut off or altered (if its crc32 is known)."""
    thorough = sum(size for size, _ in files.values()) <= CHECKED_BYTES
    for name, (size, crc32) in files.items():
        path = directory / name
        found = os.path.getsize(path) if os.path.isfile(path) else None
        if found is None:
            trouble = "is missing"
        elif found != size:
            trouble = f"has {found} bytes instead of {size}"
        elif thorough and crc32 is not None and crc32_of(path) != crc32:
            trouble = "was altered: its contents do not match their checksum"
        else:
            continue
        raise ValueError(f"the checkpoint {directory} is damaged: {name} {trouble}. Copy or save it again.")
