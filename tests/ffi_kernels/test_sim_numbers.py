"""Arithmetic in the PTX interpreter, against exact fractions, integers and numpy."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_driver import assert_same

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = np.random.default_rng(0)
BF16 = ml_dtypes.bfloat16


def arith(kernel, a, b, c, grid=2):
    d = np.zeros_like(a)
    sim.run(sim.ptx("arith"), kernel, [a, b, c, d, len(a)], grid=grid, block=128)
    return d


def round_to(value: Fraction, kind, mode, zero):
    """The number of `kind` that `value` rounds to; `zero` is what an exact zero gives."""
    if value == 0:
        return zero
    near = kind(0)
    with np.errstate(over="ignore", under="ignore"):
        guess = kind(float(value)) if abs(value) < Fraction(2) ** 1000 else kind(np.inf if value > 0 else -np.inf)
    candidates = [np.nextafter(guess, kind(-np.inf)), guess, np.nextafter(guess, kind(np.inf))]
    finite = [v for v in candidates if np.isfinite(v)]
    below, above = [v for v in finite if Fraction(float(v)) <= value], [v for v in finite if Fraction(float(v)) >= value]
    low = max(below) if below else kind(-np.inf)
    high = min(above) if above else kind(np.inf)
    if low == high:
        return low
    toward_zero = low if value > 0 else high
    if mode == "rz":
        near = toward_zero
    elif mode in ("rm", "rp"):
        near = low if mode == "rm" else high
    else:
        step = Fraction(float(np.finfo(kind).max)) - Fraction(float(np.nextafter(np.finfo(kind).max, kind(0))))
        place = lambda v: Fraction(float(v)) if np.isfinite(v) else Fraction(float(np.sign(v) * np.finfo(kind).max)) + int(np.sign(v)) * step
        to_low, to_high = value - place(low), place(high) - value
        even = low if int(low.view(np.uint32 if kind is np.float32 else np.uint64)) % 2 == 0 else high
        near = low if to_low < to_high else high if to_high < to_low else even
    return kind(-0.0) if near == 0 and value < 0 else near


def floats(n):
    wide = (RNG.normal(size=n) * np.exp2(RNG.integers(-70, 70, n))).astype(np.float32)
    near = (1 + RNG.integers(-8, 8, n) * np.float32(2.0**-23)).astype(np.float32)
    tiny = RNG.integers(1, 2**24, n).astype(np.uint32).view(np.float32)
    return np.concatenate([wide, near, tiny, -near[: n // 2]])


FLOAT_OPS = {
    "add_rn": lambda a, b, c: a + b, "add_rz": lambda a, b, c: a + b, "add_rm": lambda a, b, c: a + b, "add_rp": lambda a, b, c: a + b,
    "sub_rn": lambda a, b, c: a - b, "mul_rn": lambda a, b, c: a * b, "mul_rz": lambda a, b, c: a * b, "mul_rp": lambda a, b, c: a * b,
    "fma_rn": lambda a, b, c: a * b + c, "fma_rz": lambda a, b, c: a * b + c, "fma_rm": lambda a, b, c: a * b + c,
    "div_rn": lambda a, b, c: a / b, "div_rz": lambda a, b, c: a / b, "rcp_rn": lambda a, b, c: 1 / a,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("op", FLOAT_OPS)
def test_exact_rounding(op):
    a, b, c = floats(300), RNG.permutation(floats(300)), RNG.permutation(floats(300))
    if op.startswith("fma"):  # cancellation: c close to -a b
        c[::3] = -(a * b)[::3]
        c = np.where(np.isfinite(c), c, np.float32(1))
    got = arith(op, a, b, c)
    for i in range(len(a)):
        exact = FLOAT_OPS[op](*(Fraction(float(v)) for v in (a[i], b[i], c[i])))
        mode = op.split("_")[1]
        want = round_to(exact, np.float32, mode, np.float32(-0.0) if mode == "rm" else np.float32(0))
        assert got[i] == want, f"{op}({a[i]!r}, {b[i]!r}, {c[i]!r}) = {got[i]!r}, wanted {want!r}"


@pytest.mark.filterwarnings("ignore")
def test_float_specials():
    special = np.float32([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38])
    a, b = (np.ascontiguousarray(v.ravel()) for v in np.meshgrid(special, special))
    c = np.full_like(a, 1e-41)
    for op, f in (("add_rn", a + b), ("mul_rn", a * b), ("div_rn", a / b), ("sub_rn", a - b)):
        got = arith(op, a, b, c)
        np.testing.assert_array_equal(got.view(np.uint32)[~np.isnan(f)], f.view(np.uint32)[~np.isnan(f)])
        assert (got.view(np.uint32)[np.isnan(f)] == 0x7FFFFFFF).all()
    np.testing.assert_array_equal(arith("min_f", a, b, c), np.fmin(a, b))
    np.testing.assert_array_equal(arith("max_nan", a, b, c), np.maximum(a, b))
    flushed = lambda v: np.where(np.abs(v) < 2.0**-126, np.copysign(np.float32(0), v), v)
    assert_same(arith("add_ftz", a, b, c), flushed(flushed(a) + flushed(b)).astype(np.float32))
    assert_same(arith("add_sat", a, b, c), np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1) + 0.0).astype(np.float32))
    x = np.abs(floats(200))
    np.testing.assert_array_equal(arith("sqrt_rn", x, x, x), np.sqrt(x))


def test_approximations_are_close():
    x = (RNG.normal(size=1000) * 8).astype(np.float32)
    p = np.abs(x) + np.float32(1e-3)
    for op, values, want in (("ex2", x, np.exp2(x.astype(np.float64))), ("lg2", p, np.log2(p.astype(np.float64))), ("rsqrt_", p, p.astype(np.float64) ** -0.5),
                             ("sine", x, np.sin(x.astype(np.float64))), ("cosine", x, np.cos(x.astype(np.float64))), ("tanh_", x, np.tanh(x.astype(np.float64)))):
        np.testing.assert_allclose(arith(op, values, values, values), want, **(dict(rtol=2e-5, atol=3e-6) if sim.ON_DEVICE else dict(rtol=1.2e-7, atol=1e-30)))


def test_doubles():
    a, b, c = (RNG.normal(size=256) * np.exp2(RNG.integers(-40, 40, 256)) for _ in range(3))
    c[::2] = -(a * b)[::2]
    got = arith("dfma", a, b, c), arith("dadd_rz", a, b, c), arith("ddiv", a, b, c)
    for i in range(len(a)):
        x, y, z = (Fraction(float(v)) for v in (a[i], b[i], c[i]))
        assert got[0][i] == round_to(x * y + z, np.float64, "rn", np.float64(0))
        assert got[1][i] == round_to(x + y, np.float64, "rz", np.float64(0))
        assert got[2][i] == round_to(x / y, np.float64, "rn", np.float64(0))


HALF_OPS = {"add": lambda a, b, c: a + b, "mul": lambda a, b, c: a * b, "fma": lambda a, b, c: a * b + c}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix, kind", [("h", np.float16), ("b", BF16)])
def test_halves(prefix, kind):
    a, b, c = (RNG.integers(0, 2**32, 4000, dtype=np.uint32) for _ in range(3))
    x, y, z = (v.view(kind).astype(np.float64) for v in (a, b, c))
    for name, f in HALF_OPS.items():
        got = arith(f"{prefix}{name}2", a, b, c).view(kind)
        for i in range(0, len(x)):
            if not np.isfinite([x[i], y[i], z[i]]).all():
                continue
            exact = f(Fraction(x[i]), Fraction(y[i]), Fraction(z[i]))
            wide = np.float64(float(exact)) if abs(exact) < 2**200 else np.inf if exact > 0 else -np.inf
            if np.isfinite(wide) and Fraction(wide) != exact:  # round to odd, so that the second rounding is the only one
                wide = round_to(exact, np.float64, "rz", np.float64(0))
                wide = (wide.view(np.uint64) | np.uint64(1)).view(np.float64)
            want = narrow(wide, kind)
            assert float(got[i]) == want, f"{prefix}{name}({x[i]}, {y[i]}, {z[i]}) = {got[i]}, wanted {want}"
    numbers = ~np.isnan(a.view(BF16).astype(np.float32)).reshape(-1, 2).any(1)  # the sign of a nan is nobody's
    np.testing.assert_array_equal(arith("bneg2", a, b, c)[numbers], (a ^ 0x80008000)[numbers])
    relu = arith("bfma2_relu", a, b, c).view(BF16).astype(np.float32)
    assert not (relu < 0).any()


def narrow(value, kind):
    """float64 -> kind by exact comparison (ml_dtypes goes through float32, which rounds twice)."""
    bits, top = (10, 15) if kind is np.float16 else (7, 127)
    if not np.isfinite(value):
        return value
    e = max(np.frexp(value)[1] - 1, 1 - top)
    unit = Fraction(2) ** int(e - bits)
    scaled = Fraction(float(value)) / unit
    rounded = round(scaled) * unit
    return np.copysign(np.inf, value) if abs(rounded) >= Fraction(2) ** (top + 1) else float(rounded)


def s32(v):
    return np.asarray(v).astype(np.int64) - ((np.asarray(v).astype(np.int64) >> 31) << 32)


def test_integer_arithmetic():
    edge = np.uint32([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80000001])
    a, b = (np.concatenate([v.ravel(), RNG.integers(0, 2**32, 2000, dtype=np.uint32)]) for v in np.meshgrid(edge, edge))
    c = np.concatenate([RNG.integers(0, 70, len(a) - 500), RNG.integers(0, 2**32, 500)]).astype(np.uint32)
    A, B, C = (v.astype(np.uint64) for v in (a, b, c))
    sa, sb, sc = s32(a), s32(b), s32(c)
    low = lambda v: (np.array(v, object) & 0xFFFFFFFF).astype(np.uint32)
    check = lambda op, want: np.testing.assert_array_equal(arith(op, a, b, c), want, err_msg=op)
    check("mul_hi_u", (A * B >> np.uint64(32)).astype(np.uint32))
    check("mul_hi_s", low(sa * sb >> 32))
    check("mad_lo", low((A * B + C) & np.uint64(0xFFFFFFFF)))
    b = np.where(b == 0, np.uint32(3), b)  # the ISA leaves division by zero open
    B, sb = b.astype(np.uint64), s32(b)
    quotient = [((abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)) & 0xFFFFFFFF for x, y in zip(sa.tolist(), sb.tolist())]
    check("div_s", np.array(quotient, np.uint32))
    check("rem_u", np.array([x % y for x, y in zip(A.tolist(), B.tolist())], np.uint32))
    check("sat_add", low(np.clip(sa + sb, -(2**31), 2**31 - 1)))
    check("sad", low(sc + abs(sa - sb)))
    check("popc", np.array([int(x).bit_count() for x in a], np.uint32))
    check("clz", np.array([32 - int(x).bit_length() for x in a], np.uint32))
    check("brev", np.array([int(f"{int(x):032b}"[::-1], 2) for x in a], np.uint32))
    check("bfind_s", np.array([(int(x if x >= 0 else ~x).bit_length() - 1) & 0xFFFFFFFF for x in sa.tolist()], np.uint32))
    check("min_s", low(np.minimum(sa, sb)))
    check("abs_s", low(abs(sa)))
    check("carry", low(C + (A + B >> np.uint64(32))))
    check("slct", np.where(sc >= 0, a, b))
    check("lop3", a ^ b ^ c)
    check("shl", low([0 if n > 31 else x << n for x, n in zip(A.tolist(), C.tolist())]))
    check("shr_s", low([x >> min(n, 31) for x, n in zip(sa.tolist(), C.tolist())]))
    check("shf_l", low([((y << 32 | x) << (n & 31)) >> 32 for x, y, n in zip(A.tolist(), B.tolist(), C.tolist())]))
    check("shf_r", low([(y << 32 | x) >> min(n, 32) for x, y, n in zip(A.tolist(), B.tolist(), C.tolist())]))
    check("vadd", low([((x + y) & 0xFFFF) | (((x >> 16) + (y >> 16)) & 0xFFFF) << 16 for x, y in zip(A.tolist(), B.tolist())]))

    def field(x, pos, length, signed):
        pos, length = pos & 255, length & 255
        if not length:
            return 0
        sign = signed and x >> min(pos + length - 1, 31) & 1
        bits = [(x >> (pos + i) & 1 if pos + i < 32 else sign) if i < length else sign for i in range(32)]
        return sum(int(bit) << i for i, bit in enumerate(bits))

    B70 = b % 70
    for signed, op in ((True, "bfe_s"), (False, "bfe_u")):
        got = arith(op, a, B70, c)
        np.testing.assert_array_equal(got, [field(x, p, n, signed) for x, p, n in zip(a.tolist(), B70.tolist(), c.tolist())])

    def permute(x, y, control):
        out = 0
        for i in range(4):
            k = control >> 4 * i & 15
            byte = (y << 32 | x) >> 8 * (k & 7) & 255
            out |= (255 * (byte >> 7) if k & 8 else byte) << 8 * i
        return out

    check("prmt", np.array([permute(x, y, z) for x, y, z in zip(A.tolist(), B.tolist(), C.tolist())], np.uint32))
    signed8, unsigned8 = a.view(np.int8).reshape(-1, 4).astype(np.int64), b.view(np.uint8).reshape(-1, 4).astype(np.int64)
    check("dp4a", low(sc + (signed8 * unsigned8).sum(1)))
    halves, bytes_ = a.view(np.int16).reshape(-1, 2).astype(np.int64), b.view(np.int8).reshape(-1, 4)[:, 2:].astype(np.int64)
    check("dp2a", low(sc + (halves * bytes_).sum(1)))


def test_wide_integers():
    a, b, c = (RNG.integers(0, 2**64, 500, dtype=np.uint64) for _ in range(3))
    a[:4], b[:4] = [2**63, 2**63, 5, 2**64 - 1], [2**64 - 1, 1, 7, 2**64 - 1]
    signed = lambda v: [int(x) - (int(x) >> 63 << 64) for x in v]
    mask = 2**64 - 1
    np.testing.assert_array_equal(arith("wide_mul_hi", a, b, c), np.array([int(x) * int(y) >> 64 for x, y in zip(a, b)], np.uint64))
    np.testing.assert_array_equal(arith("mad_l", a, b, c), np.array([(int(x) * int(y) + int(z)) & mask for x, y, z in zip(a, b, c)], np.uint64))
    want = [(abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)) & mask for x, y in zip(signed(a), signed(b))]
    np.testing.assert_array_equal(arith("div_l", a, b, c), np.array(want, np.uint64))
    np.testing.assert_array_equal(arith("brev_l", a, b, c), np.array([int(f"{int(x):064b}"[::-1], 2) for x in a], np.uint64))


def test_find_nth_set_bit_and_two_predicates():
    a = RNG.integers(0, 2**32, 300, dtype=np.uint32)
    places = [[i for i in range(7, 32) if int(x) >> i & 1] for x in a]
    want = [p[2] if len(p) > 2 else 0xFFFFFFFF for p in places]
    np.testing.assert_array_equal(arith("fns", a, a, a), np.array(want, np.uint32))
    x, y = (np.float32([1, 2, np.nan, 3]).view(np.uint32), np.float32([2, 1, 1, 3]).view(np.uint32))
    np.testing.assert_array_equal(arith("setp_num", x, y, x, grid=1), [1, 6, 1, 6])
