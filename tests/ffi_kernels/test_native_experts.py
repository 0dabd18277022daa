"""experts on every native backend against its reference: formats, any routing, edges, invariance, refusals."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_bits, assert_close

import ffi_kernels as ops
from expert_weights import random_weight

QUANTIZE = {
    "bf16": lambda w: w.astype(jnp.bfloat16),
    "fp8": ops.quantize_fp8_weight,
    "mxfp4": ops.quantize_mxfp4,
    "nvfp4": ops.quantize_nvfp4_weight,
}
RECIPES = {"bf16": ("bf16", "bf16"), "official": ("mxfp4", "fp8"), "nvfp4": ("nvfp4", "nvfp4"), "modelopt": ("nvfp4", "fp8")}
SMALL = (6, 128, 256, 128)  # E, F, D, width of the shared expert
LIMIT = 1.5  # small enough to clamp


def cpu(function, *arguments):
    """function on the CPU under the backend xla."""
    device = jax.devices("cpu")[0]
    with jax.default_device(device), ops.backend("xla"):
        return jax.jit(function)(*jax.device_put(arguments, device))


def made(recipe, rows, sizes=SMALL, seed=0, shared=True):
    """(x, routed, shared): rows and matrices of different sizes, so that a wrong scale or matrix shows."""
    count, width, hidden, own = sizes
    rng = np.random.default_rng(seed)

    def normal(*shape):
        size = np.exp2(rng.integers(-1, 2, (*shape[:-2], shape[-2], 1)))
        return (rng.standard_normal(shape, np.float32) * size).astype(np.float32)

    def part(kind, leading, f):
        raw = {"w1": normal(*leading, f, hidden) / 16, "w3": normal(*leading, f, hidden) / 16, "w2": normal(*leading, hidden, f)}
        return {name: cpu(QUANTIZE[kind], w) for name, w in raw.items()}

    routed, own_kind = RECIPES[recipe]
    x = jnp.asarray(normal(rows, hidden), jnp.bfloat16)
    return x, part(routed, (count,), width), part(own_kind, (), own) if shared else None


def routing(rows, slots, count, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(count)[:slots] for _ in range(rows)]).astype(np.int32)
    return ids, rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)


def native(inputs, ids, weights, dtype=jnp.float32):
    device = jax.devices()[0]
    return np.asarray(jax.jit(functools.partial(ops.experts, limit=LIMIT, dtype=dtype))(*jax.device_put((*inputs, ids, weights), device)))


def check(inputs, ids, weights, dtype=jnp.float32, bounds="requantized"):
    got = native(inputs, ids, weights, dtype)
    want = np.asarray(cpu(functools.partial(ops.experts, limit=LIMIT, dtype=dtype), *inputs, ids, weights))
    assert got.dtype == want.dtype
    for row in range(got.shape[0]):
        assert_close(got[row], want[row], bounds)
    return got


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(backend, recipe, rows):
    check(made(recipe, rows), *routing(rows, 2, 6))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("recipe", ["bf16", "official", "nvfp4"])
def test_whole_units(backend, recipe, rows):
    """Sizes that the kernels of one recipe serve: whole tiles and units."""
    check(made(recipe, rows, (3, 512, 512, 512)), *routing(rows, 2, 3))


@pytest.mark.parametrize("room", [3, 1])
def test_fewer_tokens_of_an_expert_at_once(backend, monkeypatch, room):
    """Where the inputs of 8 tokens do not fit, an expert is read for fewer at a time, and its inputs come in several batches."""
    module = importlib.import_module("ffi_kernels.experts")
    tile, groups = module.tile, module.GROUPS_BYTES
    whole = tile.column_space_bytes
    up = module._fixed_bytes(2) + (groups + 47) // 16 * 16 + whole(256, room)
    monkeypatch.setattr(module, "MAX_SHARED_BYTES", up)
    ids, weights = routing(11, 2, 6)
    ids[:7, 0] = 3
    check(made("nvfp4", 11), ids, weights)


def test_output_in_bf16_and_no_shared_expert(backend):
    check(made("nvfp4", 2, shared=False), *routing(2, 3, 6), dtype=jnp.bfloat16, bounds="requantized")


@pytest.mark.parametrize("recipe, sizes", [("nvfp4", (3, 64, 64, 64)), ("official", (3, 128, 128, 256)), ("bf16", (3, 40, 72, 24))])
def test_ragged_sizes(backend, recipe, sizes):
    check(made(recipe, 2, sizes), *routing(2, 2, 3))


PATTERNS = {
    "all on one": lambda ids: np.full_like(ids, 4),
    "one slot each": lambda ids: np.broadcast_to(np.array([1, 5, 0], np.int32)[: ids.shape[1]], ids.shape),
    "repeated": lambda ids: np.repeat(ids[:, :1], ids.shape[1], 1),
    "outside": lambda ids: np.where(np.arange(ids.size).reshape(ids.shape) % 2, np.int32(2**31 - 1), np.int32(-(2**31))),
}


@pytest.mark.parametrize("rows, slots", [(1, 2), (9, 2), (13, 3)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_routing_patterns(backend, pattern, rows, slots):
    """Up to 32 slots one warp finds the groups, of more all of them do."""
    ids, weights = routing(rows, slots, 6)
    weights[rows // 2, 0] = 0.0 if rows > 1 else weights[0, 0]
    check(made("nvfp4", rows), np.ascontiguousarray(PATTERNS[pattern](ids)), weights)


@pytest.mark.parametrize("shared", [True, False])
def test_slots_of_weight_zero(backend, shared):
    """They add nothing, whatever their matrix holds."""
    ids, weights = routing(3, 2, 6)
    weights[0] = 0
    weights[1, 1] = -0.0
    x, routed, own = made("official", 3, shared=shared)
    ids[1, 1] = 5
    ids[0], ids[1, 0], ids[2] = 5, 0, [1, 2]
    w2 = routed["w2"]
    routed["w2"] = ops.MXFP4Tensor(w2.data, w2.scale.at[5].set(254))
    got = check((x, routed, own), ids, weights)
    if not shared:
        assert not got[0].any()


@pytest.mark.parametrize("weights", [(0.0, 0.5, 0.25), (0.5, 0.0, -0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("recipe", ["bf16", "official", "nvfp4"])
def test_slots_of_weight_zero_of_one_token(backend, recipe, weights):
    """The kernels of one token find their places before they know which slots count."""
    ids, _ = routing(1, 3, 6)
    check(made(recipe, 1), ids, np.float32([weights]))


@pytest.mark.parametrize("recipe", ["official", "nvfp4"])
def test_batch_invariance(backend, recipe):
    """A token's bits depend neither on the others nor on what they picked."""
    sizes = SMALL if backend == "sim" else (32, 512, 1024, 512)
    x, routed, shared = made(recipe, 16, sizes)
    ids, weights = routing(16, 2, 6)
    for row in (0, 13):
        alone = native((x[row : row + 1], routed, shared), ids[row : row + 1], weights[row : row + 1])[0]
        for rows in (2, 7, 16):
            order = np.roll(np.arange(16), 3)[:rows]
            order[rows - 1] = row
            assert_bits(native((x[order], routed, shared), ids[order], weights[order])[rows - 1], alone)
        same = np.broadcast_to(ids[row], ids.shape).copy()
        assert_bits(native((x, routed, shared), same, weights)[row], alone)


