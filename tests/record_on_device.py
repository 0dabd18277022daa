"""python tests/record_on_device.py OUT: what a GPU gives for every launch of the interpreter's tests, in one go.

Compiles the kernels, runs tests/ffi_kernels/test_sim*.py on the device, merges what came out into OUT/sim_record.json, lets the
interpreter of this machine compare itself with it, and writes OUT/summary.txt: tests and launches per file, every failure and
every disagreement. Tests that failed run once more, those with a CUDA error under compute-sanitizer (OUT/sanitizer.txt), the
others with their outputs kept (OUT/dumps.tar). Everything is written as it comes, so a run that is stopped leaves what it had.
`--interpreter` lets the interpreter stand in for the device: a rehearsal.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import sim_record

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "tests" / "ffi_kernels").glob("test_sim*.py") if f.name != "test_sim_record.py")
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def environment(device: bool, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("DSV4_SIM_TESTS", "DSV4_SIM_RECORD", "DSV4_SIM_REPLAY", "PYTEST_CURRENT_TEST")}
    return {**env, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **({"DSV4_SIM_TESTS": "device"} if device else {}), **more}


def compiling(device: bool) -> subprocess.Popen:
    """All kernels, several at a time, as cubins or as PTX together with the interpreter."""
    script = (
        "import os, sim_driver as sim\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "def one(name):\n    try:\n        sim.ptx(name)\n    except RuntimeError as error:\n        print(name, 'is not for sm_90a:', str(error).splitlines()[-1][:200])\n"
        f"{'' if device else 'sim.library()'}\n"
        "list(ThreadPoolExecutor(os.cpu_count()).map(one, sorted(f.stem for f in sim.KERNELS.glob('*.cu'))))\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], env=environment(device), cwd=ROOT)


def pytest(results: pathlib.Path, env: dict[str, str], workers: int, seconds: float, tests) -> dict[str, tuple[str, str]]:
    """Runs tests; processes that end with a kernel are replaced. Stops after so many seconds.

    Returns {file.py::test: (passed, failed or skipped; message)}."""
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", f"--results={results}", *tests]
    if workers > 1:
        command += ["-n", str(workers), "--max-worker-restart=200"]
    with results.with_suffix(".log").open("w") as log:
        running = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            say(f"stopped after {seconds:.0f} s")
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    found: dict[str, tuple[str, str]] = {}
    for line in results.read_text().splitlines() if results.is_file() else ():
        entry = json.loads(line)
        name = entry["test"].rpartition("/")[2] if "[" not in entry["test"] else entry["test"][entry["test"].index("test_sim") :]
        if found.get(name, ("passed",))[0] == "passed":  # a failure after the test itself counts too
            found[name] = (entry["outcome"], entry["message"])
    say(f"{len(found)} tests: " + ", ".join(f"{sum(s == state for s, _ in found.values())} {state}" for state in ("passed", "failed", "skipped")))
    return found


def first_lines(text: str, n: int = 300) -> str:
    return " ".join(text.split())[:n]


def about(device: bool) -> dict[str, str]:
    def asked(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    name, _, driver = asked("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition(", ") if device else ("the interpreter", "", "none")
    nvcc = re.search(r"V([\d.]+)", asked("nvcc", "--version"))
    return dict(device=name.splitlines()[0] if name else "unknown", driver=driver.splitlines()[0] if driver else "unknown", nvcc=nvcc[1] if nvcc else "unknown",
                date=str(datetime.date.today()), commit=asked("git", "rev-parse", "--short", "HEAD") or "unknown")  # fmt: skip


def paths(tests) -> list[str]:
    return [f"tests/ffi_kernels/{test}" for test in tests]


def looked_into(out: pathlib.Path, failed: list[str], errors: dict[str, str], device: bool) -> None:
    """Runs failed tests again: under compute-sanitizer where a launch failed, else keeping the outputs."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if device and errors and os.path.exists(sanitizer):
        with (out / "sanitizer.txt").open("w") as log:
            for test in list(errors)[:4]:
                say(f"compute-sanitizer {test}")
                log.write(f"\n===== {test}: {errors[test]}\n")
                log.flush()
                try:
                    subprocess.run([sanitizer, "--tool", "memcheck", "--print-limit", "5", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths([test])],
                                   env=environment(True), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=30)  # fmt: skip
                except subprocess.TimeoutExpired:
                    log.write("\n(stopped after 30 s)\n")
    if kept := [test for test in failed if test not in errors][:40]:
        with tempfile.TemporaryDirectory() as folder:
            pytest(pathlib.Path(folder) / "again", environment(device, DSV4_SIM_DUMP=folder, DSV4_SIM_REPLAY=os.devnull), 4, 60, paths(kept))
            with tarfile.open(out / "dumps.tar", "w") as tar:
                size = 0
                for file in sorted(pathlib.Path(folder).glob("*.npz"), key=lambda f: f.stat().st_size):
                    size += file.stat().st_size
                    if size < 14 << 20:
                        tar.add(file, file.name)


