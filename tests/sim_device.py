"""The launches of `sim_driver` on a GPU instead, through the CUDA driver: DSV4_SIM_TESTS=device runs the same tests there.

What the tests expect of the interpreter is thereby checked against hardware. A launch that fails takes nothing with it: the
context is reset for the next one; where that does not help, and where a kernel does not end, the process ends (pytest-xdist
starts another one and goes on with the next test).
"""

import ctypes
import os
import sys
import time

import sim_record

SECONDS = 10  # a kernel of these tests runs for microseconds: one that takes this long waits for what never comes
_NOT_READY = 600


class DeviceError(RuntimeError):
    """A call of the CUDA driver or a kernel failed."""


def _text(code: int) -> str:
    name = ctypes.c_char_p()
    _Device.driver.cuGetErrorString(code, ctypes.byref(name))
    return f"{name.value.decode() if name.value else 'an error'} ({code})"


def check(code: int, what: str) -> None:
    if code:
        raise DeviceError(f"{what}: {_text(code)}")


class _Device:
    """The context of this process, and the modules loaded into it."""

    driver: ctypes.CDLL = None

    def __init__(self):
        _Device.driver = ctypes.CDLL("libcuda.so.1")
        self.device, self.context, self.modules = ctypes.c_int(), ctypes.c_void_p(), {}
        check(self.driver.cuInit(0), "cuInit")
        check(self.driver.cuDeviceGet(ctypes.byref(self.device), 0), "cuDeviceGet")
        self._open()

    def _open(self) -> None:
        check(self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), self.device), "cuDevicePrimaryCtxRetain")
        check(self.driver.cuCtxSetCurrent(self.context), "cuCtxSetCurrent")

    def renew(self) -> None:
        """A clean context after a failed launch; ends the process if the device does not work in it."""
        self.modules.clear()
        self.driver.cuDevicePrimaryCtxRelease_v2(self.device)
        self.driver.cuDevicePrimaryCtxReset_v2(self.device)
        place, value = ctypes.c_uint64(), ctypes.c_uint32()
        try:
            self._open()
            check(self.driver.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(4)), "cuMemAlloc")
            check(self.driver.cuMemsetD32_v2(place, ctypes.c_uint32(7), ctypes.c_size_t(1)), "cuMemset")
            check(self.driver.cuMemcpyDtoH_v2(ctypes.byref(value), place, ctypes.c_size_t(4)), "copy back")
            check(self.driver.cuMemFree_v2(place), "cuMemFree")
        except DeviceError as error:
            end_process(f"the device does not work after a reset of the context either ({error})")

    def function(self, cubin: str, kernel: str) -> ctypes.c_void_p:
        if cubin not in self.modules:
            module = ctypes.c_void_p()
            check(self.driver.cuModuleLoad(ctypes.byref(module), cubin.encode()), f"cuModuleLoad {cubin}")
            self.modules[cubin] = module
        function = ctypes.c_void_p()
        check(self.driver.cuModuleGetFunction(ctypes.byref(function), self.modules[cubin], kernel.encode()), f"cuModuleGetFunction {kernel}")
        return function


_OPEN: list[_Device] = []


def device() -> _Device:
    if not _OPEN:
        _OPEN.append(_Device())
    check(_Device.driver.cuCtxSetCurrent(_OPEN[0].context), "cuCtxSetCurrent")  # of this thread
    return _OPEN[0]


def arch() -> str:
    """Of the device: 'sm_90a', 'sm_100a'."""
    here, numbers = device(), [ctypes.c_int(), ctypes.c_int()]
    for number, attribute in zip(numbers, (75, 76), strict=True):  # major and minor of the compute capability
        check(_Device.driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, here.device), "cuDeviceGetAttribute")
    return f"sm_{numbers[0].value}{numbers[1].value}a"


def end_process(why: str) -> None:
    print(f"{why}: this process ends", file=sys.stderr, flush=True)
    os._exit(70)


def encode_tiled(at, type_, rank, address, dims, pitch, box, strides, swizzle, fill) -> None:
    """cuTensorMapEncodeTiled into the 128 bytes at `at`: not interleaved, no promotion in L2."""
    device()
    code = _Device.driver.cuTensorMapEncodeTiled(ctypes.c_void_p(at), type_, ctypes.c_uint32(rank), ctypes.c_void_p(address), dims, pitch, box, strides, 0, swizzle, 0, fill)
    check(code, "cuTensorMapEncodeTiled")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint32)]  # fmt: skip


def _wait(what: str) -> None:
    end = time.monotonic() + SECONDS
    while (code := _Device.driver.cuStreamQuery(None)) == _NOT_READY:
        if time.monotonic() > end:
            sentence = f"{what} has not ended after {SECONDS} seconds"
            sim_record.failed(sentence)
            end_process(sentence)
        time.sleep(2e-5)
    check(code, what)


def run(cubin, kernel, pack, arrays, grid, block, cluster, shared_bytes) -> None:
    """`pack(address)` gives the parameters, where address(array) is on the device; arrays go there and, if writable, back."""
    what = f"kernel {kernel} of {os.path.basename(cubin)} with grid {grid}, block {block}, cluster {cluster}, {shared_bytes} bytes of dynamic shared memory"
    here = device()
    try:
        _run(here, str(cubin), kernel, pack, arrays, grid, block, cluster, shared_bytes, what)
    except DeviceError as error:
        sim_record.failed(str(error) if what in str(error) else f"{what}: {error}")
        print(error, file=sys.stderr, flush=True)
        here.renew()
        raise


def _run(here, cubin, kernel, pack, arrays, grid, block, cluster, shared_bytes, what) -> None:
    lib, places = here.driver, {}
    for array in arrays:
        if array.ctypes.data in places:
            continue
        pointer = ctypes.c_uint64()
        check(lib.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(1, array.nbytes))), "cuMemAlloc")
        places[array.ctypes.data] = pointer
        check(lib.cuMemcpyHtoD_v2(pointer, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)), "copy to the device")
    function = here.function(cubin, kernel)
    check(lib.cuFuncSetAttribute(function, 8, ctypes.c_int(shared_bytes)), "dynamic shared memory")
    check(lib.cuFuncSetAttribute(function, 14, ctypes.c_int(1)), "clusters of 16")
    params = ctypes.create_string_buffer(pack(lambda array: places[array.ctypes.data].value))
    attribute = _Attribute(4, b"", (ctypes.c_uint32 * 16)(*cluster))
    config = _Config((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), shared_bytes, None, ctypes.pointer(attribute), int(cluster != (1, 1, 1)))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    check(lib.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"launch of {what}")
    _wait(what)
    for array in arrays:
        if array.flags.writeable:
            check(lib.cuMemcpyDtoH_v2(ctypes.c_void_p(array.ctypes.data), places[array.ctypes.data], ctypes.c_size_t(array.nbytes)), "copy back")
    for pointer in places.values():
        check(lib.cuMemFree_v2(pointer), "cuMemFree")
