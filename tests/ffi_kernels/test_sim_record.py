"""The record of what a device gave for the interpreter's launches: that it is whole, and that its comparison notices everything.

The comparison itself happens in test_sim*.py, at every launch that the record knows.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import sim_driver as sim
import sim_record
import sim_sources
from sim_draws import Draws
from sim_record import Compare, Disagreement, any_nan

ROOT = pathlib.Path(__file__).resolve().parents[2]


def collected(*files: str) -> set[str]:
    """`file.py::test[parameters]` of the tests in these files, by pytest in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files], cwd=ROOT, env=env, capture_output=True, text=True)
    ids = {line.partition("tests/ffi_kernels/")[2] for line in done.stdout.splitlines() if "::" in line}
    assert ids, done.stdout[-2000:] + done.stderr[-2000:]
    return ids


def test_no_recorded_case_has_vanished():
    if not sim_record.RECORD.is_file():
        pytest.skip("no device has recorded what the interpreter's kernels give: `python tests/record_on_device.py OUT` on a machine with an H100 or H200, "
                    "then OUT/sim_record.json to tests/ffi_kernels/ (ffi_kernels/sim/README.md, Against a device)")  # fmt: skip
    record = json.loads(sim_record.RECORD.read_text())
    tests = {test for kind in sim_record.KINDS for test in record[kind]}
    assert len(tests) >= 150
    here = collected(*sorted({f"tests/ffi_kernels/{test.partition('::')[0]}" for test in tests}))
    gone, impossible = tests - here, here & set(record["failures"])
    assert not gone, f"recorded tests that exist no more ({sim_record.AGAIN}): {sorted(gone)}"
    assert not impossible, f"tests whose launches a device could not run: the interpreter must refuse them ({ {t: record['failures'][t] for t in impossible} })"
    assert sim_record.RECORD.stat().st_size < 300_000


# --- the comparison, with records that the interpreter makes of itself ----------------------------------------------

