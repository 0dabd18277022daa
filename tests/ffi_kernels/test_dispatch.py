"""The choice of a backend, its refusals, and that the xla backend differentiates and vectorises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close

import ffi_kernels as ops
from ffi_kernels import dispatch, library


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("DSV4_BACKEND", raising=False)


def test_xla_is_always_there():
    assert "xla" in ops.backends()
    with ops.backend("xla"):
        assert ops.current() == "xla"


def test_unknown_backend_is_refused():
    sentence = r"backend 'cuda' is unknown; choose one of xla, .*\."
    before = ops.current()
    with pytest.raises(ValueError, match=sentence):
        with ops.backend("cuda"):
            raise AssertionError("the body must not run")
    assert ops.current() == before, "a refused backend leaves nothing behind"


def test_a_native_backend_that_was_not_built_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("DSV4_NATIVE", str(tmp_path))
    library.why_not.cache_clear()
    for name in library.NATIVE:
        with pytest.raises(NotImplementedError, match=rf"backend '{name}' needs the native library.*python -m ffi_kernels.build"):
            with ops.backend(name):
                pass
    library.why_not.cache_clear()


def test_the_variable_chooses_and_the_context_wins(monkeypatch):
    monkeypatch.setitem(dispatch._OPS, "other", {"hadamard": lambda x: x + 1})
    monkeypatch.setenv("DSV4_BACKEND", "other")
    assert ops.current() == "other"
    assert np.asarray(ops.hadamard(jnp.zeros(4))).tolist() == [1] * 4
    with ops.backend("xla"):
        assert ops.current() == "xla"
        assert np.asarray(ops.hadamard(jnp.zeros(4))).tolist() == [0] * 4
        with ops.backend("other"):
            assert ops.current() == "other"
        assert ops.current() == "xla"
    monkeypatch.setenv("DSV4_BACKEND", "rocm")
    with pytest.raises(ValueError, match="backend 'rocm' is unknown"):
        ops.hadamard(jnp.zeros(4))


def test_models_that_native_kernels_do_not_serve_run_on_xla(monkeypatch):
    monkeypatch.setattr(library, "of_device", lambda: "sm_90a")
    monkeypatch.setattr(library, "why_not", lambda name: None)
    assert ops.current() == ops.current("bfloat16") == ops.current(jnp.bfloat16) == "sm_90a"
    assert ops.current(jnp.float32) == "xla"
    with ops.backend("sm_90a"):
        assert ops.current(jnp.float32) == "sm_90a", "a forced backend stays"
    monkeypatch.setenv("DSV4_BACKEND", "sm_100a")
    assert ops.current(jnp.float32) == "sm_100a"


def test_the_arch_is_the_forced_one_or_the_devices(monkeypatch):
    """Built or not: lowering for an architecture needs no kernels of this project."""
    monkeypatch.setattr(library, "of_device", lambda: "sm_90a")
    assert dispatch.arch() == "sm_90a"
    monkeypatch.setenv("DSV4_BACKEND", "sm_100a")
    assert dispatch.arch() == "sm_100a"
    with ops.backend("xla"):
        assert dispatch.arch() == "sm_90a", "the reference runs on the device as well"
    monkeypatch.delenv("DSV4_BACKEND")
    monkeypatch.setattr(library, "of_device", lambda: None)
    assert dispatch.arch() is None


def test_an_op_that_a_backend_lacks_names_both(monkeypatch):
    monkeypatch.setitem(dispatch._OPS, "other", {})
    with ops.backend("other"):
        with pytest.raises(NotImplementedError, match=r"op 'rms_norm' has no implementation on backend 'other'; use backend\('xla'\)"):
            ops.rms_norm(jnp.ones((2, 8)), None, 1e-6)


def test_every_public_op_has_a_meaning():
    kinds = (ops.backend, ops.backends, ops.chained, ops.current, ops.round_to)
    public = {n for n in ops.__all__ if callable(f := getattr(ops, n)) and not isinstance(f, type) and f not in kinds}
    assert public <= set(dispatch._OPS["xla"])


# --- transformations of the xla backend --------------------------------------------------------------------------


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


KEYS, MASK, SINK = normal(1, 2, 9, 16), np.random.default_rng(2).random((2, 3, 9)) < 0.6, normal(3, 4)
MASK[0, 1] = False  # a token that sees nothing must not poison the gradient
HC = dict(iterations=20, eps=1e-6, norm_eps=1e-6)
WEIGHT, FN, BASE, SCALE = normal(4, 6, 16), 0.3 * normal(5, 24, 64), normal(6, 24), 0.3 * normal(7, 3)
FUNCTIONS = {
    "linear": ((5, 16), lambda x: ops.linear(x, WEIGHT)),
    "attention": ((2, 3, 4, 16), lambda q: ops.attention(q, KEYS, jnp.asarray(MASK), SINK)),
    "attention keys": ((2, 9, 16), lambda k: ops.attention(normal(8, 2, 3, 4, 16), k, jnp.asarray(MASK), SINK)),
    "hc_pre": ((2, 4, 16), lambda x: jnp.concatenate([p.ravel() for p in ops.hc_pre(x, FN, BASE, SCALE, **HC)])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient(name):
    """The derivative along a random direction against a central difference: steps of 1e-2, fp32, so 1% at best."""
    shape, function = FUNCTIONS[name]
    with ops.backend("xla"):
        x, direction = normal(9, *shape), normal(10, *shape)
        weights = normal(11, *jax.eval_shape(function, x).shape)
        loss = jax.jit(lambda x: (function(x) * weights).sum())
        gradient = jax.jit(jax.grad(loss))(x)
        assert np.isfinite(gradient).all()
        slope = (loss(x + 1e-2 * direction) - loss(x - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(name):
    shape, function = FUNCTIONS[name]
    with ops.backend("xla"):
        x = normal(12, 3, *shape)
        together, one = jax.jit(jax.vmap(function))(x), jax.jit(function)
        for i in range(3):
            assert_close(together[i], one(x[i]), "sum")
