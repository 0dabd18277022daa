"""index_scores on the native backends against the reference: all kernels, any exponents, hostile lengths."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops
from ffi_kernels import indexer

BF16, F32 = ml_dtypes.bfloat16, np.float32
K = 128
# batch, tokens, heads, entries
SMALL = [(1, 1, 8, 40), (2, 2, 16, 33), (1, 3, 64, 64), (3, 1, 2, 300), (2, 1, 17, 131)]
KERNELS = {"bf16 16": 16, "bf16 64": 64, "fp4 16": 16, "fp4 64": 64, "fp4 wgmma": 64}  # and their heads
FP4 = [name for name in KERNELS if name.startswith("fp4")]
LARGE = [(1, 1, 64, 32768), (16, 1, 64, 2048), (4, 4, 64, 1001), (1, 2, 64, 262144)]


@functools.cache
def on_cpu(op):
    def call(*args):
        with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
            return jax.tree.map(np.asarray, jax.jit(getattr(ops, op))(*args))

    return call


def inputs(form, batch, tokens, heads, entries, seed=0):
    rng = np.random.default_rng([seed, batch, tokens, heads, entries])
    q, keys = rng.standard_normal((batch, tokens, heads, K)), rng.standard_normal((batch, entries, K))
    q, keys, weights = q.astype(BF16), keys.astype(BF16), rng.standard_normal((batch, tokens, heads)).astype(F32)
    if form == "fp4":
        q = on_cpu("dequantize")(on_cpu("quantize_mxfp4")(q)).astype(BF16)
        keys = on_cpu("quantize_mxfp4")(keys)
    return q, keys, weights


@pytest.fixture(params=KERNELS)
def kernel(request, backend, monkeypatch):
    """(form, heads) of a kernel, which serves these heads on every backend."""
    form, which = request.param.split()
    if which == "wgmma" and backend == "sm_100a":
        pytest.skip("sm_100a has no wgmma")
    monkeypatch.setattr(indexer, "WGMMA", (backend,) if which == "wgmma" else ())
    return form, KERNELS[request.param]


fp4_kernels = pytest.mark.parametrize("kernel", FP4, indirect=True)


def native(*args):
    return np.asarray(jax.jit(lambda *x: ops.index_scores(*x))(*args))  # traced anew: the kernel may have changed


def seen_only(scores, visible):
    entries = np.arange(scores.shape[-1])
    return np.where(entries < np.asarray(visible, np.int64)[..., None], scores, 0)


def sizes(backend, shape):
    if backend == "sim" and shape in LARGE:
        pytest.skip("this shape takes the interpreter minutes")


def test_the_choice_of_kernel(backend):
    """wgmma for FP4 keys and more than 16 heads, where the architecture has it."""
    chosen = {heads: indexer.scores_kernel(True, 1, heads).module for heads in (1, 16, 17, 64)}
    many = "indexer" if backend == "sm_100a" else "indexer_wgmma"
    assert chosen == {1: "indexer", 16: "indexer", 17: many, 64: many}
    assert {indexer.scores_kernel(False, 1, heads).module for heads in (16, 64)} == {"indexer_bf16"}


@pytest.mark.parametrize("form", ["fp4", "bf16"])
@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_against_reference(backend, shape, form):
    sizes(backend, shape)
    args = inputs(form, *shape)
    assert_close(native(*args), on_cpu("index_scores")(*args), "sum")


def test_visible_may_be_anything(kernel):
    """Lengths of 0, below 0 and beyond the capacity; what is beyond a length is never compared."""
    q, keys, weights = inputs(kernel[0], 3, 2, kernel[1], 70)
    visible = np.array([[0, -1], [np.iinfo(np.int32).min, 33], [2**31 - 1, 70]], np.int32)
    got = native(q, keys, weights, visible)
    assert_close(seen_only(got, visible), seen_only(on_cpu("index_scores")(q, keys, weights), visible), "sum")


def with_exponents(keys, seed, low, high):
    """The keys with random block exponents: some entries far apart (no integers), some near, some extreme."""
    rng = np.random.default_rng(seed)
    scale = (127 + rng.integers(low, high, keys.scale.shape)).astype(np.uint8)
    scale[:, 1::5] = 127 + rng.integers(0, 3, scale[:, 1::5].shape)  # near ones between them
    return ops.MXFP4Tensor(keys.data, scale)


@fp4_kernels
@pytest.mark.parametrize("low, high", [(-8, 8), (-70, -50), (50, 70)])
def test_any_exponents(kernel, low, high):
    q, keys, weights = inputs("fp4", 2, 2, kernel[1], 100)
    keys = with_exponents(keys, 1, low, high)
    q = np.array(q)
    q[0, 1, 3, 64:] *= BF16(2.0**-9)  # one head of one token that is no integers
    got, want = native(q, keys, weights), on_cpu("index_scores")(q, keys, weights)
    for at in np.ndindex(want.shape):  # magnitudes differ by 2**16 from entry to entry
        assert abs(got[at] - want[at]) <= 1e-4 * abs(want[at]) + 1e-5 * 2.0 ** float(keys.scale[at[0], at[2]].max() - 127.0), at


@pytest.mark.parametrize("wide", [False, True])
def test_weights_in_bf16_and_their_scale(kernel, wide):
    """The bits of weights that were scaled in fp32 before."""
    q, keys, weights = inputs(kernel[0], 2, 2, kernel[1], 70)
    if wide and kernel[0] == "fp4":
        keys = with_exponents(keys, 1, -8, 8)
    weights, scale = weights.astype(BF16), 2.0**-6.5
    got = jax.jit(functools.partial(ops.index_scores, weight_scale=scale))(q, keys, weights)
    assert_bits(np.asarray(got), native(q, keys, weights.astype(F32) * F32(scale)))


@fp4_kernels
def test_neighbours_change_nothing(kernel):
    """An entry's score has the same bits whether its neighbours, or the other tokens, take integer products or not."""
    q, keys, weights = inputs("fp4", 1, 2, kernel[1], 64)
    want = native(q, keys, weights)
    scale = np.array(keys.scale)
    scale[0, ::7, 2] += 40
    other = native(q, ops.MXFP4Tensor(keys.data, scale), weights)
    same = np.arange(64) % 7 != 0
    assert_bits(other[..., same], want[..., same])
    odd = np.array(q)
    odd[0, 0, 5, 32:64] *= BF16(2.0**-12)
    assert_bits(native(odd, keys, weights)[:, 1], want[:, 1])


