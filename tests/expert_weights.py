"""Random weights of every format without quantizing anything: for tests at the shapes of real models."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import ffi_kernels as ops


def random_weight(kind: str, *shape: int, seed: int = 0):
    """A weight [..., N, K] of format 'bf16', 'fp8', 'mxfp4' or 'nvfp4' on the CPU; values of about 2**-5, block scales of three sizes."""
    rng = np.random.default_rng(seed)
    *leading, n, k = shape
    device = jax.devices("cpu")[0]

    def put(x):
        return jax.device_put(x, device)

    if kind == "bf16":
        return put((rng.standard_normal(shape, np.float32) / 32).astype(ml_dtypes.bfloat16))
    if kind == "fp8":
        codes = rng.integers(0, 256, shape, np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0
        scale = rng.integers(112, 115, (*leading, -(-n // 128), -(-k // 128)), np.uint8)
        return ops.FP8Tensor(put(codes.view(ml_dtypes.float8_e4m3fn)), put(scale))
    codes = put(rng.integers(0, 256, (*leading, n, k // 2), np.uint8))
    if kind == "mxfp4":
        return ops.MXFP4Tensor(codes, put(rng.integers(119, 122, (*leading, n, k // 32), np.uint8)))
    scale = rng.integers(0x28, 0x48, (*leading, n, k // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
    factor = (rng.uniform(0.5, 1.5, leading) / 64).astype(np.float32)
    return ops.NVFP4Tensor(codes, put(scale), put(jnp.asarray(factor)))
