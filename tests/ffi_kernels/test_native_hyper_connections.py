"""Native hyper-connections against the reference on the CPU, and against each other.

Here: the kernels of `native/cuda/hyper_connections.cu`. Quantized outputs must be exactly what the reference makes of
the input that the kernel returned; a fused op must give the bits of its parts. Not here: the meaning (`test_ops.py`).
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops

BF16, F32 = ml_dtypes.bfloat16, np.float32
STATIC = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}


def native(function, *arrays):
    """function on the backend of the fixture, as numpy."""
    return jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arrays))


def reference(function, *arrays):
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        return jax.tree.map(np.asarray, jax.jit(lambda *a: function(*a))(*arrays))


def site(channels, mixes=24, seed=0):
    """fn, base, scale, norm_weight with lively mixes."""
    rng = np.random.default_rng(seed)
    fn = rng.standard_normal((mixes, 4 * channels)).astype(F32) / F32(2 * channels**0.5)
    scale = rng.standard_normal(3 if mixes == 24 else 1) + 1
    weight = rng.standard_normal(channels) * 0.3 + 1
    return fn, rng.standard_normal(mixes).astype(F32), scale.astype(F32), weight.astype(BF16)


def rows_of(shape, channels, seed=1):
    """streams and sublayer output bf16, post and comb fp32 of a site before."""
    rng = np.random.default_rng(seed)
    streams = rng.standard_normal((*shape, 4, channels)) * 10.0 ** rng.uniform(-2, 2, (*shape, 1, 1))
    post, comb = rng.uniform(0, 2, (*shape, 4)), rng.dirichlet(np.ones(4), (*shape, 4))
    return streams.astype(BF16), rng.standard_normal((*shape, channels)).astype(BF16), post.astype(F32), comb.astype(F32)


def sizes(backend):
    """(leading shape, D): one CTA, several, blocks that the channels do not fill; the models' widths on a device."""
    small = [((1,), 128), ((2, 1), 256), ((3,), 16), ((5,), 272), ((1,), 2176)]
    return small if backend == "sim" else small + [((1, 1), 4096), ((4, 4), 4096), ((1,), 7168), ((7,), 7168), ((2,), 8192), ((16,), 640)]


def exactly_quantized(x, got, quantize):
    if quantize is None:
        assert got is None
        return
    want = reference(ops.quantize_fp8 if quantize == "fp8" else ops.quantize_nvfp4_rows, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_bits(a, b)


@pytest.mark.parametrize("quantize", [None, "fp8", "nvfp4"])
def test_hc_pre_norm(backend, quantize):
    for shape, channels in sizes(backend):
        streams, weights = rows_of(shape, channels)[0], site(channels)
        run = functools.partial(ops.hc_pre_norm, quantize=quantize, **STATIC)
        x, codes, post, comb = native(run, streams, *weights)
        want = reference(run, streams, *weights)
        assert x.dtype == BF16 and post.dtype == comb.dtype == F32
        assert_close(x, want[0], "two bf16")
        assert_close(post, want[2], "sum")
        assert_close(comb, want[3], "sinkhorn")
        exactly_quantized(x, codes, quantize)


@pytest.mark.parametrize("quantize", [None, "fp8", "nvfp4"])
def test_hc_post_pre_norm(backend, quantize):
    """The bits of hc_post, and then those of hc_pre_norm."""
    for shape, channels in sizes(backend):
        before, weights = rows_of(shape, channels), site(channels)
        run = functools.partial(ops.hc_post_pre_norm, quantize=quantize, **STATIC)
        streams, *rest = native(run, *before, *weights)
        assert_bits(streams, native(ops.hc_post, *before))
        want = native(functools.partial(ops.hc_pre_norm, quantize=quantize, **STATIC), streams, *weights)
        for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(want), strict=True):
            assert_bits(a, b)


def test_hc_post(backend):
    for shape, channels in sizes(backend) + ([] if backend == "sim" else [((3, 700), 4096)]):
        before = rows_of(shape, channels)
        assert_close(native(ops.hc_post, *before), reference(ops.hc_post, *before), "bf16")
        before = [a.astype(F32) for a in before]
        assert_close(native(ops.hc_post, *before), reference(ops.hc_post, *before), "fp32")


