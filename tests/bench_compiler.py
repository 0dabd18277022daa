"""python tests/bench_compiler.py REGEX: the timed loops of `dsv4 bench kernels` as XLA compiles them for an H200. See `gpu_compiler.py`.

Prints a JSON object in its last line: for each case of Flash that matches the expression its number of copies and chained calls, and for
each loop inside the loop of the program its trip count, the launches of each of our custom calls in it, and its other instructions.
"""

import json
import re
import sys

import gpu_compiler
import jax

import ffi_kernels as ops
from ffi_kernels import bench

COPIES, ALONE = 8, 1e-5  # of the inputs, and seconds of a call, from which the lengths of the loops follow


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of an HLO module, by name."""
    found = re.findall(r"^(?:ENTRY )?%(\S+) \(.*\{\n((?:  .*\n)*)\}", text, re.MULTILINE)
    return {name: lines.splitlines() for name, lines in found}


def inner_loop(text: str) -> dict:
    bodies, found = computations(text), re.findall(r' while\(.*\bbody=%(\S+?)[,\s].*"known_trip_count":\{"n":"(\d+)"', text)
    (body, trips), = found
    lines = [line for line in bodies[body] if not re.search(r"\b(parameter|get-tuple-element|tuple|constant|bitcast)\(", line)]
    ours = [line for line in lines if 'custom_call_target="dsv4.' in line]
    return {
        "trips": int(trips), "launches": [int(re.search(r"\blaunches = (\d+)", line)[1]) for line in ours],
        "others": [line.strip()[:200] for line in lines if line not in ours],
    }  # fmt: skip


def figures(case, device) -> dict:
    sharding = jax.sharding.SingleDeviceSharding(device)
    place = lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=sharding)  # noqa: E731
    inputs = [jax.tree.map(place, jax.eval_shape(case.make, jax.random.key(0)))] * COPIES
    program, many, state, calls = bench.chain_program(case.run, inputs, ALONE)
    text = program.lower(many, state, place(jax.ShapeDtypeStruct((), "int32"))).compile().as_text()
    return {"calls": calls, "launches_of_a_call": bench.native_launches(case.run, inputs[0]), **inner_loop(text)}


if __name__ == "__main__":
    H200 = gpu_compiler.described(*gpu_compiler.DEVICES["H200"])
    with ops.backend("sm_90a"):
        print(json.dumps({case.name: figures(case, H200) for _, case in bench.chosen("flash", sys.argv[1], "sm_90a")}))
