"""A published checkpoint on disk, read without trust: safetensors headers, their index, and the bytes of tensors.

`open_source` validates every header against the sizes of the files before anything is allocated and lists all problems;
`Source` then reads tensors, or rows of them, with pread. Safetensors only: no pickle, no code from the checkpoint, and
regular files only (or links to them, as in the cache of Hugging Face): a pipe would wait for ever, a device never ends.
Not here: what the names mean (`names.py`, `matching.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any, Iterable

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 32 * 2**20  # bytes; the 145,116 tensors of Pro in one file would need 20 MiB
LARGEST_JSON = 64 * 2**20  # bytes of an index or a tokenizer
LARGEST_CONFIG = 2**20
MOST_CONTAINERS = 2**19  # lists and objects in a JSON file: millions of empty ones would take minutes and gigabytes
LARGEST_RANK = 8
LONGEST_NAME = 256
LONGEST_PROBLEM = 400  # characters of one that are shown
SHOWN_PROBLEMS = 20
DTYPES = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16), "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32), "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32), "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip


class SourceError(ValueError):
    """What is wrong with a published checkpoint; `.problems` is the whole list, the text shows the first ones."""

    def __init__(self, where: str | Path, problems: Iterable[str], way_out: str):
        self.problems = list(problems)
        more = len(self.problems) - SHOWN_PROBLEMS
        shown = "; ".join(map(printable, self.problems[:SHOWN_PROBLEMS])) + (f"; and {more} more" if more > 0 else "")
        super().__init__(f"{where} cannot be read: {shown}. {way_out}")


def printable(text: str, length: int = LONGEST_PROBLEM) -> str:
    """Text that came from a file, in one line that every terminal can show, shortened."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file: where its bytes lie. dtype is the code of the format ('BF16', 'F8_E4M3', ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int  # from the start of the file
    nbytes: int

    @property
    def np_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One safetensors file: size in bytes now, size its header promises, the sha256 of its header, and when its contents and
    its inode last changed."""

    size: int
    promised: int
    header_sha256: str
    mtime_ns: int
    ctime_ns: int


class Source:
    """A directory of safetensors whose headers are valid. Thread-safe; close it, or use it in a `with`.

    tensors: name -> Entry, in the order of files and offsets. files: file name -> ShardFile. config: the parsed
    config.json. config_sha256: of that file. notices: sentences about what was seen and is no error.
    """

    def __init__(
        self, directory: Path, tensors: dict[str, Entry], files: dict[str, ShardFile], config: dict, notices: list[str],
        config_sha256: str = "",
    ):  # fmt: skip
        self.directory, self.tensors, self.files, self.config, self.notices = directory, tensors, files, config, notices
        self.config_sha256 = config_sha256
        self._open: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def read(self, entry: Entry | str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows [start, stop) along the first axis, as a new array. ValueError if the file ends early."""
        entry = self.tensors[entry] if isinstance(entry, str) else entry
        if not entry.shape:
            return self.read_flat(entry, 0, 1).reshape(())
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        row = int(np.prod(entry.shape[1:], dtype=object)) if len(entry.shape) > 1 else 1
        return self.read_flat(entry, start * row, max(stop, start) * row).reshape(max(stop - start, 0), *entry.shape[1:])

    def read_flat(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the tensor in C order, as a new 1-d array."""
        out = np.empty(stop - start, entry.np_dtype)
        size = entry.np_dtype.itemsize
        self.pread(entry.file, entry.offset + start * size, memoryview(out.view(np.uint8)))
        return out

    def pread(self, file: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a file from `offset`; ValueError if the file ends before."""
        fd = self._descriptor(file)
        while into:
            count = os.preadv(fd, [into[: 2**30]], offset)
            if count == 0:
                raise ValueError(
                    f"{self.directory / file} ends at byte {offset}, where {len(into)} more belong to a tensor; the file "
                    "was cut off since it was opened, or only its header was downloaded: download it again."
                )
            into, offset = into[count:], offset + count

    def _descriptor(self, file: str) -> int:
        fd = self._open.get(file)
        if fd is None:
            fd = _open_regular(self.directory / file)
            other = self._open.setdefault(file, fd)
            if other != fd:  # another thread was faster
                os.close(fd)
                fd = other
        return fd

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; OSError for whatever else is there, without waiting for it."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if code == errno.EISDIR else "it is no regular file", str(path))
    return fd


def read_json_file(
    path: Path, limit: int = LARGEST_JSON, *, containers: int = MOST_CONTAINERS, unique_keys: bool = True,
    way_out: str = "download it again",
) -> tuple[Any, bytes]:  # fmt: skip
    """(The contents of a JSON file, its bytes), or ValueError with a sentence for whatever can be wrong with it.

    limit: bytes; containers: lists and objects that it may hold.
    """
    try:
        with open(_open_regular(path), "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise ValueError(f"it has more than the {limit} bytes that such a file may have")
        _refuse_containers(raw, containers)
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique if unique_keys else None), raw
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; copy it from the published model.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = "its JSON is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} is not readable JSON ({printable(reason)}); {way_out}.") from None


