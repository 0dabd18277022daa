"""Progress of a conversion on disk, so that it resumes after being killed: a locked directory beside the destination.

`.NAME.partial/` holds the checkpoint in the making, `plan.json` (what is being converted, from which files) and `journal`
(one JSON line per finished task, written after its data). A task is repeated unless its line is whole; repeating writes
the same bytes. What another plan or source left is started anew. Renamed to NAME at the end.

A kill loses nothing that was written. A power cut may: so every minute everything is brought to the disk, and a line of the
journal says so; after another boot of the machine only the tasks before the last such line count.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

LOCK, PLAN, JOURNAL, CHECKPOINT = "lock", "plan.json", "journal", "checkpoint"
SYNC_SECONDS = 60
_BOOT, _ON_DISK = "boot", "on disk"  # keys of lines that are no tasks


def _boot() -> str | None:
    """Distinguishes the boots of this machine, and machines; None where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


class Journal:
    """The working directory of one conversion to `destination`; a context manager that holds its lock.

    fingerprint: JSON that must be equal for a conversion to be resumed. `done` maps the keys of finished tasks to what
    was recorded for them; `restarted` says whether something else was found and removed, `distrusted` how many finished tasks
    are repeated because the machine was started again. OSError if the directory cannot be made.
    """

    def __init__(self, destination: Path, fingerprint: dict[str, Any]):
        self.destination = destination
        self.work = work_of(destination)
        self.checkpoint = self.work / CHECKPOINT
        self.done: dict[str, Any] = {}
        self.restarted, self.distrusted = False, 0
        self._fingerprint = json.dumps(fingerprint, sort_keys=True)
        self._mutex = threading.Lock()

    def __enter__(self) -> "Journal":
        self._lock = _locked(self.work)
        if self._lock is None:
            raise ValueError(f"another process is converting to {self.destination}; wait for it, or choose another destination.")
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        self._stop = threading.Event()
        self._syncing = threading.Thread(target=self._sync_now_and_then, daemon=True)
        self._syncing.start()
        return self

    def _open(self) -> None:
        plan = self.work / PLAN
        known = plan.read_text(encoding="utf-8", errors="replace") if plan.exists() else None
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
        self._read(self._file.read())

    def _read(self, text: bytes) -> None:
        """Take over what counts of a journal, and cut off the rest: a line that the kill cut, and what may not be on the disk."""
        now, boot, on_disk, ends = _boot(), None, 0, [0]  # ends: of the line of each task
        tasks: list[tuple[str, Any]] = []
        end = 0
        for line in text.split(b"\n")[:-1]:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):  # a power cut may leave anything
                break
            end += len(line) + 1
            if key == _BOOT:
                boot = value
            elif key == _ON_DISK:
                on_disk = value
            else:
                tasks.append((key, value))
                ends.append(end)
        is_same_boot = boot is not None and boot == now
        if not is_same_boot:
            self.distrusted = len(tasks) - on_disk
            tasks, end = tasks[:on_disk], ends[on_disk]
        self._file.truncate(end)
        self.done, self._count, self._on_disk = dict(tasks), len(tasks), on_disk
        if not is_same_boot:
            self._append(_BOOT, now)
            self._append(_ON_DISK, on_disk)

    def _append(self, key: str, value: Any) -> None:
        self._file.write(json.dumps([key, value]).encode() + b"\n")  # one write, so that a kill leaves a line whole or cut, never mixed

    def record(self, key: str, value: Any) -> None:
        """A task is finished: its data has been written. Thread-safe."""
        with self._mutex:
            self._append(key, value)
            self.done[key] = value
            self._count += 1

    def sync(self) -> None:
        """Bring everything that was recorded to the disk, and record that. Thread-safe."""
        with self._mutex:
            count = self._count
        if count == self._on_disk:
            return
        os.sync()
        with self._mutex:
            self._append(_ON_DISK, count)
            self._on_disk = count

    def _sync_now_and_then(self) -> None:
        while not self._stop.wait(SYNC_SECONDS):
            try:
                self.sync()
            except OSError:  # a full disk, which stops the tasks too: they tell
                return

    def finish(self) -> None:
        """The checkpoint appears under its name, whole; the working directory is removed."""
        os.sync()  # a rename must not reach the disk before the data
        with self._mutex:
            self._append(_ON_DISK, self._count)
        os.rename(self.checkpoint, self.destination)
        shutil.rmtree(self.work, ignore_errors=True)

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._syncing.join()
        self._file.close()
        self._lock.close()


def work_of(destination: Path) -> Path:
    """The working directory of the conversion to `destination`."""
    return destination.parent / f".{destination.name}.partial"


def _locked(work: Path):
    """The open and locked file in the working directory, which is made; None while another process holds it."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = (work / LOCK).open("a")
        except FileNotFoundError:  # whoever finished has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(work / LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            lock.close()
            return None
        except BaseException:
            lock.close()
            raise
        lock.close()


def remove_leftovers(destination: Path) -> None:
    """Remove the working directory of a conversion that was killed after its checkpoint had appeared under its name."""
    work = work_of(destination)
    if work.is_dir() and set(os.listdir(work)) <= {LOCK, PLAN, JOURNAL} and (lock := _locked(work)):
        shutil.rmtree(work, ignore_errors=True)
        lock.close()
