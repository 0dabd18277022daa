"""What the tests of cache entries share: inputs, and running an op natively or as the reference on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
from compare import assert_bits

import ffi_kernels as ops

BF16, EPS = jnp.bfloat16, 1e-6
LOWEST, HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def normal(seed, *shape, scale=1.0, dtype=BF16):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return np.array(jnp.asarray(x, dtype))


def angles(seed, *leading, rope=64):
    """cos, sin fp32 [*leading, rope/2] of random angles."""
    angle = np.random.default_rng(seed).uniform(-np.pi, np.pi, (*leading, rope // 2))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def quarter_turns(seed, *leading, rope=64):
    """cos, sin of multiples of a right angle: rotations without rounding."""
    turn = np.random.default_rng(seed).integers(0, 4, (*leading, rope // 2))
    return np.float32([1, 0, -1, 0])[turn], np.float32([0, 1, 0, -1])[turn]


def native(function, *arrays):
    """Compiled on the forced backend, over memory that was just filled with nan."""
    jax.block_until_ready([jnp.full((1 << 18,), jnp.nan) for _ in range(4)])
    return jax.tree.map(np.asarray, jax.jit(function)(*arrays))


def on_cpu(function, *arrays):
    with jax.default_device(jax.devices("cpu")[0]), ops.backend("xla"):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(np.asarray, arrays)))


def assert_tree_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(assert_bits, got, want)
