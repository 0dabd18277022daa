"""Cases of linear, linears and grouped_linear: the products of one block and the head, in every format."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes
from ffi_kernels.tensor import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK

FORMATS = ("bf16", "fp8", "mxfp4", "nvfp4")


def random_weight(kind: str, key: jax.Array, *shape: int):
    """A weight [..., N, K] of random codes in one of FORMATS, values of about 2**-5; nothing is quantized, so it is quick."""
    *leading, n, k = shape
    if kind == "bf16":
        return jax.random.normal(key, shape, jnp.bfloat16) / 32
    if kind == "fp8":
        codes = jax.random.bits(key, shape, jnp.uint8) & 0xBF  # below 2, never nan
        scale = jnp.full((*leading, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)), 122, jnp.uint8)
        return ops.FP8Tensor(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), scale)
    codes, of_blocks = (jax.random.split(key)[i] for i in range(2))
    codes = jax.random.bits(codes, (*leading, n, k // 2), jnp.uint8)
    if kind == "mxfp4":
        return ops.MXFP4Tensor(codes, 119 + jax.random.bits(of_blocks, (*leading, n, k // MXFP4_BLOCK), jnp.uint8) % 4)
    scale = 0x28 + jax.random.bits(of_blocks, (*leading, n, k // NVFP4_BLOCK), jnp.uint8) % 32  # 0.25 to 3.75
    return ops.NVFP4Tensor(codes, jax.lax.bitcast_convert_type(scale, jnp.float8_e4m3fn), jnp.full(leading, 1 / 64, jnp.float32))


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _linear(name: str, kind: str, n: int, k: int, rows: int = 1) -> Case:
    def make(key):
        keys = jax.random.split(key)
        return jax.random.normal(keys[0], (rows, k), jnp.bfloat16), random_weight(kind, keys[1], n, k)

    x, w = jax.eval_shape(make, jax.random.key(0))
    return Case(
        f"linear/{name}/{kind}" + (f"/R={rows}" if rows > 1 else ""), "linear", make, lambda x, w: ops.linear(ops.Unquantized(x), w),
        nbytes((x, w)) + 4 * rows * n, 2 * rows * n * k, "sum", rows,
        peer=(lambda x, w: jnp.dot(x, w.T, preferred_element_type=jnp.float32)) if kind == "bf16" else None,
    )  # fmt: skip


def _grouped(kind: str, groups: int, n: int, k: int, rows: int = 1) -> Case:
    plain = kind != "nvfp4"  # wo_a: FP8 weights take plain inputs

    def make(key):
        keys = jax.random.split(key)
        return jax.random.normal(keys[0], (rows, groups, k), jnp.bfloat16), random_weight(kind, keys[1], groups, n, k)

    x, w = jax.eval_shape(make, jax.random.key(0))
    return Case(
        f"grouped_linear/wo_a/{kind}" + (f"/R={rows}" if rows > 1 else ""), "grouped_linear", make,
        lambda x, w: ops.grouped_linear(x if plain else ops.Unquantized(x), w),
        nbytes((x, w)) + 4 * rows * groups * n, 2 * rows * groups * n * k, "sum", rows,
    )  # fmt: skip


def _linears(name: str, k: int, products: list[tuple[str, int]], rows: int = 1) -> Case:
    """One input times weights of several formats: (format, N) each."""

    def make(key):
        keys = jax.random.split(key, len(products) + 1)
        ws = tuple(random_weight(kind, at, n, k) for at, (kind, n) in zip(keys[1:], products, strict=True))
        return jax.random.normal(keys[0], (rows, k), jnp.bfloat16), ws

    def run(x, ws):
        return ops.linears(tuple(ops.Unquantized(x) for _ in ws), ws, (jnp.float32,) * len(ws))

    rows_out = sum(n for _, n in products)
    total = nbytes(jax.eval_shape(make, jax.random.key(0))) + 4 * rows * rows_out
    return Case(f"linears/{name}" + (f"/R={rows}" if rows > 1 else ""), "linears", make, run, total, 2 * rows * rows_out * k, "sum", rows)


def cases(shapes: Shapes) -> list[Case]:
    s = shapes
    wide = s.heads * s.head_dim
    index = s.index_heads * s.index_dim
    plain = [("bf16", 2 * s.head_dim)] * 2 + [("bf16", 2 * s.index_dim)] * 2 + [("bf16", s.index_heads)]
    found = [_linear("wq_b", kind, wide, s.q_lora) for kind in FORMATS]
    found += [_linear("wo_b", kind, s.hidden, s.o_groups * s.o_lora) for kind in FORMATS]
    found += [_linear("wq_b", kind, wide, s.q_lora, rows) for kind in ("fp8", "nvfp4") for rows in (4, 16)]
    found += [_grouped(kind, s.o_groups, s.o_lora, wide // s.o_groups) for kind in ("bf16", "fp8", "nvfp4")]
    found += [_grouped("fp8", s.o_groups, s.o_lora, wide // s.o_groups, 16)]
    for kind in ("fp8", "nvfp4"):
        inputs = [(kind, s.q_lora), (kind, s.head_dim), *plain]
        found += [_linears(f"attention inputs/{kind}", s.hidden, inputs, rows) for rows in (1, 16)]
        found.append(_linears(f"queries/{kind}", s.q_lora, [(kind, wide), (kind, index)]))
    found += [_linear("head", "bf16", s.vocab, s.hidden, rows) for rows in (1, 16)]
    return found
