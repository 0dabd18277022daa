"""The one place where a backend is chosen.

Backends: `xla` (reference.py and the fused references: plain jnp, anywhere), `sm_90a` and `sm_100a` (native kernels on
that device), `sim` (their PTX, interpreted on the CPU). A backend is resolved once per trace: forced by `backend(...)`
or the variable DSV4_BACKEND, else the native one of the default device, else `xla`. A model says in which dtype its
activations are: where no native kernels exist for them (all but bf16), `xla` is what it runs on unless forced. An op that
a backend lacks is an error that names both: nothing falls back silently; a GPU whose kernels were not built is told so once.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from typing import Callable

import jax.numpy as jnp

from ffi_kernels import (
    fused_reference_attention, fused_reference_entries, fused_reference_linear, fused_reference_norm, fused_reference_router,
    library, reference,
)  # fmt: skip

REFERENCES = (
    reference, fused_reference_attention, fused_reference_entries, fused_reference_linear, fused_reference_norm,
    fused_reference_router,
)  # fmt: skip
_OPS: dict[str, dict[str, Callable]] = {
    "xla": {n: f for m in REFERENCES for n, f in vars(m).items() if getattr(f, "__module__", "") == m.__name__},
    **{name: {} for name in library.NATIVE},
}
NATIVE_ACTIVATIONS = ("bfloat16",)  # of a model whose every op the native kernels serve
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("dsv4_backend", default=None)


def register(op: str, backend: str, function: Callable) -> None:
    """Make `function` the implementation of `op` on a native backend."""
    _OPS[backend][op] = function


def implements(backend: str, op: str) -> bool:
    """Whether a backend has `op`, built or not."""
    return op in _OPS[backend]


def backends() -> tuple[str, ...]:
    """Names of the backends that this build has (whether or not their device is here)."""
    return tuple(name for name in _OPS if name == "xla" or library.why_not(name) is None)


def _forced_name() -> str | None:
    return _forced.get() or os.environ.get("DSV4_BACKEND") or None


def arch() -> str | None:
    """The GPU architecture that an op traced now is for: the forced backend's, else the default device's; None for others.

    Unlike `current` it does not ask whether this build has kernels for it: what needs none of them asks here.
    """
    name = _forced_name()
    return name if name in library.ARCHS else library.of_device()


def _of_device() -> str:
    name = library.of_device()
    if name is None:
        return "xla"
    if (missing := library.why_not(name)) is not None:
        warnings.warn(f"running on backend 'xla', which is slow on this GPU: {missing}", stacklevel=3)
        return "xla"
    return name


def current(activations=None) -> str:
    """The backend that an op traced now would use. ValueError for an unknown one, NotImplementedError for one not built.

    activations: the dtype of a model's, to ask for the backend of all its ops together: 'xla' where native kernels serve
    only some of them, unless a backend is forced (whose ops then refuse what they do not serve).
    """
    name = _forced_name()
    if not name:
        served = activations is None or str(jnp.dtype(activations)) in NATIVE_ACTIVATIONS
        return _of_device() if served else "xla"
    if name not in _OPS:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(_OPS)}.")
    if name in library.NATIVE and (missing := library.why_not(name)) is not None:
        raise NotImplementedError(missing)
    return name


@contextlib.contextmanager
def backend(name: str):
    """Force every op traced inside to the backend `name`; ValueError or NotImplementedError if this build lacks it.

    A function that was jitted before keeps the backend of its first trace: enter the context first.
    """
    token = _forced.set(name)
    try:
        current()
        yield
    finally:
        _forced.reset(token)


def implementation(op: str) -> Callable:
    """The implementation of `op` on the current backend; NotImplementedError names the op and the backend."""
    name = current()
    try:
        return _OPS[name][op]
    except KeyError:
        raise NotImplementedError(
            f"op {op!r} has no implementation on backend {name!r}; use backend('xla') for it."
        ) from None
