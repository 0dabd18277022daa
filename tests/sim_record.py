"""What a GPU gave for every launch of the interpreter's tests, and the comparison of the interpreter with it.

A launch is known by its test and by a hash of everything that goes in: the kernel's source, the launch configuration, scalars,
the arrays. What comes out is one hash of all writable arrays, or the values themselves where a tolerance holds. Written with
DSV4_SIM_RECORD=file (a line per launch, added at once: a run that dies loses nothing), `merged` into tests/ffi_kernels/
sim_record.json, and compared with at every launch of the interpreter in a test that the record knows; `python
tests/record_on_device.py` does the first two on a device.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable

import numpy as np
import sim_sources
from sim_draws import current_test

RECORD = pathlib.Path(__file__).parent / "ffi_kernels" / "sim_record.json"
KINDS = "bits", "close"  # how launches are compared: hashes, values
AGAIN = "record again on a device: ffi_kernels/sim/README.md, Against a device"
Arrays = list[np.ndarray]


class Disagreement(AssertionError):
    """The interpreter gives something else than the device gave, or no longer runs what the device ran."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """How outputs are compared where not bit for bit. `canonical` maps the outputs to those that must be equal; a tolerance
    stores values."""

    canonical: Callable[[Arrays], Arrays] = lambda arrays: arrays
    rtol: float = 0.0
    atol: float = 0.0

    @property
    def kind(self) -> str:
        return "close" if self.rtol or self.atol else "bits"


EXACT = Compare()


def any_nan(kind=None) -> Compare:
    """Every nan of the outputs (read as `kind`, if given) stands for any other: the ISA leaves their bits open."""

    def canonical(arrays: Arrays) -> Arrays:
        values = [np.ascontiguousarray(a).view(kind or a.dtype) for a in arrays]
        return [v if v.dtype.kind in "iu" else np.where(v == v, v, np.array(np.nan, v.dtype)) for v in values]

    return Compare(canonical)


def _digest(*parts) -> str:
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else part if isinstance(part, bytes) else str(part).encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def inputs_of(source: pathlib.Path, kernel: str, args, arrays: Arrays, shape) -> str:
    """Hash of what a launch is given. Arrays count by content and by their place in `arrays`, never by address."""
    places = {a.ctypes.data: str(i) for i, a in enumerate(arrays)}
    said = []
    for arg in args:
        if isinstance(arg, np.ndarray):
            said.append("array " + places[arg.ctypes.data])
        elif hasattr(arg, "said"):  # a tensor map
            said.append(f"map {arg.said} of {places[arg.array.ctypes.data]}")
        else:
            said.append(repr(arg))
    contents = [x for a in arrays for x in (a.dtype.name, a.shape, int(a.flags.writeable), a)]
    return _digest(sim_sources.of_kernel(source, kernel), kernel, shape, *said, *contents)


def stored(arrays: Arrays) -> str:
    """The bytes of arrays, packed into text."""
    return base64.b64encode(zlib.compress(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays), 9)).decode()


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def outputs_of(arrays: Arrays, how: Compare) -> str:
    """Hash of the writable arrays, or their bytes (packed) where values are kept."""
    kept = how.canonical([a for a in arrays if a.flags.writeable])
    return _digest(*kept) if how.kind == "bits" else stored(kept)


# --- writing --------------------------------------------------------------------------------------------------------


def _line(**fields) -> None:
    file = os.open(os.environ["DSV4_SIM_RECORD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(file, (json.dumps(fields) + "\n").encode())  # one call: several processes write into one file
    finally:
        os.close(file)


def failed(sentence: str) -> None:
    """Notes that the device could not run a launch of the current test."""
    if "DSV4_SIM_RECORD" in os.environ:
        _line(test=current_test(), failed=sentence)


def merged(lines: pathlib.Path, about: dict) -> dict:
    """The record out of the lines of a run. A test with a failed launch has none: what came before may be half of it."""
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    failures = {e["test"]: e["failed"] for e in entries if "failed" in e}
    sections: dict = {kind: {} for kind in KINDS}
    for e in entries:
        if "failed" not in e and e["test"] not in failures:
            sections[e["kind"]].setdefault(e["test"], {})[e["inputs"]] = [e["kernel"], e["outputs"]]
    return {"about": about, **sections, "failures": failures}


def written(record: dict, path: pathlib.Path) -> None:
    """Sorted, one launch a line, so that two records can be compared by eye."""
    rows = [f'"about": {json.dumps(record["about"], sort_keys=True)}', f'"failures": {json.dumps(record["failures"], sort_keys=True, indent=0)}']
    for kind in KINDS:
        tests = [f"{json.dumps(test)}: {{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(launches.items())) + "}"
                 for test, launches in sorted(record[kind].items())]  # fmt: skip
        rows.append(f'"{kind}": {{\n' + ",\n".join(tests) + "}")
    path.write_text("{" + ",\n".join(rows) + "}\n")


# --- comparing ------------------------------------------------------------------------------------------------------


class Replay:
    """The record, and which of its launches the current test has made."""

    def __init__(self, path: pathlib.Path):
        self.record = json.loads(path.read_text()) if path.is_file() else None
        self.seen: dict[str, set[str]] = {}

    def launches(self, test: str) -> dict[str, tuple[str, str, str]]:
        """{inputs: (kind, kernel, outputs)} that a device made in this test."""
        if self.record is None:
            return {}
        return {key: (kind, *value) for kind in KINDS for key, value in self.record[kind].get(test, {}).items()}

    def compare(self, test: str, key: str, kernel: str, arrays: Arrays, how: Compare) -> None:
        """Raises Disagreement unless the outputs are those of the device, if it ran this launch."""
        known = self.launches(test).get(key)
        if known is None:
            return
        self.seen.setdefault(test, set()).add(key)
        kind, _, outputs = known
        here, about = outputs_of(arrays, how), self.record["about"]
        where = f"{test}: kernel {kernel}, of the same inputs ({key})"
        if kind != how.kind:
            raise Disagreement(f"{where}, was recorded to be compared by {kind}, now by {how.kind}; {AGAIN}")
        if kind == "bits" and here != outputs:
            raise Disagreement(f"{where}, gives other bits than {about['device']} gave on {about['date']}: {here} here, {outputs} there")
        if kind == "close" and here != outputs:
            kept = how.canonical([a for a in arrays if a.flags.writeable])
            theirs = unpacked(outputs)
            for mine in kept:
                want, theirs = np.frombuffer(theirs[: mine.nbytes], mine.dtype).reshape(mine.shape), theirs[mine.nbytes :]
                np.testing.assert_allclose(mine.astype(np.float64), want.astype(np.float64), how.rtol, how.atol,
                                           err_msg=f"{where}, is further from {about['device']} than the tolerance")  # fmt: skip

    def finish(self, test: str) -> None:
        """Raises Disagreement if the test, which has ended, left out a launch that the device made."""
        gone = {key: value[1] for key, value in self.launches(test).items() if key not in self.seen.get(test, ())}
        self.seen.pop(test, None)
        if gone:
            raise Disagreement(f"{test}: launches of {', '.join(sorted(set(gone.values())))} that a device has recorded are made no more, "
                               f"or with other inputs or another kernel ({', '.join(sorted(gone))}); {AGAIN}")  # fmt: skip


REPLAY = Replay(pathlib.Path(os.environ.get("DSV4_SIM_REPLAY", RECORD)))


def wanted() -> bool:
    """Whether launches of the current test are recorded, kept or compared at all."""
    test = current_test()
    return bool(test) and ("DSV4_SIM_RECORD" in os.environ or "DSV4_SIM_DUMP" in os.environ or bool(REPLAY.launches(test)))


def launched(key: str, kernel: str, arrays: Arrays, how: Compare) -> None:
    """To be called after a launch: records it, or compares it with the record."""
    test = current_test()
    if "DSV4_SIM_DUMP" in os.environ:
        name = "".join(c if c.isalnum() else "_" for c in test)
        np.savez_compressed(f"{os.environ['DSV4_SIM_DUMP']}/{name}-{kernel}-{key}.npz", *[a.view(np.uint8) for a in arrays if a.flags.writeable])
    if "DSV4_SIM_RECORD" in os.environ:
        _line(test=test, kernel=kernel, inputs=key, kind=how.kind, outputs=outputs_of(arrays, how))
    else:
        REPLAY.compare(test, key, kernel, arrays, how)
