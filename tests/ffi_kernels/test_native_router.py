"""route_tokens on the native backends against the reference: learned and hash routing, ties, hostile ids."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops

BF16, F32 = ml_dtypes.bfloat16, np.float32
# D, E, picks
TINY, SMALL, FLASH, PRO = (256, 8, 2), (128, 40, 6), (4096, 256, 6), (7168, 384, 6)


def on_cpu(*args, **static):
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        return jax.tree.map(np.asarray, jax.jit(functools.partial(ops.route_tokens, **static))(*args))


def native(*args, **static):
    return jax.tree.map(np.asarray, jax.jit(functools.partial(ops.route_tokens, **static))(*args))


def inputs(rows, hidden, experts, dtype=BF16, seed=0):
    """x, gate and a bias whose steps are much wider than the error of a score: no pick depends on rounding."""
    rng = np.random.default_rng([seed, rows, hidden, experts])
    x = rng.standard_normal((rows, hidden)).astype(BF16)
    gate = (rng.standard_normal((experts, hidden)) * hidden**-0.5).astype(dtype)
    return x, gate, (rng.permutation(experts) * 0.05).astype(F32)


def sizes(backend, shape):
    if backend == "sim" and shape in (FLASH, PRO):
        pytest.skip("this shape takes the interpreter minutes")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("shape", [TINY, SMALL, FLASH, PRO])
def test_learned(backend, shape, rows, dtype):
    sizes(backend, shape)
    hidden, experts, count = shape
    x, gate, bias = inputs(rows, hidden, experts, dtype)
    ids, weights = native(x, gate, bias, None, None, count=count, scale=2.5)
    want_ids, want = on_cpu(x, gate, bias, None, None, count=count, scale=2.5)
    assert_close(ids, want_ids, "exact")
    assert_close(weights, want, "sum")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("shape", [TINY, SMALL, FLASH, PRO])
def test_hash(backend, shape, rows, dtype):
    """By token through the table and by row; tokens and ids out of range are clipped."""
    sizes(backend, shape)
    hidden, experts, count = shape
    x, gate, _ = inputs(rows, hidden, experts, dtype)
    rng = np.random.default_rng(rows)
    table = rng.integers(0, experts, (50, count)).astype(np.int32)
    table[0, 0], table[49, 1] = np.iinfo(np.int32).min, experts + 7
    tokens = rng.integers(0, 50, rows).astype(np.int32)
    tokens[0] = -5
    tokens[-1] = 2**31 - 1
    for args in [(table, tokens), (table[np.clip(tokens, 0, 49)], None)]:
        ids, weights = native(x, gate, None, *args, count=count, scale=1.5)
        want_ids, want = on_cpu(x, gate, None, *args, count=count, scale=1.5)
        assert_close(ids, want_ids, "exact")
        assert_close(weights, want, "sum")


def test_ties_and_nan(backend):
    """Equal experts: the lower id first. A nan is picked first; a bias of -inf last."""
    x, gate, _ = inputs(3, 128, 40)
    gate = np.repeat(gate[:5], 8, axis=0)
    zeros = np.zeros(40, F32)
    ids, weights = native(x, gate, zeros, None, None, count=6, scale=1.0)
    want_ids, want = on_cpu(x, gate, zeros, None, None, count=6, scale=1.0)
    assert_close(ids, want_ids, "exact")
    assert_close(weights, want, "sum")
    bias = np.full(40, -np.inf, F32)
    bias[[7, 33]] = 0, np.nan
    ids, _ = native(x, gate, bias, None, None, count=6, scale=1.0)
    assert ids.tolist() == [[33, 7, 0, 1, 2, 3]] * 3
    x = np.array(x)
    x[1, 5] = np.nan
    ids, weights = native(x, gate, zeros, None, None, count=6, scale=1.0)
    assert ids[1].tolist() == [0, 1, 2, 3, 4, 5] and np.isnan(weights[1]).all() and np.isfinite(weights[[0, 2]]).all()


def test_large_logits(backend):
    """softplus far from zero on both sides."""
    x = np.ones((1, 128), BF16)
    gate = np.outer([300, -300, 80, -80, 0, 20, -20, 5], np.ones(128) / 128).astype(BF16)
    args = x, gate, None, np.arange(8, dtype=np.int32)[None], None
    assert_close(native(*args, count=8, scale=1.0)[1], on_cpu(*args, count=8, scale=1.0)[1], "sum")


@pytest.mark.parametrize("shape", [SMALL, FLASH, PRO])
def test_batch_invariance(backend, shape):
    """A row's bits are the same alone and in any slot of 2, 7 and 16."""
    sizes(backend, shape)
    hidden, experts, count = shape
    x, gate, bias = inputs(16, hidden, experts)
    table = np.arange(16 * count, dtype=np.int32).reshape(16, count) % experts
    for given in ((bias, None, None), (None, table, None)):
        def of(rows):
            return native(x[rows], gate, given[0], None if given[1] is None else given[1][rows], None, count=count, scale=1.5)

        for slots in ([0, 5], [3, 5, 1, 0, 2, 9, 15], list(range(16))):
            ids, weights = of(slots)
            for i, r in enumerate(slots):
                alone_ids, alone = of([r])
                assert_bits(ids[i], alone_ids[0])
                assert_bits(weights[i], alone[0])


def test_refusals(backend):
    def shaped(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def bias(e):
        return shaped(e, dtype=jnp.float32)

    table, tokens = shaped(50, 2, dtype=jnp.int32), shaped(3, dtype=jnp.int32)
    for args, count, says in [
        ((shaped(17, 64), shaped(8, 64), bias(8), None, None), 2, "16 rows"),
        ((shaped(1, 64), shaped(513, 64), bias(513), None, None), 2, "512 experts"),
        ((shaped(1, 64), shaped(32, 64), bias(32), None, None), 9, "8 picks"),
        ((shaped(1, 60), shaped(8, 60), bias(8), None, None), 2, "multiples of 8"),
        ((shaped(1, 64, dtype=jnp.float32), shaped(8, 64), bias(8), None, None), 2, "bf16 x"),
        ((shaped(1, 64), shaped(8, 64), None, None, None), 2, "not both or none"),
        ((shaped(1, 64), shaped(8, 64), bias(8), table, tokens), 2, "not both or none"),
        ((shaped(2, 64), shaped(8, 64), None, table, tokens), 2, "do not fit"),
        ((shaped(3, 64), shaped(8, 64), None, table, tokens), 3, "do not fit"),
        ((shaped(3, 64), shaped(8, 32), bias(8), None, None), 3, "do not fit"),
        ((shaped(3, 64), shaped(8, 64), bias(8), None, None), 9, "do not fit"),
    ]:
        with pytest.raises(ValueError, match=says):
            jax.eval_shape(functools.partial(ops.route_tokens, count=count, scale=1.0), *args)
