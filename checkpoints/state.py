"""A whole model in memory as plain numbers under published names. Not here: packed formats, files."""

from __future__ import annotations

import jax
import numpy as np

import ffi_kernels as ops
from checkpoints.names import official_name
from dsv4_jax import params
from dsv4_jax.model import Model


@jax.jit
def _numbers(weights):
    return jax.tree.map(ops.dequantize, weights, is_leaf=lambda leaf: isinstance(leaf, ops.QUANTIZED))


def official_state(model: Model) -> dict[str, np.ndarray]:
    """All weights under published names as fp32 numbers (tid2eid as int64), dequantized, experts one by one.

    wo_a is [groups * o_lora_rank, K] as published. The whole model in fp32 on the host: for small models.
    """
    state: dict[str, np.ndarray] = {}

    def add(name: str, param: params.Param, leaf: jax.Array, numbers: jax.Array) -> None:
        if param.role == "int32":
            state[official_name(name)] = np.asarray(leaf).astype(np.int64)
        elif param.role == "experts":
            state.update({official_name(name, e): matrix for e, matrix in enumerate(np.asarray(numbers))})
        elif param.role == "wo_a":
            state[official_name(name)] = np.asarray(numbers).reshape(-1, numbers.shape[-1])
        else:
            state[official_name(name)] = np.asarray(numbers)

    params.map_params(add, model.config, model.weights, _numbers(model.weights))
    return state