def summary(record: dict, ran: dict, replayed: dict) -> str:
    launches = {test: sum(len(record[kind].get(test, ())) for kind in sim_record.KINDS) for test in ran}
    lines = [" ".join(f"{key} {value}" for key, value in record["about"].items()), "", f"{'file':32}{'tests':>7}{'equal':>7}{'failed':>7}{'skipped':>8}{'launches':>9}"]
    for file in sorted({test.partition("::")[0] for test in ran}):
        states = [state for test, (state, _) in ran.items() if test.startswith(file + "::")]
        made = sum(n for test, n in launches.items() if test.startswith(file + "::"))
        lines.append(f"{file:32}{len(states):7}{states.count('passed'):7}{states.count('failed'):7}{states.count('skipped'):8}{made:9}")
    lines.append(f"{'all':32}{len(ran):7}{sum(s == 'passed' for s, _ in ran.values()):7}{sum(s == 'failed' for s, _ in ran.values()):7}{sum(s == 'skipped' for s, _ in ran.values()):8}{sum(launches.values()):9}")
    sections = (("launches that the device could not run", record["failures"]), ("tests that failed on the device", {t: m for t, (s, m) in ran.items() if s == "failed"}),
                ("tests in which the interpreter disagrees with the device", {t: m for t, (s, m) in replayed.items() if s == "failed"}))  # fmt: skip
    for title, failures in sections:
        lines += ["", f"{title}: {len(failures)}", *(f"  {test}\n      {first_lines(message)}" for test, message in sorted(failures.items()))]
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--interpreter", action="store_true", help="record the interpreter instead of a device")
    parser.add_argument("--seconds", type=float, default=150, help="limit of each of the two test runs (default 150)")
    parser.add_argument("--tests", nargs="*", default=FILES, help="test files or ids (default: all of test_sim*.py)")
    args = parser.parse_args(argv)
    out, device = args.out.resolve(), not args.interpreter
    out.mkdir(parents=True, exist_ok=True)
    say(f"compiling kernels on {os.cpu_count()} cores")
    cubins, interpreter = compiling(device), compiling(False)
    cubins.wait()
    say("running on the device")
    lines = out / "launches.jsonl"
    lines.unlink(missing_ok=True)
    ran = pytest(out / "device.jsonl", environment(device, DSV4_SIM_RECORD=str(lines), DSV4_SIM_REPLAY=os.devnull), min(8, os.cpu_count()), args.seconds, args.tests)
    record = sim_record.merged(lines, about(device)) if lines.is_file() else {"about": about(device), **{kind: {} for kind in sim_record.KINDS}, "failures": {}}
    sim_record.written(record, out / "sim_record.json")
    (out / "summary.txt").write_text(summary(record, ran, {}))
    lines.unlink(missing_ok=True)
    interpreter.wait()
    say("running in the interpreter")
    replayed = pytest(out / "replay.jsonl", environment(False, DSV4_SIM_REPLAY=str(out / "sim_record.json")), os.cpu_count(), args.seconds, args.tests)
    (out / "summary.txt").write_text(summary(record, ran, replayed))
    looked_into(out, sorted({t for r in (ran, replayed) for t, (state, _) in r.items() if state == "failed"}), record["failures"], device)
    print((out / "summary.txt").read_text())
    return int(any(state == "failed" for state, _ in (*ran.values(), *replayed.values())))


if __name__ == "__main__":
    sys.exit(main())
