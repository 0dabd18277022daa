"""The launches of `sim_driver` on a GPU instead, through the CUDA driver: DSV4_SIM_TESTS=device runs the same tests there.

What the tests expect of the interpreter is thereby checked against hardware. Faults are not: they would end the process.
"""

import ctypes
import functools

import numpy as np


@functools.cache
def cuda() -> ctypes.CDLL:
    lib = ctypes.CDLL("libcuda.so.1")
    context, device = ctypes.c_void_p(), ctypes.c_int()
    for code in (lib.cuInit(0), lib.cuDeviceGet(ctypes.byref(device), 0), lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), lib.cuCtxSetCurrent(context)):
        assert code == 0, f"CUDA error {code}"
    return lib


def check(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        cuda().cuGetErrorString(code, ctypes.byref(name))
        raise RuntimeError(f"{what}: {name.value.decode() if name.value else code}")


_tensors: dict[int, ctypes.c_uint64] = {}  # host address -> device memory that a tensor map names


def allocate(array: np.ndarray) -> int:
    pointer = ctypes.c_uint64()
    check(cuda().cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(16, array.nbytes))), "cuMemAlloc")
    return pointer.value


def tensor_map(array, box, swizzle, fill, strides, type_) -> bytes:
    place = _tensors.setdefault(array.ctypes.data, allocate(array))
    rank, raw = array.ndim, ctypes.create_string_buffer(192)
    at = (ctypes.addressof(raw) + 63) // 64 * 64
    dims = (ctypes.c_uint64 * rank)(*array.shape[::-1])
    pitch = (ctypes.c_uint64 * max(1, rank - 1))(*array.strides[::-1][1:])
    code = cuda().cuTensorMapEncodeTiled(ctypes.c_void_p(at), type_, rank, ctypes.c_void_p(place), dims, pitch, (ctypes.c_uint32 * rank)(*box),
                                         (ctypes.c_uint32 * rank)(*strides), 0, swizzle, 0, fill)
    check(code, "cuTensorMapEncodeTiled")
    return ctypes.string_at(at, 128)


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint32)]  # fmt: skip


@functools.cache
def _module(cubin: str) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    check(cuda().cuModuleLoad(ctypes.byref(module), cubin.encode()), f"cuModuleLoad {cubin}")
    return module


def run(cubin, kernel, pack, arrays, grid, block, cluster, shared_bytes) -> None:
    """`pack(address)` gives the parameters, where address(array) is on the device; arrays go there and, if writable, back."""
    lib, places = cuda(), {}
    for array in arrays:
        key = array.ctypes.data
        if key not in places:
            places[key] = _tensors[key] if key in _tensors else allocate(array)
        check(lib.cuMemcpyHtoD_v2(ctypes.c_uint64(places[key]), ctypes.c_void_p(key), ctypes.c_size_t(array.nbytes)), "copy to the device")
    function = ctypes.c_void_p()
    check(lib.cuModuleGetFunction(ctypes.byref(function), _module(str(cubin)), kernel.encode()), f"cuModuleGetFunction {kernel}")
    check(lib.cuFuncSetAttribute(function, 8, ctypes.c_int(shared_bytes)), "dynamic shared memory")
    check(lib.cuFuncSetAttribute(function, 14, ctypes.c_int(1)), "clusters of 16")
    params = ctypes.create_string_buffer(pack(lambda array: places[array.ctypes.data]))
    attribute = _Attribute(4, b"", (ctypes.c_uint32 * 16)(*cluster))
    config = _Config((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), shared_bytes, None, ctypes.pointer(attribute), int(cluster != (1, 1, 1)))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    check(lib.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"launch of {kernel}")
    check(lib.cuCtxSynchronize(), f"kernel {kernel}")
    for array in arrays:
        if array.flags.writeable:
            check(lib.cuMemcpyDtoH_v2(ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(places[array.ctypes.data]), ctypes.c_size_t(array.nbytes)), "copy back")
    for key, place in places.items():
        if key not in _tensors:
            lib.cuMemFree_v2(ctypes.c_uint64(place))
    for key in [k for k in _tensors if k in places]:
        lib.cuMemFree_v2(ctypes.c_uint64(_tensors.pop(key)))
