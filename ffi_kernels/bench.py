"""Every native op of this device against its reference (`selftest`) and against the clock (`time_cases`).

The cases are those of `ffi_kernels/cases`. Times are periods: calls of one case on several copies of its inputs, more than the
caches hold, in a loop on the device, launched as graphs. In `chain_seconds` the launches are one custom call, as those of a decode
step are; in `seconds` each is one of its own. Not here: arguments and printing (`cli`).
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ffi_kernels import cases, chain, compare, dispatch
from ffi_kernels.cases import Case

COPIES_BYTES = 512 * 2**20  # of inputs that one program touches, several times any L2 cache
MIN_COPIES, MAX_COPIES = 8, 24
MAX_ARRAYS, GRAPH_LAUNCHES = 2048, 5  # XLA needs minutes to compile programs of many more arrays; it makes graphs of five launches and more
CHAIN_LAUNCHES = 112  # of a custom call, about as many as in a step: 14 of each of 8 blocks
CHAIN_SECONDS = 2e-3  # a chain of so many seconds need not have so many launches
SECONDS_PER_CASE = 0.15
NOT_HERE = "not here: "  # begins the verdict on a case that this machine lacks something for


def kept(rows: Iterable[dict], path: str | None = None, limit_s: float | None = None) -> Iterator[dict]:
    """The rows, each appended to the file `path` as a line of JSON before the next one is made; a run that is killed loses none.

    Ends after the first row that comes more than `limit_s` seconds after the start, and says so.
    """
    began = time.perf_counter()
    for row in rows:
        if path is not None:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        yield row
        if limit_s is not None and time.perf_counter() - began > limit_s:
            print(f"stopped here: {limit_s:.0f} s are over", flush=True)
            return


def chosen(models: str, only: str | None, backend: str) -> list[tuple[str, Case]]:
    """(model, case) for models like 'flash,pro' of the ops that `backend` has, where 'model/name' matches the regular expression `only`.

    ValueError if a model is unknown, the expression is broken or nothing matches.
    """
    unknown = [m for m in models.split(",") if m not in cases.MODELS]
    if unknown:
        raise ValueError(f"there are no kernel cases for {', '.join(unknown)}; choose from {', '.join(cases.MODELS)}.")
    every = [(m, case) for m in models.split(",") for case in cases.all_cases(cases.MODELS[m])]
    every = [(m, case) for m, case in every if dispatch.implements(backend, case.op) and case.arch in (None, backend)]
    try:
        found = [(m, case) for m, case in every if only is None or re.search(only, f"{m}/{case.name}")]
    except re.error as error:
        raise ValueError(f"--only {only!r} is not a regular expression: {error}.") from None
    if not found:
        raise ValueError(f"--only {only!r} matches none of the {len(every)} cases of {backend}; try for example 'linear' or 'flash/attention'.")
    return found


def _inputs(case: Case, copies: int) -> list[tuple]:
    make = jax.jit(case.make)
    return [jax.block_until_ready(make(jax.random.key(i))) for i in range(copies)]


def _refusal(case: Case, backend: str) -> str | None:
    with dispatch.backend(backend):
        return case.refusal()


def check(case: Case, backend: str) -> dict:
    """Run one case on `backend` and on `xla`; returns its verdict: 'ok', 'not here: ...', or what is wrong in a sentence."""
    if (sentence := _refusal(case, backend)) is not None:
        return {"verdict": f"{NOT_HERE}{sentence}"}
    try:
        inputs = _inputs(case, 1)[0]
        with dispatch.backend(backend):
            got = jax.block_until_ready(jax.jit(lambda *x: case.same(case.run(*x)))(*inputs))
        with dispatch.backend("xla"):
            want = jax.block_until_ready(jax.jit(lambda *x: case.same(case.run(*x)))(*inputs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            if case.bounds == "exact":
                compare.assert_bits(a, b)
            else:
                compare.assert_close(a, b, case.bounds)
    except (AssertionError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"verdict": str(error).strip().splitlines()[0][:300]}
    return {"verdict": "ok"}


def selftest(models: str, only: str | None, backend: str) -> Iterator[dict]:
    """One row per case: model, case, rows, bounds, verdict."""
    for model, case in chosen(models, only, backend):
        yield {"model": model, "case": case.name, "rows": case.rows, "bounds": case.bounds, **check(case, backend)}


def seconds(function, inputs: list[tuple]) -> float:
    """Median seconds of function(*inputs[i]), every launch a custom call of its own: a kernel starts when the one before has ended."""
    program = _loop(lambda many, state: (state, [function(*x) for x in many]))
    return _seconds_of_step(program, inputs, []) / len(inputs)


def chain_seconds(function, inputs: list[tuple], alone: float) -> float:
    """Median seconds of function(*inputs[i]) where its launches follow each other as in a decode step. `alone`: seconds(function, inputs)."""
    program, many, state, calls = chain_program(function, inputs, alone)
    return _seconds_of_step(program, many, state) / calls


def chain_program(function, inputs: list[tuple], alone: float):
    """(program, many, state, calls): program(many, state, count) makes `count` times `calls` calls of `function` on its inputs in turn, of
    `alone` seconds each, the launches in chains (`chained_calls`).

    A kernel starts while the one before it, of the same case, still runs, and reads what its launch may read early: weights and
    the inputs called early (dependent.cuh). Nothing here writes those, and in a step what does has ended: the same reads are early.
    All other work waits until the kernel before has ended, as in a step, though no input here comes from it. What a step
    has otherwise: other kernels in front, which may leave less room to start early; of kernels that need little of a
    multiprocessor several wait here at a time.
    """
    updated, _ = _results(function, inputs[0])
    launches = CHAIN_LAUNCHES if updated else len(inputs) * native_launches(function, inputs[0])  # a second update is another chain's
    rounds, again = chain_length(launches, len(inputs) * alone)
    many = [dict(enumerate(jax.tree.leaves(x))) for x in inputs]
    state = [{i: x.pop(i) for i in updated.values()} for x in many]
    step = functools.partial(chained_calls, function, jax.tree.structure(inputs[0]), rounds)
    options = {"xla_gpu_graph_min_graph_size": 1}  # for XLA a chain is one thing to do, for which it would make no graph
    return _loop(step, again, options), many, state, len(inputs) * rounds * again


def native_launches(function, inputs: tuple) -> int:
    """Launches of our kernels that one call of `function` makes."""
    return sum(map(chain.is_launch, jax.make_jaxpr(function)(*inputs).eqns))


def chain_length(launches: int, took: float) -> tuple[int, int]:
    """(how many times a chain goes over all inputs, how many chains follow each other), if once is so many launches and seconds."""
    rounds = min(-(-CHAIN_LAUNCHES // launches), math.ceil(CHAIN_SECONDS / took))
    return rounds, math.ceil(CHAIN_SECONDS / (took * rounds))


def chained_calls(function, structure, rounds: int, many: list[dict], state: list[dict]) -> tuple[list[dict], list[jax.Array]]:
    """`rounds` calls of `function` on each of many inputs, chained -> (state, the other results of all calls).

    many, state: of each of the inputs the leaves {number: array}; those in `state` are updated in place by `function`, and the next call
    takes what the last one made of them. structure: that of one input as a pytree.
    """

    def arguments(x, own):
        return jax.tree.unflatten(structure, [leaf for _, leaf in sorted({**x, **own}.items())])

    updated, others = _results(function, arguments(many[0], state[0]))

    def calls(many, state):
        results = []
        for _ in range(rounds):
            for i, x in enumerate(many):
                made = jax.tree.leaves(function(*arguments(x, state[i])))
                state[i] = {of: made[result] for result, of in updated.items()}
                results += [made[result] for result in others]
        return state, results

    return chain.chained(calls)(many, state)


def _results(function, inputs: tuple) -> tuple[dict[int, int], list[int]]:
    """({number of a result: number of the input that it is, updated in place}, numbers of the results that are no inputs)."""
    jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    origin = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in filter(chain.is_launch, jaxpr.eqns):
        pairs = eqn.params["input_output_aliases"]
        origin.update({eqn.outvars[o]: origin[eqn.invars[i]] for i, o in pairs if eqn.invars[i] in origin})
    updated = {r: origin[v] for r, v in enumerate(jaxpr.outvars) if v in origin and v not in jaxpr.invars}
    return updated, [r for r, v in enumerate(jaxpr.outvars) if v not in origin]


def _loop(step, again: int = 1, options: dict | None = None):
    """program(many, state, count) with step(many, state) -> (state, results), in a loop on the device that makes `again` steps between
    two questions whether to go on, `count` in all; compiled with XLA's `options`. Returns the last state and results."""

    def body(_, carry):
        many, state = jax.lax.optimization_barrier(carry[:2])  # the compiler must not take the calls out of the loop
        return many, *step(many, state)

    @functools.partial(jax.jit, compiler_options=options)
    def program(many, state, count):
        shapes = jax.eval_shape(lambda *carry: step(*carry)[1], many, state)
        carry = many, state, jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), shapes)
        several = body if again == 1 else lambda _, carry: jax.lax.fori_loop(0, again, body, carry)
        return jax.lax.fori_loop(0, count, several, carry)[1:]

    return program


