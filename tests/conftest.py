"""The whole suite sees eight CPU devices; GPU tests run where there is one; torch keeps to one thread."""

import os

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, whose threads otherwise fight with XLA's


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, rather than skip, what needs a GPU that is missing")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    import jax

    try:
        jax.devices("gpu")
    except RuntimeError as error:
        sentence = f"needs an NVIDIA GPU and jax with CUDA: {str(error).splitlines()[0]}"
        (pytest.fail if item.config.getoption("--require-gpu") else pytest.skip)(sentence)


def _refusal(name):
    from ffi_kernels import library

    if (missing := library.why_not(name)) is not None:
        return missing
    if name in library.ARCHS and library.of_device() != name:
        return f"backend {name!r} needs a device of that architecture, this process runs on {library.of_device() or 'none'}."
    return None


@pytest.fixture(params=["sim", pytest.param("sm_90a", marks=pytest.mark.gpu), pytest.param("sm_100a", marks=pytest.mark.gpu)])
def backend(request):
    """Name of a native backend, forced for the whole test; `ops.backend('xla')` inside gives the reference."""
    import ffi_kernels as ops
    from ffi_kernels import library

    name = request.param
    if (reason := _refusal(name)) is not None:
        # one kind of GPU is enough: another architecture's absence is no failure under --require-gpu
        other = name in library.ARCHS and library.of_device() not in (None, name)
        strict = request.config.getoption("--require-gpu") and not other
        (pytest.fail if strict else pytest.skip)(reason)
    with ops.backend(name):
        yield name
