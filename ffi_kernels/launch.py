"""From an op to one kernel launch: `native` registers an op's launching function, `launch` makes the custom call.

A kernel takes one POD struct: 128 bytes per tensor map, a pointer per input, a pointer per output (null for None), then 4-byte
scalars. Everything but the buffers' contents is static, so the launch is written where the op is, and one handler serves
all ops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ffi_kernels import library
from ffi_kernels.dispatch import current, register

MAX_PARAMS_BYTES = 32764  # of one launch, since CUDA 12.1 on sm_70 and later
MAX_ROWS = 16  # B * T of a decode step, that the ops which mix channels take in one launch
MAX_SHARED_BYTES = 232448  # dynamic shared memory of one CTA on sm_90 and sm_100


def native(op: str, *backends: str) -> Callable:
    """Decorator: the function implements `op` on these native backends, by default on all, by calling `launch`."""

    def add(function):
        for backend in backends or library.NATIVE:
            register(op, backend, function)
        return function

    return add


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """How TMA sees a buffer of a launch: a dense row-major tensor, of which the kernel copies boxes to and from shared memory.

    buffer: its number among the inputs and then the outputs. dtype: of the elements, one of TensorMap.DTYPES; it need not be the
    buffer's. shape and box: 1 to 5 sizes in elements, outermost first; at most 256 in a box. Rows, that is all strides but the
    innermost, and the innermost size of a box have a multiple of 16 bytes. swizzle: 0, 32, 64 or 128 bytes, which the
    innermost size of a box must not exceed. Elements beyond `shape` are read as zeros and never written.
    """

    buffer: int
    dtype: str
    shape: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0

    DTYPES = {"uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "float16": 6, "float32": 7, "bfloat16": 9}  # of the driver

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def numbers(self, slot: int) -> list[int]:
        """What the handler reads: buffer, type, swizzle, rank, then 5 sizes, 4 strides in bytes, 5 box sizes, innermost first."""
        shape, box = self.shape[::-1], self.box[::-1]
        strides = [math.prod(shape[:i]) * jnp.dtype(self.dtype).itemsize for i in range(1, len(shape))]
        padded = [[*sizes, *[0] * (count - len(sizes))] for sizes, count in ((shape, 5), (strides, 4), (box, 5))]
        return [slot, self.DTYPES[self.dtype], (0, 32, 64, 128).index(self.swizzle), len(shape), *sum(padded, [])]


def _scalar(value) -> bytes:
    if isinstance(value, (bool, int, np.integer)):
        return np.int32(value).tobytes()
    return np.float32(value).tobytes()


def launch(
    op: str,
    module: str,
    kernel: str,
    *,
    grid: Sequence[int],
    block: int,
    inputs: Sequence[jax.Array | None],
    outputs: Sequence[jax.ShapeDtypeStruct | None],
    scalars: Sequence[int | float] = (),
    cluster: Sequence[int] = (1, 1, 1),
    shared_bytes: int = 0,
    aliases: dict[int, int] | None = None,
    tensor_maps: Sequence[TensorMap] = (),
    early: Sequence[int] = (),
    late: bool = False,
) -> tuple[jax.Array | None, ...]:
    """One launch of `kernel` of `module` (the stem of the .cu file) as the custom call dsv4.<op>.<backend>.

    grid counts CTAs, cluster CTAs per cluster, shared_bytes the dynamic shared memory of a CTA. The params struct holds the tensor
    maps, each in 128 bytes on a multiple of 128, a pointer per input and per output in order, then the scalars: int32 for a
    Python int, float32 for a float. aliases maps an input to the output that updates it in place. Tensor maps are encoded at each
    execution from the buffers' addresses then. In a chain (chain.py) the kernel reads the inputs `early`, besides what no launch of
    the chain writes, before it waits for the launches in front of it; a kernel that is `late` lets the next one start only after it has
    waited itself. A launch whose early inputs may not be there yet does not start early. Returns one array (or None) per output.
    ValueError if the launch is larger than a device allows, or a tensor map larger than its buffer.
    """
    backend = current()
    grid = [*grid, 1, 1][:3]
    if min(grid) < 1 or grid[0] > 2**31 - 1 or max(grid[1:]) > 65535 or not 1 <= block <= 1024:
        raise ValueError(f"{op} on {backend} wants a grid of {grid} CTAs of {block} threads, which no device launches; use smaller shapes.")
    if shared_bytes > MAX_SHARED_BYTES:
        raise ValueError(
            f"{op} on {backend} wants {shared_bytes} bytes of shared memory for these shapes, a CTA has {MAX_SHARED_BYTES}; "
            "use smaller shapes or backend('xla')."
        )
    packed = b"".join(_scalar(s) for s in scalars)
    slots, arguments, shapes, argument_of, result_of = [], [], [], {}, {}
    for i, x in enumerate(inputs):
        if x is not None:
            argument_of[i] = len(arguments)
            arguments.append(x)
        slots.append(argument_of.get(i, -1))
    for i, shape in enumerate(outputs):
        if shape is not None:
            result_of[i] = len(shapes)
            shapes.append(shape)
        slots.append(len(arguments) + result_of[i] if shape is not None else -1)
    align = 128 if tensor_maps else 8  # of the params struct
    if -(-(128 * len(tensor_maps) + 8 * len(slots) + len(packed)) // align) * align > MAX_PARAMS_BYTES:
        raise ValueError(
            f"{op} on {backend} has {len(tensor_maps)} tensor maps, {len(slots)} pointers and {len(packed)} bytes of scalars, more than "
            f"{MAX_PARAMS_BYTES} bytes."
        )
    for m in tensor_maps:
        whole = [*inputs, *outputs][m.buffer]
        if m.nbytes > whole.size * whole.dtype.itemsize:
            raise ValueError(
                f"{op} on {backend} maps {m.dtype} {m.shape} onto a buffer of {whole.dtype.name} {whole.shape}, which is smaller."
            )
    call = jax.ffi.ffi_call(
        library.register(op, backend),
        tuple(shapes),
        input_output_aliases={argument_of[i]: result_of[o] for i, o in (aliases or {}).items()},
    )
    results = call(
        *arguments,
        launches=np.int64(1),
        arch=backend,
        module=module,
        kernel=kernel,
        grid=np.asarray(grid, np.int64),
        block=np.asarray([block, 1, 1], np.int64),
        cluster=np.asarray([*cluster, 1, 1][:3], np.int64),
        shared_bytes=np.int64(shared_bytes),
        tensor_maps=np.asarray([n for m in tensor_maps for n in m.numbers(slots[m.buffer])], np.int64),
        slots=np.asarray(slots, np.int64),
        early=np.asarray([i for i in early if slots[i] >= 0], np.int64),
        late=np.int64(late),
        inputs=np.int64(len(inputs)),
        scalars=np.frombuffer(packed, np.uint8),
    )
    return tuple(results[result_of[i]] if i in result_of else None for i in range(len(outputs)))
