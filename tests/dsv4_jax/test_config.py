"""config.json, read strictly: both spellings, and every refusal."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import dsv4_jax as dsv4
from dsv4_jax.config import PRESETS, rope_frequencies
from dsv4_jax.precision import Recipe, get

DATA = Path(__file__).parents[1] / "data"


def official(name):
    return json.loads((DATA / f"config_{name}.json").read_text())


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_published_configurations_are_the_presets(name, tmp_path):
    assert dsv4.ModelConfig.from_hf(DATA / f"config_{name}.json") == PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(official(name)))
    assert dsv4.ModelConfig.from_hf(tmp_path) == PRESETS[name]


@pytest.mark.parametrize("name", list(PRESETS))
def test_round_trip(name):
    assert dsv4.ModelConfig.from_hf(PRESETS[name].to_json()) == PRESETS[name]


def test_transformers_spelling():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    official_flash = official("flash")
    theirs = transformers.models.deepseek_v4.DeepseekV4Config(**{k: v for k, v in official_flash.items() if k != "quantization_config"})
    ours = dsv4.ModelConfig.from_hf(theirs.to_dict())
    without_mtp = dataclasses.replace(dsv4.FLASH, num_nextn_predict_layers=0, compress_ratios=dsv4.FLASH.layer_ratios)
    if ours.rope_scaling is None:  # their constructor drops rope_scaling unless it is spelled rope_parameters
        without_mtp = dataclasses.replace(without_mtp, rope_scaling=None)
    assert ours == without_mtp


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"compress_rope_theta": None}, "lacks compress_rope_theta"),
        ({"rope_scaling": None, "hc_sinkhorn_iters": None}, "lacks hc_sinkhorn_iters, rope_scaling"),
        ({"q_lora_rank_2": 3}, "does not know: q_lora_rank_2"),
        ({"compress_ratios": [0, 8] * 22}, r"holds \[8\]; DeepSeek-V4 defines only 0"),
        ({"compress_ratios": [0] * 43}, "has 43 entries, but 43 layers and 1 MTP blocks need 44"),
        ({"compress_ratios": [0] * 43 + [4]}, "its entry of compress_ratios must be 0"),
        ({"model_type": "deepseek_v4_1"}, "DeepSeek-V4.1"),
        ({"architectures": ["DeepseekV41ForCausalLM"]}, "DeepSeek-V4.1"),
        ({"engram_layer_ids": [1]}, "DeepSeek-V4.1"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid', but this implementation"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2"),
        ({"num_nextn_predict_layers": 3, "compress_ratios": [0] * 46}, "DSpark"),
        ({"num_experts_per_tok": 300}, "exceeds n_routed_experts"),
        ({"qk_rope_head_dim": 129}, "must be even and at most 128"),
        ({"o_groups": 7}, "not a multiple of o_groups"),
        ({"hidden_size": 0}, "hidden_size = 0 is not positive"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling lacks beta_fast"),
        ({"hidden_size": 4096.0}, r"hidden_size = 4096.0, which is no int that this could be; take config.json"),
        ({"hidden_size": True}, "hidden_size = True, which is no int"),
        ({"hidden_size": 2**40}, "hidden_size = 1099511627776, which is no int that this could be"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6', which is no float"),
        ({"rope_theta": float("nan")}, "rope_theta = nan, which is no float"),
        ({"compress_ratios": [0, [4]] * 22}, r"holds \[\[4\]\]; DeepSeek-V4 defines only 0"),
        ({"compress_ratios": 4}, "a field of the wrong type, or lacks a part of one .*; take the file from the published model"),
        ({"n_shared_experts": True}, "n_shared_experts = True, but this implementation"),
        ({"x\n" * 100: 1}, r"does not know: 'x.{1,130}\.\.\. They could change"),
        ({f"x{i}": 1 for i in range(1000)}, r"does not know: (x\d+, ){9}x\d+ and 990 more\."),
        ({"rope_scaling": {"type": "yarn", "factor": [2]} | dict.fromkeys(("original_max_position_embeddings", "beta_fast", "beta_slow"), 1)},
         r"rope_scaling.factor = \[2\], which is no float"),
    ],
)
def test_refusals(change, sentence):
    raw = official("flash")
    for key, value in change.items():
        if value is None:
            del raw[key]
        else:
            raw[key] = value
    with pytest.raises(ValueError, match=sentence):
        dsv4.ModelConfig.from_hf(raw)


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="not a readable config.json"):
        dsv4.ModelConfig.from_hf(tmp_path)
    for content in (b"{", b"[" * 10**5, b"\xff\xfe", b"[1]"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable config.json"):
            dsv4.ModelConfig.from_hf(tmp_path)


def test_rope_frequencies_of_the_published_models():
    """Facts section 2: theta 10000 without scaling at ratio 0; else theta 160000 with keep = 1 - clamp((i - 15) / 10)."""
    i = np.arange(32)
    np.testing.assert_allclose(rope_frequencies(dsv4.FLASH, 0), 10000.0 ** (-i / 32), rtol=1e-12)
    f, keep = 160000.0 ** (-i / 32), 1 - np.clip((i - 15) / 10, 0, 1)
    for ratio in (4, 128):
        np.testing.assert_allclose(rope_frequencies(dsv4.PRO, ratio), f / 16 * (1 - keep) + f * keep, rtol=1e-12)


def test_recipes():
    assert [get(name).name for name in ("bf16", "official", "nvfp4", "fp32")] == ["bf16", "official", "nvfp4", "fp32"]
    with pytest.raises(ValueError, match="recipe 'fp16' is not known; choose one of bf16, official, nvfp4"):
        get("fp16")
    with pytest.raises(ValueError, match="kv = 'int4' is not one of plain, fp8"):
        Recipe("x", kv="int4")
    with pytest.raises(ValueError, match="use dtype='bfloat16'"):
        Recipe("x", dtype="float32", kv="fp8")
