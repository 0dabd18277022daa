"""What `dsv4 bench kernels` times: all launches that it counts, and nothing else."""

import re

import gpu_compiler
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffi_kernels as ops
from ffi_kernels import bench, chain, library
from ffi_kernels.cases import Case

COPIES, ROUNDS = 3, 2


def chained(case, inputs, rounds=ROUNDS):
    """(many, state, step) as `bench.chain_program` has them."""
    updated, _ = bench._results(case.run, inputs[0])
    many = [dict(enumerate(jax.tree.leaves(x))) for x in inputs]
    state = [{i: x.pop(i) for i in updated.values()} for x in many]
    return many, state, lambda *carry: bench.chained_calls(case.run, jax.tree.structure(inputs[0]), rounds, *carry)


@pytest.fixture(scope="module")
def native_cases():
    if (missing := library.why_not("sim")) is not None:
        pytest.skip(missing)
    with ops.backend("sim"):
        yield [case for _, case in bench.chosen("flash", r"^(?!.*(T=4|B=4|B=16))", "sim")]


def test_each_case_is_one_chain_of_all_its_launches(native_cases):
    """Nothing of XLA stands between the launches of a case, so none of them starts late; each has results of its own."""
    refused = []
    for case in native_cases:
        inputs = [jax.eval_shape(case.make, jax.random.key(0))] * COPIES
        try:
            launches = bench.native_launches(case.run, inputs[0])
        except ValueError as error:  # a machine of four multiprocessors has not enough shared memory
            refused.append(case.name)
            assert "bytes of shared memory" in str(error)
            continue
        many, state, step = chained(case, inputs)
        text = jax.jit(step).lower(many, state).as_text()
        found = [int(n) for n in re.findall(r"custom_call @dsv4\..*?\blaunches = (\d+)", text)]
        two = any(name in case.name for name in ("route_tokens learned", "decode attention hca 1M"))
        always = (3 if case.rows > 1 else 2) if case.op == "experts" else 2 if two else 1
        either = case.op == "decode_attention" and case.rows > 1  # by what is faster
        assert launches == always or either and launches == 2, case.name
        in_place = bool(state[0])
        assert in_place == (case.op in ("compress_append", "attention_inputs_and_compress", "commit_rows")), case.name
        assert found == ([COPIES] * ROUNDS if in_place else [COPIES * ROUNDS * launches]), case.name
        of_one = sum(len(eqn.outvars) for eqn in jax.make_jaxpr(case.run)(*inputs[0]).eqns if chain.is_launch(eqn))
        results = sum(line.rpartition("->")[2].count("tensor<") for line in text.splitlines() if "custom_call @dsv4." in line)
        assert results == ROUNDS * COPIES * of_one, case.name
    assert len(refused) < len(native_cases) / 10


def _small(run, make, op="rms_norm") -> Case:
    return Case("small", op, make, run, bytes=1024, flops=2048, bounds="bf16")


NORM = _small(lambda x, w: ops.rms_norm(x, w, 1e-6), lambda key: (jax.random.normal(key, (1, 64), jnp.bfloat16), jnp.ones(64)))


def test_a_chain_gives_every_result_of_every_round(backend):
    inputs = [jax.tree.map(jnp.asarray, NORM.make(jax.random.key(i))) for i in range(COPIES)]
    many, state, step = chained(NORM, inputs)
    state, results = jax.jit(step)(many, state)
    want = [np.asarray(jax.jit(NORM.run)(*x)) for x in inputs] * ROUNDS
    assert [np.asarray(x).tobytes() for x in results] == [x.tobytes() for x in want]
    assert len({x.tobytes() for x in want}) == COPIES and state == [{}] * COPIES


def test_what_is_updated_in_place_goes_on_to_the_next_call(backend):
    """A ring whose newest row is its last one plus one: after n calls n was added, to each copy by itself."""

    def run(rings, rows, start, length):
        return ops.commit_rows(rings, rows, start, length)

    def make(i):
        ring = jnp.full((1, 8, 64), i, jnp.float32)
        return [ring], [jnp.full((1, 1, 64), 10.0 + i)], jnp.array([2 + i], jnp.int32), jnp.array([1], jnp.int32)

    inputs = [make(i) for i in range(COPIES)]
    case = _small(run, make, "commit_rows")
    assert bench._results(run, inputs[0]) == ({0: 0}, [])
    many, state, step = chained(case, inputs)
    text = jax.jit(step).lower(many, state).as_text()
    assert [int(n) for n in re.findall(r"custom_call @dsv4\..*?\blaunches = (\d+)", text)] == [COPIES] * ROUNDS
    new, results = jax.jit(step)(many, state)
    assert results == []
    for i, x in enumerate(inputs):
        want = jax.jit(run)(*x)
        for _ in range(ROUNDS - 1):
            want = jax.jit(run)(want, *x[1:])
        np.testing.assert_array_equal(new[i][0], want[0])
        assert (np.asarray(want[0])[0, 2 + i] == 10 + i).all()


