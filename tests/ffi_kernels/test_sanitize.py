"""The tests of the kernels without XLA (driver_launches.py), and what `sanitize.py` says of them. Here the interpreter is the device."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sanitize

from ffi_kernels import library

ROOT = Path(__file__).parents[2]


@pytest.fixture
def built():
    for backend in ("sim", "sm_90a"):
        if (missing := library.why_not(backend)) is not None:
            pytest.skip(missing)


def rehearsed(*arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("DSV4_BACKEND", "PYTEST_CURRENT_TEST")}
    command = [sys.executable, "-m", "tests.sanitize", *arguments, "--interpreter", "--processes", "2", "--tools", "memcheck"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def test_tests_of_kernels_run_without_xla(built, tmp_path):
    """Of the launch layer's forms: in place, null pointers, clusters, several launches of an op."""
    which = "test_commit_rows_in_place or test_hc_post or test_output_in_bf16 or (test_refusals and norm)"
    done = rehearsed(str(tmp_path), "-k", which)
    assert done.returncode == 0, done.stdout + done.stderr
    tests, kernels = done.stdout.split(";")[0], done.stdout.split(";")[1]
    assert tests.startswith("memcheck: ") and "'passed'" in tests and "'failed'" not in tests and "; 0 of" not in kernels
    assert (tmp_path / "summary.txt").read_text() == done.stdout and (tmp_path / "memcheck.txt").read_text() == ""


def test_nothing_chosen_is_no_success(built, tmp_path):
    assert rehearsed(str(tmp_path), "-k", "no_test_has_this_name").returncode == 1


class Fragile(sanitize.Share):
    """Its processes die in 'c'; those that begin with 'f' get no context once; 'e' makes the tool report something."""

    def process(self, tests, seconds):
        self.started = [*getattr(self, "started", []), list(tests)]
        if tests[0] == "f" and len(self.started) == 1:
            self.said = "INTERNALERROR> out of memory"
            return 3
        self.said = "Segmentation fault"
        for test in tests:
            if test == "c":
                return -11
            self.outcomes[test] = "passed"
        self.reports += ["========= Invalid __global__ read"] if "e" in tests else []
        return 0


def test_a_process_that_dies_costs_one_test(tmp_path):
    share = Fragile(tmp_path, 0, list("abcde"), [], "device")
    share.run(time.monotonic() + 60)
    assert share.started == [list("abcde"), ["d", "e"]] and set(share.outcomes) == set("abde")
    assert share.died == {"c": "process ended with -11"} and share.unfinished == [] and share.reports[1] == "Segmentation fault"


def test_a_process_without_a_context_costs_none(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitize, "PAUSE", 0.0)
    share = Fragile(tmp_path, 0, list("fab"), [], "device")
    share.run(time.monotonic() + 60)
    assert share.started == [list("fab")] * 2 and set(share.outcomes) == set("fab") and not share.died and not share.reports


def test_what_time_leaves_no_room_for_is_named(tmp_path):
    share = Fragile(tmp_path, 0, list("ab"), [], "device")
    share.run(time.monotonic() - 1)
    assert share.unfinished == list("ab") and not share.outcomes


@pytest.mark.parametrize("tests, good", [("ab", True), ("abc", False), ("abe", False)])
def test_the_verdict(built, monkeypatch, tmp_path, tests, good):
    monkeypatch.setattr(sanitize, "Share", Fragile)
    arguments = type("", (), {"processes": 1, "seconds": 60, "how": "device", "arch": "sm_90a"})
    well, said = sanitize.checked(tmp_path, "memcheck", ["tool"], list(tests), arguments)
    assert well is good and ("died: 1" in said) == ("c" in tests)
    assert ("Invalid" in said) == ("e" in tests) and ("lines of reports" in said) == (not good)


def test_lines_that_report_nothing():
    for line in ("========= COMPUTE-SANITIZER", "========= ERROR SUMMARY: 0 errors", "========= ",
                 "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"):  # fmt: skip
        assert sanitize.QUIET.fullmatch(line)
    for line in ("========= ERROR SUMMARY: 10 errors", "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "========= Invalid read"):
        assert not sanitize.QUIET.fullmatch(line)


def test_nothing_outlives_a_process_that_is_stopped(tmp_path):
    """Not even what it started: killed alone, a tool leaves its program behind, which keeps its memory on the device."""
    share = sanitize.Share(tmp_path, 0, ["a"], ["sh", "-c", f"sleep 300 & echo $! > {tmp_path}/pid; wait"], "device")
    share.run(time.monotonic() + 1)
    assert share.unfinished == ["a"]
    state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_only_reports_of_known_accesses_are_excused():
    source = (ROOT / "ffi_kernels" / "native" / "include" / "stage.cuh").read_text().splitlines()
    (write, read), = ([1 + next(i for i, line in enumerate(source) if words in line) for words in pair] for pair in sanitize.EXCUSED)  # fmt: skip
    race = lambda first, *others: [  # noqa: E731
        f"========= Error: Race reported between Write access at f(int)+0xd970 in stage.cuh:{first}",
        *(f"=========     and Read access at f(int)+0x{i} in stage.cuh:{at} [4 hazards]" for i, at in enumerate(others)),
    ]
    summary = lambda shown: f"========= RACECHECK SUMMARY: {shown} hazards displayed (4 errors, 0 warnings)"  # noqa: E731
    ours, others = [*race(write, read), *race(write, read, read)], [*race(write, read, read + 1), *race(read, read)]
    left, known = sanitize.excused(["output of a process", *ours, *others, summary(4), "the tool ended", summary(3)])
    assert known == 2 and left == ["output of a process", *others, "the tool ended", summary(3)]
    assert sanitize.excused([]) == ([], 0)
