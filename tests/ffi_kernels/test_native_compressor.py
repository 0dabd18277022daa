"""The native compressor against its reference: which blocks close, what they pool, and how each format is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_bits, assert_close
from entry_inputs import BF16, EPS, HIGHEST, LOWEST, angles, assert_tree_bits, native, normal, on_cpu, quarter_turns

import ffi_kernels as ops
from ffi_kernels import fused_reference_entries as fused
from ffi_kernels import reference
from ffi_kernels.compressor import Compression, attention_inputs_and_compress, compress_append
from ffi_kernels.entries import attention_inputs

ROPE = 64


def make_job(seed, batch, tokens, ratio, width, capacity, kind):
    """A compressor in the middle of a sequence; kind: 'plain', 'fp8', 'fp4'."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    channels, rows = (2 * width, 8) if ratio == 4 else (width, 128)
    entries = {
        "plain": lambda: np.array(jnp.asarray(other.standard_normal((batch, capacity, width)), BF16)),
        "fp8": lambda: ops.FP8KVCache(
            other.integers(0, 99, (batch, capacity, width + ROPE)).astype(np.uint8),
            other.integers(0, 99, (batch, capacity, -(-(width - ROPE) // 512) * 8)).astype(np.uint8),
        ),
        "fp4": lambda: ops.MXFP4Tensor(
            other.integers(0, 99, (batch, capacity, width // 2)).astype(np.uint8),
            other.integers(0, 99, (batch, capacity, width // 32)).astype(np.uint8),
        ),
    }[kind]()

    def fp32(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return Compression(
        fp32(batch, tokens, channels), fp32(batch, tokens, channels), fp32(ratio, channels), fp32(batch, rows, channels),
        2 * fp32(batch, rows, channels), normal(seed, width), entries,
    )  # fmt: skip


def run(function, where, jobs, start, length, cos_sin, ratio):
    return where(lambda *x: function(*x, ratio=ratio, eps=EPS), jobs, np.int32(start), np.int32(length), *cos_sin)


def check(jobs, start, length, ratio, cos_sin=None):
    """Native against reference: pending rows and untouched entries bit for bit, plain entries closely. Returns both."""
    cos_sin = cos_sin or angles(9, len(start), 1, rope=ROPE)
    got = run(compress_append, native, jobs, start, length, cos_sin, ratio)
    want = run(fused.compress_append, on_cpu, jobs, start, length, cos_sin, ratio)
    for job, (entries, kv, score), (wanted, wanted_kv, wanted_score) in zip(jobs, got, want, strict=True):
        assert_bits(kv, wanted_kv)
        assert_bits(score, wanted_score)
        if isinstance(job.entries, np.ndarray):
            touched = (wanted != job.entries).any(-1)
            assert_bits(entries[~touched], job.entries[~touched])
            if touched.any():
                assert_close(entries[touched], wanted[touched], "two bf16")
    return got, want


SIZES = [(1, 1, 128), (3, 2, 128), (2, 4, 64)]  # B, T, width
LARGE = [(1, 1, 512), (4, 4, 512), (16, 1, 512)]


def starts(batch, tokens, ratio, seed=0):
    """Places where the block closes at the first token, at the last, and not at all."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 5, batch)
    offsets = np.array([ratio - 1, ratio - tokens, 0, ratio - 1 - tokens // 2] * 4)[:batch]
    return np.maximum(blocks * ratio + offsets, 0)


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("batch, tokens, width", SIZES + LARGE, ids=str)
def test_plain_entries(backend, batch, tokens, width, ratio):
    jobs = [make_job(0, batch, tokens, ratio, width, 6, "plain")]
    start = starts(batch, tokens, ratio)
    check(jobs, start, np.full(batch, tokens), ratio)
    check(jobs, start, np.maximum(np.full(batch, tokens) - 1, 0), ratio)


def test_both_compressors_of_a_layer(backend):
    jobs = [make_job(0, 3, 2, 4, 128, 9, "plain"), make_job(1, 3, 2, 4, 64, 9, "plain")]
    check(jobs, [3, 14, 5], [2, 2, 2], 4)


@pytest.mark.parametrize("offset", range(8))
def test_every_place_in_two_blocks_of_four(backend, offset):
    tokens = 4
    jobs = [make_job(offset, 4, tokens, 4, 64, 30, "plain")]
    check(jobs, np.array([0, 8, 16, 80]) + offset, [1, 2, 3, 4], 4)


@pytest.mark.parametrize("ratio, kind, width", [(4, "fp8", 128), (128, "fp8", 128), (4, "fp8", 512), (128, "fp8", 512), (128, "fp8", 64)])
def test_fp8_entries(backend, ratio, kind, width):
    """Written as the plain ones would be encoded."""
    plain, coded = (make_job(3, 2, 2, ratio, width, 4, k) for k in ("plain", kind))
    start, length, cos_sin = [ratio - 2, 2 * ratio - 1], [2, 1], angles(9, 2, 1)
    (values, *_), = run(compress_append, native, [plain], start, length, cos_sin, ratio)
    (got, *_), = run(compress_append, native, [coded], start, length, cos_sin, ratio)
    encoded = on_cpu(lambda x: reference.encode_kv(x, ROPE), values)
    for name in ("data", "scale"):
        want = getattr(coded.entries, name).copy()
        for sequence, entry in ((0, 0), (1, 1)):
            want[sequence, entry] = getattr(encoded, name)[sequence, entry]
        assert_bits(getattr(got, name), want)


def exact_job(seed, batch, tokens, ratio, width, capacity, kind):
    """A job whose norm is the identity and whose softmax picks one row: nothing is rounded before the last step."""
    job = make_job(seed, batch, tokens, ratio, width, capacity, kind)
    rng = np.random.default_rng(seed)

    def signs(x):
        return rng.choice([-1.0, 1.0], x.shape).astype(np.float32)

    score = np.full_like(job.state_score, -1000)
    score[:, -2] = 0
    weight = np.asarray(jnp.asarray(rng.choice([0.5, 1.0, 2.0], width), BF16))
    return job._replace(
        kv=signs(job.kv), state_kv=signs(job.state_kv), score=np.full_like(job.score, -1000), ape=0 * job.ape, state_score=score,
        norm_weight=weight,
    )  # fmt: skip


EXACT = [(4, "fp4", 128), (4, "fp4", 32), (4, "fp4", 256), (128, "fp4", 128), (4, "fp8", 128), (4, "plain", 128)]


@pytest.mark.parametrize("ratio, kind, width", EXACT)
def test_exact_entries(backend, ratio, kind, width):
    """Index keys and entries, bit for bit from the pending rows to the cache."""
    rope = min(ROPE, width)
    job, cos_sin = exact_job(4, 2, 1, ratio, width, 4, kind), quarter_turns(5, 2, 1, rope=rope)
    start, length = [2 * ratio - 1, 2 * ratio - 1], [1, 1]
    got, want = check([job], start, length, ratio, cos_sin)
    assert_tree_bits(got[0][0], want[0][0])


@pytest.mark.parametrize("ratio", [4, 128])
def test_hostile_places(backend, ratio):
    """Beyond the capacity, before the start, wrapping around: nothing is written that the reference would not write."""
    places = [
        (-1, 1), (-5, 9), (LOWEST, 1), (LOWEST, HIGHEST), (HIGHEST, 1), (HIGHEST - 3, 4), (HIGHEST, HIGHEST),
        (4 * ratio - 1, 1), (5 * ratio - 1, 2), (2 * ratio - 1, 1), (2 * ratio, 99), (ratio - 1, 0), (ratio - 1, -7), (0, 4 * ratio),
        (1, LOWEST),
    ]  # fmt: skip
    start, length = np.int32(places).T
    jobs = [make_job(6, len(places), 2, ratio, 64, 3, "plain")]
    check(jobs, start, length, ratio)


@pytest.mark.parametrize("ratio", [4, 128])
def test_strange_scores(backend, ratio):
    """Rows that are dropped, a channel of which all are, and inf and nan, which stay in their channels until the norm."""
    job = make_job(7, 4, 1, ratio, 64, 3, "plain")
    channels = slice(64, 128) if ratio == 4 else slice(None)
    job.state_score[0, :3, channels] = -np.inf
    job.state_score[1, :, 5 + 64 * (ratio == 4)] = -np.inf
    job.state_score[2, 1, 9], job.state_kv[3, 2, 3] = np.inf, np.nan
    check([job], [2 * ratio - 1] * 4, [1] * 4, ratio)


@pytest.mark.parametrize("ratio, kinds, tokens", [(4, ("fp8", "fp4"), 1), (128, ("fp8",), 2), (4, ("plain",), 3)])
def test_together_with_the_inputs_of_attention(backend, ratio, kinds, tokens):
    """One launch gives the bits of two."""
    batch, static = 3, dict(eps=EPS, kv_format=kinds[0], quantize="nvfp4" if tokens > 1 else "fp8")
    jobs = [make_job(i, batch, tokens, ratio, 128, 4, kind) for i, kind in enumerate(kinds)]
    latent = (
        normal(0, batch, tokens, 192), normal(1, batch, tokens, 128), normal(2, 192), normal(3, 128), *angles(4, batch, tokens),
    )  # fmt: skip
    place = np.int32([ratio - tokens, 2 * ratio - 1, 1]), np.full(batch, tokens, np.int32), *angles(5, batch, 1)
    apart = native(
        lambda a, j, *x: (attention_inputs(*a, **static), compress_append(j, *x, ratio=ratio, eps=EPS)), latent, jobs, *place
    )
    together = native(lambda a, j, *x: attention_inputs_and_compress(a, j, *x, ratio=ratio, **static), latent, jobs, *place)
    assert_tree_bits(together, apart)
    wide = normal(0, batch, tokens, 2064), latent[1], normal(2, 2064), *latent[3:]
    with pytest.raises(ValueError, match="call attention_inputs and compress_append"):
        jax.eval_shape(lambda a, j, *x: attention_inputs_and_compress(a, j, *x, ratio=ratio, **static), wide, jobs, *place)


@pytest.mark.parametrize("ratio, kinds", [(4, ("fp8", "fp4")), (128, ("fp8",))])
def test_entries_do_not_depend_on_company(backend, ratio, kinds):
    jobs = [make_job(i, 16, 1, ratio, 128, 4, kind) for i, kind in enumerate(kinds)]
    cos_sin, start = angles(9, 16, 1), np.full(16, 2 * ratio - 1)

    def of(slots):
        shared = [dict(ape=job.ape, norm_weight=job.norm_weight) for job in jobs]
        picked = [jax.tree.map(lambda x: x[slots], job._replace(ape=None, norm_weight=None)) for job in jobs]
        picked = [job._replace(**weights) for job, weights in zip(picked, shared, strict=True)]
        return run(compress_append, native, picked, start[slots], np.ones(len(slots)), [x[slots] for x in cos_sin], ratio)

    everything = of(list(range(16)))
    for slots in ([6], [6, 1], [9, 3, 6, 0, 15, 2, 7]):
        assert_tree_bits(of(slots), jax.tree.map(lambda x, s=slots: x[s], everything))


@pytest.mark.parametrize("ratio, kinds", [(4, ("fp8", "fp4")), (4, ("plain", "plain")), (128, ("fp8",))])
def test_entries_in_place(backend, ratio, kinds):
    jobs = [make_job(i, 2, 1, ratio, 128, 4, kind) for i, kind in enumerate(kinds)]
    caches = [jax.tree.map(jnp.array, job.entries) for job in jobs]

    def step(caches, jobs, start, length):
        jobs = [job._replace(entries=cache) for job, cache in zip(jobs, caches, strict=True)]
        return compress_append(jobs, start, length, *map(jnp.asarray, angles(9, 2, 1)), ratio=ratio, eps=EPS)

    place, rest = jnp.int32([ratio - 1, 5]), [job._replace(entries=None) for job in jobs]
    before = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), caches)
    after = jax.jit(step, donate_argnums=0)(caches, rest, place, jnp.int32([1, 1]))
    assert jax.tree.map(lambda x: x.unsafe_buffer_pointer(), [entries for entries, *_ in after]) == before


def test_native_refusals(backend):
    def refuses(match, jobs, ratio, count=1):
        batch = jobs[0].kv.shape[0]
        place = np.zeros((batch,), np.int32)
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda *x: compress_append(*x, ratio=ratio, eps=EPS), jobs, place, place, *angles(0, batch, count))

    refuses("at most 4 tokens", [make_job(0, 1, 5, 4, 64, 4, "plain")], 4, count=2)
    refuses("2 jobs", [make_job(0, 1, 1, 4, 64, 4, "plain")] * 3, 4)
    refuses("at most 512 channels", [make_job(0, 1, 1, 4, 576, 4, "plain")], 4)
    refuses("multiple of 32 channels", [make_job(0, 1, 1, 128, 72, 4, "plain")], 128)
    refuses("32 to 256 channels", [make_job(0, 1, 1, 4, 512, 4, "fp4")], 4)
    job = make_job(0, 1, 1, 4, 64, 4, "plain")
    refuses("entries in bfloat16", [job._replace(entries=job.entries.astype(np.float32))], 4)
    refuses("needs norm_weight", [job._replace(norm_weight=job.norm_weight[:8])], 4)
    refuses("needs ape", [job._replace(ape=job.ape[:3])], 4)
    refuses("needs cos", [job], 4, count=2)
