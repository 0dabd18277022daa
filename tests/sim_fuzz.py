"""Damaged PTX and absurd launches for the interpreter: `PYTHONPATH=.:tests python tests/sim_fuzz.py --count 10000 [--first N]`.

Every mutant is the PTX of one of our kernels, damaged in one to three places, and launched as its op does; two thirds of them
with an absurd size, number or address as well, or with arrays that end early or lie askew. It must end in a sentence or run to
its end. A child process runs them under limits of memory and time, so that a crash, a hang or boundless memory is seen and
named by its number, which makes the same mutant again: --first N --count 1 --keep FILE.
"""

import argparse
import collections
import dataclasses
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import sim_driver as sim
from sim_launches import Launch

from ffi_kernels import library

SECONDS = 60  # for one mutant: none takes a tenth of that
LIMIT = 20000  # warp instructions
MEMORY = 3 << 30  # bytes beyond what the child has at its start
HUGE = ["0", "1", "-1", "7", "31", "255", "4096", "65536", "2147483647", "4294967296", "9223372036854775807", "18446744073709551616", "1" + 40 * "0", "0x" + 20 * "F", "0f7F8", "1e999"]
# kernels of the interpreter's own tests: module, arch, kernel, threads, cluster
OWN = [
    ("warps", "sm_90a", "diverge", 32, 1), ("warps", "sm_90a", "calls", 32, 1), ("async", "sm_90a", "pipeline", 96, 1), ("async", "sm_90a", "remote_async", 32, 2),
    ("hazards", "sm_90a", "stages", 64, 1), ("hazards", "sm_90a", "stores", 128, 1), ("hazards", "sm_90a", "peers", 32, 2), ("speed", "sm_90a", "wgmma_e4m3", 128, 1),
    ("speed", "sm_100a", "tensor_nvfp4", 128, 1), ("speed", "sm_90a", "mma_s8", 128, 1),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """PTX of one kernel alone in its module, and how it is launched."""

    text: str
    launch: Launch


def alone(text: str, kernel: str) -> str:
    """The module with this entry only: its declarations, functions and variables stay, so that damage matters."""
    text = text[: text.find("\t.section")] if "\t.section" in text else text
    head, *parts = re.split(r"(?=^\t?// \.globl)|(?=^\.visible)|(?=^\.func)", text, flags=re.M)
    return head + "".join(p for p in parts if ".entry" not in p or re.search(rf"\.entry {kernel}\(", p))


def subjects(names=None) -> list[Subject]:
    """Our kernels with the launches of sim_cases, all or those named, and some of the interpreter's own tests."""
    import sim_cases  # runs ops: not in the child

    found = []
    for launches in sim_cases.all_launches(names).values():
        for launch in launches[:1]:
            text = next(library.directory().glob(f"{launch.module}.sm_*.ptx")).read_text()
            found.append(Subject(alone(text, launch.kernel), launch))
    for module, arch, kernel, threads, cluster in OWN:
        speed = module == "speed"  # it takes an output and a number of rounds, the others an input, an output, a number
        launch = Launch(
            op="", module=module, kernel=kernel, grid=(2, 1, 1), block=(threads, 1, 1), cluster=(cluster, 1, 1), shared_bytes=24576 if speed else 0,
            slots=(1,) if speed else (0, 1), scalars=np.int32(3 if speed else 0).tobytes(), maps=(), inputs=(np.arange(4096, dtype=np.int32),),
            outputs=(((8192,), np.dtype(np.int32)),), aliases=(),
        )  # fmt: skip
        found.append(Subject(alone(sim.ptx(module, arch).read_text(), kernel), launch))
    return found


def _pick(rng, found: list):
    return found[int(rng.integers(0, len(found)))]


def damaged(text: str, rng) -> str:
    """One piece of damage: bytes, tokens, lines, numbers, sizes, nesting, the end of the file."""
    at = int(rng.integers(0, max(1, len(text))))
    kind = int(rng.integers(0, 16))
    lines = text.split("\n")
    line = int(rng.integers(0, len(lines)))
    near = re.compile(r"[%$.]?\w+")
    if kind == 0:  # a byte
        return text[:at] + chr(int(rng.integers(0, 256))) + text[at + 1 :]
    if kind == 1:  # a few bytes less
        return text[:at] + text[at + int(rng.integers(1, 60)) :]
    if kind == 2:  # a piece from elsewhere
        other = int(rng.integers(0, len(text)))
        return text[:at] + text[other : other + int(rng.integers(1, 200))] + text[at:]
    if kind in (3, 4):  # a number
        n = re.compile(r"\d+").search(text, at)
        return text if n is None else text[: n.start()] + _pick(rng, HUGE) + text[n.end() :]
    if kind in (5, 6):  # a token for another one
        a, b = near.search(text, at), near.search(text, int(rng.integers(0, len(text))))
        return text if a is None or b is None else text[: a.start()] + b.group() + text[a.end() :]
    if kind == 7:  # lines change places
        other = int(rng.integers(0, len(lines)))
        lines[line], lines[other] = lines[other], lines[line]
    elif kind == 8:  # a line again, and again
        lines[line:line] = [lines[line]] * int(_pick(rng, [1, 2, 50, 3000]))
    elif kind == 9:  # lines less
        del lines[line : line + int(rng.integers(1, 20))]
    elif kind == 10:  # the end of the file
        return text[:at]
    elif kind == 11:  # nesting
        what = _pick(rng, ["{", "}", "(", "[", "!", "-", "{%r1,", "/*", '"', "@%p1 ", ".", "<"])
        return text[:at] + what * int(_pick(rng, [1, 2, 30, 5000])) + text[at:]
    elif kind == 12:  # the size of an array or of a register file
        n = re.compile(r"(?<=[<\[])\d+(?=[>\]])").search(text, at % max(1, min(len(text), 4000)))
        return text if n is None else text[: n.start()] + _pick(rng, HUGE) + text[n.end() :]
    elif kind == 13:  # a modifier or a type
        n = re.compile(r"\.[a-z]\w*").search(text, at)
        word = _pick(rng, [".b64", ".u8", ".f16", ".v4", ".shared", ".local", ".sync", ".aligned", ".pred", ".sat", ".b128", ".cluster", ".relaxed", ".x4", ".s64"])
        return text if n is None else text[: n.start()] + word + text[n.end() :]
    elif kind == 14:  # a register for another one
        n = re.compile(r"%(r|rd|f|p|rs|fd)\d+").search(text, at)
        return text if n is None else text[: n.start()] + f"%{_pick(rng, ['r', 'rd', 'f', 'p', 'rs', 'tid.x', 'smid', 'SP'])}{int(rng.integers(0, 40))}" + text[n.end() :]
    else:  # a label or a branch
        label = re.compile(r"\$L\w+").search(text, at)
        other = re.compile(r"\$L\w+").search(text, int(rng.integers(0, len(text))))
        return text if label is None or other is None else text[: label.start()] + other.group() + text[label.end() :]
    return "\n".join(lines)


def launch_of(launch: Launch, rng) -> Launch:
    """The launch as it should be, or with an absurd size, number or address somewhere, or arrays that end early or lie askew."""
    if not rng.integers(0, 3):
        return launch
    size = int(_pick(rng, [0, 1, 2, 3, 31, 32, 33, 1024, 1025, 65535, 65536, 2**31 - 1, 2**32 - 1]))
    what = int(rng.integers(0, 9))
    if what < 3:
        key = ("grid", "block", "cluster")[what]
        value = list(getattr(launch, key))
        value[int(rng.integers(0, 3))] = size
        return dataclasses.replace(launch, **{key: tuple(value)})
    if what == 3:
        return dataclasses.replace(launch, shared_bytes=size)
    if what == 4:
        return dataclasses.replace(launch, slots=(), maps=(), scalars=bytes(rng.integers(0, 256, min(size, 5000), np.uint8)))
    if what == 5 and launch.scalars:
        values = np.frombuffer(launch.scalars, np.int32).copy()
        values[int(rng.integers(0, len(values)))] = np.uint32(size).view(np.int32)
        return dataclasses.replace(launch, scalars=values.tobytes())
    if what == 6 and launch.maps:
        maps = [list(numbers) for numbers in launch.maps]
        maps[int(rng.integers(0, len(maps)))][int(rng.integers(1, 18))] = size
        return dataclasses.replace(launch, maps=tuple(map(tuple, maps)))
    if what == 7 and not launch.aliases:
        shape, dtype = launch.outputs[0]
        return dataclasses.replace(launch, outputs=(((int(np.prod(shape)) // 2,), dtype), *launch.outputs[1:]))
    i = int(rng.integers(0, len(launch.inputs)))
    raw = launch.inputs[i].reshape(-1).view(np.uint8)
    askew = np.zeros(raw.size + 16, np.uint8)[1 + size % 15 :][: raw.size]
    askew[:] = raw
    return dataclasses.replace(launch, inputs=(*launch.inputs[:i], askew, *launch.inputs[i + 1 :]))


def run_one(number: int, found: list[Subject], path: Path) -> str:
    """'ran' or 'sentence'. AssertionError if the interpreter refuses without words."""
    rng = np.random.default_rng(number)
    subject = _pick(rng, found)
    text = subject.text
    for _ in range(int(rng.integers(1, 4))):
        text = damaged(text, rng) or "."
    path.write_bytes(text.encode("latin-1", "replace"))
    launch = launch_of(subject.launch, rng)
    os.environ["DSV4_SIM"] = f"limit={LIMIT} schedule={_pick(rng, ['eager', 'lazy', 'random'])} seed={number}"
    try:
        launch.run(path)
    except sim.SimError as error:
        assert len(str(error)) > 20, f"mutant {number} is refused without words: '{error}'"
        return "sentence"
    return "ran"


def _environment(sanitized: bool) -> dict[str, str]:
    """Of the child. The sanitizers come before everything else that it loads."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if sanitized:
        libraries = [subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True).stdout.strip() for name in ("libasan", "libubsan")]
        env |= {"DSV4_SIM_SANITIZED": "1", "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return env


def child(folder: Path, first: int, last: int) -> None:
    """Runs mutants first .. last - 1; a line for each on stdout."""
    found = pickle.loads((folder / "subjects").read_bytes())
    sim.library()
    if not sim.SANITIZED:  # they map terabytes
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in range(first, last):
        print("begin", number, flush=True)
        signal.alarm(SECONDS)
        print("end", number, run_one(number, found, folder / f"{first}.ptx"), flush=True)
    signal.alarm(0)


def run(first: int, count: int, sanitized: bool = False, found=None, report=print) -> dict:
    """{'ran': n, 'sentence': n, 'wrong': [(number, what happened)]} of `count` mutants from number `first` on."""
    result = {"ran": 0, "sentence": 0, "wrong": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "subjects").write_bytes(pickle.dumps(subjects() if found is None else found))
        number, last = first, first + count
        while number < last:
            command = [sys.executable, __file__, "--child", name, "--first", str(number), "--count", str(last - number)]
            done = subprocess.run(command, capture_output=True, text=True, env=_environment(sanitized))
            words = [line.split() for line in done.stdout.splitlines() if line.startswith(("begin ", "end "))]
            result.update(collections.Counter({k: result[k] for k in ("ran", "sentence")}) + collections.Counter(w[2] for w in words if w[0] == "end"))
            if done.returncode == 0:
                break
            number = int(words[-1][1]) if words else number
            what = f"the process ended with status {done.returncode}: {done.stderr.strip()[-3000:]}"
            result["wrong"].append((number, what))
            report(f"WRONG mutant {number}: {what}")
            if len(result["wrong"]) >= 20:
                break
            number += 1
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10000, help="mutants (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="run the first mutant in this process and leave its PTX here")
    parser.add_argument("--sanitize", action="store_true", help="with the interpreter built for the address and undefined behaviour sanitizers")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.first, args.first + args.count)
        return 0
    if args.keep:
        run_one(args.first, subjects(), args.keep)
        return 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(args.first, args.count, args.sanitize)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{result['ran'] + result['sentence']} mutants: {result['sentence']} end in a sentence, {result['ran']} run to the end, {len(result['wrong'])} wrong; "
          f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f} s of CPU time")  # fmt: skip
    return bool(result["wrong"])


if __name__ == "__main__":
    raise SystemExit(main())
