"""`nvfp4_matmul` by cuDNN, through `jax.nn.scaled_matmul`: the third implementation, and what JAX itself would run.

JAX lowers it for CUDA to the custom call `__op$block_scaled_dot`, with elements as float4_e2m1fn and scales linear. What becomes of
that is decided when XLA compiles: for compute capability 10 with cuDNN 9.10 or newer the custom call `__cudnn$blockScaledDot`, before
which XLA brings the scales into the same 128 x 4 tiles as `layout.py`, rows padded to 128; for any other device or version, without a
word, dequantization and an ordinary dot. So `why_not` asks the compiler. `tests/ffi_kernels/test_cudnn.py` saw all that with the CUDA
compilers of jax 0.10.2 and 0.11.2, without a device.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from ffi_kernels import library, matmul, vendor
from ffi_kernels.tensor import NVFP4_BLOCK, NVFP4Tensor

OP = "cudnn.nvfp4_matmul"
LOWERED, COMPILED = "__op$block_scaled_dot", "__cudnn$blockScaledDot"  # custom calls, before and after XLA's passes
PROBE = (128, 128, 256)  # M, N, K


def elements(packed: jax.Array) -> jax.Array:
    """uint8 [rows, K/2], even K in the low nibble -> float4_e2m1fn [rows, K]: the same bytes, as XLA packs this type."""
    return jax.lax.bitcast_convert_type(packed, jnp.float4_e2m1fn).reshape(packed.shape[0], -1)


def _product(x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array) -> jax.Array:
    """uint8 [M, K/2], uint8 [N, K/2], float8_e4m3fn [M, K/16] and [N, K/16] -> float32 [M, N]."""
    batch = [a[None] for a in (elements(x), elements(w), x_scale, w_scale)]
    return jax.nn.scaled_matmul(*batch, preferred_element_type=jnp.float32)[0]


def optimized_hlo(rows: int, columns: int, k: int, device) -> str:
    """The HLO that XLA compiles a product [M, N] over K to, for a device (or a compile-only one)."""
    shapes = [((n, size), dtype) for size, dtype in ((k // 2, jnp.uint8), (k // NVFP4_BLOCK, jnp.float8_e4m3fn)) for n in (rows, columns)]
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(_product).lower(*arguments).compile().as_text()


@functools.cache
def why_not_on(device, rows: int, columns: int, k: int) -> str | None:
    """None if XLA gives the product of this shape to cuDNN on `device`, else a sentence. Compiles it, once."""
    try:
        with ThreadPoolExecutor(1) as pool:  # a thread has no mesh set, as the caller may have (jax.set_mesh)
            text = pool.submit(optimized_hlo, rows, columns, k, device).result()
    except jax.errors.JaxRuntimeError as error:
        return f"{OP}: XLA cannot compile [{rows}, {k}] x [{columns}, {k}] for {device}: {str(error).splitlines()[0]}; use nvfp4_matmul."
    if COMPILED in text:
        return None
    return (
        f"{OP}: XLA dequantizes [{rows}, {k}] x [{columns}, {k}] on {device} instead of calling cuDNN, which it does for "
        "compute capability 10 and cuDNN 9.10 or newer; update cuDNN, or use nvfp4_matmul."
    )


def why_not(shape: tuple[int, int, int] = PROBE) -> str | None:
    """None if `nvfp4_matmul` of M, N, K can be traced here, else a sentence.

    On an sm_100a device the product is compiled to see what XLA makes of it. Where the arch is only forced there is nothing to
    ask: the call is lowered, and what becomes of it stays open.
    """
    if (refusal := vendor.why_not_device(OP)) is not None or library.of_device() != vendor.ARCH:
        return refusal
    return why_not_on(library.default_device(), *shape)


def nvfp4_matmul(x: NVFP4Tensor, w: NVFP4Tensor, dtype=jnp.bfloat16) -> jax.Array:
    """x [M, K] times w [N, K] transposed -> [M, N]: the contract of `matmul.py`, in layouts linear or 'tcgen05' (untiled here).

    NotImplementedError where `why_not` says so: it never dequantizes.
    """
    if (refusal := why_not(matmul.check(OP, x, w, dtype, vendor.LAYOUTS))) is not None:
        raise NotImplementedError(refusal)
    product = _product(x.data, w.data, vendor.linear_scales(x), vendor.linear_scales(w))
    return vendor.apply_global_scales(product, x, w, dtype)
