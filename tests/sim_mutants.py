"""Mutation test of the interpreter: `PYTHONPATH=.:tests python tests/sim_mutants.py [--only WORDS] [--jobs 2]`.

Each mutant of tests/mutants is compiled and run under one schedule after the other, with checks on. It is found if the
interpreter reports anything, or if an output differs from that of the undamaged kernel. Prints a table of all mutants
with what found them, then the survivors. The undamaged kernels must pass the same runs. Status 1 if less than 95 % are found.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import sim_cases
import sim_driver as sim
from mutants import ROOT, Mutant, all_mutants
from mutants.drivers import DRIVERS

SCHEDULES = ["schedule=eager", "schedule=lazy", *(f"schedule=random seed={seed}" for seed in range(1, 9))]
LIMIT = 2**24  # warp instructions: many times what any case takes
NATIVE = Path("ffi_kernels/native")


@dataclasses.dataclass
class Result:
    mutant: Mutant
    found: str = ""  # a schedule, or empty
    how: str = ""  # the sentence, or what differs
    case: str = ""
    schedules: int = 0  # that find it, of those that were tried


def source_of(case: str) -> tuple[str, str]:
    """The .cu file and architecture of a case."""
    if case in DRIVERS:
        return DRIVERS[case].source, DRIVERS[case].arch
    (source,) = (ROOT / NATIVE).glob(f"*/{case.split()[0]}.cu")
    return str(source.relative_to(ROOT)), "sm_100a" if source.parent.name == "sm100a" else "sm_90a"


def _included(source: Path) -> dict[Path, str]:
    """The text of a file and of all that it includes of ours."""
    texts, waiting = {}, [source]
    while waiting:
        path = waiting.pop()
        texts[path] = (ROOT / path).read_text()
        found = [NATIVE / "include" / Path(name).name for name in re.findall(r'^#include "(.*?)"', texts[path], re.M)]
        waiting += [p for p in found if p not in texts]
    return texts


def _kept(text: str, kernels: set[str]) -> str:
    """Without the instances, MACRO(name, ...) at the start of a line, of kernels that nobody launches: they take long to compile."""
    needed = lambda name: any(k == name or k.endswith(f"_{name}") for k in kernels)  # noqa: E731
    return re.sub(r"^[A-Z][A-Z0-9_]+\((\w+),.*\n", lambda m: m.group() if not kernels or needed(m.group(1)) else "\n", text, flags=re.M)


def compiled(case: str, mutant: Mutant | None, kernels: set[str] = frozenset()) -> Path:
    """PTX of the case's source with the mutant in it, cached by content. ValueError with the compiler's words if it refuses."""
    source, arch = source_of(case)
    texts = _included(Path(source)) if source.startswith(str(NATIVE)) else {Path(source): (ROOT / source).read_text()}
    if mutant:
        texts[Path(mutant.file)] = mutant.apply(texts[Path(mutant.file)])
    texts[Path(source)] = _kept(texts[Path(source)], kernels)
    key = hashlib.sha1(repr((arch, sorted((str(p), t) for p, t in texts.items()))).encode()).hexdigest()[:20]
    target = sim.CACHE / f"mutant-{key}.ptx"
    if target.exists():
        return target
    sim.CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for path, text in texts.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(text)
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-ptx", f"-arch={arch}", f"-I{Path(folder) / NATIVE / 'include'}", source, "-o", "out.ptx"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"'{mutant and mutant.what}' does not compile: {(done.stderr or done.stdout).strip()[:1000]}")
        part = target.with_suffix(f".{Path(folder).name}.part")  # other threads and processes make the same
        shutil.copy(Path(folder) / "out.ptx", part)
        part.rename(target)
    return target


class Case:
    """What a case's kernels give in one PTX file."""

    def __init__(self, name: str):
        self.name = name
        self.launches = None if name in DRIVERS else sim_cases.CASES[name]()
        self.kernels = {launch.kernel for launch in self.launches or ()}

    def outputs(self, ptx, schedule: str) -> list[np.ndarray]:
        os.environ["DSV4_SIM"] = f"{schedule} limit={LIMIT}"
        if self.launches is None:
            return DRIVERS[self.name].run(ptx)
        return [array for launch in self.launches for array in launch.run(ptx)]


