"""Fixtures of the op tests."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(params=["eager", "jit"])
def run(request):
    """Applies a function as it is, or compiled: XLA rewrites divisions and constants only when it compiles."""
    if request.param == "jit":
        return jax.jit
    return lambda f: lambda *args: f(*jax.tree.map(jnp.asarray, args))
