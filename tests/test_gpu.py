"""What must hold on an NVIDIA GPU as on the CPU, on the `xla` backend: bits of the quantizers, tokens of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax as dsv4
import ffi_kernels as ops
from dsv4_jax.generate import generate
from ffi_kernels import numerics

pytestmark = pytest.mark.gpu
PROMPTS = [[0, 37, 512, 90], list(range(20, 320))]


def on(platform, f, *args):
    """f, compiled for and run on the first device of a platform; results on the host."""
    with jax.default_device(jax.devices(platform)[0]):
        return jax.tree.map(np.asarray, jax.jit(f)(*jax.tree.map(jnp.asarray, args)))


def assert_same_bits(f, *args):
    for a, b in zip(jax.tree.leaves(on("cpu", f, *args)), jax.tree.leaves(on("gpu", f, *args)), strict=True):
        a, b = (np.where(np.isnan(x), 0, x) if x.dtype == np.float32 else x for x in (a, b))
        np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def inputs():
    """Every normal bf16 value, shuffled into rows of 256, and rows scaled over forty binades."""
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[((bits >> 7) & 0xFF != 0xFF) & ((bits >> 7) & 0xFF != 0)]
    values = (np.random.default_rng(0).permutation(finite).astype(np.uint32) << 16).view(np.float32)
    rows = values[: values.size // 256 * 256].reshape(-1, 256)
    moderate = np.random.default_rng(1).standard_normal((256, 256)) * 2.0 ** np.random.default_rng(2).integers(-20, 20, (256, 1))
    return np.concatenate([rows, moderate.astype(np.float32)])


@pytest.mark.parametrize(
    "name", ["quantize_fp8", "quantize_mxfp4", "quantize_nvfp4_rows", "quantize_fp8_weight", "quantize_nvfp4_weight"]
)
def test_quantizers_have_the_same_bits(name):
    assert_same_bits(getattr(ops, name), inputs())


def test_dequantized_values_have_the_same_bits():
    x = inputs()[-256:]
    for quantize in (ops.quantize_fp8, ops.quantize_mxfp4, ops.quantize_nvfp4_rows):
        assert_same_bits(lambda x, q=quantize: ops.dequantize(q(x)), x)
    assert_same_bits(lambda x: ops.kv_values(ops.encode_kv(x, 64), 64).astype(jnp.float32), x)


def test_division_is_correctly_rounded():
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(10**6) * 2.0 ** rng.integers(-30, 30, 10**6) for _ in range(2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(on("gpu", numerics.divide, a, b), a / b)


def tokens(platform, recipe, count=120, **options):
    with jax.default_device(jax.devices(platform)[0]):
        model = dsv4.load("tiny", recipe=recipe)
        out = [[] for _ in PROMPTS]
        for part in generate(model, PROMPTS, count, stop_ids=(), **options):
            for row, new in zip(out, part.tokens):
                row.extend(new)
        return out


def test_greedy_tokens_are_those_of_the_cpu():
    assert tokens("gpu", "fp32") == tokens("cpu", "fp32")


@pytest.mark.parametrize("drafts", [1, 3])
def test_speculation_does_not_change_greedy_tokens(drafts):
    assert tokens("gpu", "fp32", draft_tokens=drafts) == tokens("gpu", "fp32")


@pytest.mark.parametrize("recipe", ["bf16", "official", "nvfp4"])
def test_recipes_stay_close_to_the_cpu(recipe):
    """Mean cross entropy of a text under each recipe, GPU and CPU: sums differ in order, so a few routes flip."""
    ids = np.asarray([PROMPTS[1]])
    losses = []
    for platform in ("cpu", "gpu"):
        with jax.default_device(jax.devices(platform)[0]):
            logits = np.asarray(dsv4.forward(dsv4.load("tiny", recipe=recipe), ids))[0, :-1]
        losses.append((np.logaddexp.reduce(logits, -1) - logits[np.arange(len(logits)), ids[0, 1:]]).mean())
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0], losses
