"""Decode attention on every native backend against its reference: values, masks, hostile inputs, invariance, refusals."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops

# name: heads, head_dim, rope, window, compressed, picks; window-only, CSA and HCA of each are tested
SMALL = (8, 128, 64, 16, 40, 24)
MODELS = {
    "small": SMALL,
    "odd": (19, 256, 128, 21, 37, 50),  # heads that fill no tile, shares of keys that are not equal
    "wide": (70, 512, 64, 12, 30, 24),  # CTAs of 64 heads, one of them nearly without any
    "tiny": (8, 128, 64, 128, 2048, 64),
    "flash": (64, 512, 64, 128, 4096, 512),
    "pro": (128, 512, 64, 128, 2048, 1024),
    "long": (64, 512, 64, 128, 8192, 512),
}
GPU_ONLY = ("tiny", "flash", "pro", "long")
RATIO = {"window": 0, "csa": 4, "hca": 128}


@pytest.fixture
def model(request, backend):
    if request.param in GPU_ONLY and backend == "sim":
        pytest.skip("the interpreter runs the small shapes only")
    return MODELS[request.param]


def inputs(model, kind, form, starts, lengths, tokens, seed=0, picked=None):
    """Arguments of ops.decode_attention for one call; rows of different sizes, so that a wrong scale or entry shows."""
    heads, channels, rope, size, entries, picks = model
    rng, batch = np.random.default_rng(seed), len(starts)

    def normal(*shape):
        x = rng.standard_normal(shape, np.float32) * np.exp2(rng.integers(-2, 2, (*shape[:-1], 1))).astype(np.float32)
        return jnp.asarray(x, jnp.bfloat16)

    def cache(count):
        values = normal(batch, count, channels)
        return jax.jit(lambda x: ops.encode_kv(x, rope))(values) if form == "fp8" else values

    angles = rng.uniform(-1e3, 1e3, (batch, tokens, rope // 2)).astype(np.float32)
    if kind == "csa" and picked is None:
        picked = rng.integers(-1, entries, (batch, tokens, picks))
    with ops.backend("xla"):
        caches = [cache(size), cache(tokens), cache(entries) if kind != "window" else None]
    return (
        normal(batch, tokens, heads, channels) * 2, *caches, jnp.asarray(picked, jnp.int32) if kind == "csa" else None,
        jnp.asarray(rng.standard_normal(heads) * 3, jnp.float32), jnp.asarray(starts, jnp.int32), jnp.asarray(lengths, jnp.int32),
        jnp.cos(angles), jnp.sin(angles),
    )  # fmt: skip


def native(kind, arguments):
    return jax.jit(functools.partial(ops.decode_attention, ratio=RATIO[kind], return_lse=True))(*arguments)


def reference(kind, arguments):
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), ops.backend("xla"):
        return native(kind, jax.device_put(arguments, cpu))


def compare(kind, arguments):
    got, want = native(kind, arguments), reference(kind, arguments)
    for sequence in range(got[0].shape[0]):
        assert_close(got[0][sequence], want[0][sequence], "two bf16")
    assert_close(got[1], want[1], "sharp")
    return got


def rows(arguments, keep):
    """The arguments of some of the sequences (slices or indices into the batch axis)."""
    return tuple(x if i == 5 else jax.tree.map(lambda a: a[keep], x) for i, x in enumerate(arguments))


@pytest.mark.parametrize("form", ["fp8", "bf16"])
@pytest.mark.parametrize("kind", RATIO)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_values(model, kind, form):
    """Empty, young, wrapped and full sequences; tokens that do not count."""
    size, entries = model[3:5]
    starts = [0, 3, size + 1, 130, 128 * entries - 2]
    got = compare(kind, inputs(model, kind, form, starts, [2, 1, 2, 2, 2], 2))
    assert not np.asarray(got[0], np.float32)[1, 1].any() and np.isneginf(np.asarray(got[1])[1, 1]).all()


@pytest.mark.parametrize("kind", RATIO)
@pytest.mark.parametrize("model", ["small", "flash"], indirect=True)
def test_four_tokens(model, kind):
    compare(kind, inputs(model, kind, "fp8", [0, 14, 1001], [4, 3, 4], 4))


@pytest.mark.parametrize("form", ["fp8", "bf16"])
@pytest.mark.parametrize("model", ["small", "flash"], indirect=True)
def test_hostile_indices_and_positions(model, form):
    """Indices outside the cache are no picks; a pick that repeats counts each time; nothing is read for any position."""
    entries, picks = model[4:]
    picked = np.full((6, 1, picks), -1)
    picked[0, 0, :5] = [2, 2, 2, entries - 1, entries]
    picked[1, 0] = np.resize([-(2**31), 2**31 - 1, entries, -2], picks)
    picked[2, 0, -1] = 0
    picked[3, 0] = 7
    starts = [5, 700, -1, 2**31 - 1, -(2**31), 128 * entries]
    arguments = inputs(model, "csa", form, starts, [1, 1, 1, 0, 1, 1], 1, picked=picked)
    compare("csa", rows(arguments, np.array([0, 1, 2, 3, 4, 5])))
    for kind in ("hca", "window"):
        compare(kind, inputs(model, kind, form, starts, [1, 1, 1, 0, 1, 99], 1))


@pytest.mark.parametrize("model", ["small", "flash"], indirect=True)
def test_sinks_and_scores_without_end(model):
    arguments = list(inputs(model, "csa", "bf16", [0, 40, 900], [1, 1, 1], 1))
    sinks = np.array(arguments[5])
    sinks[:4] = [np.inf, -np.inf, 1e4, -1e4]
    arguments[5] = jnp.asarray(sinks)
    compare("csa", tuple(arguments))
    arguments[0] = arguments[0] * 40  # one key takes all
    compare("csa", tuple(arguments))
    for value in (jnp.nan, jnp.inf):
        bad = arguments.copy()
        bad[0] = bad[0].at[1, 0, 5].set(value)
        got, want = native("csa", tuple(bad)), reference("csa", tuple(bad))
        assert np.isnan(np.asarray(want[0], np.float32)[1, 0, 5]).all()
        assert_bits(np.isnan(np.asarray(got[0], np.float32)).astype(np.uint8), np.isnan(np.asarray(want[0], np.float32)).astype(np.uint8))


@pytest.mark.parametrize("model", ["small", "flash"], indirect=True)
def test_entries_of_extreme_size(model):
    """Blocks of zeros, tiny blocks, blocks scaled above 2**7, an infinite one and one with a nan: FP8 keeps them apart."""
    heads, channels, rope, size, entries, picks = model
    arguments = list(inputs(model, "window", "fp8", [size - 1] * 6, [1] * 6, 1))
    with ops.backend("xla"):
        values = np.array(ops.kv_values(arguments[1], rope).astype(jnp.float32))
        values[0, :, : channels // 2] = 0
        values[1, 3, :64] = 1e-30
        values[2, 5, :64] *= 1e7
        values[3, 5, 7] = 3e38
        values[4, 5, 7] = np.nan
        values[5, :, :64] *= 2.0**-16
        arguments[1] = jax.jit(lambda x: ops.encode_kv(x, rope))(jnp.asarray(values, jnp.bfloat16))
    arguments[0] = arguments[0].at[3].set(0)  # 0 * 3e38 and an equal weight for each entry
    got, want = native("window", tuple(arguments)), reference("window", tuple(arguments))
    for sequence in range(6):
        assert_close(got[0][sequence], want[0][sequence], "two bf16")


@pytest.mark.parametrize("kind, form", [("csa", "fp8"), ("hca", "fp8"), ("window", "bf16")])
@pytest.mark.parametrize("model", ["small", "flash", "pro"], indirect=True)
def test_bits_do_not_depend_on_the_batch(model, kind, form):
    """A sequence alone, in slots of 2, 7 and 16, and next to others, again and again."""
    starts = np.arange(16) * 97 + 11
    arguments = inputs(model, kind, form, starts, [1] * 16, 1)
    whole = native(kind, arguments)
    for keep in (np.array([3]), np.array([9, 3]), np.array([5, 4, 3, 2, 1, 0, 15]), np.arange(16)[::-1]):
        got = native(kind, rows(arguments, keep))
        assert_bits(got[0], np.asarray(whole[0])[keep])
        assert_bits(got[1], np.asarray(whole[1])[keep])


@pytest.mark.parametrize("kind, form", [("csa", "fp8"), ("hca", "bf16")])
@pytest.mark.parametrize("model", ["small", "flash"], indirect=True)
def test_bits_do_not_depend_on_how_many_tokens_share_a_step(model, kind, form):
    """Four tokens at once give what four steps give, each after the entry before it was written to the ring."""
    size, start = model[3], model[3] * 9 - 2
    arguments = inputs(model, kind, form, [start], [4], 4)
    whole = native(kind, arguments)
    window = arguments[1]
    for t in range(4):
        one = [x if i in (3, 5, 6, 7) else jax.tree.map(lambda a: a[:, t : t + 1], x) for i, x in enumerate(arguments)]
        one[1], one[6], one[7] = window, jnp.asarray([start + t], jnp.int32), jnp.ones(1, jnp.int32)
        got = native(kind, tuple(one))
        assert_bits(got[0][:, 0], np.asarray(whole[0])[:, t])
        assert_bits(got[1][:, 0], np.asarray(whole[1])[:, t])
        window = jax.tree.map(lambda ring, new, t=t: ring.at[:, (start + t) % size].set(new[:, t]), window, arguments[2])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda a: a.__setitem__(0, a[0].astype(jnp.float32)), "takes bf16 queries"),
        (lambda a: a.__setitem__(5, a[5][:-1]), "got sink"),
        (lambda a: a.__setitem__(2, jnp.zeros((1, 1, 128), jnp.bfloat16)), "one format"),
        (lambda a: a.__setitem__(8, a[8][..., :-1]), "sin"),
        (lambda a: a.__setitem__(3, None), "ratio 4 with compressed missing"),
    ],
)
def test_refusals(backend, change, sentence):
    arguments = list(inputs(SMALL, "csa", "fp8", [3], [1], 1))
    change(arguments)
    with pytest.raises(ValueError, match=sentence):
        ops.decode_attention(*arguments, ratio=4)


@pytest.mark.parametrize("parts", [(1, 1), (1, 4), (1, 8), (2, 2), (3, 4)], ids=lambda parts: "x".join(map(str, parts)))
@pytest.mark.parametrize("kind, form", [("window", "fp8"), ("csa", "fp8"), ("csa", "bf16"), ("hca", "fp8")])
@pytest.mark.parametrize("model", ["odd", "wide", "flash"], indirect=True)
def test_bits_do_not_depend_on_the_mapping(model, kind, form, parts, monkeypatch):
    """CTAs of 16 heads, of 32, and of 32 after 32; with four parts; of 64 heads, with a part after the other, a chain, or two."""
    arguments = inputs(model, kind, form, [5, 1000, 40], [1, 2, 2], 2)
    module, results = sys.modules["ffi_kernels.decode_attention"], []
    monkeypatch.setattr(module, "parts_of", lambda keys: parts)
    for shape in ((16, 1, 1), (32, 1, 1), (32, 2, 1), (16, 1, 4), (64, 1, 1), (64, 1, 1, 2), (64, 1, 4), (64, 1, 4, 2)):

        def mapping_of(rows, heads, channels, clusters, parts, fits, wide, shape=shape):
            if shape[0] == 64 and not wide:
                shape = (32, 1, 1)
            mapping = module.Mapping(*shape)
            if mapping.heads == 64 and mapping.parts > 1:
                mapping = mapping._replace(parts=min(mapping.parts, parts))
            possible = mapping.parts * mapping.turns <= parts and (fits or mapping.passes == mapping.parts == 1)
            return mapping if possible else module.Mapping(shape[0], 1, 1)

        monkeypatch.setattr(module, "mapping_of", mapping_of)
        results.append((native if results or parts[0] == 1 else compare)(kind, arguments))  # one cluster: test_values
    for other in results[1:]:
        assert_bits(other[0], results[0][0])
        assert_bits(other[1], results[0][1])
