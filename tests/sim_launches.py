"""Launches of our own kernels, taken from the ops that make them, and repeated in the interpreter without XLA.

`record(function, *arguments)` runs ops eagerly on the backend `sim` and keeps each of their launches with its inputs;
`Launch.run(ptx)` repeats one: in any PTX of that kernel, under any schedule, with poisoned outputs. So one launch can be run
again a thousand times, or through damaged kernels.
"""

import ctypes
import dataclasses
import struct
import unittest.mock

import jax
import numpy as np
import sim_driver as sim

import ffi_kernels as ops
from ffi_kernels import launch as layer

POISON = 0xA5


def _encoded(numbers: tuple, array: np.ndarray) -> bytes:
    """A tensor map over the array, as the launch layer's handler would make it."""
    _, kind, swizzle, rank, *sizes = numbers
    raw, error = ctypes.create_string_buffer(192), ctypes.create_string_buffer(1024)
    at = (ctypes.addressof(raw) + 63) // 64 * 64
    encode = sim.library().dsv4_sim_encode_tiled
    encode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
    dims, strides, box = (ctypes.c_uint64 * 5)(*sizes[:5]), (ctypes.c_uint64 * 4)(*sizes[5:9]), (ctypes.c_uint32 * 5)(*sizes[9:])
    if encode(at, kind, rank, array.ctypes.data, dims, strides, box, (ctypes.c_uint32 * 5)(*[1] * 5), swizzle, 0, error, 1024):
        raise sim.SimError(error.value.decode())
    return ctypes.string_at(at, 128)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One custom call: attributes as `ffi_kernels.launch.launch` gives them; inputs are read-only numpy arrays."""

    op: str
    module: str
    kernel: str
    grid: tuple
    block: tuple
    cluster: tuple
    shared_bytes: int
    slots: tuple
    scalars: bytes
    maps: tuple  # 18 numbers for each tensor map: see TensorMap.numbers
    inputs: tuple
    outputs: tuple  # (shape, dtype) of each
    aliases: tuple  # (input, output) that are the same memory

    def run(self, ptx) -> list[np.ndarray]:
        """The outputs, as flat arrays of bytes so that all bits count. SimError with the interpreter's sentence."""
        made = [np.full(max(1, int(np.prod(shape)) * dtype.itemsize), POISON, np.uint8) for shape, dtype in self.outputs]
        inputs = list(self.inputs)
        for i, o in self.aliases:
            made[o][:] = inputs[i].reshape(-1).view(np.uint8)
            inputs[i] = made[o]
        arrays = [*inputs, *made]
        params = b"".join(_encoded(numbers, arrays[numbers[0]]) for numbers in self.maps)
        params += b"".join(struct.pack("<Q", arrays[s].ctypes.data if s >= 0 else 0) for s in self.slots) + self.scalars
        sim.run(ptx, self.kernel, grid=self.grid, block=self.block, cluster=self.cluster, shared_bytes=self.shared_bytes,
                raw_params=params + bytes(-len(params) % (128 if self.maps else 8)), memory=arrays)  # fmt: skip
        return made


def record(function, *arguments) -> list[Launch]:
    """The launches of function(*arguments), in order. The ops run for real, so that each sees what the one before made."""
    found = []
    real = jax.ffi.ffi_call

    def ffi_call(target, shapes, *, input_output_aliases):
        call = real(target, shapes, input_output_aliases=input_output_aliases)

        def run(*inputs, arch, **attributes):
            arrays = []
            for x in inputs:
                array = np.array(x, order="C")  # a copy: an aliased one is overwritten
                array.flags.writeable = False
                arrays.append(array)
            found.append(Launch(
                op=target.split(".")[1], module=attributes["module"], kernel=attributes["kernel"],
                grid=tuple(int(n) for n in attributes["grid"]), block=tuple(int(n) for n in attributes["block"]),
                cluster=tuple(int(n) for n in attributes["cluster"]), shared_bytes=int(attributes["shared_bytes"]),
                slots=tuple(int(n) for n in attributes["slots"]), scalars=attributes["scalars"].tobytes(), inputs=tuple(arrays),
                maps=tuple(tuple(int(n) for n in numbers) for numbers in attributes["tensor_maps"].reshape(-1, 18)),
                outputs=tuple((s.shape, np.dtype(s.dtype)) for s in shapes), aliases=tuple(input_output_aliases.items()),
            ))  # fmt: skip
            return call(*inputs, arch=arch, **attributes)

        return run

    with unittest.mock.patch.object(layer.jax.ffi, "ffi_call", ffi_call), ops.backend("sim"), jax.disable_jit():
        jax.block_until_ready(function(*arguments))
    return found
