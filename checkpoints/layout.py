"""Arrays on disk as Orbax restores them: zarr, not compressed, in chunks that one device reads whole.

Here: the parts of a weight in each format, chunk shapes, bytes per device, writing blocks of an array in any order, and
the metadata files of Orbax. A chunk is split wherever its array can be split over `tensor`, by expert width and by expert
alike, so a sharded restore reads only what it holds. Imports numpy only: a plan needs no device.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Iterable

import ml_dtypes
import numpy as np

SPLIT_AXES = ("heads", "groups", "vocab", "embed_columns", "shared_width", "expert_width", "experts")
SMALLEST_CHUNK = 256 * 2**10  # bytes; smaller arrays are read whole by everybody
LARGEST_CHUNK = 64 * 2**20
DEFAULT_SPLIT = 8
BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
UINT8, FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_ZARR_DTYPES = {"uint8": "|u1", "float32": "<f4", "int32": "<i4"}  # the others go by their names
_PLAIN = {"bfloat16": BFLOAT16, "float32": FLOAT32, "int32": np.dtype(np.int32)}


def stored_parts(shape: tuple[int, ...], form: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Part ('' for a plain tensor) -> shape and dtype of its array, for a weight of a logical shape and a format.

    ValueError where the blocks of the format do not divide the last axis.
    """
    if form in _PLAIN:
        return {"": (shape, _PLAIN[form])}
    *lead, n, k = shape
    if form == "fp8":
        return {"data": (shape, E4M3), "scale": ((*lead, -(-n // 128), -(-k // 128)), UINT8)}
    block = {"mxfp4": 32, "nvfp4": 16}[form]
    if k % block:
        raise ValueError(f"{form} has blocks of {block}, which do not divide the {k} columns of {list(shape)}")
    parts = {"data": ((*lead, n, k // 2), UINT8), "scale": ((*lead, n, k // block), E4M3 if form == "nvfp4" else UINT8)}
    return parts | ({"global_scale": (tuple(lead), FLOAT32)} if form == "nvfp4" else {})


def chunk_shape(shape: tuple[int, ...], itemsize: int, axes: tuple[str | None, ...], split: int) -> tuple[int, ...]:
    """The chunks of one array: `axes` names its axes; those that may be sharded are cut in `split`, if they divide."""
    chunk = list(shape)
    # Whole experts last: where an array is too small for both, the default way of sharding them reads less.
    for i, axis in sorted(enumerate(axes[: len(shape)]), key=lambda pair: pair[1] == "experts"):
        parts = math.gcd(shape[i], split)
        if axis in SPLIT_AXES and math.prod(chunk) * itemsize // parts >= SMALLEST_CHUNK:
            chunk[i] //= parts
    for i in range(len(chunk)):
        while math.prod(chunk) * itemsize > LARGEST_CHUNK and chunk[i] > 1:
            chunk[i] //= next((d for d in (2, 3, 5, 7, 11, 13) if chunk[i] % d == 0), chunk[i])
    return tuple(chunk)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of a checkpoint: name ('layers.3.attn.wkv.data'), shape, dtype, chunk shape (divides the shape)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_count(self) -> int:
        return math.prod(n // c for n, c in zip(self.shape, self.chunks))

    def create(self, weights: Path) -> None:
        """Make its directory and .zarray; harmless when repeated."""
        directory = weights / self.name
        directory.mkdir(exist_ok=True)
        description = {
            "chunks": list(self.chunks), "compressor": None, "dimension_separator": ".",
            "dtype": _ZARR_DTYPES.get(self.dtype.name, self.dtype.name), "fill_value": None, "filters": None, "order": "C",
            "shape": list(self.shape), "zarr_format": 2,
        }  # fmt: skip
        text = json.dumps(description, separators=(",", ":"), sort_keys=True)
        (directory / ".zarray").write_text(text, encoding="ascii")

    def write(self, weights: Path, start: tuple[int, ...], block: np.ndarray) -> None:
        """Write a block at an offset, in place: blocks may come in any order, from any thread, and again."""
        ranges = [range(s // c, -(-(s + n) // c)) for s, n, c in zip(start, block.shape, self.chunks)]
        for index in np.ndindex(*map(len, ranges)):
            chunk = [r[i] for r, i in zip(ranges, index)]
            low = [max(s, i * c) for s, i, c in zip(start, chunk, self.chunks)]
            high = [min(s + n, (i + 1) * c) for s, n, i, c in zip(start, block.shape, chunk, self.chunks)]
            part = block[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))]
            name = ".".join(map(str, chunk)) or "0"
            fd = os.open(weights / self.name / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._write_part(fd, [a - i * c for a, i, c in zip(low, chunk, self.chunks)], part)
            finally:
                os.close(fd)

    def _write_part(self, fd: int, at: list[int], part: np.ndarray) -> None:
        whole = part.ndim  # axes from here on are covered entirely, so what begins one axis before is contiguous
        while whole and part.shape[whole - 1] == self.chunks[whole - 1]:
            whole -= 1
        lead = max(whole - 1, 0)
        strides = [math.prod(self.chunks[i + 1 :]) for i in range(part.ndim)]
        for index in np.ndindex(*part.shape[:lead]):
            offset = sum((a + i) * s for a, i, s in zip(at, (*index, *[0] * (part.ndim - lead)), strides))
            _pwrite(fd, np.ascontiguousarray(part[index]), offset * self.dtype.itemsize)


def _pwrite(fd: int, values: np.ndarray, offset: int) -> None:
    view = memoryview(values.reshape(-1).view(np.uint8))
    while view:
        count = os.pwrite(fd, view[: 2**30], offset)
        view, offset = view[count:], offset + count


def arrays_of(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], form: str, split: int) -> dict[str, StoredArray]:
    """Part -> the array that stores it, of one parameter."""
    return {
        part: StoredArray(f"{path}.{part}" if part else path, s, dtype, chunk_shape(s, dtype.itemsize, axes, split))
        for part, (s, dtype) in stored_parts(shape, form).items()
    }


def bytes_per_device(array: StoredArray, axes: tuple[str | None, ...], rules: dict[str | None, str | None], sizes: dict[str, int]) -> int:
    """Bytes that one device of a mesh holds of an array; ValueError where its shard would not be whole."""
    count = 1
    for n, axis in zip(array.shape, axes):
        parts = sizes.get(rules.get(axis) or "", 1)
        if n % parts:
            raise ValueError(f"{array.name} has {n} entries along {axis}, which {rules.get(axis)}={parts} does not divide")
        count *= parts
    return array.nbytes // count


def write_orbax_metadata(weights: Path, arrays: Iterable[StoredArray]) -> None:
    """The files beside the arrays by which Orbax knows the tree; the same bytes whenever the arrays are the same."""
    arrays = sorted(arrays, key=lambda a: a.name)
    tree = {
        str((a.name,)): {
            "key_metadata": [{"key": a.name, "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(a.shape)},
        }
        for a in arrays
    }
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    shapes = [
        {"array_metadata": {"param_name": a.name, "write_shape": list(a.shape), "chunk_shape": list(a.chunks), "ext_metadata": None}}
        for a in arrays
    ]
    sharding = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})
    files = {
        "_METADATA": {
            "tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_sharding": {base64.b64encode(a.name.encode()).decode(): sharding for a in arrays},
        "_CHECKPOINT_METADATA": {
            "item_handlers": handler, "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": 1,
            "commit_timestamp_nsecs": 1, "custom_metadata": {},
        },
        "array_metadatas/process_0": {"array_metadatas": shapes},
    }  # fmt: skip
    (weights / "array_metadatas").mkdir(exist_ok=True)
    for name, content in files.items():
        (weights / name).write_text(json.dumps(content), encoding="utf-8")
