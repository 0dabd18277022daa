"""The native library: where it lies, what it holds, and its registration with XLA. Not here: launches (`launch.py`).

The library and the compiled kernels come from `pip install` or `python -m ffi_kernels.build`. A machine without them
still has the `xla` backend; `why_not` says in a sentence what a backend lacks.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from pathlib import Path

import jax

ARCHS = ("sm_90a", "sm_100a")
SIM = "sim"
NATIVE = (*ARCHS, SIM)
BUILT_HERE = Path(__file__).parents[1] / "build" / "native"


def directory() -> Path | None:
    """Where the library lies: $DSV4_NATIVE, what `python -m ffi_kernels.build` made, or what pip installed."""
    installed = Path(sysconfig.get_path("platlib")) / "ffi_kernels" / "_native"
    forced = os.environ.get("DSV4_NATIVE")
    places = [Path(forced)] if forced else [BUILT_HERE, Path(__file__).parent / "_native", installed]
    return next((place for place in places if (place / "libdsv4.so").is_file()), None)


@functools.cache
def _library() -> ctypes.CDLL:
    where = directory()
    library = ctypes.CDLL(str(where / "libdsv4.so"))
    for suffix, named in ((".cubin", lambda arch: arch), (".ptx", lambda arch: SIM)):
        for path in sorted(where.glob(f"*{suffix}")):
            module, arch = path.name.removesuffix(suffix).split(".")
            library.dsv4_add_image(named(arch).encode(), module.encode(), str(path).encode())
    return library


def host_function(name: str):
    """A plain C function of the library (`native/host/`) as ctypes knows it, or None where this build does not have it."""
    return None if directory() is None else getattr(_library(), name, None)


@functools.cache
def why_not(backend: str) -> str | None:
    """None if this build has the kernels of `backend`, else a sentence that says what is missing and how to get it."""
    where = directory()
    if where is None:
        return (
            f"backend {backend!r} needs the native library, which is in none of the places where it is installed; run "
            "python -m ffi_kernels.build (it needs a C++17 compiler and nvcc), or use backend('xla')."
        )
    images = "*.ptx" if backend == SIM else f"*.{backend}.cubin"
    if not any(where.glob(images)):
        return f"backend {backend!r} needs {images} in {where}; run python -m ffi_kernels.build where nvcc is."
    if backend == SIM and not hasattr(_library(), "dsv4_simulate"):
        return f"the library in {where} was built without the interpreter; build it with -DDSV4_INTERPRETER=ON."
    return None


def default_device() -> jax.Device:
    """The device that JAX uses unless told otherwise."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def of_device() -> str | None:
    """The native backend of the default device: 'sm_90a' or 'sm_100a', None for any other device."""
    device = default_device()
    if device.platform not in ("gpu", "cuda"):
        return None
    name = f"sm_{str(device.compute_capability).replace('.', '')}a"
    return name if name in ARCHS else None


@functools.cache
def register(op: str, backend: str) -> str:
    """The target of `op` on `backend`, registered with XLA: 'dsv4.<op>.<backend>'."""
    if (missing := why_not(backend)) is not None:
        raise NotImplementedError(f"op {op!r}: {missing}")
    target, library = f"dsv4.{op}.{backend}", _library()
    if backend == SIM:
        jax.devices("cpu")  # XLA:CPU forgets handlers that were registered before it started
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library.dsv4_simulate), platform="cpu")
    else:
        stages = {"initialize": library.dsv4_initialize, "execute": library.dsv4_execute}
        jax.ffi.register_ffi_target(target, {k: jax.ffi.pycapsule(v) for k, v in stages.items()}, platform="CUDA")
    return target
