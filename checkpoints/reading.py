"""Arrays of a checkpoint, read with TensorStore into shards: a device's part only, replicas once per process.

Here: `Reader`, and `LoadReport`, its count of bytes. Not here: what the arrays mean (`restore.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path
from typing import Iterator

import jax
import numpy as np
from jax.sharding import Sharding

READ_AHEAD = 512 * 2**20  # bytes that may be under way beside the piece that is waited for
_FILE_BYTES = "/tensorstore/kvstore/file/bytes_read"


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a load read.

    bytes_read: device of this process -> bytes of the stored chunks that hold its shards; a chunk that several devices
    need counts for each. process_bytes: the same, with what several devices hold whole counted once. file_bytes: what
    TensorStore really read from files, or None if it does not count: the metadata of arrays too, less where chunks are
    compressed or where one read served parts of several devices. stored_bytes: of all arrays of the checkpoint.
    """

    bytes_read: dict[jax.Device, int]
    process_bytes: int
    file_bytes: int | None
    stored_bytes: int
    seconds: float

    def __str__(self) -> str:
        largest = max(self.bytes_read.values(), default=0)
        total = self.process_bytes if self.file_bytes is None else self.file_bytes
        return (
            f"{size_text(total)} read by this process in {self.seconds:.1f} s (the checkpoint has "
            f"{size_text(self.stored_bytes)}), at most {size_text(largest)} for one of its {len(self.bytes_read)} devices"
        )


def size_text(nbytes: int) -> str:
    """Bytes for people, in powers of 1000.

    >>> size_text(999), size_text(159_600_000_000)
    ('999 B', '159.6 GB')
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.4g} {unit}"
    return f"{nbytes} B"


@dataclasses.dataclass
class _Piece:
    """One part of an array, for the devices that hold it."""

    devices: list[jax.Device]
    index: tuple[slice, ...]
    nbytes: int
    values: object = None  # a TensorStore future


class Reader:
    """The arrays of the checkpoint `directory`; use it in a `with`. Whatever the libraries raise becomes a ValueError
    with a sentence that names the directory."""

    def __init__(self, directory: Path):
        self._directory, self._weights = directory, (directory / "weights").resolve()
        self._is_ocdbt = (self._weights / "manifest.ocdbt").exists()
        self._stored: dict[str, jax.ShapeDtypeStruct] = {}
        self._bytes_read: collections.Counter = collections.Counter()
        self._process_bytes, self._before = 0, None
        self._last: tuple = (None, None)  # the array that `rows` read last, open

    def __enter__(self) -> "Reader":
        import tensorstore

        # The index of an OCDBT database is read once; chunks are not kept, so that every byte counted is a byte read.
        self._context = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": 2**26}})
        return self

    def __exit__(self, *_) -> None:
        self._context, self._last = None, (None, None)

    def stored(self) -> dict[str, jax.ShapeDtypeStruct]:
        """name -> shape and dtype of every array, from metadata alone."""
        import orbax.checkpoint as ocp

        def read():
            with ocp.PyTreeCheckpointer(use_ocdbt=self._is_ocdbt) as checkpointer:
                metadata = checkpointer.metadata(self._weights)
            if metadata.item_metadata is None:
                raise ValueError("its metadata is missing")
            tree = metadata.item_metadata.tree
            return {name: jax.ShapeDtypeStruct(tuple(array.shape), array.dtype) for name, array in tree.items()}

        self._stored = self._reading(read)
        return self._stored

    def arrays(self, shardings: dict[str, Sharding]) -> Iterator[jax.Array]:
        """Each array in its sharding, in the order of `shardings`; the next ones are read meanwhile."""
        self._before = _file_bytes()
        opened = [(name, sharding, self._reading(lambda name=name: self._open(name))) for name, sharding in shardings.items()]
        waiting = iter([(name, s, self._reading(future.result)) for name, s, future in opened])
        started: collections.deque = collections.deque()
        ahead = 0
        for _ in shardings:
            while not started or ahead < READ_AHEAD:
                following = next(waiting, None)
                if following is None:
                    break
                name, sharding, array = following
                pieces = self._pieces(array, sharding, self._stored[name].shape)
                for piece in pieces:
                    piece.values = array[piece.index].read()
                started.append((name, sharding, pieces))
                ahead += sum(piece.nbytes for piece in pieces)
            name, sharding, pieces = started.popleft()
            shards = []
            for piece in pieces:
                values = self._reading(piece.values.result)
                piece.values = None
                ahead -= piece.nbytes
                shards += [jax.device_put(np.asarray(values), device) for device in piece.devices]
            like = self._stored[name]
            yield jax.make_array_from_single_device_arrays(like.shape, sharding, shards)

    def rows(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """An array as numpy, or [start, stop) of its first axis."""
        array = self._handle(name)
        return np.asarray(self._reading(lambda: (array if start is None else array[start:stop]).read().result()))

    def rows_per_chunk(self, name: str) -> int:
        """Entries of the first axis that one stored chunk holds; 1 for a scalar."""
        return (self._handle(name).chunk_layout.read_chunk.shape or (1,))[0]

    def _handle(self, name: str):
        if self._last[0] != name:
            self._last = (name, self._reading(lambda: self._open(name).result()))
        return self._last[1]

    def report(self, seconds: float) -> LoadReport:
        """What was read since `arrays` began."""
        after = _file_bytes()
        measured = None if after is None or self._before is None else after - self._before
        stored = sum(math.prod(like.shape) * like.dtype.itemsize for like in self._stored.values())
        return LoadReport(dict(self._bytes_read), self._process_bytes, measured, stored, seconds)

    def _open(self, name: str):
        import tensorstore

        if self._is_ocdbt:
            base = {"driver": "file", "path": f"{self._weights}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#index"}
        else:
            kvstore = {"driver": "file", "path": f"{self._weights / name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, context=self._context, read=True)

    def _pieces(self, array, sharding: Sharding, shape: tuple[int, ...]) -> list[_Piece]:
        """The different parts of an array that devices of this process hold; counts their bytes."""
        chunk = array.chunk_layout.read_chunk.shape or ()  # a scalar has none
        pieces: dict[tuple, _Piece] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape))
            touched = math.prod(-(-stop // c) - start // c for (start, stop), c in zip(bounds, chunk))
            nbytes = touched * math.prod(chunk) * array.dtype.numpy_dtype.itemsize
            self._bytes_read[device] += nbytes
            if bounds not in pieces:
                pieces[bounds] = _Piece([], tuple(slice(*b) for b in bounds), nbytes)
                self._process_bytes += nbytes
            pieces[bounds].devices.append(device)
        return list(pieces.values())

    def _reading(self, read):
        """`read()`, with whatever Orbax and TensorStore raise said in a sentence."""
        try:
            return read()
        except (jax.errors.JaxRuntimeError, MemoryError):  # the devices' trouble, not the files'
            raise
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0].split(" See full")[0][:300]
            raise ValueError(
                f"the checkpoint {self._directory} is damaged or incomplete: Orbax cannot read {self._directory / 'weights'} "
                f"({first_line}). Copy or save it again."
            ) from error


def _file_bytes() -> int | None:
    """Bytes that TensorStore has read from files in this process."""
    import tensorstore

    found = tensorstore.experimental_collect_matching_metrics(_FILE_BYTES)
    return sum(value["value"] for metric in found for value in metric["values"]) if found else None
