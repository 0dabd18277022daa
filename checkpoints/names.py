"""Names of the published checkpoint for the tensors of our tree, and a whole model under those names.

Our tree already uses the published names; what differs is their shape: experts are stacked, wo_a is per group, and
hyper-connection parameters are nested. Not here: packed formats on disk (`official_state` gives plain numbers).
"""

from __future__ import annotations

import re

import jax
import numpy as np

import ffi_kernels as ops
from dsv4_jax import params
from dsv4_jax.model import Model

_HYPER_CONNECTION = re.compile(r"\bhc_(attn|ffn|head)\.(fn|base|scale)$")
_WITHOUT_SUFFIX = re.compile(r"(\.attn_sink|\.ape|\.gate\.(weight|bias|tid2eid)|hc_(attn|ffn|head)_(fn|base|scale))$")


def official_name(name: str, expert: int | None = None) -> str:
    """Our dotted name -> the published one; `expert` picks one of a stacked tensor.

    >>> official_name("mtp.hc_head.fn"), official_name("layers.3.ffn.experts.w1", expert=7)
    ('mtp.0.hc_head_fn', 'layers.3.ffn.experts.7.w1.weight')
    """
    name = re.sub(r"^mtp\.", "mtp.0.", name)
    name = _HYPER_CONNECTION.sub(r"hc_\1_\2", name)
    if expert is not None:
        name = name.replace(".experts.", f".experts.{expert}.")
    return name if _WITHOUT_SUFFIX.search(name) else f"{name}.weight"


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
