"""A GEMM in the PTX interpreter: wgmma fed by tensor copies, warp-specialised, with barriers between."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()


@pytest.mark.skipif(sim.ON_DEVICE, reason="a fault would end the process on a device")
def test_a_copy_signals_its_own_cta():
    source = np.zeros((2, 8, 64), np.float32)
    maps = [sim.tensor_map(source, (16, 6, 2))] * 2
    with pytest.raises(sim.SimError, match="a tensor copy to CTA 0 signals an mbarrier of CTA 1; it must be of the same CTA, or with .cta_group::2 of its pair"):
        sim.run(sim.ptx("tensor"), "foreign", [*maps, np.zeros(64, np.uint8), 0, 0, 0, 768], grid=2, cluster=2, shared_bytes=16384, memory=[source])


KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn}


def gemm(kind, m, n, k, swizzle, grid, defect=0):
    """Quarter integers: every sum is exact."""
    dtype = np.dtype(KINDS[kind])
    pad = -(-k * dtype.itemsize // 16) * 16 // dtype.itemsize
    a, b = (RNG.integers(-8, 9, (rows, pad)) / 4.0 for rows in (m, n))
    a[:, k:] = b[:, k:] = 0
    a, b = a.astype(dtype), b.astype(dtype)
    box = swizzle // dtype.itemsize
    kinds = dict(type_="uint8") if kind == "e4m3" else {}
    maps = [sim.tensor_map(x, (box, rows), swizzle=swizzle, **kinds) for x, rows in ((a, 64), (b, 32))]
    d = np.full((m, n), np.nan, np.float32)
    sim.run(sim.ptx("tensor"), f"gemm_{kind}", [*maps, d, m, n, pad, dtype.itemsize, swizzle, defect], grid=grid, block=160, shared_bytes=2 * 96 * 128 + 1024, memory=[a, b])
    want = a.astype(np.float64) @ b.astype(np.float64).T
    return d, (-want if kind == "f16" else want).astype(np.float32)  # the f16 kernel negates B


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_gemm_of_every_type_and_swizzle(kind, swizzle):
    d, want = gemm(kind, 128, 64, 2 * 128 // np.dtype(KINDS[kind]).itemsize, swizzle, grid=2)
    np.testing.assert_array_equal(d, want)


@pytest.mark.parametrize("m, n, k", [(64, 32, 64), (70, 50, 200), (200, 130, 72), (1, 1, 8)])
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random seed=1", "random seed=2", "random seed=3"])
def test_ragged_sizes_and_more_tiles_than_ctas(m, n, k, schedule, monkeypatch):
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    d, want = gemm("bf16", m, n, k, 128, grid=3 if m > 64 else 1)
    np.testing.assert_array_equal(d, want)


@pytest.mark.parametrize("defect, words", [(1, "synchronisation|waited|expects only"), (2, None), (3, "synchronisation|waited"), (4, None), (5, "synchronisation|waited")])
@pytest.mark.skipif(sim.ON_DEVICE, reason="a fault would end the process on a device")
def test_defects_of_a_gemm(defect, words):
    """No wait for an empty stage; a wrong row; no wait for data; a wrong stride; products still running when a stage is freed."""
    if words is None:
        d, want = gemm("bf16", 128, 64, 512, 128, grid=1, defect=defect)
        assert not np.array_equal(d, want)
    else:
        with pytest.raises(sim.SimError, match=words):
            gemm("bf16", 128, 64, 512, 128, grid=1, defect=defect)
