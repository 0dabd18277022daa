"""Schedules and hazard checks of the PTX interpreter: correct kernels pass under all of them, each defect is found."""

import numpy as np
import pytest
import sim_driver as sim
from sim_record import Compare

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
defects = pytest.mark.skipif(sim.ON_DEVICE, reason="a device does not report defects")
SCHEDULES = ["schedule=eager", "schedule=lazy", *(f"schedule=random seed={seed}" for seed in range(1, 9))]
A = np.arange(1024, dtype=np.int32) * 7 % 1013


def shape(kernel):
    return {"reduce": dict(block=128), "exchange": dict(block=64), "halves": dict(block=64), "copies": dict(block=64), "warp_copies": dict(block=32), "handoff": dict(block=64),
            "stages": dict(block=64), "stores": dict(block=128), "peers": dict(grid=4, cluster=2), "habits": dict(block=64),
            "arrivals": dict(grid=2, cluster=2), "flag": dict(block=64), "handover": dict(grid=5)}[kernel]  # fmt: skip


def wanted(kernel):
    d = np.zeros(1024, np.int32)
    if kernel == "reduce":
        d[:128] = A[:256].sum()
    elif kernel == "exchange":
        d[:64] = np.roll(A[:64].reshape(2, 32), -3, 1).ravel()
    elif kernel == "halves":
        d[:192] = (A[:64] + np.arange(3)[:, None]).ravel()
    elif kernel == "copies":
        d[:512] = np.roll(A[:512].reshape(2, 2, 128)[::-1], 1, 1).ravel()
    elif kernel == "warp_copies":
        d[:384] = A[:384].reshape(3, 128)[:, np.arange(128) ^ 5].ravel()
    elif kernel == "handoff":
        d[:96] = A[:96].reshape(3, 32)[:, ::-1].ravel()
    elif kernel == "stages":
        d[:384] = A[:384].reshape(6, 64)[:, ::-1].ravel()
    elif kernel == "stores":
        d[:256] = A[:256] + 1
    elif kernel == "peers":
        d[:128] = A[:128].reshape(2, 2, 32)[:, ::-1, ::-1].ravel()
    elif kernel == "arrivals":
        d[:64] = A[:64]
    elif kernel == "flag":
        d[:32] = A[31::-1]
    else:
        d[2:322] = (A[:320].reshape(5, 64) + np.arange(5)[:, None]).ravel()
        d[:2] = 5, d[2:322].sum()
    return d


def launch(kernel, defect, arch="sm_90a", **how):
    a, d = A.copy(), np.zeros(1024, np.int32)
    a.flags.writeable = False
    sim.run(sim.ptx("hazards", arch), kernel, [a, d, defect], **shape(kernel), **how)
    return d


@pytest.mark.parametrize("kernel", ["reduce", "exchange", "halves", "copies", "warp_copies", "handoff", "stages", "stores", "peers", "arrivals", "flag", "handover"])
def test_correct_kernels_pass_under_every_schedule(kernel, monkeypatch):
    for schedule in [*SCHEDULES, *(f"schedule=random seed={seed}" for seed in range(100, 150))] if not sim.ON_DEVICE else SCHEDULES[:1]:
        monkeypatch.setenv("DSV4_SIM", schedule)
        np.testing.assert_array_equal(launch(kernel, 0), wanted(kernel), err_msg=schedule)


