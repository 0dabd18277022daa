"""Converts again and again in forked children that are killed, for `test_resume.py`; prints one JSON line per child.

A process of its own, because a fork must not copy the threads of JAX. Arguments: source, destination, recipe, seed, kills.
Every second child kills itself just before or just after its n-th write (fault injection); the others are killed from
outside after a random time.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from checkpoints import conversion, journal, layout, store  # noqa: F401  (imported before the forks, to be quick)


def die_at(number: int, after: bool) -> None:
    """Kill this process at its n-th event: a block written to an array, or a line written to the journal."""
    left = [number]

    def counted(f):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = f(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    layout._pwrite = counted(layout._pwrite)
    journal.Journal.record = counted(journal.Journal.record)
    journal.Journal.finish = counted(journal.Journal.finish)


def half_writes(number: int) -> None:
    """Kill this process in the middle of the n-th block: the first half of its bytes is on disk."""
    left, write = [number], layout._pwrite

    def call(fd, values, offset):
        left[0] -= 1
        if left[0] == 0:
            write(fd, values.reshape(-1)[: values.size // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        write(fd, values, offset)

    layout._pwrite = call


def main() -> None:
    source, destination, recipe, seed, count = sys.argv[1:]
    random.seed(int(seed))
    seconds, events = 0.1, 400  # about what a conversion takes
    kills = 0
    for number in range(3 * int(count)):
        if kills == int(count):
            break
        injected = number % 2
        place, after, half = random.randint(1, events), random.random() < 0.5, random.random() < 0.3
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            try:
                if injected:
                    half_writes(place) if half else die_at(place, after)
                conversion.convert(source, f"{destination}-{number}", recipe, workers=2)
                os._exit(0)
            except BaseException as error:
                print(json.dumps({"error": repr(error)}), flush=True)
                os._exit(1)
        if not injected:
            time.sleep(random.uniform(0.0, seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status)
        kills += killed
        if not killed and not injected:
            seconds = min(seconds, time.perf_counter() - began)
        partial = Path(destination).parent / f".{Path(destination).name}-{number}.partial"
        text = (partial / "journal").read_bytes() if (partial / "journal").exists() else b""
        lines = sum(not line.startswith((b'["boot"', b'["on disk"')) for line in text.splitlines())  # of tasks
        # Whatever the kill left, the same call ends in the same bytes; in a child too, so that this process stays small.
        child = os.fork()
        if child == 0:
            try:
                done = conversion.convert(source, f"{destination}-{number}", recipe, workers=1 + number % 3)
                print(json.dumps({"number": number, "killed": killed, "lines": lines, "resumed": done.resumed}), flush=True)
                os._exit(0)
            except BaseException as error:
                whole = "exists already" in str(error)  # the kill came after the end
                print(json.dumps({"number": number, "whole": whole, "killed": killed} | ({} if whole else {"error": repr(error)})), flush=True)
                os._exit(0 if whole else 1)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
