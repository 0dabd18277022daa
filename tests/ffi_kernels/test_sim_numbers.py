"""Floating-point arithmetic in the PTX interpreter, against exact fractions and numpy."""

from fractions import Fraction
from math import isqrt

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws
from sim_driver import assert_same
from sim_record import EXACT, Compare, any_nan
from sim_rounding import rounded

pytestmark = [pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-"), pytest.mark.filterwarnings("ignore")]
RNG = Draws()
BF16, F16, F32, F64 = ml_dtypes.bfloat16, np.float16, np.float32, np.float64


def arith(kernel, a, b=None, c=None, out=None, compare=EXACT):
    """d[i] = kernel(a[i], b[i], c[i])"""
    inputs = [np.array(a if x is None else x) for x in (a, b, c)]
    for x in inputs:
        x.flags.writeable = False
    d = np.zeros(len(a), out or inputs[0].dtype)
    sim.run(sim.ptx("floats"), kernel, [*inputs, d, len(a)], grid=2, block=128, compare=compare)
    return d


# --- f32 and f64 ----------------------------------------------------------------------------------------------------


def root(x: Fraction) -> Fraction:
    """The square root to 1200 places, and a hair more where it is not exact, so that it rounds as the true one."""
    scaled = x * 4**1200
    whole = isqrt(scaled.numerator // scaled.denominator)
    return Fraction(whole, 2**1200) if scaled == whole**2 else Fraction(2 * whole + 1, 2**1201)


ARITY = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "div": 2, "rcp": 1, "sqrt": 1}
TERMS = {  # the terms whose sum the result is: an exact zero gets its sign from them
    "add": lambda a, b: (a, b), "sub": lambda a, b: (a, -b), "mul": lambda a, b: (a * b,), "fma": lambda a, b, c: (a * b, c),
    "div": lambda a, b: (a / b,), "rcp": lambda a: (1 / a,), "sqrt": lambda a: (np.sqrt(a) if isinstance(a, float) else root(a),),
}  # fmt: skip


def reference(op, mode, kind, *operands):
    """op of numbers of `kind` as IEEE 754 defines it under a rounding mode; nan is nan."""
    operands = operands[: ARITY[op]]
    floats = [F64(x) for x in operands]
    if not np.isfinite(floats).all() or (op == "div" and operands[1] == 0) or (op == "rcp" and operands[0] == 0) or (op == "sqrt" and operands[0] < 0):
        signs = [x if not np.isfinite(x) or x == 0 else np.copysign(F64(1), x) for x in floats]  # finite ones must not overflow on the way
        return kind(sum(TERMS[op](*signs)[1:], TERMS[op](*signs)[0]))
    if (op in ("div", "mul") and 0 in operands[:2]) or (op == "sqrt" and operands[0] == 0):
        return kind(TERMS[op](*floats)[0])
    exact = sum(TERMS[op](*(Fraction(float(x)) for x in operands)))
    if exact:
        return kind(rounded(exact, kind, mode))
    signs = {bool(np.signbit(t)) for t in TERMS[op](*(np.copysign(F64(x != 0), x) for x in floats))}
    negative = signs == {True} or (len(signs) == 2 and mode == "rm")
    return kind(-0.0 if negative else 0.0)


def samples(kind, n):
    """Ordinary, close to one, subnormal, and special ones against each other."""
    low, bits, high = (-70, 23, 70) if kind is F32 else (-600, 52, 600)
    wide = np.ldexp(RNG.normal((3, n)), RNG.integers(low, high, (3, n))).astype(kind)
    near = (1 + RNG.integers(-8, 8, (3, n)) * kind(2.0**-bits)).astype(kind)
    tiny = RNG.integers(1, 2 ** (bits + 1), (3, n)).astype(np.uint32 if kind is F32 else np.uint64).view(kind)
    special = kind([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, np.finfo(kind).tiny / 2, -np.finfo(kind).tiny / 3, np.finfo(kind).max, np.finfo(kind).tiny])
    a, b = (x.ravel() for x in np.meshgrid(special, special))
    c = RNG.permutation(np.resize(special, len(a)))
    columns = [np.concatenate([wide, near, tiny, -near[:, : n // 2]], 1), np.stack([a, b, c])]
    a, b, c = np.ascontiguousarray(np.concatenate(columns, 1))
    cancels = -(a * b) if kind is F32 else -a
    c[::3] = np.where(np.isfinite(cancels), cancels, c)[::3]
    return a, RNG.permutation(b), c


MODES = ("rn", "rz", "rm", "rp")


@pytest.mark.parametrize("op", TERMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [F32, F64], ids=["f32", "f64"])
def test_rounding(op, mode, kind):
    a, b, c = samples(kind, 120)
    got = arith(f"{op}_{mode}{'_d' if kind is F64 else ''}", a, b, c, compare=EXACT if kind is F32 else any_nan())
    want = np.array([reference(op, mode, kind, x, y, z) for x, y, z in zip(a, b, c)], kind)
    assert_same(got, want, list(zip(a, b, c)))
    if kind is F32:
        assert (got.view(np.uint32)[np.isnan(want)] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("kernel", [
    "add_rn_ftz", "sub_rz_ftz", "mul_rn_ftz", "fma_rn_ftz", "div_rn_ftz", "rcp_rn_ftz", "sqrt_rn_ftz", "add_rn_sat", "sub_rm_sat", "mul_rz_sat", "fma_rp_sat", "fma_rn_ftz_sat",
])  # fmt: skip
def test_flushing_and_saturation(kernel):
    op, mode, *how = kernel.split("_")
    a, b, c = samples(F32, 100)
    flushed = lambda v: np.where(np.abs(v) < 2.0**-126, np.copysign(F32(0), v), v).astype(F32) if "ftz" in how else v
    want = flushed(np.array([reference(op, mode, F32, *x) for x in zip(flushed(a), flushed(b), flushed(c))], F32))
    if "sat" in how:
        want = np.where(want > 0, np.minimum(want, F32(1)), F32(0))
    assert_same(arith(kernel, a, b, c), want, list(zip(a, b, c)))


def extreme(a, b, greater, nan, flip):
    """min or max as the ISA spells it out, of arrays; -0 is below +0."""
    sign = np.signbit(a) ^ np.signbit(b)
    if flip:
        a, b = np.abs(a), np.abs(b)
    below = (a < b) | ((a == b) & np.signbit(a))
    chosen = np.where(below != greater, a, b)
    chosen = np.where(np.isnan(a), b, np.where(np.isnan(b), a, chosen))
    if nan:
        chosen = np.where(np.isnan(a) | np.isnan(b), np.nan, chosen)
    return np.where(sign & ~np.isnan(chosen), -chosen, chosen) if flip else chosen


@pytest.mark.parametrize("least", ["least", "most"])
@pytest.mark.parametrize("how", ["", "_nan", "_flip", "_nan_flip", "_ftz", "_d"])
def test_least_and_most(least, how):
    a, b, _ = samples(F64 if how == "_d" else F32, 60)
    x, y = (np.where(np.abs(v) < 2.0**-126, np.copysign(F32(0), v), v) if how == "_ftz" else v for v in (a, b))
    got = arith(least + how, a, b, compare=any_nan())
    assert_same(got, extreme(x, y, least == "most", "nan" in how, "flip" in how).astype(a.dtype))


@pytest.mark.parametrize("kernel, meaning", [
    ("abs_", np.abs), ("neg", np.negative), ("abs_ftz", np.abs), ("neg_ftz", np.negative), ("abs_d", np.abs), ("neg_d", np.negative),
])  # fmt: skip
def test_signs(kernel, meaning):
    a = samples(F64 if kernel.endswith("_d") else F32, 60)[0]
    x = np.where(np.abs(a) < 2.0**-126, np.copysign(F32(0), a), a) if "ftz" in kernel else a
    assert_same(arith(kernel, a, compare=any_nan()), meaning(x).astype(a.dtype))


@pytest.mark.parametrize("kernel, kind", [("copysign_", F32), ("copysign_d", F64)])
def test_copysign(kernel, kind):
    a, b, _ = samples(kind, 60)
    assert_same(arith(kernel, a, b, compare=any_nan()), np.copysign(b, a))


COMPARISONS = [
    lambda a, b: a == b, lambda a, b: (a < b) | (a > b), lambda a, b: a < b, lambda a, b: a <= b, lambda a, b: a > b, lambda a, b: a >= b,
    lambda a, b: ~((a < b) | (a > b)), lambda a, b: ~(a == b), lambda a, b: ~(a >= b), lambda a, b: ~(a > b), lambda a, b: ~(a <= b), lambda a, b: ~(a < b),
    lambda a, b: (a == a) & (b == b), lambda a, b: (a != a) | (b != b),
]  # fmt: skip


@pytest.mark.parametrize("kernel, kind", [("compare_f", F32), ("compare_ftz", F32), ("compare_d", F64), ("compare_h", F16), ("compare_b", BF16)])
def test_comparisons(kernel, kind):
    if kind in (F32, F64):
        a, b, _ = samples(kind, 60)
    else:
        a, b = (RNG.integers(0, 65536, 1000, np.uint16) for _ in range(2))
        b[::4] = a[::4]
        a[:8], b[:8] = [0, 0x8000, 0x7FFF, 0, 0xFFFF, 0x7C00, 0x7F80, 1], [0x8000, 0, 0x7FFF, 0x7FFF, 0, 0x7C00, 0x7F80, 0x8001]
    x, y = (v.view(kind).astype(F64) for v in (a, b))
    if kernel.endswith("ftz"):
        x, y = (np.where(np.abs(v) < 2.0**-126, 0 * v, v) for v in (x, y))
    want = sum(f(x, y).astype(np.uint32) << i for i, f in enumerate(COMPARISONS))
    np.testing.assert_array_equal(arith(kernel, a, b, out=np.uint32), want)


def test_set_and_combined_predicates():
    a, b, c = samples(F32, 60)
    np.testing.assert_array_equal(arith("set_f", a, b, out=np.uint32), np.where(~(a > b), 0x3F800000, 0))
    np.testing.assert_array_equal(arith("set_u", a, b, out=np.uint32), np.where(a > b, 0xFFFFFFFF, 0))
    less, r = ~(a >= b), c < 0
    np.testing.assert_array_equal(arith("setp_both", a, b, c, out=np.uint32), np.where(less & r, 1, 2) + 4 * (~less & r))


@pytest.mark.parametrize("kernel, kind", [("classes_f", F32), ("classes_d", F64)])
def test_classes_of_numbers(kernel, kind):
    a = samples(kind, 60)[0]
    size, finite = np.abs(a), np.isfinite(a)
    normal = finite & ((size >= np.finfo(kind).tiny) | (a == 0))  # zero is normal, says the ISA
    bits = (finite, np.isinf(a), ~np.isnan(a), np.isnan(a), normal, finite & ~normal)
    np.testing.assert_array_equal(arith(kernel, a, out=np.uint32), sum(b.astype(np.uint32) << i for i, b in enumerate(bits)))


# --- halves ---------------------------------------------------------------------------------------------------------


def half_words(n):
    """Pairs of 16-bit patterns: random ones, and special ones of both formats."""
    special = np.array([0, 0x8000, 0x3C00, 0xBC00, 0x3F80, 0xBF80, 0x7C00, 0xFC00, 0x7F80, 0xFF80, 0x7FFF, 0xFE01, 1, 0x8001, 0x3FF, 0x7BFF, 0x7F7F, 0x80], np.uint16)
    return [RNG.permutation(np.concatenate([RNG.integers(0, 65536, 2 * n - len(special), np.uint16), special])).view(np.uint32) for _ in range(3)]


def half_reference(op, kind, a, b, c, how):
    flush = lambda v: v if "ftz" not in how or abs(v) >= 2.0**-14 or v != v else np.copysign(0.0, v)
    out = np.zeros(len(a))
    for i, operands in enumerate(zip(a, b, c)):
        x = [flush(float(v)) for v in operands[: ARITY[op]]]
        terms = TERMS[op](*x)
        if np.isfinite(x).all():
            exact = sum(TERMS[op](*(Fraction(v) for v in x)))
            value = flush(rounded(exact, kind)) if exact else float(sum(terms[1:], terms[0])) * 0.0
        else:
            value = sum(terms[1:], terms[0])
        if "sat" in how:
            value = min(max(value, 0.0), 1.0) + 0.0 if value == value else 0.0
        if "relu" in how and value <= 0:
            value = 0.0
        out[i] = value
    return out


HALVES = [(f"{op}_{form}", kind) for op in ("add", "sub", "mul", "fma") for form, kind in (("h2", F16), ("b2", BF16), ("h", F16), ("b", BF16), ("h2_ftz", F16), ("h2_sat", F16))]


@pytest.mark.parametrize("kernel, kind", [*HALVES, ("fma_h2_relu", F16), ("fma_b2_relu", BF16)])
def test_halves(kernel, kind):
    a, b, c = half_words(600)
    if "2" not in kernel:
        a, b, c = (v.view(np.uint16) for v in (a, b, c))
    got = arith(kernel, a, b, c, compare=any_nan(kind)).view(kind)
    want = half_reference(kernel.split("_")[0], kind, *(v.view(kind).astype(F64) for v in (a, b, c)), kernel.split("_")[1:])
    assert_same(got, want.astype(F32).astype(kind), list(zip(*(v.view(kind) for v in (a, b, c)))))


@pytest.mark.parametrize("least", ["least", "most"])
@pytest.mark.parametrize("how", ["h2", "h2_nan", "h2_flip", "h2_ftz", "b2", "b2_nan", "b2_flip"])
def test_least_and_most_of_halves(least, how):
    kind = F16 if how[0] == "h" else BF16
    a, b, _ = half_words(500)
    x, y = (v.view(kind).astype(F32) for v in (a, b))
    if "ftz" in how:
        x, y = (np.where(np.abs(v) < 2.0**-14, np.copysign(F32(0), v), v) for v in (x, y))
    got = arith(f"{least}_{how}", a, b, compare=any_nan(kind)).view(kind)
    assert_same(got, extreme(x, y, least == "most", "nan" in how, "flip" in how).astype(F32).astype(kind))


@pytest.mark.parametrize("kernel, kind", [("abs_h2", F16), ("neg_h2", F16), ("abs_b2", BF16), ("neg_b2", BF16), ("neg_h2_ftz", F16)])
def test_signs_of_halves(kernel, kind):
    a = half_words(500)[0]
    x = a.view(kind).astype(F32)
    if "ftz" in kernel:
        x = np.where(np.abs(x) < 2.0**-14, np.copysign(F32(0), x), x)
    want = (np.abs(x) if kernel.startswith("abs") else -x).astype(kind)
    assert_same(arith(kernel, a, compare=any_nan(kind)).view(kind), want)


def test_comparisons_of_pairs():
    a, b, _ = half_words(500)
    b[::3] = a[::3]
    x, y = (v.view(F16).astype(F32) for v in (a, b))
    less = ~(x >= y)
    np.testing.assert_array_equal(arith("compare_h2", a, b), less[0::2] + 2 * less[1::2])
    np.testing.assert_array_equal(arith("set_h2", a, b).view(np.uint16), np.where(x >= y, 0x3C00, 0))
    x, y = (v.view(BF16).astype(F32) for v in (a, b))
    np.testing.assert_array_equal(arith("set_b2", a, b).view(np.uint16), np.where(~(x == y), 0x3F80, 0))


@pytest.mark.parametrize("kernel, kind", [
    ("neg", F32), ("abs_", F32), ("neg_d", F64), ("copysign_", F32), ("neg_h2", F16), ("neg_b2", BF16), ("abs_h2", F16), ("abs_b2", BF16), ("least_h2", F16),
])  # fmt: skip
def test_bits_of_nan_are_the_devices(kernel, kind):
    """The ISA leaves the bits of these nans open."""
    heads = {F32: [0x7FFF, 0xFFFF, 0x7FC1, 0x7F81], F64: [0x7FFF, 0xFFFF, 0x7FF9, 0x7FF1], F16: [0x7FFF, 0xFFFF, 0x7E01, 0x7C01], BF16: [0x7FFF, 0xFFFF, 0x7FC1, 0x7F81]}
    bits = np.array(heads[kind], np.uint64) << np.uint64(8 * np.dtype(kind).itemsize - 16)
    a = bits.astype({F32: np.uint32, F64: np.uint64}.get(kind, np.uint16))
    want = a if kernel == "copysign_" else a | 1 << 51 if kernel == "neg_d" else np.full_like(a, np.iinfo(a.dtype).max >> 1)
    np.testing.assert_array_equal(arith(kernel, a.view(kind if kind in (F32, F64) else np.uint32)).view(a.dtype), want)


# --- approximations -------------------------------------------------------------------------------------------------

APPROXIMATIONS = {  # kernel: (meaning, relative and absolute error of a device; the interpreter rounds the true value once)
    "ex2": (lambda x, p: np.exp2(x), 2e-7, 1e-30), "lg2": (lambda x, p: np.log2(p), 1e-6, 3e-7), "rsqrt_": (lambda x, p: p**-0.5, 3e-7, 0), "sine": (lambda x, p: np.sin(x), 0, 2e-6),
    "cosine": (lambda x, p: np.cos(x), 0, 2e-6), "tanh_": (lambda x, p: np.tanh(x), 1e-3, 1e-6), "rcp_approx": (lambda x, p: 1 / p, 2e-7, 0), "sqrt_approx": (lambda x, p: np.sqrt(p), 3e-7, 0),
    "div_approx": (lambda x, p: x / p, 3e-7, 1e-30), "div_full": (lambda x, p: x / p, 3e-7, 1e-30),
}  # fmt: skip


@pytest.mark.parametrize("op", APPROXIMATIONS)
def test_approximations_are_close(op):
    x = np.clip(RNG.normal(100) * 2, -3, 3).astype(F32)
    p = np.abs(x) + F32(1e-3)
    meaning, rtol, atol = APPROXIMATIONS[op]
    got = arith(op, x if op in ("ex2", "sine", "cosine", "tanh_", "div_approx", "div_full") else p, p, compare=Compare(rtol=max(rtol, 1e-12), atol=atol))
    np.testing.assert_allclose(got, meaning(x.astype(F64), p.astype(F64)), **(dict(rtol=rtol, atol=atol) if sim.ON_DEVICE else dict(rtol=1.2e-7, atol=1e-30)))


@pytest.mark.parametrize("kernel, kind, meaning, error", [("ex2_h2", F16, np.exp2, 2**-9.9), ("ex2_b2", BF16, np.exp2, 2**-7), ("tanh_h2", F16, np.tanh, 2**-10.9), ("tanh_b2", BF16, np.tanh, 2**-8)])
def test_approximations_of_halves_are_close(kernel, kind, meaning, error):
    """Errors as the ISA promises them: relative for ex2, absolute for tanh."""
    x = np.clip(RNG.normal(200) * 2, -3, 3).astype(kind)
    values = lambda arrays: [a.view(kind).astype(F32) for a in arrays]
    got = arith(kernel, x.view(np.uint32), compare=Compare(values, rtol=2 * error if "ex2" in kernel else 1e-12, atol=0 if "ex2" in kernel else 2 * error)).view(kind).astype(F64)
    want = meaning(x.astype(F64))
    assert (np.abs(got - want) <= (error * want if "ex2" in kernel else error) * 1.01 + np.abs(want) * (2.0**-12 if kind is F16 else 2.0**-9)).all()
