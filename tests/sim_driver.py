"""Runs kernels in the PTX interpreter from numpy arrays, without XLA: compiles the interpreter and .cu files on demand.

`run(ptx, kernel, args, grid=1, block=32)` passes `args` as one POD, in order: arrays as pointers (updated in place when
writable), tensor maps, int as int32, float as float32; it raises SimError with the interpreter's sentence. With
DSV4_SIM_TESTS=device the same launches run on a GPU (sim_device.py); what a GPU gave is recorded, and compared with, by
sim_record.py.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import sim_record
from sim_draws import Draws

from ffi_kernels import library as native

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIM = ROOT / "ffi_kernels" / "sim"
NATIVE = ROOT / "ffi_kernels" / "native"
KERNELS = ROOT / "tests" / "ffi_kernels" / "sim_kernels"
ON_DEVICE = os.environ.get("DSV4_SIM_TESTS") == "device"  # see sim_device.py
SANITIZED = os.environ.get("DSV4_SIM_SANITIZED") == "1"  # the interpreter with the address and undefined behaviour sanitizers: sim_fuzz.py
CACHE = pathlib.Path(tempfile.gettempdir()) / "dsv4_sim_tests"


class SimError(RuntimeError):
    """The sentence with which the interpreter ended a launch."""


def missing() -> str:
    """What these tests lack on this machine, empty if nothing."""
    lacking = [tool for tool in (("nvcc",) if ON_DEVICE else ("g++", "nvcc")) if shutil.which(tool) is None]
    return f"{' and '.join(lacking)} not found" if lacking else ""


def _compile(target: pathlib.Path, command: list[str]) -> pathlib.Path:
    if not target.exists():
        CACHE.mkdir(exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}-{id(command):x}.part")  # other threads and processes make the same
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        part.rename(target)
    return target


def _state(files) -> str:
    """What the build writes into the library as the state of these sources (native/CMakeLists.txt)."""
    return hashlib.sha1(";".join(hashlib.sha1(f.read_bytes()).hexdigest() for f in files).encode()).hexdigest()


def _built(state: str) -> ctypes.CDLL | None:
    """The FFI library, of this checkout or installed, if it holds the interpreter in this state."""
    where = native.directory()
    lib = where and ctypes.CDLL(str(where / "libdsv4.so"))
    if not hasattr(lib, "dsv4_sim_sources"):
        return None
    lib.dsv4_sim_sources.restype = ctypes.c_char_p
    return lib if lib.dsv4_sim_sources().decode() == state else None


@functools.cache
def library() -> ctypes.CDLL:
    """The interpreter: out of the FFI library where that is up to date, else alone, compiled once per state of its sources."""
    sources = sorted([*SIM.glob("*.cpp"), NATIVE / "ffi" / "images.cpp"])
    headers = sorted([*SIM.glob("*.h"), NATIVE / "include" / "launch.h"])
    lib = not SANITIZED and _built(_state(sorted([*SIM.glob("*.cpp"), *SIM.glob("*.h")]))) or _alone(sources, headers)
    lib.dsv4_sim_instructions.restype = ctypes.c_uint64
    lib.dsv4_sim_run.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t,
                                 ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    return lib


def _alone(sources, headers) -> ctypes.CDLL:
    sanitizers = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZED else []
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *sanitizers, f"-I{NATIVE / 'include'}", f"-I{SIM}"]
    common = hashlib.sha1(b"".join(f.read_bytes() for f in headers) + " ".join(flags).encode())
    digest = common.copy()

    def compiled(source):
        key = common.copy()
        key.update(source.read_bytes())
        return _compile(CACHE / f"{source.stem}-{key.hexdigest()[:16]}.o", ["g++", *flags, "-c", str(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    for source in sources:
        digest.update(source.read_bytes())
    return ctypes.CDLL(str(_compile(CACHE / f"libsim-{digest.hexdigest()[:16]}.so", ["g++", "-shared", *sanitizers, *map(str, objects)])))


_SOURCES: dict[pathlib.Path, pathlib.Path] = {}  # PTX for sm_90a -> the .cu file it was made of


@functools.cache
def ptx(name: str, arch: str = "sm_90a", extra: tuple[str, ...] = ()) -> pathlib.Path:
    """PTX of sim_kernels/<name>.cu (on a device: the cubin)."""
    form = ["-cubin", f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"] if ON_DEVICE else ["-ptx", f"-arch={arch}"]
    suffix = "cubin" if ON_DEVICE else "ptx"
    source = KERNELS / f"{name}.cu"
    headers = b"".join(f.read_bytes() for f in sorted(KERNELS.glob("*.h")))
    key = hashlib.sha1(source.read_bytes() + headers + arch.encode() + " ".join(extra).encode()).hexdigest()[:16]
    made = _compile(CACHE / f"{name}-{key}.{suffix}", ["nvcc", "-std=c++17", "-O3", *form, "-lineinfo", *extra, str(source)])
    if arch == "sm_90a":
        _SOURCES[made] = source
    return made


TYPES = {  # of cuTensorMapEncodeTiled
    "uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5, "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9,
    "float32_ftz": 10, "tfloat32": 11, "tfloat32_ftz": 12, "4 bits": 13, "4 bits, 16 to 16 bytes": 14, "6 bits, 16 to 16 bytes": 15,
}  # fmt: skip
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3, "128 in 32": 4}


@dataclasses.dataclass(frozen=True, eq=False)
class TensorMap:
    """A tensor map over `array`, encoded when a launch passes it: only then its address on a device is known."""

    array: np.ndarray
    box: tuple[int, ...]
    swizzle: int | str  # bytes
    fill_nan: bool
    element_strides: tuple[int, ...]
    type: int
    dims: tuple[int, ...]  # innermost first

    @property
    def said(self) -> str:
        return f"{self.array.shape} {self.array.strides} {self.box} {self.swizzle} {self.fill_nan} {self.element_strides} {self.type} {self.dims}"

    def encoded(self, address: int) -> bytes:
        rank, raw = self.array.ndim, ctypes.create_string_buffer(192)
        at = (ctypes.addressof(raw) + 63) // 64 * 64
        dims = (ctypes.c_uint64 * rank)(*self.dims)
        pitch = (ctypes.c_uint64 * max(1, rank - 1))(*self.array.strides[::-1][1:])
        numbers = (ctypes.c_uint32 * rank)(*self.box), (ctypes.c_uint32 * rank)(*self.element_strides)
        swizzle = SWIZZLES[self.swizzle]
        if ON_DEVICE:
            import sim_device

            sim_device.encode_tiled(at, self.type, rank, address, dims, pitch, *numbers, swizzle, int(self.fill_nan))
        else:
            error = ctypes.create_string_buffer(1024)
            encode = library().dsv4_sim_encode_tiled
            encode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
            if encode(at, self.type, rank, address, dims, pitch, *numbers, swizzle, int(self.fill_nan), error, 1024):
                raise SimError(error.value.decode())
        return ctypes.string_at(at, 128)


def tensor_map(array: np.ndarray, box, *, swizzle: int | str = 0, fill_nan: bool = False, element_strides=None, type_: str | None = None, dims=None) -> TensorMap:
    """A tensor map over an array, contiguous along its last axis; `box` and strides count from the innermost dimension; swizzle in bytes.

    `dims`: the dimensions, innermost first, where elements of the type are not those of the array (packed 4-bit types).
    """
    steps = tuple(element_strides or [1] * array.ndim)
    made = TensorMap(array, tuple(box), swizzle, fill_nan, steps, TYPES[type_ or array.dtype.name], tuple(dims or array.shape[::-1]))
    if not ON_DEVICE:
        made.encoded(array.ctypes.data)  # refuses at once what cannot be
    return made


def _three(value) -> tuple[int, int, int]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value + (1,) * (3 - len(value))


def _packed(args, place) -> bytes:
    """The POD that the kernel takes: `place(array)` is its address."""
    fields, align = [], 4
    for arg in args:
        if isinstance(arg, np.ndarray) or arg is None:
            fields.append(("Q", 0 if arg is None else place(arg)))
            align = max(align, 8)
        elif isinstance(arg, TensorMap):
            fields.append(("128s", arg.encoded(place(arg.array))))
            align = 64
        elif isinstance(arg, float):
            fields.append(("f", arg))
        else:
            fields.append(("i", int(arg)))
    params = struct.pack("=" + "".join(f for f, _ in fields), *(v for _, v in fields))
    return params + bytes(-len(params) % align)


def run(path, kernel: str, args=(), *, grid=1, block=32, cluster=1, shared_bytes: int = 0, raw_params: bytes | None = None, memory=(),
        unsettled=(), compare: sim_record.Compare = sim_record.EXACT) -> None:  # fmt: skip
    """Runs one launch. Arrays in `args` and `memory` are what it may touch, writable as numpy says. If some of them are `unsettled`, it
    follows a launch that writes them and may not have ended (interpreter only). `compare` says how what comes out is compared
    with what a device gave."""
    arrays = [*memory, *(a for a in args if isinstance(a, np.ndarray))]
    shape = _three(grid), _three(block), _three(cluster), shared_bytes
    source = _SOURCES.get(path)
    key = sim_record.inputs_of(source, kernel, args, arrays, shape) if source and raw_params is None and sim_record.wanted() else None
    if ON_DEVICE:
        import sim_device

        sim_device.run(path, kernel, lambda place: _packed(args, place), arrays, *shape)
    else:
        written = {id(array) for array in unsettled}
        uses = [int(array.flags.writeable) + 2 * (id(array) in written) for array in arrays]
        _interpret(path, kernel, _packed(args, lambda array: array.ctypes.data) if raw_params is None else raw_params, arrays, uses, *shape)
    if key is not None:
        sim_record.launched(key, kernel, arrays, compare)


def _interpret(path, kernel, params, arrays, uses, grid, block, cluster, shared_bytes) -> None:
    """uses: of each array, 1 if the kernel may write it, plus 2 if a launch before this one does (c_api.cpp)."""
    buffers = []
    for array, use in zip(arrays, uses, strict=True):
        assert array.flags.c_contiguous
        buffers += [array.ctypes.data, array.nbytes, use]
    dims = (ctypes.c_uint32 * 9)(*(v & 0xFFFFFFFF for v in (*grid, *block, *cluster)))
    listed = (ctypes.c_uint64 * max(1, len(buffers)))(*buffers)
    error = ctypes.create_string_buffer(65536)
    failed = library().dsv4_sim_run(str(path).encode(), kernel.encode(), dims, shared_bytes & 0xFFFFFFFF, params, len(params),
                                    listed, len(buffers) // 3, error, len(error))
    if failed:
        raise SimError(error.value.decode(errors="replace"))


# --- for the tests' convenience -------------------------------------------------------------------------------------

RNG = Draws()


def ints(n, low=-1000, high=1000):
    a = RNG.integers(low, high, n).astype(np.int32)
    a.flags.writeable = False
    return a


def poisoned(n, kind=np.int32):
    return np.full(n, 0x7D, np.uint8).repeat(np.dtype(kind).itemsize).view(kind)


def launch(kernel, args, module="warps", **how):
    run(ptx(module), kernel, args, **how)


def core_tiles(rows_bytes):
    """[rows, 32 bytes] to the k-major layout without swizzle: 8 x 16-byte cores, rows by 128 bytes, then the second half."""
    rows = rows_bytes.shape[0]
    return np.ascontiguousarray(rows_bytes.reshape(rows // 8, 8, 2, 16).transpose(2, 0, 1, 3)).reshape(-1)


def assert_same(got, want, inputs=None):
    """Equal bits, except that any nan stands for any other."""
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[want.dtype.itemsize]
    same = (got.view(bits) == want.view(bits)) | (np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32)))
    at = np.flatnonzero(~same)
    assert not len(at), f"{len(at)} differ, first at {at[0]}: {got[at[0]]} wanted {want[at[0]]}" + ("" if inputs is None else f" of {inputs[at[0]]!r}")
