"""Fixtures of the op tests; the end of each test as the record of the interpreter's launches sees it."""

import sys

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(params=["eager", "jit"])
def run(request):
    """Applies a function as it is, or compiled: XLA rewrites divisions and constants only when it compiles."""
    if request.param == "jit":
        return jax.jit
    return lambda f: lambda *args: f(*jax.tree.map(jnp.asarray, args))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that ran interpreter launches which a device has recorded must have made all of them (sim_record.py)."""
    result = yield
    if "sim_record" in sys.modules:
        sys.modules["sim_record"].REPLAY.finish(sys.modules["sim_draws"].current_test())
    return result
