"""Correct kernels under random schedules: no false alarm, and the same bits as the eager schedule gives.

`PYTHONPATH=.:tests python tests/sim_schedules.py --seeds 500` runs every seed on a share of the cases of `sim_cases`, which
hold every kernel of ffi_kernels/native, so that each case meets --each seeds; prints a table and the CPU seconds.
"""

import argparse
import collections
import os
import re
import time

import numpy as np
import sim_cases
import sim_driver as sim

from ffi_kernels import library

FIXED = ("schedule=eager", "schedule=lazy")


def ptx_of(module: str):
    return next(library.directory().glob(f"{module}.sm_*.ptx"))


def kernels() -> set[tuple[str, str]]:
    """(module, kernel) of everything that was built of the kernels."""
    return {(path.name.split(".")[0], k) for path in library.directory().glob("*.sm_*.ptx") for k in re.findall(r"\.entry (\w+)\(", path.read_text())}


def outputs(launches, schedule: str) -> list[np.ndarray]:
    """All outputs of the launches of a case under a schedule (words of DSV4_SIM). SimError, with a sentence."""
    os.environ["DSV4_SIM"] = schedule
    return [array for launch in launches for array in launch.run(ptx_of(launch.module))]


def differ(got, want) -> bool:
    return any((a != b).any() for a, b in zip(got, want, strict=True))


def run(seeds, each: int, names=None, report=None) -> dict:
    """Runs seed s on each case whose turn it is; returns counts, the kernels met, and what went wrong as (case, schedule, sentence)."""
    recorded = sim_cases.all_launches(names)
    want = {name: outputs(launches, "schedule=eager") for name, launches in recorded.items()}
    turns = collections.deque(recorded)
    share = max(1, round(len(recorded) * each / len(seeds)))
    plan = [(name, schedule) for schedule in FIXED for name in recorded]
    for seed in seeds:
        plan += [(turns[i], f"schedule=random seed={seed}") for i in range(share)]
        turns.rotate(-share)
    counts, wrong, began = collections.Counter(), [], time.process_time()
    for name, schedule in plan:
        try:
            if differ(outputs(recorded[name], schedule), want[name]):
                wrong.append((name, schedule, "the outputs differ from those of schedule=eager"))
        except sim.SimError as error:
            wrong.append((name, schedule, str(error)))
        counts[name] += 1
        if report and wrong and wrong[-1][:2] == (name, schedule):
            report(wrong[-1])
    met = {(launch.module, launch.kernel) for launches in recorded.values() for launch in launches}
    return {"counts": counts, "wrong": wrong, "kernels": met, "cpu_seconds": time.process_time() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=500, help="random schedules, seeds 1 to N (default: %(default)s)")
    parser.add_argument("--each", type=int, default=50, help="seeds that each case meets (default: %(default)s)")
    parser.add_argument("--only", help="cases whose name holds this", default="")
    args = parser.parse_args()
    names = [name for name in sim_cases.CASES if args.only in name]
    found = run(range(1, args.seeds + 1), args.each, names, report=lambda w: print("WRONG", *w, flush=True))
    for name, count in found["counts"].items():
        print(f"{name:30} {count:5} runs")
    left = sorted(kernels() - found["kernels"]) if not args.only else []
    print(f"{sum(found['counts'].values())} runs of {len(names)} cases, {len(found['kernels'])} kernels ({len(left)} not met: {left}), "
          f"{args.seeds} seeds: {len(found['wrong'])} wrong, {found['cpu_seconds']:.0f} s of CPU time")  # fmt: skip
    return bool(found["wrong"] or left)


if __name__ == "__main__":
    raise SystemExit(main())
