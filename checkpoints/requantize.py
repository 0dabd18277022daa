"""Number formats in vectorised numpy, bit for bit what `ffi_kernels/reference.py` computes: decode, encode, convert.

Matrices are [N, K] here, and blocks lie along K. FP8 weights become NVFP4 without leaving their codes: within a block an
e4m3 code maps to an e2m1 code by seven thresholds that depend on the largest code and the power-of-two scale only, so
they come from a small table. Not here: files, and which tensor gets which format.
"""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np

FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK = 128, 32, 16
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).view(np.uint64).ravel()  # byte -> two fp32
_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
_NORMAL = np.float32(2.0**-126)
_SLAB = 2**15  # blocks of 16 at a time: temporaries stay in the cache


def power_of_two(biased: np.ndarray) -> np.ndarray:
    """e8m0 bytes -> fp32; 255 is not a number and must have been refused before."""
    return np.ldexp(np.float32(1), biased.astype(np.int32) - 127)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Non-negative fp32 -> e4m3 bytes, to nearest even, saturating."""
    return np.minimum(x, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def encode_e2m1(x: np.ndarray) -> np.ndarray:
    """fp32 -> e2m1 codes, to nearest even, saturating."""
    magnitude = np.abs(x)
    code = np.zeros(x.shape, np.uint8)
    for lower, midpoint in enumerate(_MIDPOINTS):  # a tie goes to the even code
        code += (magnitude >= midpoint if lower % 2 else magnitude > midpoint).view(np.uint8)
    code |= (x.view(np.uint32) >> np.uint32(28)).astype(np.uint8) & np.uint8(8)
    return code


def unpack_e2m1(packed: np.ndarray) -> np.ndarray:
    """Packed e2m1 [..., K/2] -> fp32 [..., K]; the low nibble is the even K."""
    return np.take(_PAIRS, packed).view(np.float32).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


# --- decode -----------------------------------------------------------------------------------------------------


def decode_blocks(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """fp32 values [N, K] times one fp32 scale [N, blocks] per equal block of K, in place."""
    blocks = values.reshape(*scale.shape, -1)
    blocks *= scale[..., None]
    return values


def expand_fp8_scale(scale: np.ndarray, columns: int) -> np.ndarray:
    """Scale [N, ceil(K/128)] of each row -> [N, K]."""
    return np.repeat(scale, FP8_BLOCK, axis=1)[:, :columns]


# --- encode -----------------------------------------------------------------------------------------------------


def _flush(x: np.ndarray) -> np.ndarray:
    """Subnormals become zero, as XLA computes."""
    return np.where(np.abs(x) < _NORMAL, np.copysign(np.float32(0), x), x)


def _power_of_two_scale(amax: np.ndarray, least: float, fraction: float, largest_exponent: int) -> np.ndarray:
    """e8m0 bytes of 2**ceil(log2(max(amax, least) / (fraction * 2**largest_exponent))), exactly."""
    mantissa, exponent = np.frexp(np.maximum(amax, np.float32(least)))  # mantissa in [0.5, 1)
    exponent = exponent - 1 + (2 * mantissa > fraction) - largest_exponent
    return (np.clip(exponent, -127, 127) + 127).astype(np.uint8)


def encode_fp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [N, K] -> (e4m3 bytes [N, K], e8m0 bytes [ceil(N/128), ceil(K/128)])."""
    n, k = x.shape
    padded = np.zeros((-(-n // FP8_BLOCK) * FP8_BLOCK, -(-k // FP8_BLOCK) * FP8_BLOCK), np.float32)
    padded[:n, :k] = x
    tiles = padded.reshape(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    scale = _power_of_two_scale(np.abs(tiles).max((1, 3)), 1e-4, 1.75, 8)
    inverse = np.ldexp(np.float32(1), 127 - scale.astype(np.int32))
    tiles *= inverse[:, None, :, None]  # a power of two: exact
    np.clip(padded, -448, 448, out=padded)
    return padded[:n, :k].astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def encode_mxfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [N, K] -> (packed e2m1 [N, K/2], e8m0 bytes [N, K/32])."""
    blocks = x.reshape(x.shape[0], -1, MXFP4_BLOCK)
    scale = _power_of_two_scale(np.abs(blocks).max(-1), 6 * 2.0**-126, 1.5, 2)
    exponent = 127 - scale.astype(np.int32)
    return _pack(encode_e2m1(np.ldexp(blocks, exponent[..., None])).reshape(x.shape)), scale


def nvfp4_global_scale(amax: float) -> np.float32:
    """amax / (6 * 448), or 1 where that is not a normal number."""
    scale = np.float32(amax) / np.float32(2688)
    return np.float32(1) if scale < _NORMAL else scale


def _nvfp4_block_scale(block_max: np.ndarray, global_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3 bytes of the block scales, the fp32 unit of each block: 0 where the block is all zero)."""
    scale = round_e4m3(_flush(block_max) / (np.float32(6) * global_scale))
    unit = E4M3[scale] * global_scale
    usable = unit >= _NORMAL
    return np.where(usable, scale, np.uint8(0)), np.where(usable, unit, np.float32(0))


def encode_nvfp4(x: np.ndarray, global_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [N, K] -> (packed e2m1 [N, K/2], e4m3 bytes [N, K/16])."""
    if global_scale < 2.0**-100:
        x = _flush(x)
    blocks = x.reshape(x.shape[0], -1, NVFP4_BLOCK)
    scale, unit = _nvfp4_block_scale(np.abs(blocks).max(-1), global_scale)
    dead = unit == 0
    codes = encode_e2m1(blocks / np.where(dead, np.float32(1), unit)[..., None])
    codes[dead] = 0
    return _pack(codes.reshape(x.shape)), scale


def _pack(codes: np.ndarray) -> np.ndarray:
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


# --- MXFP4 -> NVFP4, without loss -------------------------------------------------------------------------------


def mxfp4_scale_to_nvfp4(scale: np.ndarray) -> tuple[np.ndarray, np.float32, np.ndarray]:
    """e8m0 bytes [N, K/32] -> (e4m3 bytes [N, K/16], global scale, mask of the blocks [N, K/32] that are lost)."""
    base = max(int(scale.max(initial=0)) - 8, 1)  # biased exponent of the global scale, a normal number
    relative = np.arange(256) - base
    table = np.where(relative >= -9, np.ldexp(np.float32(1), np.clip(relative, -9, 8)), np.float32(0))
    table = table.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.repeat(np.take(table, scale), 2, axis=-1), power_of_two(np.asarray(base))[()], scale < base - 9


# --- FP8 -> NVFP4 -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Error:
    """Squared error, squared norm and largest deviation of a conversion; add them over the parts of a tensor."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Error") -> "Error":
        return Error(
            self.squared_error + other.squared_error, self.squared_norm + other.squared_norm, max(self.largest, other.largest)
        )

    @classmethod
    def between(cls, before: np.ndarray, after: np.ndarray) -> "Error":
        """fp32 before and after."""
        difference = after - before
        largest = float(np.abs(difference).max(initial=0))
        unit = 2.0 ** np.frexp(max(float(np.abs(before).max(initial=0)), largest, 1e-30))[1]  # squares stay in range
        squared = [float(np.square(x * np.float32(1 / unit)).sum(dtype=np.float64)) * unit**2 for x in (difference, before)]
        return cls(*squared, largest)


class FP8ToNVFP4:
    """Requantizes the rows of one FP8 matrix whose scales are powers of two.

    scales: e8m0 bytes that occur in it; amax: its largest magnitude. `rows` may be called on any slabs of rows.
    """

    def __init__(self, scales: np.ndarray, amax: float):
        self.global_scale = nvfp4_global_scale(amax)
        distinct = np.unique(scales)
        self._index = np.zeros(256, np.uint16)
        self._index[distinct] = np.arange(len(distinct), dtype=np.uint16) * 128
        tables = [_table(int(byte), float(self.global_scale)) for byte in distinct]
        self._thresholds = np.concatenate([t[0] for t in tables], axis=1)  # [7, distinct * 128]
        self._scale = np.concatenate([t[1] for t in tables])
        self._sign = np.concatenate([t[2] for t in tables])
        self._distinct = distinct
        self._counts: np.ndarray | None = None

    def rows(self, codes: np.ndarray, scale: np.ndarray, count_errors: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """e4m3 bytes [N, K] without nan, e8m0 bytes [N, K/16] -> (packed e2m1 [N, K/2], e4m3 bytes [N, K/16])."""
        n, k = codes.shape
        blocks, exponents = codes.reshape(-1, NVFP4_BLOCK), scale.ravel()
        data, block_scale = np.empty((len(blocks), 8), np.uint8), np.empty(len(blocks), np.uint8)
        for start in range(0, len(blocks), _SLAB):
            part = slice(start, start + _SLAB)
            self._slab(blocks[part], exponents[part], data[part], block_scale[part], count_errors)
        return data.reshape(n, k // 2), block_scale.reshape(n, k // NVFP4_BLOCK)

    def _slab(self, blocks, exponents, data, block_scale, count_errors) -> None:
        codes = np.ascontiguousarray(blocks.T)  # [16, blocks]: every operation below runs over whole rows
        magnitude = codes & np.uint8(0x7F)
        key = np.take(self._index, exponents)
        key += np.maximum.reduce(magnitude, axis=0)
        out = np.right_shift(codes, np.uint8(4))
        out &= np.take(self._sign, key)
        passed = np.empty(codes.shape, np.bool_)
        for thresholds in self._thresholds:
            np.greater_equal(magnitude, np.take(thresholds, key), out=passed)
            out += passed.view(np.uint8)
        high = out[1::2] << np.uint8(4)
        high |= out[0::2]
        data[:] = high.T
        np.take(self._scale, key, out=block_scale, mode="clip")
        if count_errors:
            index = (key.astype(np.int64) << 7)[None, :] | magnitude
            counts = np.bincount(index.ravel(), minlength=len(self._scale) * 128)
            self._counts = counts if self._counts is None else self._counts + counts

    def error(self) -> Error:
        """Of all rows converted so far: exact sums over a histogram of codes, in any order."""
        total = Error()
        if self._counts is None:
            return total
        for byte, counts in zip(self._distinct, self._counts.reshape(len(self._distinct), 128, 128)):
            values = E4M3[:127].astype(np.float64) * 2.0 ** (int(byte) - 127)
            codes, unit = _codes(int(byte), float(self.global_scale))
            difference = np.abs(E2M1[codes].astype(np.float64) * unit[:, None] - values)
            counts = counts[:127, :127]
            total += Error(
                float((counts * difference**2).sum()), float((counts * values**2).sum()),
                float(difference[counts > 0].max(initial=0)),
            )  # fmt: skip
        return total


def _magnitudes(byte: int) -> np.ndarray:
    """fp32 values of the e4m3 magnitudes under a scale; those beyond fp32 occur in no matrix with a finite maximum."""
    with np.errstate(over="ignore"):
        return _flush(np.ldexp(E4M3[:127], byte - 127))


def _codes(byte: int, global_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(e2m1 magnitude [largest code, code], fp32 unit [largest code]) of e4m3 magnitudes under the scale 2**(byte-127)."""
    values = _magnitudes(byte)
    _, unit = _nvfp4_block_scale(values, np.float32(global_scale))
    dead = unit == 0
    codes = encode_e2m1(values[None, :] / np.where(dead, np.float32(1), unit)[:, None])
    codes[dead] = 0
    return codes, unit


@functools.lru_cache(maxsize=256)
def _table(byte: int, global_scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each largest code of a block: (the seven codes from which e2m1 goes up [7, 128], e4m3 byte, mask of the sign)."""
    codes, unit = _codes(byte, global_scale)
    values = _magnitudes(byte)
    scale, _ = _nvfp4_block_scale(values, np.float32(global_scale))
    thresholds = np.full((7, 128), 255, np.uint8)
    for step in range(7):
        above = codes > step  # monotone in the code
        thresholds[step, :127] = np.where(above.any(1), above.argmax(1), 255)
    pad = np.zeros(1, np.uint8)
    return thresholds, np.concatenate([scale, pad]), np.concatenate([np.where(unit > 0, 8, 0).astype(np.uint8), pad])
