"""Published safetensors -> a checkpoint of this package, streaming: `convert`, and `plan_conversion` for a dry run.

Tasks (one matrix each) run on threads in the order of the source's files, so that reading, requantizing and writing
overlap; memory is a few slabs per thread. Killed at any moment, the same call resumes (`journal.py`), and the result is
the same bytes. Not here: formats of values (`transcode.py`), names and shapes (`matching.py`), arrays on disk (`layout.py`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

from checkpoints import layout, matching, planning, transcode
from checkpoints.journal import Journal, remove_leftovers
from checkpoints.matrix import ValueProblem
from checkpoints.planning import Plan, Task
from checkpoints.reader import SHOWN_PROBLEMS, Source, SourceError, open_source, read_json_file
from checkpoints.transcode import Report
from dsv4_jax.precision import Recipe

_BLOCK = 2**18  # bytes of a file that are hashed at a time: they stay in the cache
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did. errors: path -> Report of the tensors whose numbers changed; resumed: tasks found done."""

    destination: Path
    plan: Plan
    reports: dict[str, Report]
    notices: list[str]
    resumed: int
    seconds: float


def plan_conversion(
    source: Source, recipe: str | Recipe = "official", *, tensor: int = layout.DEFAULT_SPLIT, allow_inexact: bool = False
) -> Plan:
    """Everything `convert` would do with an opened source, from its headers; arguments and errors as there."""
    if tensor < 1:
        raise ValueError(f"tensor={tensor} is no number of devices; use 1 or more.")
    return planning.make_plan(source, matching.match(source), recipe, tensor, allow_inexact)


def convert(
    source: str | Path,
    destination: str | Path,
    recipe: str | Recipe = "official",
    *,
    tensor: int = layout.DEFAULT_SPLIT,
    allow_inexact: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the published checkpoint in `source` to the new directory `destination`, which `load` reads.

    recipe: 'official' (the published bits), 'nvfp4' (NVFP4 in every linear), 'bf16', 'fp32', 'lossless' (each kind of
    weight in the format it has), or a Recipe. tensor: devices that a sharded load will mostly have; chunks are cut for
    it, and every other number still loads. allow_inexact: go on where a recipe that promises bits cannot keep them, and
    count. workers: threads. Raises ValueError with what is wrong (a list, for tensors); after a kill or an error, the
    same call resumes.
    """
    destination = Path(destination)
    began = time.perf_counter()
    with _trouble_told(destination):
        _refuse_existing(destination)
    with open_source(source) as opened:
        plan = plan_conversion(opened, recipe, tensor=tensor, allow_inexact=allow_inexact)
        tokenizer = _tokenizer(opened)
        with _trouble_told(destination), Journal(destination, _fingerprint(opened, plan, tokenizer, allow_inexact)) as journal:
            notices, resumed = _notices(plan, journal, tokenizer), len(journal.done)
            weights = journal.checkpoint / "weights"
            _prepare(plan, journal, weights)
            _run(opened, plan, journal, weights, allow_inexact, workers, progress)
            _unchanged(opened)
            reports = _reports(plan, journal)
            _describe(opened, plan, journal, reports, tokenizer)
            _refuse_existing(destination)
            journal.finish()
    return Conversion(destination, plan, reports, notices, resumed, time.perf_counter() - began)


@contextlib.contextmanager
def _trouble_told(destination: Path) -> Iterator[None]:
    """What the operating system refuses (a full disk, missing rights, a bad name) becomes a ValueError with a sentence."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ValueError(
            f"the conversion to {destination} stopped: {error.strerror or error}{where}. Once that is mended, the same command resumes it."
        ) from error


def _refuse_existing(destination: Path) -> None:
    if os.path.lexists(destination):
        remove_leftovers(destination)
        raise ValueError(f"{destination} exists already; a checkpoint is never overwritten: delete it first or convert elsewhere.")


def _notices(plan: Plan, journal: Journal, tokenizer: bytes | None) -> list[str]:
    notices = list(plan.matched.notices)
    if journal.restarted:
        notices.append("an unfinished conversion of something else was found and removed")
    if journal.distrusted:
        notices.append(f"the machine was started again, so the last {journal.distrusted} steps, which may not be on its disk, are repeated")
    if tokenizer is None:
        notices.append("there is no tokenizer.json, so the checkpoint takes token ids only")
    return notices


