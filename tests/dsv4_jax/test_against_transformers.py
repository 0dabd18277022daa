"""The fp32 model against transformers' DeepseekV4ForCausalLM on random weights: every position, and 600 tokens of decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle.from_transformers import official_weights
from oracle.test_oracle import CONFIGS, YARN_65536, prompt, transformers_model

import dsv4_jax as dsv4
from checkpoints import from_transformers, official_state

# On top of the oracle's: odd sizes everywhere, one Sinkhorn iteration, hash routing in every layer, two streams.
MORE = {
    "odd sizes": dict(
        vocab_size=131, hidden_size=98, moe_intermediate_size=35, num_attention_heads=6, o_groups=3, o_lora_rank=23,
        q_lora_rank=37, head_dim=50, qk_rope_head_dim=10, index_n_heads=17, index_head_dim=26, index_topk=7,
        n_routed_experts=5, num_experts_per_tok=2, hc_sinkhorn_iters=1, num_hash_layers=4, hc_mult=2,
    ),
    "short YaRN window": dict(
        sliding_window=32, compress_ratios=[4, 4, 128, 0], hc_sinkhorn_iters=6, num_attention_heads=4, o_groups=4,
        rope_parameters=YARN_65536 | {"original_max_position_embeddings": 128, "factor": 4.0}, index_topk=12,
    ),
}  # fmt: skip
ALL = CONFIGS | MORE
LENGTH = 700  # 175 entries of ratio 4, more than any index_topk here; 5 of ratio 128; several windows


@functools.cache
def models(name: str):
    theirs = transformers_model(**ALL[name])
    return theirs, from_transformers(theirs)


def tokens_of(theirs, length: int = LENGTH) -> torch.Tensor:
    return prompt(length, theirs.config.vocab_size)


@pytest.mark.parametrize("name", ALL)
def test_logits_at_every_position(name, record_property):
    theirs, ours = models(name)
    assert ours.recipe.name == "fp32"
    tokens = tokens_of(theirs)
    with torch.no_grad():
        expected = theirs(tokens[None], use_cache=False).logits[0].numpy()
    actual = np.asarray(dsv4.forward(ours, tokens.numpy()[None]))[0]
    difference = np.abs(actual - expected).max(-1)
    worst = int(difference.argmax())
    record_property("max_abs", float(difference[worst]))
    print(f"{name}: {difference[worst]:.1e} at position {worst}, of {np.abs(expected).max():.2f}")
    assert difference[worst] <= 2e-4, f"position {worst} of {name} differs by {difference[worst]}"


@pytest.mark.parametrize("name", ["YaRN 64, HCA first", "odd sizes"])
def test_600_greedy_tokens_through_both_caches(name):
    theirs, ours = models(name)
    start, new = tokens_of(theirs, 61), 600
    result = theirs.generate(
        start[None], max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = result.sequences[0, len(start) :].tolist()
    state = dsv4.init_state(ours, batch=1, max_len=len(start) + new)
    logits, state = dsv4.prefill(ours, start.numpy()[None], np.array([len(start)]), state)
    tokens, differences = [], []
    for step in range(new):
        differences.append(float(np.abs(np.asarray(logits[0]) - result.scores[step][0].numpy()).max()))
        tokens.append(int(jnp.argmax(logits[0])))
        assert tokens[-1] == expected[step], f"token {step} of {name}; logits differ by {differences[-1]}"
        if step + 1 < new:
            logits, state = dsv4.decode_step(ours, np.array(tokens[-1:]), state)
    print(f"{name}: {len(set(tokens))} distinct tokens, logits within {max(differences):.1e}")
    assert len(tokens) == new and len(set(tokens)) > 20, "the text got stuck, so it tests little"
    assert max(differences) <= 2e-4


def test_official_state_undoes_the_conversion():
    theirs, ours = models("small")
    expected, actual = official_weights(theirs), official_state(ours)
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor.numpy(), err_msg=name)


def test_bf16_models_become_bf16():
    theirs = transformers_model().to(torch.bfloat16)
    ours = from_transformers(theirs)
    assert ours.recipe.name == "bf16"
    assert ours.weights["layers"][0]["attn"]["wo_a"].shape == (2, 24, 64)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.weights)} == {"bfloat16", "float32", "int32"}
    np.testing.assert_array_equal(
        official_state(ours)["layers.2.attn.wkv.weight"], theirs.model.layers[2].self_attn.kv_proj.weight.detach().float()
    )
    assert from_transformers(theirs, recipe="fp32").weights["embed"].dtype == jnp.float32


def test_misfits_are_listed():
    theirs = transformers_model()
    theirs.model.layers[1].register_buffer("novelty", torch.zeros(3))
    del theirs.model.layers[2].self_attn.sinks
    theirs.config.o_lora_rank = 12
    with pytest.raises(ValueError, match="do not fit its configuration") as error:
        from_transformers(theirs)
    text = str(error.value)
    wrong_shape = "layers.0.attn.wo_a is [48, 64] instead of [2, 12, 64]"
    for part in ("model.layers.1.novelty is unknown", "layers.2.attn.attn_sink is missing", wrong_shape):
        assert part in text, (part, text)