needs_interpreter = pytest.mark.skipif(bool(sim.missing()) or sim.ON_DEVICE, reason=sim.missing() or "about the interpreter")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function that runs `launches` as the test `name`: first recording them, then against that record with `change` made to it."""

    def run(launches, change=lambda record: None, again=None, name="test_of.py::test_it"):
        lines, path = tmp_path / "lines", tmp_path / "record.json"
        monkeypatch.setattr(sim_record, "current_test", lambda: name)
        monkeypatch.setenv("DSV4_SIM_RECORD", str(lines))
        lines.unlink(missing_ok=True)
        monkeypatch.setattr(sim_record, "REPLAY", sim_record.Replay(pathlib.Path(os.devnull)))
        launches()
        record = sim_record.merged(lines, dict(device="a device", date="today"))
        change(record)
        sim_record.written(record, path)
        monkeypatch.delenv("DSV4_SIM_RECORD")
        replay = sim_record.Replay(path)
        assert replay.record == record
        monkeypatch.setattr(sim_record, "REPLAY", replay)
        (again or launches)()
        replay.finish(name)
        return record

    return run


def votes(a=5, **how):
    d = np.zeros(32 * 12, np.int32)
    sim.launch("votes", [np.full(32, a, np.int32), d, 32], **how)
    return d


def test_of(record, kind="bits"):
    return record[kind]["test_of.py::test_it"]


test_of.__test__ = False


@needs_interpreter
def test_the_interpreter_agrees_with_itself(recorded):
    record = recorded(lambda: (votes(5), votes(6), votes(5)))
    assert len(test_of(record)) == 2 and {kernel for kernel, _ in test_of(record).values()} == {"votes"}


@needs_interpreter
def test_other_bits_of_the_device_are_noticed(recorded):
    def tamper(record):
        for launch in test_of(record).values():
            launch[1] = "0" * 16

    with pytest.raises(Disagreement, match=r"test_of.py::test_it: kernel votes.*other bits than a device gave on today"):
        recorded(votes, tamper)


@needs_interpreter
def test_launches_with_other_inputs_are_noticed(recorded):
    with pytest.raises(Disagreement, match="test_of.py::test_it: launches of votes .* made no more, .* record again on a device"):
        recorded(lambda: votes(5), again=lambda: votes(6))
    with pytest.raises(Disagreement, match="made no more"):
        recorded(lambda: votes(5), again=lambda: votes(5, grid=2))
    with pytest.raises(Disagreement, match="made no more"):
        recorded(votes, again=lambda: None)


@needs_interpreter
def test_more_launches_than_recorded_are_no_fault(recorded):
    recorded(lambda: votes(5), again=lambda: (votes(5), votes(6)))


def floats(values, compare):
    x = np.array(values, np.float32)
    x.flags.writeable = False
    sim.run(sim.ptx("floats"), "ex2", [x, x, x, np.zeros(len(x), np.float32), len(x)], compare=compare)


@needs_interpreter
def test_tolerances_hold_values(recorded):
    near = Compare(rtol=1e-6)
    record = recorded(lambda: floats([0.5, 1.5], near))
    assert not record["bits"] and len(test_of(record, "close")) == 1

    def values(scale):
        def change(record):
            for launch in test_of(record, "close").values():
                launch[1] = sim_record.stored([(np.exp2(np.array([0.5, 1.5])) * scale).astype(np.float32)])
        return change

    recorded(lambda: floats([0.5, 1.5], near), values(1 + 5e-7))
    with pytest.raises(AssertionError, match="further from a device than the tolerance"):
        recorded(lambda: floats([0.5, 1.5], near), values(1 + 1e-5))
    with pytest.raises(Disagreement, match="recorded to be compared by close, now by bits"):
        recorded(lambda: floats([0.5, 1.5], near), again=lambda: floats([0.5, 1.5], sim_record.EXACT))


@needs_interpreter
def test_outputs_are_kept_for_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(sim_record, "current_test", lambda: "test_of.py::test_that_no_record_knows")
    monkeypatch.setenv("DSV4_SIM_DUMP", str(tmp_path))
    seen = votes()
    (file,) = tmp_path.glob("test_of_py__test_that_no_record_knows-votes-*.npz")
    kept = [np.load(file)[name].view(np.int32) for name in np.load(file).files]
    assert any(np.array_equal(array, seen) for array in kept)


@needs_interpreter
def test_nans_are_one_where_their_bits_are_open(recorded):
    a, b = (np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00001, 0xFFFFFFFF))
    assert sim_record.outputs_of([a], any_nan()) == sim_record.outputs_of([b], any_nan())
    assert sim_record.outputs_of([a], sim_record.EXACT) != sim_record.outputs_of([b], sim_record.EXACT)


def test_a_test_with_a_failed_launch_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV4_SIM_RECORD", str(tmp_path / "lines"))
    sim_record._line(test="a.py::t", kernel="k", inputs="1", kind="bits", outputs="2")
    monkeypatch.setattr(sim_record, "current_test", lambda: "a.py::t")
    sim_record.failed("kernel k: an illegal instruction was encountered")
    record = sim_record.merged(tmp_path / "lines", {})
    assert record["failures"] == {"a.py::t": "kernel k: an illegal instruction was encountered"} and not record["bits"]


def test_inputs_depend_on_the_kernels_own_source(tmp_path):
    """Another kernel of the file, a comment and the layout may change; what the kernel uses may not."""
    path = tmp_path / "k.cu"

    def of(text):
        path.write_text(text)
        sim_sources._parts.cache_clear()
        return sim_sources.of_kernel(path, "k")

    plain = 'struct P { int* d; };\n__device__ int f(int x) { return x + 1; }\nextern "C" __global__ void k(P p) { *p.d = f(1); }\n'
    base = of(plain)
    assert of(plain + 'extern "C" __global__ void other(P p) { *p.d = 2; }\n#define G(name) extern "C" __global__ void name(P p) {}\nG(third)\n') == base
    assert of("// what it does\n" + plain.replace("{ return", "{\n  return")) == base
    assert of(plain.replace("x + 1", "x + 2")) != base and of(plain.replace("f(1)", "f(2)")) != base and of(plain.replace("int* d", "int* d; int e")) != base


def test_draws_are_the_same_everywhere(monkeypatch):
    """Seeded by the test's name, whatever was drawn before; these numbers must never change."""
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "somewhere/test_of.py::test_it (call)")
    draws = Draws()
    assert draws.integers(0, 100, 5).tolist() == Draws().integers(100, size=5).tolist() == [9, 36, 89, 45, 77]
    assert draws.normal(3).tolist() == [-0.9971160888671875, -0.6608428955078125, 0.5350189208984375]
    assert draws.permutation(np.arange(6)).tolist() == [2, 4, 0, 1, 5, 3]
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "test_of.py::test_other (call)")
    assert draws.integers(0, 100, 5).tolist() != [9, 36, 89, 45, 77]


@needs_interpreter
def test_the_command_that_records(tmp_path):
    """A rehearsal: the interpreter in place of the device, two tests."""
    tests = ["tests/ffi_kernels/test_sim.py::test_barriers", "tests/ffi_kernels/test_sim_numbers.py::test_bits_of_nan_are_the_devices"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "tests/record_on_device.py", str(tmp_path), "--interpreter", "--tests", *tests], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "sim_record.json").read_text())
    assert len(record["bits"]) == 10 and "test_sim.py::test_barriers" in record["bits"] and not record["failures"]
    assert record["about"]["device"] == "the interpreter" and record["about"]["nvcc"] != "unknown"
    assert "tests in which the interpreter disagrees with the device: 0" in done.stdout
    assert {f.name for f in tmp_path.iterdir()} == {"sim_record.json", "summary.txt", "device.jsonl", "device.log", "replay.jsonl", "replay.log"}


@pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
@pytest.mark.parametrize("name", sorted(f.stem for f in sim.KERNELS.glob("*.cu")))
def test_kernels_assemble_for_a_device(name, tmp_path):
    """The interpreter reads PTX that nobody assembled: what ptxas refuses must not wait for a device to show."""
    arch = "sm_100a" if "tcgen05" in (sim.KERNELS / f"{name}.cu").read_text() else "sm_90a"
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}", "-o", str(tmp_path / "x.cubin"), str(sim.KERNELS / f"{name}.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
