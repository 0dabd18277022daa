"""mbarriers, cp.async and bulk copies in the PTX interpreter: phases, counts, bytes, states, sizes, groups, reductions."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws
from sim_driver import ints, launch, poisoned

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()


def test_states_of_a_barrier():
    """After each step: whether parity 0 (1) and parity 1 (2) have passed, whether a state has, how many arrivals were pending."""
    d = poisoned(40)
    launch("states", [np.zeros(1, np.int32), d, 0], module="barriers")
    steps = [2, 5, 4, 2, 1, 1, 0, 1, 0, 1, 2, 2, 0, 1, 1, 5, 3, 2, 3, 1, 0, 2, 2, 1, 2, 2, 1]
    np.testing.assert_array_equal(d[: len(steps)], steps)
    assert (d[len(steps) :] == 0x7D7D7D7D).all()


@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_phases(rounds):
    a, d = ints(128), poisoned(128)
    launch("phases", [a, d, rounds], module="barriers", block=128)
    v = a.astype(np.int64)
    for _ in range(rounds):
        v = v * 3 + np.roll(v, -32)
    np.testing.assert_array_equal(d, v.astype(np.int32))


def test_cp_async_sizes():
    a, d = ints(128), poisoned(128)
    launch("copies", [a, d, 0], module="barriers")
    rows = a.reshape(32, 4).astype(int)
    t = np.arange(32)
    weights = np.array([1, 3, 5, 7])
    first = np.where(t & 1, rows[:, 0], 0) + 3 * rows[:, 1] + 5 * -7
    counts = t % 3
    first += 7 * np.where(counts > 0, rows[:, 0], 0) + 11 * np.where(counts > 1, rows[:, 1], 0)
    kept = np.where(np.arange(4) < (t % 5)[:, None], rows, 0) @ weights
    np.testing.assert_array_equal(d.reshape(4, 32), [first, kept, np.where(t & 4, 0, rows @ weights), rows @ weights])


@pytest.mark.parametrize("pieces", [1, 3, 16, 200])
def test_bulk_copies_of_any_size(pieces):
    """`pieces` of 16 bytes, and two copies beside them on the same barrier."""
    a, d = ints(1024), poisoned(1024)
    launch("bulk", [a, d, pieces], module="barriers")
    s = np.full(1024, -5)
    s[: 4 * pieces], s[900:908], s[1000:1012] = a[: 4 * pieces], a[8:16], a[4:16]
    want = np.full(1024, 0x7D7D7D7D)
    want[: 4 * pieces], want[896:] = 2 * s[: 4 * pieces] + 1, 2 * s[896:] + 1
    np.testing.assert_array_equal(d, want)


TYPES = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "b32": np.uint32, "b64": np.uint64, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
REDUCTIONS = [
    *[f"add_{t}" for t in ("u32", "s32", "u64", "f32", "f64", "f16", "bf16")], *[f"{op}_{t}" for op in ("min", "max") for t in ("u32", "s32", "u64", "s64", "f16", "bf16")],
    "inc_u32", "dec_u32", *[f"{op}_{t}" for op in ("and", "or", "xor") for t in ("b32", "b64")],
]  # fmt: skip
MEANING = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "inc": lambda old, most: np.where(old >= most, 0, old + 1), "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bulk_reductions(name):
    op, kind = name.split("_")[0], np.dtype(TYPES[name.split("_")[1]])
    n = 256 // kind.itemsize
    old, values = (RNG.integers(0 if kind.kind == "u" else -90, 90, n).astype(kind) for _ in range(2))
    if op in ("inc", "dec"):
        old, values = old % 5, values % 5
    want = MEANING[op](old, values).astype(kind)
    values.flags.writeable = False
    sim.run(sim.ptx("barriers"), f"reduce_{name}", [values, old, values.nbytes])
    np.testing.assert_array_equal(old, want)


def test_bulk_sums_keep_subnormal_numbers():
    """Unlike those of atom and red in global memory (test_sim_memory.py)."""
    old = np.float32([1e-40, 3e-39, 1.5e-38, -1.5e-38] * 4)
    values = np.float32([2e-40, 1.3e-38, -1e-39, 1.4e-38] * 4)
    want = (old.astype(np.float64) + values).astype(np.float32)
    values.flags.writeable = False
    sim.run(sim.ptx("barriers"), "reduce_add_f32", [values, old, values.nbytes])
    np.testing.assert_array_equal(old.view(np.uint32), want.view(np.uint32))


@pytest.mark.skipif(sim.ON_DEVICE, reason="undefined on a device")
@pytest.mark.parametrize("line, words", [
    ("mbarrier.arrive.noComplete.shared.b64 %rd1, [s], 2;", "completes the phase"), ("mbarrier.arrive.shared.b64 %rd1, [s]; mbarrier.pending_count.b64 %r1, %rd1;", "no arrival with .noComplete"),
])  # fmt: skip
def test_states_without_a_count(tmp_path, line, words):
    path = tmp_path / "m.ptx"
    path.write_text(f".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{{\n.reg .b32 %r<4>;\n.reg .b64 %rd<4>;\n.shared .align 8 .b8 s[8];\n"
                    f"mbarrier.init.shared.b64 [s], 2;\n{line}\nret;\n}}\n")  # fmt: skip
    with pytest.raises(sim.SimError, match=words):
        sim.run(path, "k", block=1)
