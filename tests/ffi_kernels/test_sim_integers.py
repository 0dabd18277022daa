"""Integer instructions in the PTX interpreter, one test each, against Python's integers."""

import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()


def signed(x, bits=32):
    return x - (x >> (bits - 1) << bits)


def s64(x):
    return signed(x, 64)


def s16(x):
    return signed(x, 16)


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a - b * quotient(a, b)


def clipped(x):
    return min(max(x, -(2**31)), 2**31 - 1)


def reversed_bits(x, bits):
    return int(f"{x:0{bits}b}"[::-1], 2)


def find(x, bits, is_signed, shift=False):
    """bfind: the place of the highest bit that is not the sign, or how far it is from the top; all ones if there is none."""
    if is_signed and x >> (bits - 1):
        x ^= 2**bits - 1
    return -1 if x == 0 else bits - x.bit_length() if shift else x.bit_length() - 1


def nth(mask, base, offset):
    if offset == 0:
        return base if mask >> base & 1 else -1
    places = [i for i in (range(base, 32) if offset > 0 else range(base, -1, -1)) if mask >> i & 1]
    return places[abs(offset) - 1] if abs(offset) <= len(places) else -1


def field(pos, length, bits):
    """Place and length of a bit field: of 32 bits their low bytes count, of 64 bits the whole numbers."""
    return (pos, min(length, 64)) if bits == 64 else (pos & 255, length & 255)


def extracted(x, pos, length, bits, is_signed):
    pos, length = field(pos, length, bits)
    if not length:
        return 0
    sign = is_signed and x >> min(pos + length - 1, bits - 1) & 1
    return sum(int(x >> (pos + i) & 1 if i < length and pos + i < bits else sign) << i for i in range(bits))


def inserted(a, x, pos, length, bits):
    pos, length = field(pos, length, bits)
    mask = ((1 << length) - 1 << pos) & (2**bits - 1) if pos < bits else 0
    return x & ~mask | a << pos & mask


def bit_mask(a, b, wrap):
    if wrap:
        a, b = a & 31, b & 31
    return 0 if a > 31 else (1 << min(b, 32)) - 1 << a


def extended(x, n, wrap, is_signed):
    n = n & 31 if wrap else min(n, 32)
    low = x & (1 << n) - 1
    return signed(low, n) if is_signed and n else low


def funnel(a, b, n, left, wrap):
    n, pair = n & 31 if wrap else min(n, 32), b << 32 | a
    return pair << n >> 32 if left else pair >> n


def permuted(a, b, control):
    def pick(k):
        byte = (b << 32 | a) >> 8 * (k & 7) & 255
        return byte >> 7 and 255 if k & 8 else byte

    return sum(pick(control >> 4 * i & 15) << 8 * i for i in range(4))


def permuted_by_mode(mode, a, b, c):
    table = {
        "f4e": (0x3210, 0x4321, 0x5432, 0x6543), "b4e": (0x5670, 0x6701, 0x7012, 0x0123), "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
        "ecl": (0x3210, 0x3211, 0x3222, 0x3333), "ecr": (0x0000, 0x1110, 0x2210, 0x3210), "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
    }  # fmt: skip
    return permuted(a, b, table[mode][c & 3])


