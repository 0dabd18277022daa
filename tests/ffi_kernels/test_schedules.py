"""Correct kernels under random schedules raise no alarm and give the same bits: a part of what `tests/sim_schedules.py` runs."""

import pytest
import sim_driver as sim
import sim_schedules

from ffi_kernels import library

CASES = ["linear nvfp4", "hyper_connections 1 1", "topk cluster", "compressor 128 plain", "attention fp8 tiles", "matmul one", "matmul pair"]


@pytest.mark.parametrize("name", CASES)
def test_random_schedules(name, monkeypatch):
    for why in (sim.missing(), library.why_not("sim")):
        if why:
            pytest.skip(why)
    monkeypatch.setenv("DSV4_SIM", "")  # restored afterwards
    found = sim_schedules.run(range(1, 13), 12, [name])
    assert found["counts"][name] == 14 and not found["wrong"]
