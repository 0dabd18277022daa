"""Progress of a conversion on disk, so that it resumes after being killed: a locked directory beside the destination.

`.NAME.partial/` holds the checkpoint in the making, `plan.json` (what is being converted, from which files) and `journal`
(one JSON line per finished task, written after its data). A task is repeated unless its line is whole; repeating writes
the same bytes. What another plan, source or boot of the machine left is started anew. Renamed to NAME at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

LOCK, PLAN, JOURNAL = "lock", "plan.json", "journal"


def _boot() -> str:
    """Distinguishes the boots of this machine: after a power cut, finished writes may not have reached the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Journal:
    """The working directory of one conversion to `destination`; a context manager that holds its lock.

    fingerprint: JSON that must be equal for a conversion to be resumed. `done` maps the keys of finished tasks to what
    was recorded for them; `restarted` says whether something else was found and removed.
    """

    def __init__(self, destination: Path, fingerprint: dict[str, Any]):
        self.destination = destination
        self.work = destination.parent / f".{destination.name}.partial"
        self.checkpoint = self.work / "checkpoint"
        self.done: dict[str, Any] = {}
        self.restarted = False
        self._fingerprint = json.dumps(fingerprint | {"boot": _boot()}, sort_keys=True)
        self._mutex = threading.Lock()

    def __enter__(self) -> "Journal":
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = (self.work / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(f"another process is converting to {self.destination}; wait for it, or choose another destination.") from None
        plan = self.work / PLAN
        known = plan.read_text(encoding="utf-8") if plan.exists() else None
        if known != self._fingerprint:
            self.restarted = self.checkpoint.exists()
            plan.unlink(missing_ok=True)  # first: without a plan nothing below counts
            (self.work / JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            self.checkpoint.mkdir()
            temporary = plan.with_suffix(".new")
            temporary.write_text(self._fingerprint, encoding="utf-8")
            temporary.rename(plan)
        self._file = (self.work / JOURNAL).open("a+b", buffering=0)
        self._file.seek(0)
        lines = self._file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # a line that was cut by the kill
        for line in whole.splitlines():
            key, value = json.loads(line)
            self.done[key] = value
        return self

    def record(self, key: str, value: Any) -> None:
        """A task is finished: its data has been written. Thread-safe."""
        line = json.dumps([key, value]).encode() + b"\n"
        with self._mutex:
            self._file.write(line)  # one write, so that a kill leaves a line whole or cut, never mixed
            self.done[key] = value

    def finish(self) -> None:
        """The checkpoint appears under its name, whole; the working directory is removed."""
        os.sync()  # a rename must not reach the disk before the data
        os.rename(self.checkpoint, self.destination)
        shutil.rmtree(self.work, ignore_errors=True)

    def __exit__(self, *_) -> None:
        if not self._file.closed:
            self._file.close()
        self._lock.close()
