"""Damaged PTX and absurd launches end in sentences: a part of the 10,000 mutants that `tests/sim_fuzz.py` runs."""

import numpy as np
import pytest
import sim_driver as sim
import sim_fuzz

from ffi_kernels import library

CASES = ["topk f32", "norm rms", "attention fp8 csa", "matmul pair"]


@pytest.fixture(scope="module")
def subjects():
    for why in (sim.missing(), library.why_not("sim")):
        if why:
            pytest.skip(why)
    return sim_fuzz.subjects(CASES)


def test_no_mutant_ends_the_process(subjects):
    result = sim_fuzz.run(0, 400, found=subjects)
    assert not result["wrong"] and result["ran"] + result["sentence"] == 400
    assert result["ran"] > 4 and result["sentence"] > 200  # both happen


def test_undamaged_kernels_run(subjects, tmp_path, monkeypatch):
    """The subjects are right before they are damaged: what ends in a sentence does so because of the damage."""
    monkeypatch.setenv("DSV4_SIM", "")
    for subject in subjects:
        (path := tmp_path / "kernel.ptx").write_text(subject.text)
        subject.launch.run(path)


def test_a_crash_is_seen_and_named(subjects, monkeypatch):
    """A process that ends is reported with the mutant's number, and the hunt goes on behind it."""
    broken = [sim_fuzz.Subject(subjects[0].text, None)]  # no launch: run_one raises something that is no sentence
    result = sim_fuzz.run(7, 2, found=broken, report=lambda line: None)
    assert [number for number, _ in result["wrong"]] == [7, 8]
    assert all("AttributeError" in said or "TypeError" in said for _, said in result["wrong"]), "as the damage to None happens to be"
    assert not np.any([result["ran"], result["sentence"]])