def _tokenizer(source: Source) -> bytes | None:
    path = source.directory / "tokenizer.json"
    return read_json_file(path, unique_keys=False)[1] if path.exists() else None


def _fingerprint(source: Source, plan: Plan, tokenizer: bytes | None, allow_inexact: bool) -> dict[str, Any]:
    return {
        "files": {name: [f.size, f.mtime_ns, f.ctime_ns, f.header_sha256] for name, f in source.files.items()},
        "config": plan.config.to_json(), "recipe": dataclasses.asdict(plan.recipe), "split": plan.split,
        "chunks": [layout.SMALLEST_CHUNK, layout.LARGEST_CHUNK], "allow_inexact": allow_inexact,
        "tokenizer": tokenizer and hashlib.sha256(tokenizer).hexdigest(), "versions": _versions(),
    }  # fmt: skip


def _prepare(plan: Plan, journal: Journal, weights: Path) -> None:
    """Directories of all arrays; ValueError if the disk has no room."""
    free = shutil.disk_usage(journal.work).free
    there = sum(f.stat().st_blocks * 512 for f in weights.glob("*/*")) if journal.done else 0
    if plan.nbytes - there > free:
        raise ValueError(
            f"{journal.destination.parent} has {free / 1e9:.1f} GB free, but {(plan.nbytes - there) / 1e9:.1f} GB more are "
            "needed; free some, or choose another destination."
        )
    weights.mkdir(exist_ok=True)
    if "arrays" not in journal.done:
        for array in plan.all_arrays:
            array.create(weights)
        journal.record("arrays", len(plan.all_arrays))


# --- running tasks ----------------------------------------------------------------------------------------------


def _jobs(source: Source, plan: Plan, done: dict[str, Any]) -> Iterator[tuple[str, int, Task | str]]:
    """(key, bytes, task or name of a file to hash) of what is left; a file is hashed along with its tensors."""
    begun: set[str] = set()
    for number, task in enumerate(plan.tasks):
        file = task.piece.parts["data"].file
        if file not in begun:
            begun.add(file)
            if f"sha256 {file}" not in done:
                yield f"sha256 {file}", 0, file
        if str(number) not in done:
            yield str(number), task.nbytes, task
    for file in source.files:
        if file not in begun and f"sha256 {file}" not in done:
            yield f"sha256 {file}", 0, file


def _run(
    source: Source, plan: Plan, journal: Journal, weights: Path, allow_inexact: bool, workers: int | None, progress: Progress | None
) -> None:
    """All tasks that are left, on threads. The first values that are wrong are collected; then SourceError."""
    jobs = _jobs(source, plan, dict(journal.done))
    total = sum(task.nbytes for task in plan.tasks)
    finished = sum(task.nbytes for number, task in enumerate(plan.tasks) if str(number) in journal.done)
    mutex, stop = threading.Lock(), threading.Event()
    problems: list[str] = []
    failures: list[BaseException] = []

    def work() -> None:
        nonlocal finished
        while not stop.is_set():
            with mutex:
                key, size, job = next(jobs, (None, 0, None))
            if job is None:
                return
            try:
                if isinstance(job, str):
                    journal.record(key, _sha256(source, job))
                else:
                    report = transcode.run(job, source, weights, strict=plan.strict, allow_inexact=allow_inexact)
                    journal.record(key, report.to_json())
                with mutex:
                    finished += size
            except ValueProblem as problem:
                with mutex:
                    problems.append(str(problem))
                    if len(problems) > SHOWN_PROBLEMS:
                        stop.set()
            except BaseException as error:  # told below, in the thread that called
                failures.append(error)
                stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers or min(16, (os.cpu_count() or 1) + 1))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                if progress:
                    progress(finished, total)
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    if problems:
        raise SourceError(source.directory, sorted(set(problems)), "Download damaged files again, or choose another recipe.")


def _sha256(source: Source, file: str) -> str:
    digest, buffer, size = hashlib.sha256(), memoryview(bytearray(_BLOCK)), source.files[file].size
    for offset in range(0, size, _BLOCK):
        block = buffer[: min(_BLOCK, size - offset)]
        source.pread(file, offset, block)
        digest.update(block)
    return digest.hexdigest()


