"""Which backends a test can run on here; the others are skipped with the reason, or fail under --require-gpu."""

import pytest

from ffi_kernels import library

def refusal(name: str) -> str | None:
    """None if backend `name` is built and its device is here, else why not."""
    if name == "xla":
        return None
    if (missing := library.why_not(name)) is not None:
        return missing
    if name in library.ARCHS and library.of_device() != name:
        return f"backend {name!r} needs a device of that architecture, this process runs on {library.of_device() or 'none'}."
    return None


def require(request, name: str) -> str:
    """`name`, or a skip. One kind of GPU is enough: another architecture's absence is no failure under --require-gpu."""
    if (reason := refusal(name)) is not None:
        other = name in library.ARCHS and library.of_device() not in (None, name)
        strict = request.config.getoption("--require-gpu") and not other
        (pytest.fail if strict else pytest.skip)(reason)
    return name