def test_hc_head_norm(backend):
    for shape, channels in sizes(backend):
        streams, weights = rows_of(shape, channels)[0], site(channels, mixes=4)
        run = functools.partial(ops.hc_head_norm, eps=1e-6, norm_eps=1e-6)
        assert_close(native(run, streams, *weights), reference(run, streams, *weights), "two bf16")


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_of_hard_logits(backend, iterations):
    """Logits of any size and sign, and -inf: sums of columns and rows far from 1 before the first normalisation."""
    streams = rows_of((8,), 128)[0]
    fn, base, scale, weight = site(128)
    for size in (0.0, 30.0, 300.0):
        hard = base.copy()
        hard[8:] = np.random.default_rng(int(size)).standard_normal(16).astype(F32) * F32(size)
        hard[9] = -np.inf if size else 0
        run = functools.partial(ops.hc_pre_norm, iterations=iterations, eps=1e-6, norm_eps=1e-6)
        got, want = (f(run, streams, fn, hard, scale, weight)[3] for f in (native, reference))
        assert_close(got, want, "sinkhorn" if size <= 30 else "sharp")


def test_odd_rows_stay_alone(backend):
    """A row of zeros, of inf, with a nan, and huge ones: numbers where the reference has numbers; the others' bits stay."""
    channels = 256
    streams = rows_of((6,), channels)[0]
    weights = site(channels)
    clean = streams.copy()
    streams[1], streams[2, 3, 7], streams[4, 0, 200] = 0, np.nan, np.inf
    run = functools.partial(ops.hc_pre_norm, quantize="nvfp4", **STATIC)
    got, want, before = native(run, streams, *weights), reference(run, streams, *weights), native(run, clean, *weights)
    for i, kind in ((0, "two bf16"), (2, "sum"), (3, "sinkhorn")):
        assert_close(got[i], want[i], kind)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(before), strict=True):
        assert_bits(a[[0, 3, 5]], b[[0, 3, 5]])


def test_rows_do_not_depend_on_each_other(backend):
    """Bits of a row are the same alone, and in any slot of 2, 7 and 16."""
    for channels in (256,) if backend == "sim" else (256, 4096, 7168):
        before, weights = rows_of((16,), channels), site(channels)
        run = functools.partial(ops.hc_post_pre_norm, quantize="nvfp4", **STATIC)
        alone = jax.tree.leaves(native(run, *(a[:1] for a in before), *weights))
        for rows, slot in ((2, 1), (7, 5), (16, 15), (16, 6)):
            batch = [np.roll(a[:rows], slot, axis=0) for a in before]
            for a, b in zip(alone, jax.tree.leaves(native(run, *batch, *weights)), strict=True):
                assert_bits(a[0], b[slot])


def test_every_run_gives_the_same_bits(backend):
    channels = 256 if backend == "sim" else 4096
    before, weights = rows_of((4,), channels), site(channels)
    step = jax.jit(lambda *a: ops.hc_post_pre_norm(*a, quantize="fp8", **STATIC))
    first = jax.tree.map(np.asarray, step(*before, *weights))
    for _ in range(2 if backend == "sim" else 200):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(step(*before, *weights)), strict=True):
            assert_bits(a, b)


def test_refusals(backend):
    streams, f, post, comb = rows_of((2,), 128)
    weights = site(128)
    norm = functools.partial(ops.hc_pre_norm, **STATIC)
    for call, message in (
        (lambda: norm(rows_of((17,), 128)[0], *weights), f"hc_pre_norm on {backend} serves decode steps of 1 to 16 rows.*got 17"),
        (lambda: norm(streams, *weights[:3], weights[3].astype(F32)), r"needs bfloat16 for an input of shape \(128,\), got float32"),
        (lambda: norm(streams.astype(F32), *weights[:3], weights[3].astype(F32)), "takes bf16 streams, got float32"),
        (lambda: norm(rows_of((1,), 8320)[0], *site(8320)), "takes at most 8192 channels, got 8320"),
        (lambda: norm(rows_of((1,), 24)[0], *site(24)), "multiple of 16 channels, got 4 of 24"),
        (lambda: norm(streams, *weights, quantize="int4"), "quantizes to 'fp8' or 'nvfp4', got 'int4'"),
        (lambda: norm(streams, weights[0][:, :-4], *weights[1:]), r"hc_pre_norm with 4 streams of 128 needs fn \(24, 512\)"),
        (lambda: norm(streams, *weights[:3], jnp.ones(64)), r"norm_weight of as many channels, got \(64,\)"),
        (lambda: ops.hc_pre_norm(streams, *weights, **{**STATIC, "eps": 0.0}), "eps >= 1e-9"),
        (lambda: ops.hc_post(streams, f[:1], post, comb), r"hc_post of streams \(2, 4, 128\) needs f of shape \(2, 128\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
