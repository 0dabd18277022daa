"""Every native op of this device against its reference (`selftest`) and against the clock (`time_cases`).

The cases are those of `ffi_kernels/cases`. A time is that of one launch inside a graph: calls of one case on several
copies of its inputs, more than the caches hold, in a loop on the device. Not here: arguments and printing (`cli`).
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ffi_kernels import cases, compare, dispatch
from ffi_kernels.cases import Case

COPIES_BYTES = 512 * 2**20  # of inputs that one program touches, several times any L2 cache
MIN_COPIES, MAX_COPIES = 8, 24  # XLA makes a graph of five launches and more
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
    """Median seconds of function(*inputs[i]): a loop on the device over all inputs, launched as one graph.

    The program is called with two lengths of the loop, so that what the host adds to a call cancels.
    """

    def body(_, carry):
        many, _ = carry
        many = jax.lax.optimization_barrier(many)  # the compiler must not take the calls out of the loop
        return many, [function(*x) for x in many]

    @jax.jit
    def program(many, count):
        shapes = jax.eval_shape(lambda m: [function(*x) for x in m], many)
        out = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (many, out))[1]

    def once(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(inputs, count))
        return time.perf_counter() - began

    once(1)
    few = 2
    many = few + max(4, min(200, int(SECONDS_PER_CASE / 8 / max(once(4) / 4, 1e-6))))
    times = [once(many) - once(few) for _ in range(7)]
    return float(np.median(times)) / (many - few) / len(inputs)


@functools.cache
def roofline() -> tuple[float, float]:
    """(bytes per second of reading device memory, bf16 FLOP per second of a large product), measured now."""
    words = jnp.ones((2**29,), jnp.float32)  # 2 GiB
    read = words.nbytes / seconds(jnp.max, [(words,)])
    n = 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    return read, 2 * n**3 / seconds(jnp.dot, [(a, b)])


def time_case(case: Case, backend: str, peers: bool = True) -> dict:
    """Microseconds of one launch, what that makes of the roofline, and the peer's time on the same inputs."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(case.make, jax.random.key(0))))
    inputs = _inputs(case, int(np.clip(COPIES_BYTES // max(size, 1), MIN_COPIES, MAX_COPIES)))
    with dispatch.backend(backend):
        took = seconds(case.run, inputs)
    read, flops = roofline()
    floor = max(case.bytes / read, case.flops / flops / case.speed)
    row = {
        "time_us": 1e6 * took, "bandwidth_gbs": case.bytes / took / 1e9, "tflops": case.flops / took / 1e12,
        "roofline_percent": 100 * floor / took, "bytes": case.bytes,
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
