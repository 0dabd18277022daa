"""The one place where a backend is chosen.

Backends: `xla` (reference.py, anywhere). The native ones (`sm_90a`, `sm_100a`, `sim`) register here when they are
built. A backend is resolved once per trace: forced by `backend(...)` or the variable DSV4_BACKEND, else the best one
registered for the device. An op that a backend lacks is an error that names both: nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from typing import Callable

from ffi_kernels import reference

_OPS: dict[str, dict[str, Callable]] = {
    "xla": {n: f for n, f in vars(reference).items() if getattr(f, "__module__", "") == reference.__name__}
}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("dsv4_backend", default=None)


def backends() -> tuple[str, ...]:
    """Names of the backends that this build has."""
    return tuple(_OPS)


def current() -> str:
    """The backend that an op traced now would use."""
    name = _forced.get() or os.environ.get("DSV4_BACKEND") or "xla"
    if name not in _OPS:
        raise ValueError(f"backend {name!r} is not part of this build, which has {', '.join(_OPS)}; choose one of these.")
    return name


@contextlib.contextmanager
def backend(name: str):
    """Force every op traced inside to the backend `name`; ValueError if this build lacks it.

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
