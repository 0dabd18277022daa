"""Exact rounding to the number formats of DeepSeek-V4 (facts section 3), in plain jnp.

Everything is arithmetic on powers of two or on bits, so each backend of XLA gives the same result as the
conversion instructions of the hardware (round to nearest, ties to even, saturating). XLA itself flushes
subnormal floats on CPU, approximates division on GPU and turns division by a constant into a multiplication;
the helpers here do not. Not here: blocks and scales (`reference.py`), containers (`tensor.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

E4M3_MAX = 448.0
E2M1_MAX = 6.0


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent as fp32, exactly; int32 exponent in [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def round_to(x: jax.Array, dtype) -> jax.Array:
    """x rounded once to bf16 (or left in fp32), even where XLA would skip a conversion that is undone at once."""
    if dtype == jnp.bfloat16 and x.dtype == jnp.float32:
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def exponent_of(x: jax.Array) -> jax.Array:
    """floor(log2 |x|) of normal fp32 x as int32; -127 for zero and subnormals, 128 for inf and nan."""
    return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127


def scale_by_power_of_two(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x * 2**exponent for fp32 x (subnormals included) and int32 exponent in [-252, 254]."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    subnormal = (bits & 0x7F800000) == 0
    mantissa = jnp.where(bits < 0, -1.0, 1.0) * (bits & 0x7FFFFF).astype(jnp.float32)  # exact: below 2**24
    exponent = jnp.where(subnormal, exponent - 149, exponent)
    first = jnp.clip(exponent, -126, 127)
    second = jnp.clip(exponent - first, -126, 127)
    return jnp.where(subnormal, mantissa, x) * power_of_two(first) * power_of_two(second)


def times_power_of_two(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x * 2**exponent for fp32 x that is zero or normal, and int32 exponent in [-252, 254]; cheaper than the above."""
    first = jnp.clip(exponent, -126, 127)
    second = power_of_two(jnp.clip(exponent - first, -126, 127))
    return x * power_of_two(first) * jnp.where(x == x, second, x)  # XLA would merge two constant factors, and overflow


