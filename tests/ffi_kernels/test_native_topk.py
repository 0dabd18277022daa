"""top_entries on the native backends: exactly the best entries, whatever the scores, lengths and ties."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits

import ffi_kernels as ops

BF16, F32 = ml_dtypes.bfloat16, np.float32


def native(scores, visible, count):
    return np.asarray(jax.jit(ops.top_entries, static_argnums=2)(scores, visible, count))


def best(scores, visible, count):
    """By a stable sort in numpy: nan first, then by falling score, then by rising index."""
    out = np.full((*visible.shape, min(count, scores.shape[-1])), -1, np.int32)
    for at in np.ndindex(visible.shape):
        row = scores[at][: max(int(visible[at]), 0)].astype(F32)
        order = np.lexsort((-np.where(np.isnan(row), np.inf, row), ~np.isnan(row)))[:count]
        out[at][: len(order)] = np.sort(order)
    return out


@functools.cache
def scores_of(kind, rows, entries):
    rng = np.random.default_rng([len(kind), rows, entries])
    scores = rng.standard_normal((rows, 1, entries)).astype(F32)
    if kind == "ties":
        scores = rng.choice(np.array([-np.inf, -2, -1, -0.0, 0.0, 1, 2, np.inf], F32), scores.shape)
    if kind == "equal":
        scores[:] = -3.5
    if kind == "relu":
        scores = np.maximum(scores - 2, 0)
    if kind == "close":  # the last winner is decided by the last bits
        scores = (np.float32(1) + scores * np.float32(2e-6)).astype(F32)
    if kind == "odd":  # nan of both signs, subnormals, both infinities
        special = np.array([np.nan, -np.nan, 1e-40, -1e-40, np.inf, -np.inf, -0.0, 3e38, -3e38], F32)
        at = rng.random(scores.shape) < 0.1
        scores[at] = rng.choice(special, at.sum())
    return scores


KINDS = ["normal", "ties", "equal", "relu", "close", "odd"]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries, count", [(61, 16), (1024, 64), (5000, 100), (9001, 512)])
def test_small(backend, kind, entries, count, dtype):
    """One CTA and clusters of two and four, whole vectors and odd row lengths."""
    scores = scores_of(kind, 2, entries).astype(dtype)
    visible = np.array([[entries], [entries - 13]], np.int32)
    assert_bits(native(scores, visible, count), best(scores, visible, count))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, entries, count", [(1, 262144, 512), (3, 262144, 1024), (16, 32768, 512), (5, 65537, 1024)])
def test_large(backend, kind, rows, entries, count):
    if backend == "sim":
        pytest.skip("this shape takes the interpreter minutes")
    scores = scores_of(kind, rows, entries)
    visible = np.full((rows, 1), entries, np.int32)
    visible[rows // 2 :] -= 5000 * np.arange(rows - rows // 2, dtype=np.int32)[:, None] % entries
    want = best(scores, visible, count)
    for _ in range(3):
        assert_bits(native(scores, visible, count), want)


@pytest.mark.parametrize("entries", [64, 9001])
def test_visible_may_be_anything(backend, entries):
    """Lengths from INT_MIN to INT_MAX, below, at and above the count; scores beyond a length may be nan."""
    scores = np.repeat(scores_of("normal", 1, entries), 9, axis=0).reshape(3, 3, entries)
    least, most = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    visible = np.array([[0, -1, least], [1, 15, 16], [17, 40, most]], np.int32)
    seen = np.arange(entries) < visible[..., None]
    scores = np.where(seen, scores, np.nan).astype(F32)
    assert_bits(native(scores, visible, 16), best(scores, visible, 16))


@pytest.mark.parametrize("entries, count", [(1, 1), (7, 7), (7, 100), (33, 32), (130, 129)])
def test_tiny(backend, entries, count):
    scores = scores_of("normal", 2, entries)
    visible = np.array([[entries], [entries // 2]], np.int32)
    assert_bits(native(scores, visible, count), best(scores, visible, count))


def test_reference_is_the_same_function(backend):
    scores = scores_of("odd", 2, 300)
    visible = np.array([[300], [50]], np.int32)
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        want = np.asarray(jax.jit(ops.top_entries, static_argnums=2)(scores, visible, 64))
    assert_bits(want, best(scores, visible, 64))
    assert_bits(native(scores, visible, 64), want)


def test_refusals(backend):
    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    visible = shaped(1, 1, dtype=jnp.int32)
    for scores, count, says in [
        (shaped(1, 1, 2**18 + 1), 8, "262144 entries"), (shaped(1, 1, 64, dtype=jnp.float16), 8, "float16"),
        (shaped(1, 2, 64), 8, "visible"), (shaped(1, 1, 64), 0, "count 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            jax.eval_shape(lambda s, v: ops.top_entries(s, v, count), scores, visible)