def test_how_long_a_chain_is():
    """As long as one of a step, unless it takes long; in all long enough that asking whether to go on costs little."""
    assert bench.chain_length(24, 24 * 5e-6) == (5, 4)  # 120 launches, 0.6 ms each time
    assert bench.chain_length(16, 16 * 20e-6) == (7, 1)  # 112 launches
    assert bench.chain_length(8, 8 * 234e-6) == (2, 1)
    assert bench.chain_length(8, 8.0) == (1, 1)


@pytest.fixture
def quick(monkeypatch):
    if (missing := library.why_not("sim")) is not None:
        pytest.skip(missing)
    for name, value in {"MIN_COPIES": 2, "MAX_COPIES": 2, "SECONDS_PER_CASE": 0.0, "roofline": lambda: (1e9, 1e12)}.items():
        monkeypatch.setattr(bench, name, value)


def test_figures_are_of_the_chain(quick, monkeypatch):
    monkeypatch.setattr(bench, "chain_seconds", lambda function, inputs, alone: alone / 2)
    row = bench.time_case(NORM, "sim", peers=False)
    assert row["launches"] == 1 and row["time_us"] == row["alone_us"] / 2 > 0
    took = row["time_us"] * 1e-6
    np.testing.assert_allclose(row["bandwidth_gbs"], 1024 / took / 1e9)
    np.testing.assert_allclose(row["tflops"], 2048 / took / 1e12)
    np.testing.assert_allclose(row["roofline_percent"], 100 * max(1024 / 1e9, 2048 / 1e12) / took)


def test_times_on_the_interpreter(quick):
    row = bench.time_case(NORM, "sim")
    times = [row[name] for name in ("time_us", "alone_us", "xla_us")]  # differences of times: of so little work on a busy machine, of any sign
    assert np.isfinite(times).all() and len(set(times)) == 3


def test_what_is_not_ours_has_one_time(quick):
    """A product by NVIDIA, say: XLA makes one of equal calls, so a chain of rounds would be too short."""
    row = bench.time_case(_small(lambda x, w: x * w.astype(x.dtype), NORM.make), "sim", peers=False)
    assert row["launches"] == 0 and row["time_us"] == row["alone_us"]


def test_inputs_of_many_arrays_have_few_copies(quick, monkeypatch):
    """XLA takes minutes to compile a program of 10,000 arrays."""
    monkeypatch.setattr(bench, "MIN_COPIES", 8)
    monkeypatch.setattr(bench, "MAX_COPIES", 24)
    monkeypatch.setattr(bench, "chain_seconds", lambda *_: 1.0)
    seen = []
    monkeypatch.setattr(bench, "seconds", lambda function, inputs: seen.append(len(inputs)) or 1.0)
    for count in (2, 100, 600):
        bench.time_case(_small(lambda *xs: xs[0], lambda key, n=count: tuple(jnp.zeros(1) for _ in range(n))), "sim", peers=False)  # noqa: B023
    assert seen == [24, 20, bench.GRAPH_LAUNCHES]


def test_the_timed_loop_holds_the_chain_and_nothing_else():
    """As XLA compiles it for an H200: one custom call of all launches, and the counter of the loop."""
    for sentence in (gpu_compiler.missing(), library.why_not("sm_90a")):
        if sentence is not None:
            pytest.skip(sentence)
    only = r"linear/wq_b/fp8$|experts/official$|hc_post 1 rows|compress_append ratio=4 coded closing B=1 T=1"
    found = gpu_compiler.answer("bench_compiler.py", only, backend="sm_90a")
    assert len(found) == 4
    for name, loop in found.items():
        (launches,), (counter,) = loop["launches"], loop["others"]
        assert launches * loop["trips"] == loop["calls"] * loop["launches_of_a_call"] > 100, name
        assert re.search(r"= s32\[\] fusion\(.*while/body/while/body/add", counter), name