@jax.jit  # outside a trace, platform_dependent compiles anew at every call
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y in fp32, correctly rounded for normal operands and quotients.

    XLA:GPU divides with an error of up to 2 ulp, so a correction by the exactly computed remainder follows there.
    """
    # A divisor that depends on x is never a constant of the graph: XLA multiplies by reciprocals of constants.
    y = jnp.where((x == x) & (y == y), y, jnp.nan)
    return jax.lax.platform_dependent(x, y, cpu=lambda x, y: x / y, default=_divide_corrected)


def _divide_corrected(x: jax.Array, y: jax.Array) -> jax.Array:
    # Scale both to [1, 2) so that no step under- or overflows.
    shift_x, shift_y = exponent_of(x), exponent_of(y)
    a = scale_by_power_of_two(x, -shift_x)
    b = scale_by_power_of_two(y, -shift_y)
    sign = jnp.where((a < 0) != (b < 0), -1.0, 1.0)
    a, b = jnp.abs(a), jnp.abs(b)
    q = sign * scale_by_power_of_two(_correct_quotient(a, b, a / b), shift_x - shift_y)
    normal = (jnp.abs(2 * shift_x - 1) < 255) & (jnp.abs(2 * shift_y - 1) < 255)  # both in [-126, 127]
    return jnp.where(normal, q, x / y)


def _correct_quotient(a: jax.Array, b: jax.Array, q: jax.Array) -> jax.Array:
    """a / b correctly rounded, for a and b in [1, 2) and a q within 2 ulp of it."""

    def high(v):  # the upper 12 bits of the significand, so that every partial product below is exact
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(v, jnp.int32) & jnp.int32(-4096), jnp.float32)

    def remainder(q):
        qh, bh = high(q), high(b)
        ql, bl = q - qh, b - bh
        return (((a - qh * bh) - qh * bl) - ql * bh) - ql * bl

    q = q + remainder(q) / b  # now within 1 ulp, where the remainder is exact
    r = remainder(q)
    # The quotient of two floats is never halfway between two floats: the nearer neighbour is the answer.
    bits = jax.lax.bitcast_convert_type(q, jnp.int32) + jnp.where(r > 0, 1, -1)
    neighbour = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(2 * jnp.abs(r) > jnp.abs(neighbour - q) * b, neighbour, q)


def ceil_log2(x: jax.Array, fraction: float) -> jax.Array:
    """Smallest int32 n with x <= fraction * 2**n, for normal positive fp32 x and 1 <= fraction < 2; exact."""
    threshold = int(round((fraction - 1) * 2**23))
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return exponent_of(x) + ((bits & 0x7FFFFF) > threshold)


def _round(x: jax.Array, mantissa_bits: int, min_exponent: int, largest: float) -> jax.Array:
    quantum = jnp.clip(exponent_of(x), min_exponent, 100) - mantissa_bits
    rounded = jnp.round(x * power_of_two(-quantum)) * power_of_two(quantum)  # jnp.round: ties to even
    return jnp.where(jnp.abs(x) >= largest, jnp.sign(x) * largest, jnp.clip(rounded, -largest, largest))


def round_e4m3(x: jax.Array) -> jax.Array:
    """fp32 -> the nearest e4m3 value, as fp32 (cvt.rn.satfinite.e4m3x2: saturates at 448, keeps nan)."""
    return jnp.where(jnp.isnan(x), x, _round(x, 3, -6, E4M3_MAX))


def round_e2m1(x: jax.Array) -> jax.Array:
    """fp32 -> the nearest e2m1 value, as fp32 (cvt.rn.satfinite.e2m1x2: saturates at 6, nan becomes +6)."""
    return jnp.where(jnp.isnan(x), E2M1_MAX, _round(x, 1, 0, E2M1_MAX))


def encode_e2m1(x: jax.Array) -> jax.Array:
    """fp32 -> e2m1 codes, uint8 in [0, 16): sign in bit 3, then magnitude 0, .5, 1, 1.5, 2, 3, 4, 6."""
    value = round_e2m1(x)
    magnitude = jnp.abs(value)
    code = jnp.where(magnitude <= 2, 2 * magnitude, jnp.where(magnitude <= 4, magnitude + 2, 7)).astype(jnp.uint8)
    negative = (jax.lax.bitcast_convert_type(x, jnp.int32) < 0) & ~jnp.isnan(x)
    return code | (negative.astype(jnp.uint8) << 3)


def decode_e2m1(code: jax.Array) -> jax.Array:
    """e2m1 codes (uint8, low 4 bits) -> fp32."""
    code = code.astype(jnp.int32)
    exponent, mantissa = (code >> 1) & 3, code & 1
    normal = ((exponent + 126) << 23) | (mantissa << 22)
    subnormal = jnp.where(mantissa == 1, 126 << 23, 0)  # 0.5 or 0
    bits = jnp.where(exponent > 0, normal, subnormal) | ((code & 8) << 28)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def pack_e2m1(codes: jax.Array) -> jax.Array:
    """Codes [..., K] -> bytes [..., K/2]; the low nibble is the even K."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: jax.Array) -> jax.Array:
    """Bytes [..., K/2] -> codes [..., K]."""
    return jnp.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def decode_e8m0(scale: jax.Array) -> jax.Array:
    """uint8 biased exponents -> int32 exponents n of the scale 2**n, in [-127, 127]. Byte 255 means nan: `is_e8m0_nan`."""
    return scale.astype(jnp.int32) - 127


def encode_e8m0(exponent: jax.Array) -> jax.Array:
    """int32 exponents n -> uint8 biased exponents, clamped to the range of e8m0."""
    return (jnp.clip(exponent, -127, 127) + 127).astype(jnp.uint8)
