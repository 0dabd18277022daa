"""The native ops of `entries.py` against their reference: rows, query heads, the cache format, rings.

Roundings to bf16 may fall differently where an fp32 sum was added in another order; whatever follows such a rounding is
compared bit for bit with the reference's work on the native op's own bf16 values. Poison stands where outputs will be.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_bits, assert_close
from entry_inputs import BF16, EPS, HIGHEST, LOWEST, angles, assert_tree_bits, native, normal, on_cpu, quarter_turns

import ffi_kernels as ops
from ffi_kernels import entries, reference
from ffi_kernels import fused_reference_entries as fused

# --- attention_inputs --------------------------------------------------------------------------------------------

LATENT = [  # B, T, Q, K, rope: the tests' small models, the tiny one, Flash, Pro; blocks that are partial
    (1, 1, 64, 128, 64), (2, 2, 128, 128, 64), (1, 3, 201, 64, 64), (1, 1, 1024, 512, 64), (4, 4, 1536, 512, 64),
    (3, 1, 144, 192, 16),
]  # fmt: skip


def latent_inputs(batch, tokens, q_width, width, rope, seed=0):
    return (
        normal(seed, batch, tokens, q_width), normal(seed + 1, batch, tokens, width, scale=3), normal(seed + 2, q_width),
        normal(seed + 3, width), *angles(seed + 4, batch, tokens, rope=rope),
    )  # fmt: skip


def attention_inputs(kv_format, quantize):
    return lambda *x: entries.attention_inputs(*x, eps=EPS, kv_format=kv_format, quantize=quantize)


@pytest.mark.parametrize("shape", LATENT, ids=str)
def test_attention_inputs(backend, shape):
    inputs = latent_inputs(*shape)
    normed, nothing, entry = native(attention_inputs("plain", None), *inputs)
    want = on_cpu(lambda *x: fused.attention_inputs(*x, eps=EPS, kv_format="plain", quantize=None), *inputs)
    assert nothing is None
    assert_close(normed, want[0], "bf16")
    assert_close(entry, want[2], "two bf16")

    whole_blocks = shape[2] % 16 == 0
    for quantize, kv_format in [("fp8", "fp8"), ("nvfp4" if whole_blocks else "fp8", "plain")]:
        fp8_entry = kv_format == "fp8" and (shape[3] - shape[4]) % 64 == 0
        got = native(attention_inputs("fp8" if fp8_entry else "plain", quantize), *inputs)
        assert_bits(got[0], normed)
        quantizer = {"fp8": reference.quantize_fp8, "nvfp4": reference.quantize_nvfp4_rows}[quantize]
        assert_tree_bits(got[1], on_cpu(quantizer, normed))
        assert_tree_bits(got[2], on_cpu(lambda x: reference.encode_kv(x, shape[4]), entry) if fp8_entry else entry)


def test_attention_inputs_of_strange_rows(backend):
    """Rows of zeros, of tiny and of huge numbers, and with an inf or a nan, which no other row notices."""
    qr, kv, *rest = latent_inputs(1, 4, 256, 128, 64)
    for x in (qr, kv):
        x[0, 0], x[0, 1] = 0, x[0, 1] * np.asarray(1e-30, x.dtype)
        x[0, 2, 3], x[0, 3, 70] = np.inf, np.nan
    for quantize in ("fp8", "nvfp4"):
        got = native(attention_inputs("fp8", quantize), qr, kv, *rest)
        want = on_cpu(lambda *x, q=quantize: fused.attention_inputs(*x, eps=EPS, kv_format="fp8", quantize=q), qr, kv, *rest)
        assert_close(got[0], want[0], "bf16")
        values = [on_cpu(reference.dequantize, t[1]) for t in (got, want)]
        assert_close(*[np.nan_to_num(v, posinf=0, neginf=0) for v in values], "two bf16")
        decoded = [on_cpu(lambda c: reference.decode_kv(c, 64), t[2]).astype(np.float32) for t in (got, want)]
        assert (np.isnan(decoded[0]) == np.isnan(decoded[1])).all()


@pytest.mark.parametrize("quantize, kv_format", [("fp8", "fp8"), ("nvfp4", "plain")])
def test_attention_inputs_do_not_depend_on_company(backend, quantize, kv_format):
    qr, kv, *weights, cos, sin = latent_inputs(16, 1, 192, 128, 64)
    everything = native(attention_inputs(kv_format, quantize), qr, kv, *weights, cos, sin)
    for slots in ([5], [5, 15], [3, 9, 5, 0, 1, 2, 4]):
        got = native(attention_inputs(kv_format, quantize), qr[slots], kv[slots], *weights, cos[slots], sin[slots])
        assert_tree_bits(got, jax.tree.map(lambda x, s=slots: x[s], everything))


# --- queries -----------------------------------------------------------------------------------------------------

HEADS = [  # B, T, H, K, Hi, Ki, rope
    (1, 1, 8, 128, 16, 128, 64), (2, 2, 3, 64, 5, 32, 16), (1, 3, 5, 512, 0, 0, 64), (1, 1, 64, 512, 64, 128, 64),
    (2, 1, 2, 256, 3, 256, 64),
]  # fmt: skip


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_queries(backend, shape):
    batch, tokens, heads, width, index_heads, index_width, rope = shape
    q, (cos, sin) = normal(0, batch, tokens, heads, width, scale=4), angles(1, batch, tokens, rope=rope)
    index_q = normal(2, batch, tokens, index_heads, index_width) if index_heads else None
    got = native(lambda *x: entries.queries(*x, eps=EPS, fp4=False), q, index_q, cos, sin)
    want = on_cpu(lambda *x: fused.queries(*x, eps=EPS, fp4=False), q, index_q, cos, sin)
    assert_close(got[0], want[0], "two bf16")
    if not index_heads:
        assert got[1] is None
        return
    assert_close(got[1], want[1], "bf16")
    got = native(lambda *x: entries.queries(*x, eps=EPS, fp4=True), q, index_q, cos, sin)
    want = on_cpu(lambda *x: fused.queries(*x, eps=EPS, fp4=True), q, index_q, cos, sin)
    assert (got[1] != want[1]).mean() <= 1e-3  # the sums of the transform, rounded to bf16 and then to e2m1

    cos, sin = quarter_turns(3, batch, tokens, rope=rope)
    index_q = np.array(jnp.asarray(np.random.default_rng(4).integers(-16, 17, index_q.shape) / 8, BF16))
    index_q[0, 0, 0] = 0
    got = native(lambda *x: entries.queries(*x, eps=EPS, fp4=True), q, index_q, cos, sin)
    want = on_cpu(lambda *x: fused.queries(*x, eps=EPS, fp4=True), q, index_q, cos, sin)
    assert_bits(got[1], want[1])  # every sum is exact


def test_queries_do_not_depend_on_company(backend):
    q, index_q, (cos, sin) = normal(0, 16, 1, 4, 128), normal(1, 16, 1, 4, 128), angles(2, 16, 1)

    def run(slots):
        return native(lambda *x: entries.queries(*x, eps=EPS, fp4=True), *(x[slots] for x in (q, index_q, cos, sin)))

    everything = run(list(range(16)))
    for slots in ([11], [11, 3], [0, 11, 2, 7, 8, 9, 1]):
        assert_tree_bits(run(slots), jax.tree.map(lambda x, s=slots: x[s], everything))


# --- the cache format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, jnp.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape, rope", [((5, 512), 64), ((3, 2, 128), 64), ((2, 3, 80), 16), ((1, 64), 64)], ids=str)
def test_the_cache_format(backend, shape, rope, dtype):
    kv = normal(0, *shape, scale=5, dtype=dtype) * np.exp2(np.arange(shape[-1]) % 40 - 20).astype(dtype)
    kv[0, ..., :8] = 0
    if shape[-1] > rope:
        kv[0, ..., 64:72], kv[-1, ..., 3] = 1e30, np.inf
    got, want = native(lambda x: ops.encode_kv(x, rope), kv), on_cpu(lambda x: reference.encode_kv(x, rope), kv)
    assert_tree_bits(got, want)
    assert_bits(native(lambda c: ops.kv_values(c, rope), want), on_cpu(lambda c: reference.decode_kv(c, rope), want))


def test_every_code_of_the_cache_format(backend):
    data = np.zeros((40, 64 + 128), np.uint8)
    data[:, :64] = np.arange(256, dtype=np.uint8).reshape(4, 64).repeat(10, 0)
    data[:, 64:] = np.random.default_rng(0).integers(0, 256, (40, 128))
    scale = np.zeros((40, 8), np.uint8)
    scale[:, 0] = np.tile([20, 60, 100, 120, 126, 127, 128, 200, 245, 247], 4)
    cache = ops.FP8KVCache(data, scale)
    got, want = native(lambda c: ops.kv_values(c, 64), cache), on_cpu(lambda c: reference.decode_kv(c, 64), cache)
    assert (np.isnan(got.astype(np.float32)) == np.isnan(want.astype(np.float32))).all()
    assert_bits(np.where(np.isnan(want), 0, got).astype(BF16), np.where(np.isnan(want), 0, want).astype(BF16))


# --- commit_rows -------------------------------------------------------------------------------------------------

STEPS = [  # start, length
    (0, 1), (5, 4), (126, 4), (127, 1), (1000, 3), (9, 0), (-1, 2), (-3, 4), (7, 99), (7, -5), (LOWEST, 4), (HIGHEST, 4),
    (HIGHEST, HIGHEST), (HIGHEST - 3, 4), (-1, LOWEST),
]  # fmt: skip


def ring_trees(batch, tokens, seed=0):
    """Rings of every width there is, and one as odd as it can be."""
    rng = np.random.default_rng(seed)
    tails = {
        "data": ((128, 576), np.uint8), "scale": ((128, 8), np.uint8), "plain": ((128, 64), BF16), "odd": ((3, 7), np.uint8),
        "kv": ((8, 256), np.float32), "score": ((128, 132), np.float32), "tiny window": ((2, 16), np.uint8), "vector": ((5,), np.float32),
    }  # fmt: skip

    def make(size, *tail, dtype):
        return rng.integers(0, 100, (batch, size, *tail)).astype(dtype)

    rings = {name: make(*shape, dtype=dtype) for name, (shape, dtype) in tails.items()}
    return rings, {name: make(tokens, *shape[1:], dtype=dtype) for name, (shape, dtype) in tails.items()}


@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_commit_rows(backend, tokens):
    rings, rows = ring_trees(len(STEPS), tokens)
    start, length = np.int32(STEPS).T
    assert_tree_bits(native(entries.commit_rows, rings, rows, start, length), on_cpu(fused.commit_rows, rings, rows, start, length))


def test_commit_rows_of_many_rings(backend):
    """More rings than one launch takes."""
    count = 330
    rings = [np.full((2, 2, 4), i % 251, np.uint8) for i in range(count)]
    rows = [np.full((2, 1, 4), i % 199 + 50, np.uint8) for i in range(count)]
    start, length = np.int32([1, 4]), np.int32([1, 1])
    assert_tree_bits(native(entries.commit_rows, rings, rows, start, length), on_cpu(fused.commit_rows, rings, rows, start, length))


def test_commit_rows_in_place(backend):
    rings, rows = ring_trees(2, 2)
    rings = jax.tree.map(jnp.array, rings)
    before = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), rings)
    step = jax.jit(entries.commit_rows, donate_argnums=0)
    after = step(rings, rows, jnp.int32([3, 4]), jnp.int32([2, 1]))
    assert jax.tree.map(lambda x: x.unsafe_buffer_pointer(), after) == before


# --- refusals ----------------------------------------------------------------------------------------------------


def test_native_refusals(backend):
    def refuses(match, function, *arrays):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(function, *arrays)

    refuses("at most 512 channels", attention_inputs("plain", None), *latent_inputs(1, 1, 64, 576, 64))
    refuses("at most 8192 channels", attention_inputs("plain", None), *latent_inputs(1, 1, 8200, 64, 64))
    refuses("multiple of 8", attention_inputs("plain", None), *latent_inputs(1, 1, 64, 64, 4))
    qr, *rest = latent_inputs(1, 1, 64, 128, 64)
    refuses("takes qr in bfloat16", attention_inputs("plain", None), qr.astype(np.float32), *rest)
    q, cos_sin = normal(0, 1, 1, 2, 512), angles(0, 1, 1)
    refuses("32 to 256 channels", lambda *x: entries.queries(*x, eps=EPS, fp4=True), q, q, *cos_sin)
    refuses("at most 512 channels", lambda x: ops.encode_kv(x, 64), normal(0, 1, 576))


def test_contract_refusals():
    """On every backend: shapes and formats that do not belong together."""

    def refuses(match, function, *arrays):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(function, *arrays)

    inputs = latent_inputs(1, 1, 64, 128, 64)
    refuses("kv_format 'e4m3'", attention_inputs("e4m3", None), *inputs)
    refuses("weights", attention_inputs("plain", None), *inputs[:2], inputs[3], *inputs[3:])
    refuses("cos", attention_inputs("plain", None), *inputs[:4], inputs[4][0], inputs[5][0])
    refuses("blocks of 64", attention_inputs("fp8", None), *latent_inputs(1, 1, 64, 96, 64))
    refuses("multiple of 16", attention_inputs("plain", "nvfp4"), *latent_inputs(1, 1, 72, 64, 64))
    heads = normal(0, 1, 1, 2, 96), normal(0, 1, 1, 2, 96), *angles(0, 1, 1)
    refuses("power of two", lambda *x: entries.queries(*x, eps=EPS, fp4=True), *heads)
    ring, one = np.zeros((2, 8, 4), np.float32), np.zeros((2,), np.int32)
    refuses("one dtype", entries.commit_rows, [ring], [ring[:, :2].astype(np.uint8)], one, one)
    refuses("one dtype", entries.commit_rows, [ring], [ring[:, :2, :3]], one, one)
    refuses("rows", entries.commit_rows, [ring], [ring, ring], one, one)