def _seconds_of_step(program, many: list, state: list) -> float:
    """Median seconds by which one more of `count` lengthens program(many, state, count): what the host adds to a call cancels."""

    def once(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(many, state, count))
        return time.perf_counter() - began

    once(1)
    few = 2
    more = max(4, min(200, int(SECONDS_PER_CASE / 8 / max(once(4) / 4, 1e-6))))
    return float(np.median([once(few + more) - once(few) for _ in range(7)])) / more


@functools.cache
def roofline() -> tuple[float, float]:
    """(bytes per second of reading device memory, bf16 FLOP per second of a large product), measured now."""
    words = jnp.ones((2**29,), jnp.float32)  # 2 GiB
    read = words.nbytes / seconds(jnp.max, [(words,)])
    n = 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    return read, 2 * n**3 / seconds(jnp.dot, [(a, b)])


def time_case(case: Case, backend: str, peers: bool = True) -> dict:
    """What one call of the case takes, what that makes of the roofline, and the peer's time on the same inputs.

    time_us: from one call to the next in a chain, as in a decode step (`chain_seconds`); bandwidth_gbs, tflops and roofline_percent
    are made of it. alone_us: where no kernel starts early (`seconds`), as are xla_us and peer_us. launches: kernels of ours in a
    call; a case without any, a product by NVIDIA, cannot be chained and has one time. bytes: what the op must move.
    """
    arrays = jax.tree.leaves(jax.eval_shape(case.make, jax.random.key(0)))
    copies = int(np.clip(COPIES_BYTES // max(sum(x.size * x.dtype.itemsize for x in arrays), 1), MIN_COPIES, MAX_COPIES))
    inputs = _inputs(case, min(copies, max(GRAPH_LAUNCHES, MAX_ARRAYS // len(arrays))))
    with dispatch.backend(backend):
        took = alone = seconds(case.run, inputs)
        if launches := native_launches(case.run, inputs[0]):
            took = chain_seconds(case.run, inputs, alone)
    read, flops = roofline()
    floor = max(case.bytes / read, case.flops / flops / case.speed)
    row = {
        "time_us": 1e6 * took, "alone_us": 1e6 * alone, "launches": launches, "bandwidth_gbs": case.bytes / took / 1e9,
        "tflops": case.flops / took / 1e12, "roofline_percent": 100 * floor / took, "bytes": case.bytes,
    }  # fmt: skip
    if peers:
        with dispatch.backend("xla"):
            row["xla_us"] = 1e6 * seconds(case.run, inputs)
            if case.peer is not None:
                row["peer_us"] = 1e6 * seconds(case.peer, inputs)
    return row


def time_cases(models: str, only: str | None, backend: str, peers: bool = True) -> Iterator[dict]:
    """One row per case; a case that fails has its sentence under 'error'."""
    for model, case in chosen(models, only, backend):
        row = {"model": model, "case": case.name, "rows": case.rows}
        if (sentence := _refusal(case, backend)) is not None:
            yield {**row, "error": f"{NOT_HERE}{sentence}"}
            continue
        try:
            yield {**row, **time_case(case, backend, peers)}
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            yield {**row, "error": str(error).strip().splitlines()[0][:300]}
