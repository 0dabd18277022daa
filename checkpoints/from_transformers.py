"""transformers' DeepseekV4ForCausalLM, in memory, as our `Model`.

The table below is the whole mapping. transformers has no MTP block, so neither has the result.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import jax
import numpy as np

from dsv4_jax import params, precision
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Model
from dsv4_jax.precision import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _first_half(experts: np.ndarray) -> np.ndarray:
    return experts[:, : experts.shape[1] // 2]


def _second_half(experts: np.ndarray) -> np.ndarray:
    return experts[:, experts.shape[1] // 2 :]


_COMPRESSOR = (
    ("kv_proj.weight", "wkv"),
    ("gate_proj.weight", "wgate"),
    ("kv_norm.weight", "norm"),
    ("position_bias", "ape"),
)
_HC = (("fn", "fn"), ("base", "base"), ("scale", "scale"))
_LAYER = (
    ("input_layernorm.weight", "attn_norm"),
    ("post_attention_layernorm.weight", "ffn_norm"),
    *((f"attn_hc.{theirs}", f"hc_attn.{ours}") for theirs, ours in _HC),
    *((f"ffn_hc.{theirs}", f"hc_ffn.{ours}") for theirs, ours in _HC),
    ("self_attn.q_a_proj.weight", "attn.wq_a"),
    ("self_attn.q_a_norm.weight", "attn.q_norm"),
    ("self_attn.q_b_proj.weight", "attn.wq_b"),
    ("self_attn.kv_proj.weight", "attn.wkv"),
    ("self_attn.kv_norm.weight", "attn.kv_norm"),
    ("self_attn.o_a_proj.weight", "attn.wo_a"),  # [groups * o_lora_rank, K], split below into groups
    ("self_attn.o_b_proj.weight", "attn.wo_b"),
    ("self_attn.sinks", "attn.attn_sink"),
    *((f"self_attn.compressor.{theirs}", f"attn.compressor.{ours}") for theirs, ours in _COMPRESSOR),
    ("self_attn.compressor.indexer.q_b_proj.weight", "attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.scorer.weights_proj.weight", "attn.indexer.weights_proj"),
    *((f"self_attn.compressor.indexer.{theirs}", f"attn.indexer.compressor.{ours}") for theirs, ours in _COMPRESSOR),
    ("mlp.gate.weight", "ffn.gate.weight"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    ("mlp.gate.tid2eid", "ffn.gate.tid2eid"),
    ("mlp.experts.gate_up_proj", "ffn.experts.w1", _first_half),
    ("mlp.experts.gate_up_proj", "ffn.experts.w3", _second_half),
    ("mlp.experts.down_proj", "ffn.experts.w2"),
    ("mlp.shared_experts.gate_proj.weight", "ffn.shared_experts.w1"),
    ("mlp.shared_experts.up_proj.weight", "ffn.shared_experts.w3"),
    ("mlp.shared_experts.down_proj.weight", "ffn.shared_experts.w2"),
)
# (transformers' name, our name, transform or nothing); {} is a layer number.
TABLE = (
    ("model.embed_tokens.weight", "embed"),
    ("lm_head.weight", "head"),
    ("model.norm.weight", "norm"),
    *((f"model.hc_head.hc_{theirs}", f"hc_head.{ours}") for theirs, ours in _HC),
    *((f"model.layers.{{}}.{theirs}", f"layers.{{}}.{ours}", *transform) for theirs, ours, *transform in _LAYER),
)


def _listed(names) -> str:
    names = sorted(names)
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")


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

    rows: dict[str, list] = {}
    for theirs, *row in TABLE:
        rows.setdefault(theirs, []).append(row)
    ours, unknown = {}, []
    for name, tensor in state.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        number = layer.group(1) if layer else ""
        pattern = name.replace(layer.group(), "model.layers.{}.", 1) if layer else name
        if pattern not in rows:
            unknown.append(name)
            continue
        values = tensor.detach().cpu()
        values = (values.float() if values.is_floating_point() else values.int()).numpy()
        for path, *transform in rows[pattern]:
            ours[path.format(number)] = transform[0](values) if transform else values

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