def test_batch_invariance(kernel):
    """A sequence's bits are the same alone, in any slot of 2, 7 and 16, for one token or four, and whatever is visible."""
    q, keys, weights = inputs(kernel[0], 16, 4, kernel[1], 70)
    alone = {b: native(*jax.tree.map(lambda a: a[b : b + 1], (q, keys, weights))) for b in (0, 6, 15)}
    for batch in (2, 7, 16):
        got = native(*jax.tree.map(lambda a: a[:batch], (q, keys, weights)))
        for b in alone:
            if b < batch:
                assert_bits(got[b], alone[b][0])
    for t in range(4):
        one = native(q[:1, t : t + 1], jax.tree.map(lambda a: a[:1], keys), weights[:1, t : t + 1])
        assert_bits(one[0, 0], alone[0][0, t])
    visible = np.array([[3, 17, 33, 69]], np.int32)
    some = native(*jax.tree.map(lambda a: a[:1], (q, keys, weights)), visible)
    assert_bits(seen_only(some, visible), seen_only(alone[0], visible))


def test_several_tiles_of_a_cta(kernel, monkeypatch):
    """On fewer multiprocessors a CTA takes one tile after the other, and the bits stay the same."""
    args = inputs(kernel[0], 2, 1, kernel[1], 599)
    want = native(*args)
    monkeypatch.setattr(indexer, "_MULTIPROCESSORS_OTHERS", 2)
    monkeypatch.setattr(indexer, "_MULTIPROCESSORS", {})
    assert_bits(native(*args), want)
    assert_close(want, on_cpu("index_scores")(*args), "sum")


def test_nan_and_inf(kernel):
    q, keys, weights = inputs(kernel[0], 1, 4, kernel[1], 40)
    q, weights = np.array(q), np.array(weights)
    q[0, 0, 3, 7], q[0, 1, 2, 100] = np.nan, np.inf
    weights[0, 2, 5], weights[0, 3, 6] = np.nan, -np.inf
    assert_close(native(q, keys, weights), on_cpu("index_scores")(q, keys, weights), "sum")


@fp4_kernels
def test_zero_heads_and_blocks(kernel):
    q, keys, weights = inputs("fp4", 1, 2, kernel[1], 40)
    q = np.array(q)
    q[0, 0, 3] = 0
    q[0, 1] = 0
    data = np.array(keys.data)
    data[0, 5] = 0
    data[0, 6, :16] = 0
    keys = ops.MXFP4Tensor(data, keys.scale)
    got = native(q, keys, weights)
    assert not got[0, 1].any() and not got[:, :, 5].any()
    assert_close(got, on_cpu("index_scores")(q, keys, weights), "sum")


def test_refusals(backend):
    def shaped(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    weights = functools.partial(shaped, dtype=jnp.float32)
    for args, says in [
        ((shaped(1, 1, 8, 64), shaped(1, 9, 64), weights(1, 1, 8)), "K = 128"),
        ((shaped(1, 1, 65, K), shaped(1, 9, K), weights(1, 1, 65)), "64 heads"),
        ((shaped(1, 17, 8, K), shaped(1, 9, K), weights(1, 17, 8)), "16 tokens"),
        ((shaped(1, 1, 8, K, dtype=jnp.float32), shaped(1, 9, K), weights(1, 1, 8)), "bf16 queries"),
        ((shaped(1, 1, 8, K), shaped(1, 9, K, dtype=jnp.float32), weights(1, 1, 8)), "MXFP4 keys"),
        ((shaped(1, 1, 8, K), shaped(1, 9, K), weights(1, 1, 8), shaped(1, 2, dtype=jnp.int32)), "visible"),
    ]:
        with pytest.raises(ValueError, match=says):
            jax.eval_shape(ops.index_scores, *args)
