"""How close a result must be: bit for bit (`assert_bits`), or within the bounds of its kind (`assert_close`).

A kind is named for what sets its error. Three bounds hold together: `abs` of the largest difference relative to the
largest wanted magnitude, `rel` of the 2-norm of the difference relative to the wanted 2-norm, and `cos`, one minus the
cosine. inf and nan must sit where they are wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Bounds(NamedTuple):
    abs: float
    rel: float
    cos: float
    why: str


BOUNDS = {
    # name: abs, rel, cos
    "exact": Bounds(0, 0, 0, "integers, choices and copies have no rounding"),
    "fp32": Bounds(2e-6, 1e-6, 1e-11, "a few fp32 operations per element, 2**-24 = 6e-8 each, and exp or rsqrt at 2 ulp"),
    "sum": Bounds(8e-6, 6e-6, 1e-11, "an fp32 sum of up to 2**15 exact products in any order; its error grows as the root"),
    "sinkhorn": Bounds(5e-6, 3e-6, 1e-11, "normalising again forgets rounding errors: those of the sum before it remain"),
    "sharp": Bounds(1e-4, 5e-5, 1e-8, "softmax of fp32 scores up to 10**3, each wrong by up to 10**3 * 2**-24 = 6e-5"),
    "bf16": Bounds(4e-3, 2.5e-3, 3e-6, "one rounding to bf16: half an ulp, at most 2**-8 = 3.9e-3 of the value"),
    "two bf16": Bounds(8e-3, 3.5e-3, 6e-6, "two roundings to bf16, as of attention's probabilities and result"),
    "requantized": Bounds(8e-3, 4e-3, 1e-5, "another order of an fp32 sum turns a rounding to bf16, and that one to FP4, in a few of 10**4 channels"),
}


def bits(x) -> np.ndarray:
    """The bit pattern of an array of 1-, 2- or 4-byte elements, as unsigned integers."""
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_bits(got, want) -> None:
    """Same shape and same bits, the sign of zero included; the message names the first difference."""
    got, want = bits(got), bits(want)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    wrong = np.argwhere(got != want)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(f"{len(wrong)} of {got.size} differ, first at {at}: {int(got[at]):#x}, wanted {int(want[at]):#x}")


def assert_close(got, want, kind: str) -> None:
    """got against want (float64) of the same shape, within BOUNDS[kind]; the message names the worst element."""
    limit = BOUNDS[kind]
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    for name, mask in (("nan", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = np.argwhere(mask(got) != mask(want))
        assert not len(wrong), f"{len(wrong)} elements disagree about being {name}, first at {tuple(wrong[0])}"
    finite = np.isfinite(want)
    difference = np.where(finite, np.abs(got - np.where(finite, want, 0)), 0)
    if not difference.any():
        return
    size, norm = np.abs(want[finite]).max(), np.linalg.norm(want[finite])
    worst = np.unravel_index(difference.argmax(), difference.shape)
    place = f"worst at {tuple(int(i) for i in worst)}: {got[worst]:.9g}, wanted {want[worst]:.9g}"
    assert size, f"{place}; everything should be zero"
    other = np.linalg.norm(got[finite])
    cosine = 0.0 if not other else float(got[finite] @ want[finite] / (norm * other))
    measured = Bounds(difference.max() / size, np.linalg.norm(difference[finite]) / norm, 1 - cosine, "")
    for name in ("abs", "rel", "cos"):
        value, bound = getattr(measured, name), getattr(limit, name)
        # two float64 norms cannot tell a cosine nearer to 1 than this
        assert value <= max(bound, 1e-15 if name == "cos" else 0), f"{kind} allows {name} {bound:g} ({limit.why}), got {value:.3g}; {place}"
