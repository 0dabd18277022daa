"""The launches of the native ops without XLA: JAX computes on the CPU, and each launch goes to a GPU through the CUDA driver alone.

`pytest --by-driver device -k sm_90a tests/ffi_kernels/test_native_*.py` runs the tests of the kernels so, for tools that look over a
program's shoulder (`sanitize.py`): no kernel but ours runs, one at a time, and every buffer is an allocation of its own, so that not a byte
beyond it is anybody's. `--by-driver interpreter` has the interpreter behind the same path. Chains (chain.py) come one launch
after another.
"""

import functools
import os
import threading

import jax
import numpy as np
import sim_driver

from ffi_kernels import library

SECONDS = 300  # that a launch may take: tools make them slow
_one_at_a_time = threading.Lock()
_launched: set[str] = set()  # names of kernels


def install() -> None:
    """Puts this in the place of XLA's custom calls in this process; the default device counts as a GPU of the driver."""
    jax.config.update("jax_platforms", "cpu")  # JAX_PLATFORMS would be too late where a plugin of pytest has imported JAX
    arch = _arch()
    library.of_device = lambda: arch
    by_xla = jax.ffi.ffi_call

    def ffi_call(target, shapes, **how):
        return by_driver(shapes, how.get("input_output_aliases") or {}) if target.startswith("dsv4.") else by_xla(target, shapes, **how)

    jax.ffi.ffi_call = ffi_call


def _arch() -> str:
    if not sim_driver.ON_DEVICE:
        return "sm_90a"
    import sim_device

    sim_device.SECONDS = SECONDS
    return sim_device.arch()


def by_driver(shapes, aliases: dict[int, int]):
    """What `jax.ffi.ffi_call` returns for an op's target: takes the arguments, and the attributes of `launch`."""

    def call(*arguments, **attributes):
        return jax.pure_callback(functools.partial(_launch, shapes, aliases, attributes), shapes, *arguments)

    return call


def _launch(shapes, aliases, attributes, *arguments) -> tuple:
    if len(attributes["tensor_maps"]):
        raise NotImplementedError(f"{attributes['kernel']} takes tensor maps, which this way to the driver does not encode; run it by XLA.")
    given = [np.ascontiguousarray(x).view() for x in arguments]
    results = [_poisoned(t) for t in shapes]
    for argument, result in aliases.items():
        results[result] = given[argument] = given[argument].copy()
    for x in set(range(len(given))) - set(aliases):
        given[x].flags.writeable = False
    buffers = [*given, *results]
    pointers = [None if slot < 0 else buffers[slot] for slot in attributes["slots"]]
    image = library.directory() / f"{attributes['module']}.{attributes['arch']}.{'cubin' if sim_driver.ON_DEVICE else 'ptx'}"
    scalars = attributes["scalars"].view(np.int32).tolist()
    with _one_at_a_time:
        _note(attributes["kernel"])
        sim_driver.run(
            image, attributes["kernel"], [*pointers, *scalars], grid=attributes["grid"].tolist(), block=attributes["block"].tolist(),
            cluster=attributes["cluster"].tolist(), shared_bytes=int(attributes["shared_bytes"]),
        )  # fmt: skip
    return tuple(results)


def _note(kernel: str) -> None:
    """Keeps the name in the file $DSV4_LAUNCHED, if there is one."""
    if kernel not in _launched and (path := os.environ.get("DSV4_LAUNCHED")):
        with open(path, "a") as file:
            file.write(f"{kernel}\n")
    _launched.add(kernel)


def _poisoned(shape) -> np.ndarray:
    """An array full of a byte that no result is made of."""
    return np.full(shape.size * np.dtype(shape.dtype).itemsize, 0x7D, np.uint8).view(shape.dtype).reshape(shape.shape)