def open_source(directory: str | Path, *, headers_only: bool = False) -> Source:
    """The published checkpoint in `directory`, its headers validated; no tensor is read.

    headers_only: files that hold their header and not (all of) the data are accepted with a notice, for planning.
    Raises SourceError (a ValueError) listing every problem.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"{directory} {what}; give the directory that holds config.json and the .safetensors files.")
    config, config_bytes = read_json_file(directory / "config.json", LARGEST_CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{directory / 'config.json'} holds no JSON object; download it again.")
    problems: list[str] = []
    notices: list[str] = []
    weight_map, names = _shards(directory, problems)
    tensors: dict[str, Entry] = {}
    files: dict[str, ShardFile] = {}
    short = []
    for file in names:
        try:
            shard, entries = read_header(directory / file)
        except ValueError as error:
            problems.append(str(error))
            continue
        files[file] = shard
        if shard.size != shard.promised:
            if headers_only and shard.size < shard.promised:
                short.append(file)
            else:
                trouble = "cut off" if shard.size < shard.promised else "longer than it says"
                problems.append(f"{file} is {trouble}: it has {shard.size} bytes, and its header describes {shard.promised}")
        for entry in entries:
            other = tensors.setdefault(entry.name, entry)
            if other is not entry:
                problems.append(f"{entry.name} is in {other.file} and again in {file}")
            if weight_map is not None and weight_map.get(entry.name) != file:
                told = weight_map.get(entry.name)
                problems.append(f"{entry.name} is in {file}, but {INDEX} " + (f"says {told}" if told else "does not list it"))
    if weight_map is not None:
        lacking = ((name, file) for name, file in weight_map.items() if file in files and name not in tensors)
        problems += [f"{INDEX} lists {name}, which {file} lacks" for name, file in lacking]
    if problems:
        raise SourceError(directory, problems, "Download these files again from the publisher.")
    if short:
        notices.append(f"{len(short)} of {len(files)} files hold their header only, so this can be planned but not converted")
    return Source(directory, tensors, files, config, notices, hashlib.sha256(config_bytes).hexdigest())


def _shards(directory: Path, problems: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """(tensor name -> file by the index, or None without an index; names of the files)."""
    try:
        found = sorted(name for name in os.listdir(directory) if not name.startswith("."))  # what begins so, systems leave behind
    except OSError as error:
        raise ValueError(f"{directory} cannot be listed ({error.strerror}); make it readable, or copy it.") from None
    present = [name for name in found if name.endswith(".safetensors")]
    if INDEX not in found:
        if not present:
            pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            hint = f" ({pickles[0]} is a pickle, which could run code, and is never read)" if pickles else ""
            raise ValueError(f"{directory} holds no .safetensors file{hint}; give the directory of a safetensors checkpoint.")
        return None, present
    try:
        index, _ = read_json_file(directory / INDEX)
    except ValueError as error:
        raise SourceError(directory, [str(error).rstrip(".")], "Without its index no tensor can be trusted.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SourceError(directory, [f"{INDEX} has no weight_map of names to files"], "Download the index again.")
    good, there = [], set(present)
    for file, count in sorted(collections.Counter(weight_map.values()).items()):
        if file != os.path.basename(file) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            problems.append(f"{INDEX} names {file[:80]!r}, which is not the plain name of a .safetensors file")
        elif file not in there:
            problems.append(f"{file} with {count} tensors is missing")
        else:
            good.append(file)
    return weight_map, good


def _refuse_containers(raw: bytes, most: int) -> None:
    count = raw.count(b"[") + raw.count(b"{")
    if count > most:
        raise ValueError(f"it has {count} opening brackets, more than {most}")


def _unique(pairs: list[tuple]) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return out


def read_header(path: Path) -> tuple[ShardFile, list[Entry]]:
    """One safetensors file: (its sizes, its tensors by offset). ValueError with a sentence for anything irregular.

    Nothing is allocated by what the file claims: lengths are compared with the size of the file first.
    """
    name = path.name
    try:
        with open(_open_regular(path), "rb") as file:
            status = os.fstat(file.fileno())
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError(f"{name} has {len(prefix)} bytes, fewer than the 8 of a safetensors length")
            (length,) = struct.unpack("<Q", prefix)
            limit = max(0, min(LARGEST_HEADER, status.st_size - 8))
            if length > limit:
                raise ValueError(f"{name} claims a header of {length} bytes, but at most {limit} are possible")
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{name} cannot be opened ({error.strerror})") from None
    if len(raw) < length:
        raise ValueError(f"{name} ends inside its header")
    try:
        _refuse_containers(raw, 3 * raw.count(b'"data_offsets"') + 2000)  # three for a tensor, and what the metadata quotes
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(f"the header of {name} is not readable JSON ({reason})") from None
    if not isinstance(header, dict):
        raise ValueError(f"the header of {name} is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__ of {name} is not an object of strings")
    start = 8 + length
    entries = [_entry(name, key, value, start) for key, value in header.items()]
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    at = start
    for entry in entries:
        if entry.offset != at:
            trouble = "overlaps the tensor before it" if entry.offset < at else "leaves a hole before it"
            raise ValueError(f"{entry.name} of {name} begins at byte {entry.offset} instead of {at}, so it {trouble}")
        at += entry.nbytes
    digest = hashlib.sha256(prefix + raw).hexdigest()
    return ShardFile(status.st_size, at, digest, status.st_mtime_ns, status.st_ctime_ns), entries


def _entry(file: str, name: str, value, start: int) -> Entry:
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"{file} names a tensor {name[:80]!r}, which is no name that a person gave")
    what = f"{name} of {file}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has the dtype {str(dtype)[:40]!r}, which is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"{what} has the shape {str(shape)[:80]}, which is not a list of non-negative integers")
    if len(shape) > LARGEST_RANK:
        raise ValueError(f"{what} has {len(shape)} axes, more than {LARGEST_RANK}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in offsets):
        raise ValueError(f"{what} has the data_offsets {str(offsets)[:80]}, which are not two non-negative integers")
    nbytes = DTYPES[dtype].itemsize
    for n in shape:
        nbytes *= n  # Python integers do not overflow
    if offsets[1] - offsets[0] != nbytes:
        span = offsets[1] - offsets[0]
        raise ValueError(f"{what} is {dtype} {shape}, which takes {nbytes} bytes, but its data_offsets span {span}")
    return Entry(name, dtype, tuple(shape), file, start + offsets[0], nbytes)
