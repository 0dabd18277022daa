"""transformers' DeepseekV4ForCausalLM, in memory, as our `Model`.

The mapping is the table of `names.py`. transformers has no MTP block, so neither has the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from checkpoints import names
from dsv4_jax import params, precision
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Model
from dsv4_jax.precision import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _half(values: np.ndarray, transform: str) -> np.ndarray:
    """The rows of a fused gate_up_proj that `transform` names; anything else unchanged."""
    if transform not in (names.FIRST_HALF, names.SECOND_HALF):
        return values
    middle = values.shape[1] // 2
    return values[:, :middle] if transform == names.FIRST_HALF else values[:, middle:]


def _listed(found) -> str:
    found = sorted(found)
    return ", ".join(found[:40]) + (f" and {len(found) - 40} more" if len(found) > 40 else "")


def from_transformers(hf_model: PreTrainedModel, recipe: str | Recipe | None = None) -> Model:
    """A DeepseekV4ForCausalLM as a `Model` with the same numbers, in the formats of `recipe`.

    recipe: None means fp32 for a float32 model and bf16 otherwise. Raises ValueError listing every tensor that has no
    place here, is missing, or has another shape than the configuration gives it.
    """
    import torch

    config = ModelConfig.from_hf(hf_model.config.to_dict())
    state = hf_model.state_dict()
    if recipe is None:
        recipe = precision.FP32 if state["lm_head.weight"].dtype == torch.float32 else precision.BF16
    recipe = precision.get(recipe)

    ours, unknown = {}, []
    for name, tensor in state.items():
        what = names.meaning(name)
        if what is None:
            unknown.append(name)
            continue
        values = tensor.detach().cpu()
        values = (values.float() if values.is_floating_point() else values.int()).numpy()
        for path, transform in zip(what.paths, what.transforms):
            ours[path] = _half(values, transform)

    problems = []

    def take(name: str, param: params.Param) -> np.ndarray | None:
        values = ours.pop(name, None)
        if values is None:
            problems.append(f"{name} is missing")
        elif values.size != np.prod(param.shape) or values.shape[-1:] != param.shape[-1:]:
            problems.append(f"{name} is {list(values.shape)} instead of {list(param.shape)}")
        else:
            return values.reshape(param.shape)
        return None

    weights = params.map_params(take, config)
    problems += [f"{name} is unknown" for name in unknown] + [f"{name} belongs to no layer" for name in ours]
    if problems:
        raise ValueError(
            f"the tensors of the transformers model do not fit its configuration: {_listed(problems)}. "
            "Was the configuration changed after the model was made, or is it another architecture?"
        )
    convert = jax.jit(params.to_recipe, static_argnums=(1, 2))
    return Model(convert(weights, config, recipe), config, recipe)
