"""Correct rounding of exact numbers into any floating-point format, for the tests of arithmetic and conversions."""

import math
from fractions import Fraction

import ml_dtypes


def rounded(value, kind, mode: str = "rn") -> float:
    """`value` (a number without nan or infinity) in the format `kind`: rn to nearest even, rz to zero, rm down, rp up, rna to
    nearest away from zero. Beyond the largest number lies infinity, or that number where the mode points back to it."""
    exact = Fraction(value)
    if not exact:
        return math.copysign(0.0, float(value))
    info = ml_dtypes.finfo(kind)
    size = abs(exact)
    e = size.numerator.bit_length() - size.denominator.bit_length()
    e -= Fraction(2) ** e > size
    unit = Fraction(2) ** (max(e, int(info.minexp)) - int(info.nmant))
    steps = exact / unit
    if mode == "rna":
        whole = math.floor(abs(steps) + Fraction(1, 2)) * (1 if exact > 0 else -1)
    else:
        whole = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](steps)
    result, most = whole * unit, Fraction(float(info.max))
    if abs(result) > most:
        inward = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        return math.copysign(float(most) if inward else math.inf, float(exact > 0) - 0.5)
    return math.copysign(float(abs(result)), float(exact > 0) - 0.5)
