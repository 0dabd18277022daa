"""`dsv4 convert`: arguments, progress, the table of a dry run, and what to say at the end. The work is in `conversion.py`."""

from __future__ import annotations

import argparse
import collections
import contextlib
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Iterator

from checkpoints.journal import work_of
from checkpoints.layout import DEFAULT_SPLIT
from checkpoints.planning import RECIPE_NAMES, Plan
from checkpoints.reader import Source

DESCRIPTION = """\
Convert published DeepSeek-V4 safetensors to a checkpoint that loads straight into its shards.

SRC is a directory with config.json and .safetensors: official (FP8 + MXFP4), ModelOpt NVFP4, compressed-tensors NVFP4,
or transformers' save_pretrained. The format is told tensor by tensor, so they may be mixed. DST must not exist; it
appears when it is complete. Interrupted or killed, the same command resumes where it stopped.
"""
EPILOG = """\
recipes:
  official   the published bits: FP8 attention and shared experts, MXFP4 experts. Refuses what these cannot hold.
  nvfp4      NVFP4 in every linear: MXFP4 experts without loss, FP8 weights requantized, with the error of each tensor
             in the metadata.
  bf16       everything as bf16 numbers (Flash: 582 GB). fp32: the same in fp32.
  lossless   each kind of weight in the format it was published in, e.g. ModelOpt: FP8 attention and NVFP4 experts.

examples:
  dsv4 convert DeepSeek-V4-Flash flash --dry-run          what would be done, and bytes per device; needs headers only
  dsv4 convert DeepSeek-V4-Flash flash                    then: dsv4 generate --model flash --mesh tensor=8 "Once"
  dsv4 convert DeepSeek-V4-Flash flash-nvfp4 --recipe nvfp4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("source", metavar="SRC", type=Path, help="directory of the published checkpoint")
    parser.add_argument("destination", metavar="DST", type=Path, nargs="?", help="new directory (not needed for --dry-run)")
    parser.add_argument("--recipe", default="official", choices=RECIPE_NAMES, help="formats to store (default: %(default)s)")
    parser.add_argument(
        "--mesh", default=f"tensor={DEFAULT_SPLIT}",
        help="devices that will mostly load it; chunks are cut for them, any other mesh still loads (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-inexact", action="store_true",
        help="go on where a recipe that keeps the published numbers cannot: round, count, and report the error",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only read headers, check every name and shape, and print sizes")
    parser.add_argument("--workers", type=int, help="threads (default: one more than there are cores)")


def tensor_of(mesh: str) -> int:
    """'tensor=8' -> 8; requests are no matter of weights, so 'data=2,tensor=4' -> 4."""
    found = re.fullmatch(r"(?:data=\d+,)?tensor=([1-9]\d*)(?:,data=\d+)?", mesh)
    if not found:
        raise ValueError(f"mesh {mesh!r} is not understood; write for example tensor=8.")
    return int(found.group(1))


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command; returns the exit code. ValueError with a sentence for what is wrong."""
    from checkpoints.conversion import convert, plan_conversion, report_json
    from checkpoints.reader import open_source

    tensor = tensor_of(args.mesh)
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers {args.workers} leaves nobody to work; use 1 or more.")
    if args.dry_run:
        with open_source(args.source, headers_only=True) as source:
            plan = plan_conversion(source, args.recipe, tensor=tensor, allow_inexact=args.allow_inexact)
            print("\n".join(dry_run_lines(source, plan)))
        return 0
    if args.destination is None:
        raise ValueError("DST is missing: name the new directory, or add --dry-run.")
    try:
        with _terminated_as_interrupted(), _Bar() as bar:
            done = convert(
                args.source, args.destination, args.recipe, tensor=tensor, allow_inexact=args.allow_inexact,
                workers=args.workers, progress=bar.update,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"dsv4 convert: interrupted; the same command resumes it, or delete {work_of(args.destination)} to give up.", file=sys.stderr)
        return 130
    for notice in done.notices:
        print(f"note: {notice}.", file=sys.stderr)
    told = {path: report_json(done.plan, path, report) for path, report in done.reports.items()}
    inexact = {path: t["inexact"] for path, t in told.items() if t.get("inexact")}
    if inexact:
        first = next(iter(inexact))
        print(f"note: {sum(inexact.values())} blocks or values of {len(inexact)} tensors were rounded ({first}, ...).", file=sys.stderr)
    worst = sorted((t.get("relative_error", 0), path) for path, t in told.items())[::-1][:3]
    if worst and worst[0][0]:
        print("largest relative errors: " + ", ".join(f"{path} {error:.2%}" for error, path in worst))
    rate = done.plan.nbytes / max(done.seconds, 1e-9) / 1e6
    again = f", {done.resumed} steps of it before" if done.resumed else ""
    size = f"{done.plan.nbytes / 1e9:.2f} GB in recipe {done.plan.recipe.name}"
    print(f"{args.destination}: {size}, {done.seconds:.1f} s{again} ({rate:.0f} MB/s)")
    return 0


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which batch systems end a job, stops between two tensors as Ctrl-C does."""

    def interrupt(*_):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def dry_run_lines(source: Source, plan: Plan) -> list[str]:
    """What a conversion would read and write, and the bytes that devices will hold."""
    matched, gigabyte = plan.matched, 1e9
    lines = [f"{source.directory}: {len(source.tensors)} tensors in {len(source.files)} files, {source.nbytes / gigabyte:.1f} GB"]
    lines += [f"note: {notice}." for notice in matched.notices]
    changes: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for path, pieces in matched.pieces.items():
        for piece in pieces:
            row = changes[matched.declared[path].role, piece.form, plan.forms[path]]
            row[0] += 1
            row[1] += piece.nbytes
        written = sum(a.nbytes for a in plan.arrays[path].values())
        changes[matched.declared[path].role, pieces[0].form, plan.forms[path]][2] += written
    lines.append(f"{'role':10}{'published':>12}{'stored':>12}{'tensors':>10}{'reads GB':>10}{'writes GB':>11}")
    for (role, form, target), (count, read, write) in sorted(changes.items()):
        lines.append(f"{role:10}{form:>12}{target:>12}{count:>10}{read / gigabyte:>10.2f}{write / gigabyte:>11.2f}")
    chunks = sum(array.chunk_count for array in plan.all_arrays)
    lines.append(f"writes {plan.nbytes / gigabyte:.1f} GB: {len(plan.all_arrays)} arrays in {chunks} chunks, recipe {plan.recipe.name}")
    for tensor in sorted({1, 2, 4, 8, 16, plan.split}):
        for sharding in ("width", "experts"):
            try:
                size = f"{plan.bytes_per_device(tensor, sharding) / gigabyte:.2f} GB"
            except ValueError as error:
                size = f"not possible: {error}"
            lines.append(f"  on each device of tensor={tensor}, experts split by {sharding}: {size}")
            if tensor == 1:
                break
    return lines


class _Bar:
    """Progress on stderr with bytes, rate and time left; silent where stderr is no terminal."""

    def __enter__(self) -> "_Bar":
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        self._progress = Progress(
            TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = None
        self._progress.start()
        return self

    def update(self, done: int, total: int) -> None:
        if self._task is None:  # what an earlier run did is no speed of this one
            self._task = self._progress.add_task("converting", total=total)
            self._progress.reset(self._task, total=total, completed=done)
        self._progress.update(self._task, completed=done)

    def __exit__(self, *_) -> None:
        self._progress.stop()