DEFECTS = [
    ("reduce", 1, "no synchronisation|no bar.warp.sync"), ("reduce", 2, "no synchronisation|no bar.warp.sync"), ("exchange", 1, "no bar.warp.sync"), ("exchange", 2, "no bar.warp.sync"), ("halves", 1, "no bar.warp.sync"),
    ("copies", 1, "has not been waited for"), ("copies", 2, "has not been waited for"), ("copies", 3, "waited for|no synchronisation|no bar.warp.sync"),
    ("warp_copies", 1, "no bar.warp.sync"), ("warp_copies", 2, "no bar.warp.sync"), ("handoff", 1, "no synchronisation"), ("handoff", 2, "no synchronisation"),
    ("handoff", 3, "no synchronisation"), ("handoff", 4, "no synchronisation"), ("stages", 8, "no synchronisation"), ("stages", 1, "fence.mbarrier_init"),
    ("stages", 2, "mbarrier.init|no mbarrier was initialised"), ("stages", 3, "hazard|expects only"), ("stages", 4, "has not been waited for|no synchronisation"),
    ("stages", 5, "no synchronisation"), ("stages", 6, "deadlock|hazard|expects|range"), ("stages", 7, "deadlock|hazard|expects"), ("stores", 1, "fence.proxy.async"),
    ("stores", 2, "no synchronisation|no bar.warp.sync|fence.proxy.async|waited for"), ("stores", 3, "has not been waited for|no synchronisation"), ("stores", 4, "exits without waiting"),
    ("peers", 1, "start of that CTA"), ("peers", 2, "no synchronisation|no bar.warp.sync"), ("peers", 3, "has exited|ends while"), ("arrivals", 1, "ends while|has exited"),
    ("arrivals", 2, "start of that CTA|mbarrier.init|no mbarrier was initialised"), ("flag", 1, "no synchronisation"), ("flag", 2, "no synchronisation"),
    ("handover", 1, "global memory: reads"), ("handover", 2, "global memory: writes"), ("handover", 3, "global memory: reads"),
]  # fmt: skip


@defects
@pytest.mark.parametrize("kernel, defect, words", DEFECTS, ids=[f"{k}-{n}" for k, n, _ in DEFECTS])
def test_each_defect_is_found_under_every_schedule(kernel, defect, words, monkeypatch):
    for schedule in SCHEDULES:
        monkeypatch.setenv("DSV4_SIM", schedule)
        with pytest.raises(sim.SimError, match=words) as caught:
            launch(kernel, defect)
        assert f"Kernel {kernel}" in str(caught.value)


@defects
def test_a_seed_repeats_a_run_exactly(monkeypatch):
    monkeypatch.setenv("DSV4_SIM", "schedule=random seed=11")
    sentences = set()
    for _ in range(3):
        with pytest.raises(sim.SimError) as caught:
            launch("reduce", 1)
        sentences.add(str(caught.value))
    assert len(sentences) == 1


@defects
def test_checks_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("DSV4_SIM", "checks=off")
    np.testing.assert_array_equal(launch("exchange", 1), wanted("exchange"))


HABITS = [(1, "no synchronisation|no bar.warp.sync"), (2, "have exited or do not exist"), (3, None), (4, "exits without waiting"), (5, "no bar.warp.sync"), (6, "no bar.warp.sync")]


@pytest.mark.parametrize("habit, words", HABITS)
def test_what_devices_do_beyond_the_isa(habit, words, monkeypatch):
    """An alarm by default, which a device does not give; with strict=off such kernels run, and give what they give on a device."""
    for schedule in SCHEDULES if not sim.ON_DEVICE else SCHEDULES[:1]:
        monkeypatch.setenv("DSV4_SIM", schedule)
        if words and not sim.ON_DEVICE:
            with pytest.raises(sim.SimError, match=words):
                launch("habits", habit)
        monkeypatch.setenv("DSV4_SIM", f"{schedule} strict=off")
        stored = np.where(np.arange(64) < 32, A[:64], 0)
        want = {1: np.roll(A[:64], 32), 2: np.where(np.arange(64) < 20, A[:64], 0), 3: np.zeros(64), 4: stored, 6: stored, 5: A[:64].reshape(-1, 2)[:, ::-1].ravel()}
        np.testing.assert_array_equal(launch("habits", habit)[:64], want[habit], err_msg=schedule)


@pytest.mark.skipif(sim.ON_DEVICE, reason="a device elects the same lane always")
def test_any_lane_may_be_elected(monkeypatch):
    chosen = set()
    for seed in range(1, 9):
        monkeypatch.setenv("DSV4_SIM", f"schedule=random seed={seed}")
        chosen.add(int(launch("habits", 3, compare=Compare(lambda arrays: []))[0]))
    assert len(chosen) > 4
