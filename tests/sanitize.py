"""python -m tests.sanitize OUT: the tests of the kernels of this GPU under compute-sanitizer, memcheck and then racecheck.

The tests run as `pytest --by-driver device` (driver_launches.py) in several processes. One that dies is replaced, and the test it died in
is named; the others go on. Prints, and writes into OUT/summary.txt, how many tests and which share of the kernels in this build each
tool has seen, and what was wrong; the reports of a tool, and the output of processes that died, are in OUT/<tool>.txt. Exit code 0
only if all tests passed under all tools without a report. Racecheck, which takes half a minute for a test at the sizes of a model,
leaves those out. The first case of each test comes first, then the second, so that a run that is cut short has seen most kernels.

Racecheck reports races that are none where warps have met at different numbers of named barriers. Reports of accesses that `EXCUSED`
names are counted apart, if it still reports one in racecheck_control.cu, which has none; compiling that needs nvcc.

A process that gets no context, as when others hold the memory, tries again.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ffi_kernels import library

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = [*sorted((ROOT / "tests" / "ffi_kernels").glob("test_native_*.py")), ROOT / "tests" / "ffi_kernels" / "test_ops.py"]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
OF_A_MODEL = re.compile(r"[\[-](flash|pro|long)\b|real_shapes")  # names of tests at its sizes
# Source of accesses, the first a write, with a __syncthreads between them that racecheck does not see.
EXCUSED = [("r.out.factor[r.column] = factor", "nvfp4_block_scale(largest_magnitude<2>(raw), *factor)")]  # experts_up: behind teams of two sizes
QUIET = re.compile(r"=========\s*(COMPUTE-SANITIZER|\w+ SUMMARY: 0 (errors|hazards)\b.*)?")


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]


def collected(how: str, which: str) -> list[str]:
    """The tests for this GPU, ids as pytest takes them, the first case of each first."""
    done = subprocess.run(pytest("--collect-only", "--by-driver", how, "-m", "gpu", "-k", which, *map(str, FILES)), cwd=ROOT, capture_output=True, text=True)
    cases = collections.defaultdict(list)
    for line in done.stdout.splitlines():
        if "::" in line:
            cases[line.partition("[")[0]].append(line)
    return [case for turn in itertools.zip_longest(*cases.values()) for case in turn if case is not None]


PAUSE = 3.0  # seconds, before the next attempt of a process that got no context


class Share:
    """Some of the tests under one tool, in one process after another."""

    def __init__(self, folder: pathlib.Path, number: int, tests: list[str], tool: list[str], how: str):
        self.at, self.tests, self.tool, self.how = folder / str(number), tests, tool, how
        self.outcomes: dict[str, str] = {}
        self.died: dict[str, str] = {}
        self.unfinished: list[str] = []
        self.reports: list[str] = []
        self.said = ""  # by the last process, in its output

    def run(self, until: float) -> None:
        left = self.tests
        while left and (seconds := until - time.monotonic()) > 0:
            ended = self.process(left, seconds)
            begun, left = len(left), [test for test in left if test not in self.outcomes]
            if ended is None or not left:
                break
            if len(left) == begun and "INTERNALERROR" in self.said:  # before the first test
                time.sleep(PAUSE)
                continue
            self.died[left[0]] = f"process ended with {ended}"
            self.reports += [f"output of the process that died in {left[0]}:", *self.said.splitlines()[-20:]]
            left = left[1:]
        self.unfinished = left
        if left:
            self.reports += [f"output of the process that did not reach {left[0]}:", *self.said.splitlines()[-20:]]

    def process(self, tests: list[str], seconds: float) -> int | None:
        """Runs tests until they or the seconds are over; the exit code, None when it was stopped."""
        names, results, log, output = (self.at.with_suffix(end) for end in (".tests", ".jsonl", ".tool", ".log"))
        names.write_text("\n".join(tests))
        for file in (results, log):
            file.unlink(missing_ok=True)
        command = [*self.tool, *(["--log-file", str(log)] if self.tool else []), *pytest("--by-driver", self.how, "--results", str(results), f"@{names}")]
        with output.open("w") as into:
            running = subprocess.Popen(
                command, cwd=ROOT, stdout=into, stderr=into, start_new_session=True, env={**os.environ, "DSV4_LAUNCHED": str(self.at)}
            )
            try:
                ended = running.wait(seconds)
            except subprocess.TimeoutExpired:
                ended = None
            try:
                os.killpg(running.pid, signal.SIGKILL)  # the tool's end is not its program's
            except ProcessLookupError:
                pass
            running.wait()
        for row in map(json.loads, results.read_text().splitlines() if results.is_file() else ()):
            self.outcomes[row["test"]] = row["outcome"] + (": " + " ".join(row["message"].split())[:200] if row["outcome"] == "failed" else "")
        said = log.read_text(errors="replace").splitlines() if log.is_file() else []
        self.reports += [line for line in said if not QUIET.fullmatch(line)]
        if self.tool and ended in (0, 1) and not any("SUMMARY" in line for line in said):
            self.reports.append(f"the tool ended without a summary (exit code {ended})")
        self.said = output.read_text(errors="replace")
        return ended

    def launched(self) -> set[str]:
        return set(self.at.read_text().split()) if self.at.is_file() else set()


class MemoryUsed:
    """The most device memory in use meanwhile, of all processes together."""

    def __init__(self):
        self.most, self.over = "unknown", threading.Event()

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()

    def _watch(self) -> None:
        most = 0
        while shutil.which("nvidia-smi") and not self.over.wait(1.0):
            asked = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
            most = max([most, *map(int, re.findall(r"^\d+$", asked.stdout, re.MULTILINE))])
            self.most = f"{most} MiB"


def sound(out: pathlib.Path, arch: str) -> bool:
    """Whether racecheck reports nothing in a kernel that has no race, and so deserves to be believed. False only if it was asked."""
    program = out / "racecheck_control"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if subprocess.run([nvcc, f"-arch={arch}", "-o", program, ROOT / "tests" / "racecheck_control.cu"], capture_output=True).returncode:
        return True
    runs = [subprocess.run([SANITIZER, "--tool", "racecheck", program, *named], capture_output=True, text=True) for named in ([], ["named"])]
    program.unlink()
    reported = ["Race reported" in run.stdout for run in runs]
    return any(run.returncode for run in runs) or reported != [False, True]


def excused(reports: list[str]) -> tuple[list[str], int]:
    """The lines of the reports without those that EXCUSED names, and how many these were."""
    kept, count, block = [], 0, []
    for line in [*reports, "========= Error: end"]:
        shown = re.match(r"=========\s+RACECHECK SUMMARY: (\d+) hazards displayed \((\d+) errors, (\d+) warnings\)", line)
        if shown and int(shown[1]) == int(shown[2]) + int(shown[3]):
            continue  # all of them are here
        if re.match(r"=========\s+(Error|Warning):", line) or not line.startswith("========="):
            code = [_source(*at) for at in re.findall(r"access at .*? in (\S+):(\d+)", "\n".join(block))]
            known = any(code and write in code[0] and all(read in x for x in code[1:]) for write, read in EXCUSED)
            kept, count, block = kept + block * (not known), count + known, []
        block.append(line)
    return kept + block[:-1], count


def _source(name: str, line: str) -> str:
    found = [*(ROOT / "ffi_kernels" / "native").rglob(pathlib.Path(name).name)]
    return found[0].read_text().splitlines()[int(line) - 1] if len(found) == 1 else ""


def kernels(arch: str) -> set[str]:
    """Names of all kernels of this build for an architecture, from the sections of its cubins."""
    images = library.directory().glob(f"*.{arch}.cubin")
    return {name.decode() for image in images for name in re.findall(rb"\.text\.(\w+)", image.read_bytes())}


def checked(out: pathlib.Path, name: str, tool: list[str], tests: list[str], arguments) -> tuple[bool, str]:
    """Runs the tests under one tool; whether all is well, and what came of it."""
    began, count = time.monotonic(), min(arguments.processes, len(tests))
    with tempfile.TemporaryDirectory() as folder, MemoryUsed() as memory:
        shares = [Share(pathlib.Path(folder), i, tests[i::count], tool, arguments.how) for i in range(count)]
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda share: share.run(began + arguments.seconds), shares))
        launched = set().union(*(share.launched() for share in shares))
    reports = [line for share in shares for line in share.reports]
    left, known = (reports, 0) if name != "racecheck" or not reports or sound(out, arguments.arch) else excused(reports)
    (out / f"{name}.txt").write_text("\n".join(reports))
    outcomes = {test: outcome for share in shares for test, outcome in share.outcomes.items()}
    states = collections.Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    built, died = kernels(arguments.arch), {test: why for share in shares for test, why in share.died.items()}
    unfinished = [test for share in shares for test in share.unfinished]
    lines = [
        f"{name}: {len(outcomes)} of {len(tests)} tests in {time.monotonic() - began:.0f} s, {dict(states)}; "
        f"{len(launched & built)} of {len(built)} kernels; at most {memory.most} of device memory by {count} processes"
        + f"; {known} reports excused, as racecheck is wrong about racecheck_control.cu, too" * bool(known)
    ]
    for title, found in {
        "lines of reports": left, "died": [f"{test}: {why}" for test, why in died.items()], "not reached": unfinished,
        "failed": [f"{test}: {o}" for test, o in outcomes.items() if o.startswith("failed")], "not launched": sorted(built - launched),
    }.items():  # fmt: skip
        lines += [f"  {title}: {len(found)}", *(f"    {line[:240]}" for line in found[:12])] if found else []
    good = not (left or died or unfinished) and set(states) <= {"passed", "skipped"} and states["passed"] > 0
    return good, "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"], help="of compute-sanitizer (default: memcheck racecheck)")
    parser.add_argument("--processes", type=int, default=8, help="at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="limit of each tool (default: %(default)s)")
    parser.add_argument("--arch", choices=library.ARCHS, default="sm_90a", help="of this GPU (default: %(default)s)")
    parser.add_argument("-k", dest="which", help="which tests, as pytest takes it (default: those of the architecture that are not 'large')")
    parser.add_argument("--interpreter", dest="how", action="store_const", const="interpreter", default="device", help="a rehearsal: interpreted, without a tool")
    arguments = parser.parse_args(argv)
    if (missing := library.why_not(arguments.arch if arguments.how == "device" else library.SIM)) is not None:
        parser.error(missing)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.txt").write_text("")
    others = " and ".join(f"not {arch}" for arch in library.ARCHS if arch != arguments.arch)
    tests = collected(arguments.how, f"{others} and ({arguments.which or 'not large'})")
    good = bool(tests)
    for tool in arguments.tools if tests else ():
        command = [SANITIZER, "--tool", tool, "--print-limit", "50"] if arguments.how == "device" else []
        well, said = checked(out, tool, command, [t for t in tests if tool != "racecheck" or not OF_A_MODEL.search(t)], arguments)
        good &= well
        print(said, flush=True)
        with (out / "summary.txt").open("a") as file:
            file.write(said + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
