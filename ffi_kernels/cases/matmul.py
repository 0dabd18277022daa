"""Cases of nvfp4_matmul: the linear layers of one block for the tokens of a prompt, by our kernel and by those that NVIDIA maintains."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

import ffi_kernels as ops
from ffi_kernels import dispatch, layout, vendor
from ffi_kernels.cases import Case, Shapes
from ffi_kernels.cases.linear import nbytes, random_weight

FP4_SPEED = 4  # dense FP4 against dense bf16, of sm_100a


def _matmul(name: str, n: int, k: int, rows: int) -> Case:
    def make(key):
        keys = jax.random.split(key, 3)
        x, w = random_weight("nvfp4", keys[0], rows, k), random_weight("nvfp4", keys[1], n, k)
        x = ops.NVFP4Tensor(x.data, x.scale, jax.random.uniform(keys[2], (rows, 1), jnp.float32, 0.5, 1.5))
        return layout.pack_tcgen05(x), layout.pack_tcgen05(w)

    x, w = jax.eval_shape(make, jax.random.key(0))
    return Case(
        f"nvfp4_matmul/{name}/R={rows}", "nvfp4_matmul", make, ops.nvfp4_matmul,
        nbytes((x, w)) + 2 * rows * n, 2 * rows * n * k, "bf16", rows, speed=FP4_SPEED,
    )  # fmt: skip


def _by(name: str, case: Case) -> Case:
    """The same product by an implementation of `vendor.py`, whose reference is that of ours."""

    def run(x, w):
        return (ops.nvfp4_matmul if dispatch.current() == "xla" else vendor.implementations()[name].function)(x, w)

    def refusal():
        return vendor.implementations()[name].refusal

    return dataclasses.replace(case, name=f"{case.name}/{name}", run=run, arch=vendor.ARCH, refusal=refusal)


def cases(shapes: Shapes) -> list[Case]:
    s = shapes
    layers = [
        ("wq_a", s.q_lora, s.hidden), ("wq_b", s.heads * s.head_dim, s.q_lora), ("wo_b", s.hidden, s.o_groups * s.o_lora),
        ("w1", s.expert_width, s.hidden), ("w2", s.hidden, s.expert_width),
    ]  # fmt: skip
    ours = [_matmul(name, n, k, rows) for name, n, k in layers for rows in (128, 2048)]
    return [case for own in ours for case in (own, *(_by(name, own) for name in vendor.NAMES))]
