"""A transformers DeepSeek-V4 model as an official config and official weight names. The MTP block is not among them."""

import torch

_RATIO = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_SAME = (
    "vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim "
    "q_lora_rank o_groups o_lora_rank index_n_heads index_head_dim index_topk n_routed_experts num_experts_per_tok "
    "routed_scaling_factor swiglu_limit hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps sliding_window rope_theta "
    "compress_rope_theta"
).split()
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")

_ATTENTION = {
    "q_a_proj.weight": "wq_a.weight",
    "q_a_norm.weight": "q_norm.weight",
    "q_b_proj.weight": "wq_b.weight",
    "kv_proj.weight": "wkv.weight",
    "kv_norm.weight": "kv_norm.weight",
    "o_a_proj.weight": "wo_a.weight",
    "o_b_proj.weight": "wo_b.weight",
    "sinks": "attn_sink",
}
_COMPRESSOR = {
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "kv_norm.weight": "norm.weight",
    "position_bias": "ape",
}
_INDEXER = {"q_b_proj.weight": "wq_b.weight", "scorer.weights_proj.weight": "weights_proj.weight"}
_INDEXER |= {theirs: f"compressor.{ours}" for theirs, ours in _COMPRESSOR.items()}
_LAYER = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight"}
_LAYER |= {f"{site}_hc.{part}": f"hc_{site}_{part}" for site in ("attn", "ffn") for part in ("fn", "base", "scale")}
_LAYER |= {f"self_attn.{theirs}": f"attn.{ours}" for theirs, ours in _ATTENTION.items()}
_LAYER |= {f"self_attn.compressor.{theirs}": f"attn.compressor.{ours}" for theirs, ours in _COMPRESSOR.items()}
_LAYER |= {f"self_attn.compressor.indexer.{theirs}": f"attn.indexer.{ours}" for theirs, ours in _INDEXER.items()}
_LAYER |= {
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
_MODEL = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def official_config(hf_config) -> dict:
    """transformers' DeepseekV4Config -> the keys of the official config.json that the model needs."""
    config = {key: getattr(hf_config, key) for key in _SAME}
    config["compress_ratios"] = [_RATIO[kind] for kind in hf_config.layer_types] + [0]
    config["num_hash_layers"] = hf_config.mlp_layer_types.count("hash_moe")
    rope = hf_config.rope_parameters["compress"]
    config["rope_scaling"] = {"type": "yarn"} | {k: rope[k] for k in _YARN} if rope["rope_type"] == "yarn" else None
    return config


def official_weights(hf_model) -> dict[str, torch.Tensor]:
    """The tensors of a DeepseekV4ForCausalLM under official names; raises KeyError for a tensor without one."""
    weights = {}
    for name, tensor in hf_model.state_dict().items():
        if name in _MODEL:
            weights[_MODEL[name]] = tensor
            continue
        _, _, layer, part = name.split(".", 3)  # model.layers.N.part
        if part == "mlp.experts.gate_up_proj":  # [E, 2F, D], gate first
            for expert, gate_up in enumerate(tensor):
                w1, w3 = gate_up.chunk(2)
                weights[f"layers.{layer}.ffn.experts.{expert}.w1.weight"] = w1
                weights[f"layers.{layer}.ffn.experts.{expert}.w3.weight"] = w3
        elif part == "mlp.experts.down_proj":
            for expert, w2 in enumerate(tensor):
                weights[f"layers.{layer}.ffn.experts.{expert}.w2.weight"] = w2
        else:
            weights[f"layers.{layer}.{_LAYER[part]}"] = tensor
    return weights
