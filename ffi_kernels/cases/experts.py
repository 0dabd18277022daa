"""Cases of experts: the MoE of one decode step, in every recipe, for 1, 4 and 16 tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import ffi_kernels as ops
from ffi_kernels.cases import Case, Shapes
from ffi_kernels.cases.linear import nbytes, random_weight

RECIPES = {"bf16": ("bf16", "bf16"), "official": ("mxfp4", "fp8"), "nvfp4": ("nvfp4", "nvfp4")}
HELD = {1: 8, 4: 24, 16: 48}  # experts in memory, by tokens: fewer than the model's, so that copies fit
LIMIT = 10.0


def _case(shapes: Shapes, recipe: str, rows: int) -> Case:
    kind, shared_kind = RECIPES[recipe]
    held, f, d = HELD[rows], shapes.expert_width, shapes.hidden
    ids = np.stack([np.random.default_rng(i).permutation(held)[: shapes.per_token] for i in range(rows)]).astype(np.int32)
    picked = len(np.unique(ids))

    def make(key):
        keys = jax.random.split(key, 8)
        sizes = {"w1": (f, d), "w3": (f, d), "w2": (d, f)}
        routed = {name: random_weight(kind, keys[i], held, *size) for i, (name, size) in enumerate(sizes.items())}
        shared = {name: random_weight(shared_kind, keys[3 + i], *size) for i, (name, size) in enumerate(sizes.items())}
        weights = jax.random.uniform(keys[7], ids.shape, jnp.float32, 0.1, 0.4)
        return jax.random.normal(keys[6], (rows, d), jnp.bfloat16) / 4, routed, shared, weights

    def run(x, routed, shared, weights):
        return ops.experts(x, routed, shared, jnp.asarray(ids), weights, LIMIT)

    x, routed, shared, _ = jax.eval_shape(make, jax.random.key(0))
    total = nbytes(routed) * picked // held + nbytes(shared) + nbytes(x) + 4 * rows * d
    flops = 2 * 3 * f * d * rows * (shapes.per_token + 1)
    return Case(f"experts/{recipe}" + (f"/R={rows}" if rows > 1 else ""), "experts", make, run, total, flops, "requantized", rows)


def cases(shapes: Shapes) -> list[Case]:
    few = [_case(shapes, recipe, 1) for recipe in RECIPES]
    return few + [_case(shapes, recipe, rows) for recipe in ("official", "nvfp4") for rows in (4, 16)]