@pytest.mark.parametrize("recipe, sizes", [(r, (8, 2048, 4096, 2048)) for r in RECIPES] + [("nvfp4", (8, 3072, 7168, 3072))])
def test_real_shapes(backend, recipe, sizes):
    if backend == "sim":
        pytest.skip("the interpreter runs the small shapes only")
    count, f, d, own = sizes
    kind, own_kind = RECIPES[recipe]
    routed = {n: random_weight(kind, count, *((d, f) if n == "w2" else (f, d)), seed=i) for i, n in enumerate(("w1", "w3", "w2"))}
    shared = {n: random_weight(own_kind, *((d, own) if n == "w2" else (own, d)), seed=9 + i) for i, n in enumerate(("w1", "w3", "w2"))}
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, d)) / 8, jnp.bfloat16)
    ids, weights = routing(16, 6, count)
    on_device = jax.device_put((routed, shared), jax.devices()[0])
    for rows in (1, 4, 16):
        got = native((x[:rows], *on_device), ids[:rows], weights[:rows])
        for row in {0, rows - 1}:
            one = slice(row, row + 1)
            want = cpu(functools.partial(ops.experts, limit=LIMIT), x[one], routed, shared, ids[one], weights[one])
            assert_close(got[row], want[0], "requantized")


def test_not_finite(backend):
    """A token that is not a number stays so, and its neighbours do not notice."""
    x, routed, shared = made("nvfp4", 3)
    x = x.at[1, 7].set(jnp.nan)
    ids, weights = routing(3, 2, 6)
    got = check((x, routed, shared), np.zeros_like(ids) + [0, 1], weights)
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


def test_refusals(backend):
    x, routed, shared = made("bf16", 2)
    ids, weights = routing(2, 2, 6)
    call = functools.partial(jax.eval_shape, functools.partial(ops.experts, limit=LIMIT))
    with pytest.raises(ValueError, match="serves 1 to 16 tokens and 128 picks, not 17 tokens with 2 each; trace prompts"):
        call(jnp.zeros((17, 256), jnp.bfloat16), routed, shared, jnp.zeros((17, 2), jnp.int32), jnp.zeros((17, 2)))
    with pytest.raises(ValueError, match="plain inputs in bfloat16, not float32"):
        call(x.astype(jnp.float32), routed, shared, ids, weights)
    with pytest.raises(ValueError, match=r"takes x \[R, 256\] with ids and weights"):
        call(x[:1], routed, shared, ids, weights)
    with pytest.raises(ValueError, match="of one format and w2"):
        call(x, {**routed, "w3": routed["w3"][:, :8]}, shared, ids, weights)