def hunt(mutant: Mutant, cases: dict[str, Case], wanted: dict[str, list], schedules, all_schedules: bool) -> Result:
    """Runs one mutant under the schedules of its cases until one finds it; with all_schedules, under all of the case that does."""
    for name in mutant.cases:
        ptx = compiled(name, mutant, cases[name].kernels)
        result = Result(mutant, case=name)
        for schedule in schedules:
            try:
                how = "" if all((a == b).all() for a, b in zip(cases[name].outputs(ptx, schedule), wanted[name], strict=True)) else "another output"
            except sim.SimError as error:
                how = str(error)
            result.schedules += bool(how)
            if how and not result.found:
                result.found, result.how = schedule.removeprefix("schedule="), how
            if how and not all_schedules:
                break
        if result.found:
            return result
    return result


def kind_of(result: Result) -> str:
    """The table's word for what found a mutant."""
    words = {"hazard in": "hazard", "deadlock": "deadlock", "spins for ever": "endless", "warp instructions": "endless", "out of bounds": "bounds"}
    if not result.found:
        return "SURVIVES"
    return next((kind for text, kind in words.items() if text in result.how), "output" if result.how == "another output" else "fault")


def run(mutants: list[Mutant], jobs: int = 2, schedules=SCHEDULES, all_schedules: bool = False, report=print) -> list[Result]:
    """All results, in order. AssertionError if an undamaged kernel does not pass, ValueError if a table is out of date."""
    cases = {name: Case(name) for name in dict.fromkeys(name for m in mutants for name in m.cases)}
    pool = concurrent.futures.ThreadPoolExecutor(jobs)  # nvcc works beside the interpreter
    try:
        clean = {name: pool.submit(compiled, name, None, case.kernels) for name, case in cases.items()}
        ready = [[pool.submit(compiled, name, m, cases[name].kernels) for name in m.cases[:1]] for m in mutants]
        wanted = {}
        for name, case in cases.items():
            wanted[name] = case.outputs(clean[name].result(), SCHEDULES[0])
            for schedule in schedules:
                again = case.outputs(clean[name].result(), schedule)
                assert all((a == b).all() for a, b in zip(again, wanted[name], strict=True)), f"{name} gives other bits under {schedule}"
        results = []
        for mutant, waiting in zip(mutants, ready, strict=True):
            for future in waiting:
                future.result()
            results.append(hunt(mutant, cases, wanted, schedules, all_schedules))
            r = results[-1]
            report(f"{len(results):4} {Path(mutant.file).name:22} {mutant.what:62} {kind_of(r):9} {r.found:14} {r.schedules if all_schedules else '':>3} {' '.join(r.how.split('. At ')[0].split())[:150]}")
        return results
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose file, case or words hold this")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (default: %(default)s)")
    parser.add_argument("--all-schedules", action="store_true", help="do not stop at the first schedule that finds a mutant")
    args = parser.parse_args()
    mutants = [m for m in all_mutants() if args.only in f"{m.file} {m.cases} {m.what}"]
    if not mutants:
        parser.error(f"no mutant's file, case or words hold {args.only!r}; without --only all {len(all_mutants())} run")
    results = run(mutants, args.jobs, all_schedules=args.all_schedules, report=lambda line: print(line, flush=True))
    alive = [r.mutant for r in results if not r.found]
    print(f"\n{len(results)} mutants of {len({m.file for m in mutants})} files, {len(results) - len(alive)} found ({100 * (1 - len(alive) / len(results)):.1f} %): "
          f"{dict(collections.Counter(map(kind_of, results)))}; first by {dict(collections.Counter(r.found.split()[0] for r in results if r.found))}")  # fmt: skip
    for m in alive:
        print(f"survives: {m.file}: {m.what} ({', '.join(m.cases)})\n--- {m.old}\n+++ {m.new}")
    return len(alive) > 0.05 * len(results)


if __name__ == "__main__":
    raise SystemExit(main())