def bytes_of(x, is_signed, width=8):
    parts = [x >> width * i & (1 << width) - 1 for i in range(32 // width)]
    return [signed(p, width) if is_signed else p for p in parts]


def dot(a, b, c, sa, sb):
    return c + sum(x * y for x, y in zip(bytes_of(a, sa), bytes_of(b, sb)))


def dot2(a, b, c, sa, sb, high):
    return c + sum(x * y for x, y in zip(bytes_of(a, sa, 16), bytes_of(b, sb)[2 * high : 2 * high + 2]))


def halves(f, a, b, is_signed):
    low, high = (f(x, y) & 0xFFFF for x, y in zip(bytes_of(a, is_signed, 16), bytes_of(b, is_signed, 16)))
    return high << 16 | low


def looked_up(table, a, b, c):
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def compared(a, b):
    return (a == b) + 2 * (a != b) + 4 * (a < b) + 8 * (a <= b) + 16 * (a > b) + 32 * (a >= b)


def carried(a, b, c):
    s = a + b
    t = b + c + (s >> 32)
    return (c + (t & 0xFFFFFFFF) + (t >> 32)) ^ s & 0xFFFFFFFF


def mad_carried(a, b, c):
    s = (a * b & 0xFFFFFFFF) + c
    t = (a * b >> 32) + c + (s >> 32)
    return (t & 0xFFFFFFFF) + (s & 0xFFFFFFFF) + (t >> 32)


def predicates(a, b, c):
    p, q = signed(a) < signed(b), signed(b) < signed(c)
    r = p != q
    return (3 if p or (not q and r) else 5) + (8 if r else 16)


def two_predicates(a, b, c):
    less, r = signed(a) < signed(b), signed(c) < 0
    return (1 if less != r else 2) | (4 if (not less) != r else 8)


ONES = 0x3F800000  # 1.0f
OPS_32 = {
    "add_u32": lambda a, b, c: a + b, "add_sat": lambda a, b, c: clipped(signed(a) + signed(b)), "sub_u32": lambda a, b, c: a - b,
    "sub_sat": lambda a, b, c: clipped(signed(a) - signed(b)), "mul_lo": lambda a, b, c: a * b, "mul_hi_u": lambda a, b, c: a * b >> 32,
    "mul_hi_s": lambda a, b, c: signed(a) * signed(b) >> 32, "mad_lo": lambda a, b, c: a * b + c, "mad_hi_u": lambda a, b, c: (a * b >> 32) + c,
    "mad_hi_s": lambda a, b, c: (signed(a) * signed(b) >> 32) + c, "mul24_lo_u": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul24_hi_u": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16, "mul24_hi_s": lambda a, b, c: (signed(a) >> 8) * (signed(b) >> 8) >> 16,
    "mad24_lo_s": lambda a, b, c: (signed(a) >> 8) * (signed(b) >> 8) + c, "mad24_hi_u": lambda a, b, c: ((a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16) + c,
    "div_s": lambda a, b, c: quotient(signed(a), signed(b)), "div_u": lambda a, b, c: a // b, "rem_s": lambda a, b, c: remainder(signed(a), signed(b)),
    "rem_u": lambda a, b, c: a % b, "sad_s": lambda a, b, c: c + abs(signed(a) - signed(b)), "sad_u": lambda a, b, c: c + abs(a - b),
    "min_s": lambda a, b, c: min(signed(a), signed(b)), "max_s": lambda a, b, c: max(signed(a), signed(b)), "min_u": lambda a, b, c: min(a, b),
    "max_u": lambda a, b, c: max(a, b), "min_relu": lambda a, b, c: max(0, min(signed(a), signed(b))), "max_relu": lambda a, b, c: max(0, signed(a), signed(b)),
    "abs_s": lambda a, b, c: abs(signed(a)), "neg_s": lambda a, b, c: -a, "and_b": lambda a, b, c: a & b, "or_b": lambda a, b, c: a | b,
    "xor_b": lambda a, b, c: a ^ b, "not_b": lambda a, b, c: ~a, "cnot": lambda a, b, c: a == 0, "popc": lambda a, b, c: a.bit_count(),
    "clz": lambda a, b, c: 32 - a.bit_length(), "brev": lambda a, b, c: reversed_bits(a, 32), "bfind_s": lambda a, b, c: find(a, 32, True),
    "bfind_u": lambda a, b, c: find(a, 32, False), "bfind_shift_s": lambda a, b, c: find(a, 32, True, True), "bfind_shift_u": lambda a, b, c: find(a, 32, False, True),
    "fns": lambda a, b, c: nth(a, b & 31, signed(c) >> 29), "bfe_s": lambda a, b, c: extracted(a, b, c, 32, True), "bfe_u": lambda a, b, c: extracted(a, b, c, 32, False),
    "bfi": lambda a, b, c: inserted(a, 0x12345678, b, c, 32), "bmsk_clamp": lambda a, b, c: bit_mask(b, c, False), "bmsk_wrap": lambda a, b, c: bit_mask(b, c, True),
    "szext_clamp_s": lambda a, b, c: extended(a, c, False, True), "szext_clamp_u": lambda a, b, c: extended(a, c, False, False),
    "szext_wrap_s": lambda a, b, c: extended(a, c, True, True), "szext_wrap_u": lambda a, b, c: extended(a, c, True, False),
    "shl": lambda a, b, c: a << c if c < 32 else 0, "shr_s": lambda a, b, c: signed(a) >> min(c, 31), "shr_u": lambda a, b, c: a >> c if c < 32 else 0,
    "shf_l_wrap": lambda a, b, c: funnel(a, b, c, True, True), "shf_l_clamp": lambda a, b, c: funnel(a, b, c, True, False),
    "shf_r_wrap": lambda a, b, c: funnel(a, b, c, False, True), "shf_r_clamp": lambda a, b, c: funnel(a, b, c, False, False),
    "lop3_96": lambda a, b, c: looked_up(0x96, a, b, c), "lop3_e8": lambda a, b, c: looked_up(0xE8, a, b, c), "lop3_2b": lambda a, b, c: looked_up(0x2B, a, b, c),
    "lop3_or": lambda a, b, c: 1 if a & b & c or a >> 31 else a & b & c, "prmt": permuted,
    **{f"prmt_{mode}": lambda a, b, c, mode=mode: permuted_by_mode(mode, a, b, c) for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")},
    **{f"dp4a_{x}{y}": lambda a, b, c, x=x, y=y: dot(a, b, c, x == "s", y == "s") for x in "su" for y in "su"},
    "dp2a_lo_ss": lambda a, b, c: dot2(a, b, c, True, True, 0), "dp2a_hi_ss": lambda a, b, c: dot2(a, b, c, True, True, 1),
    "dp2a_lo_uu": lambda a, b, c: dot2(a, b, c, False, False, 0), "dp2a_hi_us": lambda a, b, c: dot2(a, b, c, False, True, 1),
    "add_u16x2": lambda a, b, c: halves(lambda x, y: x + y, a, b, False), "min_u16x2": lambda a, b, c: halves(min, a, b, False),
    "max_s16x2": lambda a, b, c: halves(max, a, b, True), "min_relu_s16x2": lambda a, b, c: halves(lambda x, y: max(0, min(x, y)), a, b, True),
    "carry_in": lambda a, b, c: c + (a + b >> 32), "borrow": lambda a, b, c: c - (a < b), "carries": carried, "mad_carry": mad_carried,
    "slct_s": lambda a, b, c: a if signed(c) >= 0 else b, "slct_f": lambda a, b, c: a if c < 0x7F800001 or c == 0x80000000 else b,
    "set_lt": lambda a, b, c: -(signed(a) < signed(b)), "set_f": lambda a, b, c: ONES * (a > b), "set_and": lambda a, b, c: -(signed(a) >= signed(b) and c != 7),
    "setp_s32": lambda a, b, c: compared(signed(a), signed(b)), "setp_u32": lambda a, b, c: compared(a, b), "setp_two": two_predicates, "predicates": predicates,
}  # fmt: skip
OPS_64 = {
    "add_64": lambda a, b, c: a + b, "sub_64": lambda a, b, c: a - b, "mul_lo_64": lambda a, b, c: a * b, "mul_hi_u64": lambda a, b, c: a * b >> 64,
    "mul_hi_s64": lambda a, b, c: s64(a) * s64(b) >> 64, "mad_lo_64": lambda a, b, c: a * b + c, "mad_hi_s64": lambda a, b, c: (s64(a) * s64(b) >> 64) + c,
    "div_s64": lambda a, b, c: quotient(s64(a), s64(b)), "div_u64": lambda a, b, c: a // b, "rem_s64": lambda a, b, c: remainder(s64(a), s64(b)),
    "rem_u64": lambda a, b, c: a % b, "min_s64": lambda a, b, c: min(s64(a), s64(b)), "max_u64": lambda a, b, c: max(a, b), "abs_s64": lambda a, b, c: abs(s64(a)),
    "neg_s64": lambda a, b, c: -a, "and_64": lambda a, b, c: a & b, "or_64": lambda a, b, c: a | b, "xor_64": lambda a, b, c: a ^ b, "not_64": lambda a, b, c: ~a,
    "cnot_64": lambda a, b, c: a == 0, "brev_64": lambda a, b, c: reversed_bits(a, 64), "sad_s64": lambda a, b, c: c + abs(s64(a) - s64(b)),
    "carries_64": lambda a, b, c: c + (a + b & 2**64 - 1) + (a + b >> 64), "borrow_64": lambda a, b, c: c - (a - b & 2**64 - 1) - (a < b),
}  # fmt: skip
COUNTS_64 = {  # a and b of 64 bits, c and the result of 32
    "popc_64": lambda a, b, c: a.bit_count(), "clz_64": lambda a, b, c: 64 - a.bit_length(), "bfind_s64": lambda a, b, c: find(a, 64, True),
    "bfind_shift_u64": lambda a, b, c: find(a, 64, False, True), "setp_s64": lambda a, b, c: compared(s64(a), s64(b)),
}  # fmt: skip
SHIFTS_64 = {  # c of 32 bits
    "shl_64": lambda a, b, c: a << c if c < 64 else 0, "shr_s64": lambda a, b, c: s64(a) >> min(c, 63), "shr_u64": lambda a, b, c: a >> c if c < 64 else 0,
    "bfe_s64": lambda a, b, c: extracted(a, c, b & 255, 64, True), "bfe_u64": lambda a, b, c: extracted(a, b & 255, c, 64, False),
    "bfi_64": lambda a, b, c: inserted(a, b, b & 63, c, 64),
}  # fmt: skip
OPS_16 = {
    "add_16": lambda a, b, c: a + b, "sub_16": lambda a, b, c: a - b, "mul_lo_16": lambda a, b, c: a * b, "mul_hi_u16": lambda a, b, c: a * b >> 16,
    "mul_hi_s16": lambda a, b, c: s16(a) * s16(b) >> 16, "mad_lo_16": lambda a, b, c: a * b + c, "div_s16": lambda a, b, c: quotient(s16(a), s16(b)),
    "div_u16": lambda a, b, c: a // b, "rem_s16": lambda a, b, c: remainder(s16(a), s16(b)), "rem_u16": lambda a, b, c: a % b,
    "min_s16": lambda a, b, c: min(s16(a), s16(b)), "max_u16": lambda a, b, c: max(a, b), "abs_s16": lambda a, b, c: abs(s16(a)), "neg_s16": lambda a, b, c: -a,
    "xor_16": lambda a, b, c: a ^ b, "not_16": lambda a, b, c: ~a, "sad_u16": lambda a, b, c: c + abs(a - b), "shl_16": lambda a, b, c: a << c if c < 16 else 0,
    "shr_s16": lambda a, b, c: s16(a) >> min(c, 15),
}  # fmt: skip
WIDE_16 = {
    "mul_wide_u16": lambda a, b, c: a * b, "mul_wide_s16": lambda a, b, c: s16(a) * s16(b), "mad_wide_s16": lambda a, b, c: s16(a) * s16(b) + c,
    "setp_s16": lambda a, b, c: compared(s16(a), s16(b)),
}  # fmt: skip
WIDE_32 = {
    "mul_wide_u32": lambda a, b, c: a * b, "mul_wide_s32": lambda a, b, c: signed(a) * signed(b), "mad_wide_u32": lambda a, b, c: a * b + c,
    "mad_wide_s32": lambda a, b, c: signed(a) * signed(b) + c,
}  # fmt: skip
FORMS = {16: np.uint16, 32: np.uint32, 64: np.uint64}
CASES = [  # (kernel, meaning, bits of a and b, of c, of the result)
    (name, meaning, *bits)
    for table, bits in ((OPS_32, (32, 32, 32)), (OPS_64, (64, 64, 64)), (COUNTS_64, (64, 32, 32)), (SHIFTS_64, (64, 32, 64)),
                        (OPS_16, (16, 16, 16)), (WIDE_16, (16, 32, 32)), (WIDE_32, (32, 64, 64)))
    for name, meaning in table.items()
]  # fmt: skip


def numbers(bits, n):
    """Edges, small numbers and random ones."""
    top = 1 << bits
    edges = [0, 1, 2, 3, 7, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, top // 2 - 1, top // 2, top // 2 + 1, top - 2, top - 1]
    drawn = RNG.integers(0, top, n - len(edges), FORMS[bits])
    drawn[::3] >>= RNG.integers(0, bits, len(drawn[::3])).astype(FORMS[bits])
    return RNG.permutation(np.concatenate([np.array(edges, FORMS[bits]), drawn]))


def applied(name, a, b, c, bits):
    d = np.zeros(len(a), FORMS[bits])
    for x in (a, b, c):
        x.flags.writeable = False
    sim.run(sim.ptx("integers"), name, [a, b, c, d, len(a)], grid=2, block=128)
    return d


@pytest.mark.parametrize("name, meaning, bits, bits_c, bits_out", CASES, ids=[case[0] for case in CASES])
def test_instruction(name, meaning, bits, bits_c, bits_out):
    a, b, c = numbers(bits, 500), numbers(bits, 500), numbers(bits_c, 500)
    if name in ("slct_f",):
        c[(c & 0x7FFFFFFF) > 0x7F800000] = 5  # nan is not on either side
    if name[:3] in ("div", "rem"):
        b[b == 0] = 3  # see the test below
    want = [meaning(int(x), int(y), int(z)) & (1 << bits_out) - 1 for x, y, z in zip(a, b, c)]
    np.testing.assert_array_equal(applied(name, a, b, c, bits_out), np.array(want, FORMS[bits_out]))


@pytest.mark.parametrize("name, bits", [(f"{op}_{sign}{bits}", bits or 32) for op in ("div", "rem") for sign in "su" for bits in ("", 16, 64)])
def test_division_by_zero_gives_all_ones(name, bits):
    """The ISA leaves the result to the device."""
    a = np.array([0, 1, 5, (1 << bits) - 1, 1 << (bits - 1)], FORMS[bits])
    np.testing.assert_array_equal(applied(name, a, np.zeros_like(a), a, bits), np.full(5, (1 << bits) - 1, FORMS[bits]))
