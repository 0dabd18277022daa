"""Defects injected into our own kernels: a sample of `tests/mutants`; `tests/sim_mutants.py` hunts all of them."""

import collections
import os

import pytest
import sim_cases
import sim_driver as sim
import sim_mutants
from mutants import ROOT, all_mutants
from mutants.drivers import DRIVERS

from ffi_kernels import library

# By file: few modules, since their undamaged kernels are compiled too; the first, the last and some between.
SAMPLE = {"sm100a/matmul.cu": 9, "include/tcgen05.cuh": 4, "sim_kernels/tensor.cu": 4, "cuda/router.cu": 3, "cuda/norm.cu": 2}
SCHEDULES = ["schedule=eager", "schedule=lazy", "schedule=random seed=1"]


def sample(mutants, count):
    return [mutants[i * len(mutants) // count] for i in range(count)]


def test_every_mutant_stands_in_its_file_and_has_its_cases():
    found = all_mutants()
    for mutant in found:
        assert mutant.apply(text := (ROOT / mutant.file).read_text()) != text
        assert set(mutant.cases) <= {*sim_cases.CASES, *DRIVERS}, mutant
    ours = collections.Counter(m.file for m in found if m.file.startswith("ffi_kernels/native/"))
    assert sum(ours.values()) >= 60 and sum(".cu" == os.path.splitext(f)[1] for f in ours) >= 4, ours
    assert len({(m.file, m.old, m.new) for m in found}) == len(found)


def test_a_sample_is_found(monkeypatch):
    """Undamaged kernels pass, and every mutant of the sample is found under one of three schedules."""
    for why in (sim.missing(), library.why_not("sim")):
        if why:
            pytest.skip(why)
    monkeypatch.setenv("DSV4_SIM", "")  # restored afterwards
    chosen = [m for end, count in SAMPLE.items() for m in sample([m for m in all_mutants() if m.file.endswith(end)], count)]
    results = sim_mutants.run(chosen, 1, SCHEDULES, report=print)
    assert not [r.mutant for r in results if not r.found]


def test_a_mutant_that_changes_nothing_survives(monkeypatch):
    """What the hunt calls found is the defect's doing."""
    if why := sim.missing():
        pytest.skip(why)
    monkeypatch.setenv("DSV4_SIM", "")
    same = sim_mutants.Mutant("nothing", DRIVERS["tensor gemm"].source, "init(&empty[i], 4);", "init(&empty[i], 2 + 2);", ("tensor gemm",))
    (result,) = sim_mutants.run([same], 1, SCHEDULES[:2], report=lambda line: None)
    assert not result.found and sim_mutants.kind_of(result) == "SURVIVES"