def _unchanged(source: Source) -> None:
    for name, known in source.files.items():
        now = (source.directory / name).stat()
        if (now.st_size, now.st_mtime_ns, now.st_ctime_ns) != (known.size, known.mtime_ns, known.ctime_ns):
            raise ValueError(f"{source.directory / name} changed while it was being converted; run the same command again.")


# --- what the checkpoint says about itself ----------------------------------------------------------------------


def _reports(plan: Plan, journal: Journal) -> dict[str, Report]:
    """path -> what its conversion changed, summed over experts in their order."""
    reports: dict[str, Report] = {}
    for number, task in enumerate(plan.tasks):
        report = Report.from_json(journal.done[str(number)])
        if report.inexact or report.error is not None:
            reports[task.piece.path] = reports.get(task.piece.path, Report()) + report
    return {path: r for path, r in reports.items() if r.inexact or r.error.squared_error}


def report_json(plan: Plan, path: str, report: Report) -> dict[str, Any]:
    """What dsv4.json and `dsv4 convert` say about one tensor whose numbers changed."""
    told: dict[str, Any] = {"from": plan.matched.pieces[path][0].form, "to": plan.forms[path]}
    if report.inexact:
        told["inexact"] = report.inexact
    if report.error is not None:
        norm = report.error.squared_norm
        told["relative_error"] = (report.error.squared_error / norm) ** 0.5 if norm else 0.0
        told["largest_error"] = report.error.largest
    return told


def _describe(source: Source, plan: Plan, journal: Journal, reports: dict[str, Report], tokenizer: bytes | None) -> None:
    """The Orbax metadata, config.json, dsv4.json and tokenizer.json; deterministic."""
    from checkpoints.store import CHECKED_BYTES, FORMAT_VERSION, crc32_of

    weights = journal.checkpoint / "weights"
    layout.write_orbax_metadata(weights, plan.all_arrays)
    thorough = plan.nbytes <= CHECKED_BYTES
    files = sorted(f for f in weights.rglob("*") if f.is_file())
    missing = sum(array.chunk_count + 1 for array in plan.all_arrays) + 4 - len(files)
    if missing:
        raise RuntimeError(f"{missing} files of {weights} are missing; delete {journal.work} and convert again.")
    formats: dict[str, set[str]] = collections.defaultdict(set)
    published: dict[str, dict[str, int]] = collections.defaultdict(collections.Counter)
    for path, form in plan.forms.items():
        role = plan.matched.declared[path].role
        formats[role].add(form)
        for piece in plan.matched.pieces[path]:
            published[role][piece.form] += 1
    dropped = plan.matched.dropped
    conversion = {
        "source": {
            "files": {name: {"bytes": f.size, "sha256": journal.done[f"sha256 {name}"]} for name, f in source.files.items()},
            "config_sha256": source.config_sha256,
            "tokenizer_sha256": tokenizer and hashlib.sha256(tokenizer).hexdigest(),
            "tensors": len(source.tensors), "formats": {role: dict(sorted(found.items())) for role, found in sorted(published.items())},
            "left_out": {"tensors": len(dropped), "first": dropped[:5]},
        },
        "recipe": plan.recipe.name, "chunks_for_tensor": plan.split, "versions": _versions(),
        "changed": {path: report_json(plan, path, reports[path]) for path in sorted(reports)},
    }  # fmt: skip
    description = {
        "format_version": FORMAT_VERSION,
        "recipe": dataclasses.asdict(plan.recipe),
        "formats": {role: sorted(found) for role, found in sorted(formats.items())},
        "metadata": {"conversion": conversion},
        "files": {f.relative_to(journal.checkpoint).as_posix(): [f.stat().st_size, crc32_of(f) if thorough else None] for f in files},
    }
    if tokenizer is not None:
        (journal.checkpoint / "tokenizer.json").write_bytes(tokenizer)
    for name, content in (("config.json", plan.config.to_json()), ("dsv4.json", description)):
        (journal.checkpoint / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("dsv4-jax", "numpy", "ml_dtypes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
