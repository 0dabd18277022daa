"""Number formats in vectorised numpy, bit for bit what `ffi_kernels/reference.py` computes: decode, encode, convert.

Matrices are [N, K] here, and blocks lie along K. `encode_nvfp4` and `fp8_to_nvfp4`, where a conversion spends its time, use the
native library where it is built (`ffi_kernels/native/host/nvfp4.cpp`: the same bits, several times faster, because numpy
writes every intermediate result to memory). Not here: files, and which tensor gets which format.
"""

from __future__ import annotations

import ctypes
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
_SUBNORMALS_MATTER = np.float32(2.0**-100)  # under a smaller global scale subnormals would be seen; XLA makes them zero
_CHUNK = 2**13  # blocks that numpy encodes at a time: most temporaries stay in the cache


def power_of_two(biased: np.ndarray) -> np.ndarray:
    """e8m0 bytes -> fp32; 255 is not a number and must have been refused before."""
    return np.ldexp(np.float32(1), biased.astype(np.int32) - 127)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Non-negative fp32 -> e4m3 bytes, to nearest even, saturating."""
    x = np.minimum(x, np.float32(448))
    bits = x.view(np.uint32)
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(120 << 3)
    return np.where(x < np.float32(2.0**-6), np.rint(x * np.float32(512)).astype(np.uint32), normal).astype(np.uint8)


def encode_e2m1(x: np.ndarray) -> np.ndarray:
    """fp32 -> e2m1 codes, to nearest even, saturating."""
    magnitude = np.abs(x)
    code = np.zeros(x.shape, np.uint8)
    for lower, midpoint in enumerate(_MIDPOINTS):  # a tie goes to the even code
        code += (magnitude >= midpoint if lower % 2 else magnitude > midpoint).view(np.uint8)
    code |= np.signbit(x).view(np.uint8) << np.uint8(3)
    return code


def unpack_e2m1(packed: np.ndarray) -> np.ndarray:
    """Packed e2m1 [..., K/2] -> fp32 [..., K]; the low nibble is the even K."""
    return np.take(_PAIRS, packed).view(np.float32).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def largest_magnitude(x: np.ndarray) -> np.float32:
    """Of fp32 or bf16 numbers without nan; 0 of none."""
    bits = x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)
    mask = bits.dtype.type(2 ** (8 * x.dtype.itemsize - 1) - 1)
    return np.array((bits & mask).max(initial=0), bits.dtype).view(x.dtype).astype(np.float32)[()]


# --- decode -----------------------------------------------------------------------------------------------------


def decode_blocks(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """fp32 values [N, K] times one fp32 scale [N, blocks] per equal block of K, in place."""
    blocks = values.reshape(*scale.shape, -1)
    blocks *= scale[..., None]
    return values


def expand_fp8_scale(scale: np.ndarray, columns: int) -> np.ndarray:
    """Scale [N, ceil(K/128)] of each row -> [N, K]."""
    return np.repeat(scale, FP8_BLOCK, axis=1)[:, :columns]


class Decoder:
    """Bytes of FP8 or packed FP4 data -> bf16 or fp32 numbers, by a table of what each byte is under each scale.

    scales: fp32 [S], those that occur. factor: the global scale of NVFP4, or 1. Where a byte may lose something, or go beyond
    the range, the bytes are counted: `lost` and `beyond` (how many went) tell of all rows so far.
    """

    _AT_ONCE = 2**15  # bytes: their index, eight times as large, stays in the cache

    def __init__(self, form: str, scales: np.ndarray, dtype: np.dtype, factor: np.float32 = np.float32(1)):
        base = np.nan_to_num(E4M3)[:, None] if form == "fp8" else _PAIRS.view(np.float32).reshape(256, 2)
        self._block = {"fp8": FP8_BLOCK, "mxfp4": MXFP4_BLOCK // 2, "nvfp4": NVFP4_BLOCK // 2}[form]  # bytes of one scale
        with np.errstate(over="ignore"):
            self._exact = base * scales[:, None, None] * factor
            self._numbers = self._exact.astype(dtype)
        width = self._numbers.dtype.itemsize * base.shape[1]
        self._table = self._numbers.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[width]).reshape(-1)
        counted = (self._numbers.astype(np.float32) != self._exact).any() or not np.isfinite(self._exact).all()
        self._counts = np.zeros(self._table.shape, np.int64) if counted else None

    def rows(self, data: np.ndarray, which: np.ndarray) -> np.ndarray:
        """uint8 [N, B], for each block of a row the place of its scale [N, blocks] -> numbers [N, B, or 2 * B]."""
        out = np.empty(data.shape, self._table.dtype)
        step = max(1, self._AT_ONCE // data.shape[1])
        for start in range(0, len(data), step):
            part = slice(start, start + step)
            index = np.repeat(which[part].astype(np.intp) << 8, self._block, axis=1)[:, : data.shape[1]] + data[part]
            np.take(self._table, index, out=out[part], mode="clip")
            if self._counts is not None:
                self._counts += np.bincount(index.reshape(-1), minlength=len(self._counts))
        return out.view(self._numbers.dtype)

    @property
    def beyond(self) -> int:
        bad = ~np.isfinite(self._numbers.astype(np.float32)).all(-1).reshape(-1)
        return 0 if self._counts is None else int(self._counts[bad].sum())

    @property
    def lost(self) -> "Error":
        if self._counts is None:
            return Error()
        occurs = self._counts > 0
        times = self._counts[occurs][:, None]
        exact, now = (x.reshape(len(occurs), -1)[occurs].astype(np.float64) for x in (self._exact, self._numbers))
        difference = now - exact
        return Error(float((times * difference**2).sum()), float((times * exact**2).sum()), float(np.abs(difference).max(initial=0)))


# --- MXFP4 -> NVFP4, without loss -------------------------------------------------------------------------------


def mxfp4_scale_to_nvfp4(scale: np.ndarray) -> tuple[np.ndarray, np.float32, np.ndarray]:
    """e8m0 bytes [N, K/32] -> (e4m3 bytes [N, K/16], global scale, mask of the blocks [N, K/32] that are lost)."""
    base = max(int(scale.max(initial=0)) - 8, 1)  # biased exponent of the global scale, a normal number
    relative = np.arange(256) - base
    table = np.where(relative >= -9, np.ldexp(np.float32(1), np.clip(relative, -9, 8)), np.float32(0))
    return np.repeat(np.take(round_e4m3(table), scale), 2, axis=-1), power_of_two(np.asarray(base))[()], scale < base - 9


# --- encode -----------------------------------------------------------------------------------------------------


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
        squared = [float(np.square(x, dtype=np.float64).sum()) for x in (difference, before)]
        return cls(*squared, float(np.abs(difference).max(initial=0)))


def _power_of_two_scale(amax: np.ndarray, least: float, fraction: float, largest_exponent: int) -> np.ndarray:
    """e8m0 bytes of 2**ceil(log2(max(amax, least) / (fraction * 2**largest_exponent))), exactly."""
    mantissa, exponent = np.frexp(np.maximum(amax, np.float32(least)))  # mantissa in [0.5, 1)
    exponent = exponent - 1 + (2 * mantissa > fraction) - largest_exponent
    return (np.clip(exponent, -127, 127) + 127).astype(np.uint8)


def encode_fp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [N, K] -> (e4m3 bytes [N, K], e8m0 bytes [ceil(N/128), ceil(K/128)])."""
    n, k = x.shape
    padded = np.zeros((-(-n // FP8_BLOCK) * FP8_BLOCK, -(-k // FP8_BLOCK) * FP8_BLOCK), np.float32)
    np.abs(x, out=padded[:n, :k])
    tiles = padded.reshape(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    scale = _power_of_two_scale(tiles.max((1, 3)), 1e-4, 1.75, 8)
    tiles *= np.ldexp(np.float32(1), 127 - scale.astype(np.int32))[:, None, :, None]  # a power of two: exact
    return round_e4m3(padded)[:n, :k] | (np.signbit(x).view(np.uint8) << np.uint8(7)), scale


def encode_mxfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [N, K] -> (packed e2m1 [N, K/2], e8m0 bytes [N, K/32])."""
    blocks = x.reshape(x.shape[0], -1, MXFP4_BLOCK)
    scale = _power_of_two_scale(np.abs(blocks).max(-1), 6 * 2.0**-126, 1.5, 2)
    exponent = 127 - scale.astype(np.int32)
    codes = encode_e2m1(np.ldexp(blocks, exponent[..., None])).reshape(x.shape)
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4)), scale


# --- to NVFP4 ---------------------------------------------------------------------------------------------------


def nvfp4_global_scale(amax: float) -> np.float32:
    """amax / (6 * 448), or 1 where that is not a normal number."""
    scale = np.float32(amax) / np.float32(2688)
    return np.float32(1) if scale < _NORMAL else scale


def encode_nvfp4(x: np.ndarray, global_scale: np.float32) -> tuple[np.ndarray, np.ndarray, Error]:
    """Finite fp32 or bf16 [N, K] -> (packed e2m1 [N, K/2], e4m3 bytes [N, K/16], what is lost)."""
    native = _native("dsv4_nvfp4_of_numbers")
    if native is None:
        return _in_numpy(lambda part: x.reshape(-1, NVFP4_BLOCK)[part].astype(np.float32), x.shape, global_scale)
    x = np.ascontiguousarray(x)
    return _by_library(lambda *rest: native(x.ctypes.data, x.dtype.itemsize == 2, *rest), x.shape, global_scale)


def fp8_to_nvfp4(codes: np.ndarray, scale: np.ndarray, global_scale: np.float32) -> tuple[np.ndarray, np.ndarray, Error]:
    """e4m3 bytes [N, K] without nan, e8m0 bytes [N, K/16], whose products are finite -> as `encode_nvfp4`."""
    native = _native("dsv4_nvfp4_of_fp8")
    codes, scale = np.ascontiguousarray(codes), np.ascontiguousarray(scale)
    if native is None:
        blocks, powers = codes.reshape(-1, NVFP4_BLOCK), power_of_two(scale).reshape(-1, 1)
        return _in_numpy(lambda part: np.take(E4M3, blocks[part]) * powers[part], codes.shape, global_scale)
    return _by_library(lambda *rest: native(codes.ctypes.data, scale.ctypes.data, *rest), codes.shape, global_scale)


@functools.cache
def _native(name: str):
    """A function of the native library, or None where it is not built."""
    from ffi_kernels import library  # with jax, which a plan does not wait for

    function = library.host_function(name)
    if function is not None:
        pointer, second = ctypes.c_void_p, ctypes.c_int if name == "dsv4_nvfp4_of_numbers" else ctypes.c_void_p
        function.argtypes = [pointer, second, ctypes.c_ssize_t, ctypes.c_float, pointer, pointer, pointer]
        function.restype = None
    return function


def _by_library(call, shape: tuple[int, int], global_scale: np.float32) -> tuple[np.ndarray, np.ndarray, Error]:
    data, scale, lost = np.empty((shape[0], shape[1] // 2), np.uint8), np.empty((shape[0], shape[1] // NVFP4_BLOCK), np.uint8), np.empty(3)
    call(scale.size, float(global_scale), data.ctypes.data, scale.ctypes.data, lost.ctypes.data)
    return data, scale, Error(*lost.tolist())


def _in_numpy(values_of, shape: tuple[int, int], global_scale: np.float32) -> tuple[np.ndarray, np.ndarray, Error]:
    """values_of(slice of all blocks in order) -> their numbers, fp32 [blocks, 16]."""
    count = shape[0] * shape[1] // NVFP4_BLOCK
    data, scale, error = np.empty((count, NVFP4_BLOCK // 2), np.uint8), np.empty(count, np.uint8), Error()
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        columns = np.ascontiguousarray(values_of(part).T)  # [16, blocks]: every operation below runs over whole rows
        if global_scale < _SUBNORMALS_MATTER:
            columns = np.where(np.abs(columns) < _NORMAL, np.copysign(np.float32(0), columns), columns)
        chosen = round_e4m3(np.abs(columns).max(0) / (np.float32(6) * global_scale))
        unit = E4M3[chosen] * global_scale
        usable = unit >= _NORMAL
        codes = encode_e2m1(columns / np.where(usable, unit, np.float32(1)))
        codes[:, ~usable] = 0
        data[part] = (codes[0::2] | (codes[1::2] << np.uint8(4))).T
        scale[part] = np.where(usable, chosen, np.uint8(0))
        error += Error.between(columns, E2M1[codes] * np.where(usable, unit, np.float32(0)))
    return data.reshape(shape[0], -1), scale.reshape(shape[0], -1), error
