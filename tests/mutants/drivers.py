"""Cases of mutants that are no op of ours: kernels of tests/ffi_kernels/sim_kernels, driven from numpy."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np
import sim_driver as sim


@dataclasses.dataclass(frozen=True)
class Driver:
    """run(ptx) launches the kernel and returns all outputs; source: the .cu file that ptx is made of, from the root."""

    source: str
    arch: str
    run: Callable[..., list[np.ndarray]]


def _gemm(ptx) -> list[np.ndarray]:
    """Ragged, more tiles than CTAs, an odd number of steps: what follows a tile meets stages in the other phase."""
    rng = np.random.default_rng(3)
    m, n, k, swizzle = 150, 50, 200, 128
    a, b = (np.asarray(rng.integers(-8, 9, (rows, k)) / 4.0, ml_dtypes.bfloat16) for rows in (m, n))
    maps = [sim.tensor_map(x, (swizzle // 2, rows), swizzle=swizzle) for x, rows in ((a, 64), (b, 32))]
    d = np.full((m, n), np.nan, np.float32)
    sim.run(ptx, "gemm_bf16", [*maps, d, m, n, k, 2, swizzle, 0], grid=2, block=160, shared_bytes=2 * 96 * 128 + 1024, memory=[a, b])
    return [d.view(np.uint8)]


DRIVERS = {"tensor gemm": Driver("tests/ffi_kernels/sim_kernels/tensor.cu", "sm_90a", _gemm)}
