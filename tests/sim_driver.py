"""Runs kernels in the PTX interpreter from numpy arrays, without XLA: compiles the interpreter and .cu files on demand.

`run(ptx, kernel, args, grid=1, block=32)` passes `args` as one POD, in order: arrays as pointers (updated in place when
writable), int as int32, float as float32; it raises SimError with the interpreter's sentence.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile

import numpy as np

from ffi_kernels import library as native

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIM = ROOT / "ffi_kernels" / "sim"
NATIVE = ROOT / "ffi_kernels" / "native"
KERNELS = ROOT / "tests" / "ffi_kernels" / "sim_kernels"
ON_DEVICE = os.environ.get("DSV4_SIM_TESTS") == "device"  # see sim_device.py
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
        part = target.with_suffix(f".{hashlib.sha1(str(id(command)).encode()).hexdigest()[:8]}.part")
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
    lib = _built(_state(sorted([*SIM.glob("*.cpp"), *SIM.glob("*.h")]))) or _alone(sources, headers)
    lib.dsv4_sim_instructions.restype = ctypes.c_uint64
    lib.dsv4_sim_run.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t,
                                 ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    return lib


def _alone(sources, headers) -> ctypes.CDLL:
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{NATIVE / 'include'}", f"-I{SIM}"]
    common = hashlib.sha1(b"".join(f.read_bytes() for f in headers) + " ".join(flags).encode())
    objects, digest = [], common.copy()
    for source in sources:
        key = common.copy()
        key.update(source.read_bytes())
        digest.update(source.read_bytes())
        objects.append(_compile(CACHE / f"{source.stem}-{key.hexdigest()[:16]}.o", ["g++", *flags, "-c", str(source)]))
    return ctypes.CDLL(str(_compile(CACHE / f"libsim-{digest.hexdigest()[:16]}.so", ["g++", "-shared", *map(str, objects)])))


@functools.cache
def ptx(name: str, arch: str = "sm_90a", extra: tuple[str, ...] = ()) -> pathlib.Path:
    """PTX of sim_kernels/<name>.cu (on a device: the cubin)."""
    form = ["-cubin", f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"] if ON_DEVICE else ["-ptx", f"-arch={arch}"]
    suffix = "cubin" if ON_DEVICE else "ptx"
    source = KERNELS / f"{name}.cu"
    headers = b"".join(f.read_bytes() for f in sorted(KERNELS.glob("*.h")))
    key = hashlib.sha1(source.read_bytes() + headers + arch.encode() + " ".join(extra).encode()).hexdigest()[:16]
    return _compile(CACHE / f"{name}-{key}.{suffix}", ["nvcc", "-std=c++17", "-O3", *form, "-lineinfo", *extra, str(source)])


def _three(value) -> tuple[int, int, int]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value + (1,) * (3 - len(value))


TYPES = {"uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "float16": 6, "float32": 7, "bfloat16": 9}  # of cuTensorMapEncodeTiled


def tensor_map(array: np.ndarray, box, *, swizzle: int = 0, fill_nan: bool = False, element_strides=None, type_: str | None = None) -> bytes:
    """A tensor map over a C-contiguous array; `box` and strides count from the innermost dimension; swizzle in bytes."""
    if ON_DEVICE:
        import sim_device

        return sim_device.tensor_map(array, box, {0: 0, 32: 1, 64: 2, 128: 3}[swizzle], int(fill_nan), element_strides or [1] * array.ndim, TYPES[type_ or array.dtype.name])
    rank, out = array.ndim, ctypes.create_string_buffer(128)
    dims = (ctypes.c_uint64 * rank)(*array.shape[::-1])
    strides = (ctypes.c_uint64 * max(1, rank - 1))(*array.strides[::-1][1:])
    boxes, steps = (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*(element_strides or [1] * rank))
    error = ctypes.create_string_buffer(1024)
    encode = library().dsv4_sim_encode_tiled
    encode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
    if encode(out, TYPES[type_ or array.dtype.name], rank, array.ctypes.data, dims, strides, boxes, steps, {0: 0, 32: 1, 64: 2, 128: 3}[swizzle], int(fill_nan), error, 1024):
        raise SimError(error.value.decode())
    return out.raw


def _packed(args, place) -> bytes:
    """The POD that the kernel takes: `place(array)` is its address."""
    fields = []
    for arg in args:
        if isinstance(arg, np.ndarray):
            fields.append(("Q", place(arg)))
        elif isinstance(arg, bytes):
            fields.append((f"{len(arg)}s", arg))
        elif arg is None:
            fields.append(("Q", 0))
        elif isinstance(arg, float):
            fields.append(("f", arg))
        else:
            fields.append(("i", int(arg)))
    params = struct.pack("=" + "".join(f for f, _ in fields), *(v for _, v in fields))
    align = 64 if any(isinstance(a, bytes) for a in args) else 8 if any(f == "Q" for f, _ in fields) else 4
    return params + bytes(-len(params) % align)


def run(path, kernel: str, args=(), *, grid=1, block=32, cluster=1, shared_bytes: int = 0, raw_params: bytes | None = None, memory=()) -> None:
    """Runs one launch. Arrays in `args` and `memory` are what it may touch, writable as numpy says; bytes are passed as they are."""
    if ON_DEVICE:
        import sim_device

        arrays = [*memory, *(a for a in args if isinstance(a, np.ndarray))]
        return sim_device.run(path, kernel, lambda place: _packed(args, place), arrays, _three(grid), _three(block), _three(cluster), shared_bytes)
    buffers = []
    for array in [*memory, *(a for a in args if isinstance(a, np.ndarray))]:
        assert array.flags.c_contiguous
        buffers += [array.ctypes.data, array.nbytes, int(array.flags.writeable)]
    params = _packed(args, lambda array: array.ctypes.data) if raw_params is None else raw_params
    dims = (ctypes.c_uint32 * 9)(*(v & 0xFFFFFFFF for group in (grid, block, cluster) for v in _three(group)))
    listed = (ctypes.c_uint64 * max(1, len(buffers)))(*buffers)
    error = ctypes.create_string_buffer(65536)
    failed = library().dsv4_sim_run(str(path).encode(), kernel.encode(), dims, shared_bytes & 0xFFFFFFFF, params, len(params),
                                    listed, len(buffers) // 3, error, len(error))
    if failed:
        raise SimError(error.value.decode(errors="replace"))


# --- for the tests' convenience -------------------------------------------------------------------------------------

_RNG = np.random.default_rng(1)


def ints(n, low=-1000, high=1000):
    a = _RNG.integers(low, high, n).astype(np.int32)
    a.flags.writeable = False
    return a


def poisoned(n, kind=np.int32):
    return np.full(n, 0x7D, np.uint8).repeat(np.dtype(kind).itemsize).view(kind)


def launch(kernel, args, module="warps", **how):
    run(ptx(module), kernel, args, **how)


def assert_same(got, want, inputs=None):
    """Equal bits, except that any nan stands for any other."""
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[want.dtype.itemsize]
    same = (got.view(bits) == want.view(bits)) | (np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32)))
    at = np.flatnonzero(~same)
    assert not len(at), f"{len(at)} differ, first at {at[0]}: {got[at[0]]} wanted {want[at[0]]}" + ("" if inputs is None else f" of {inputs[at[0]]!r}")
