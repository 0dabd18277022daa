"""The oracle against transformers in fp32, its MTP block against transformers' parts, its formats exactly."""

import pytest
import torch
from oracle.formats import E2M1, e2m1_codes, e2m1_values, e4m3, fp4_round, fp8_round, hadamard
from oracle.formats import nvfp4_quantize, nvfp4_values, power_of_two_scale
from oracle.from_transformers import official_config, official_weights
from oracle.model import Oracle, rope_frequencies

deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4", reason="needs transformers")
torch.set_num_threads(1)

YARN_65536 = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 65536, "beta_fast": 32.0, "beta_slow": 1.0
}  # fmt: skip
# Enough indexer heads that no score is 0 for lack of any live ReLU: ties go to the lower entry here, anywhere in topk.
SMALL = dict(
    vocab_size=160, hidden_size=96, moe_intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, head_dim=64,
    qk_rope_head_dim=16, q_lora_rank=48, o_groups=2, o_lora_rank=24, index_n_heads=16, index_head_dim=32, index_topk=16,
    n_routed_experts=8, num_experts_per_tok=3, compress_ratios=[0, 4, 128, 4], num_hash_layers=2, hc_sinkhorn_iters=20,
    max_position_embeddings=4096, routed_scaling_factor=1.5, attn_implementation="eager",
)  # fmt: skip
CONFIGS = {
    "small": {},
    "one head, CSA first": dict(num_attention_heads=1, o_groups=1, compress_ratios=[4, 0, 128, 4]),
    "8 heads, YaRN 65536": dict(
        hidden_size=256, num_attention_heads=8, o_groups=4, hc_sinkhorn_iters=3, index_topk=8, qk_rope_head_dim=32,
        rope_parameters=YARN_65536, max_position_embeddings=16 * 65536, num_hash_layers=1,
    ),
    "YaRN 64, HCA first": dict(
        rope_parameters=YARN_65536 | {"original_max_position_embeddings": 64}, max_position_embeddings=16 * 64,
        compress_ratios=[128, 128, 4, 128], num_hash_layers=3, index_topk=4, hidden_size=256, routed_scaling_factor=2.5,
    ),
    "real head and rope dims": dict(
        head_dim=512, qk_rope_head_dim=64, index_head_dim=128, num_hidden_layers=2, compress_ratios=[4, 128],
        rope_parameters=YARN_65536, max_position_embeddings=16 * 65536, num_hash_layers=0, index_topk=64,
    ),
}  # fmt: skip


def transformers_model(seed: int = 0, **overrides):
    """A random fp32 model in which every parameter matters: no bias, sink, norm or scale is at its neutral value."""
    config = deepseek.DeepseekV4Config(**SMALL | overrides)
    config._experts_implementation = "eager"
    model = deepseek.DeepseekV4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():  # state_dict shares storage with the model, buffers included
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("tid2eid"):
            rows = [torch.randperm(config.n_routed_experts, generator=generator) for _ in value]
            value.copy_(torch.stack(rows)[:, : config.num_experts_per_tok])
        elif "norm" in name:
            value.copy_(1 + 0.3 * noise)
        elif name.endswith(("scale", "sinks", "position_bias")):
            value.copy_(0.3 + noise)
        elif name.endswith("base"):
            value.copy_(noise)
        elif name.endswith("e_score_correction_bias"):
            value.copy_(0.2 * noise)
        elif name.endswith("embed_tokens.weight"):
            value.copy_(noise)
        elif "experts" in name:  # large enough for the swiglu clamps to act
            value.copy_(noise * 3 * value.shape[-1] ** -0.5)
        else:
            value.copy_(noise * value.shape[-1] ** -0.5)
    return model


def prompt(length: int, vocab: int = SMALL["vocab_size"]) -> torch.Tensor:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length))


def with_mtp(model) -> tuple[dict, dict, torch.nn.Module]:
    """(config, weights, one-layer transformers model that lends its layer to the MTP block)."""
    lender = transformers_model(1, num_hidden_layers=1, compress_ratios=[0], num_hash_layers=0)
    weights, lent = official_weights(model), official_weights(lender)
    for name, tensor in lent.items():
        if name not in ("embed.weight", "head.weight"):
            weights["mtp.0." + name.removeprefix("layers.0.")] = tensor
    width, generator = model.config.hidden_size, torch.Generator().manual_seed(2)
    for name in ("e_proj", "h_proj"):
        weights[f"mtp.0.{name}.weight"] = torch.randn(width, width, generator=generator) * width**-0.5
    for name in ("enorm", "hnorm"):
        weights[f"mtp.0.{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
    return official_config(model.config), weights, lender.model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, record_property):
    model = transformers_model(**CONFIGS[name])
    oracle = Oracle(official_config(model.config), official_weights(model))
    for length in (1, 3, 4, 130, 300):
        tokens = prompt(length)
        with torch.no_grad():
            theirs = model(tokens[None], use_cache=False).logits[0]
        ours = oracle.forward(tokens)
        difference = (ours["logits"] - theirs).abs().max().item()
        record_property(f"max_abs_{length}", difference)
        print(f"{name}, {length} tokens: {difference:.1e} of {theirs.abs().max():.2f}")
        assert difference <= 2e-4, (length, difference)
        assert ours["mtp_logits"] is None


def test_mtp_equals_transformers_parts():
    model = transformers_model()
    config, weights, lender = with_mtp(model)
    tokens = prompt(150)
    result = Oracle(config, weights).forward(tokens)

    def rms_norm(x, weight):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, config["rms_norm_eps"])

    with torch.no_grad():
        token = rms_norm(weights["embed.weight"][tokens[1:]], weights["mtp.0.enorm.weight"])
        hidden = rms_norm(result["hidden"][:-1], weights["mtp.0.hnorm.weight"])
        streams = (token @ weights["mtp.0.e_proj.weight"].T)[:, None] + hidden @ weights["mtp.0.h_proj.weight"].T
        positions = torch.arange(149)[None]
        age = positions[0][:, None] - positions[0]
        mask = torch.zeros(149, 149).masked_fill((age < 0) | (age >= config["sliding_window"]), -torch.inf)
        rope = {"main": lender.rotary_emb(token[None], positions, "main")}
        streams = lender.layers[0](
            streams[None], position_embeddings=rope, position_ids=positions, attention_mask=mask[None, None]
        )
        theirs = lender.norm(lender.hc_head(streams))[0] @ weights["head.weight"].T
    difference = (result["mtp_logits"] - theirs).abs().max().item()
    print(f"mtp: {difference:.1e} of {theirs.abs().max():.2f}")
    assert result["mtp_logits"].shape == (149, config["vocab_size"])
    assert difference <= 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [False, True])
def test_recipes_are_causal_and_near_fp32(dtype, quantize):
    """Later tokens change nothing before them, and rounding changes something but not much."""
    config, weights, _ = with_mtp(transformers_model())
    tokens = prompt(140)
    oracle = Oracle(config, weights, dtype=dtype, quantize=quantize)
    whole, start = oracle.forward(tokens), oracle.forward(tokens[:133])
    assert whole["hidden"].dtype == dtype and whole["logits"].dtype == torch.float32
    exact = Oracle(config, weights).forward(tokens)
    for site in ("logits", "mtp_logits"):
        assert torch.isfinite(whole[site]).all()
        length = len(start[site])
        # Matrix shapes choose the summation order, so rounding may land elsewhere; a leak would show everywhere.
        moved = (whole[site][:length] - start[site]).abs().amax(-1)
        assert moved.median() < 1e-4
        print(f"{site} {dtype} {quantize}: moved {moved.max():.1e}, median {moved.median():.1e}")
        cosine = torch.nn.functional.cosine_similarity(whole[site], exact[site], dim=-1)
        print(f"  cosine with fp32: median {cosine.median():.5f}, least {cosine.min():.4f}")
        assert cosine.median() > 0.95
        if quantize or dtype == torch.bfloat16:
            assert not torch.equal(whole[site], exact[site])


def test_sites():
    config, weights, _ = with_mtp(transformers_model())
    result = Oracle(config, weights).forward(prompt(100))
    blocks = ["layers.0", "layers.1", "layers.2", "layers.3", "mtp.0"]
    outputs = {f"{block}.{part}" for block in blocks for part in ("attn", "ffn")}
    assert set(result["sites"]) == outputs | {"layers.1.topk", "layers.3.topk"}
    assert result["hidden"].shape == (100, 4, config["hidden_size"])
    top = result["sites"]["layers.1.topk"]
    assert top.shape == (100, config["index_topk"]) and top.dtype == torch.long
    for p, row in enumerate(top):
        chosen = row[row >= 0]
        assert len(chosen) == len(chosen.unique()) == min(config["index_topk"], (p + 1) // 4)
        assert (chosen < (p + 1) // 4).all() and (row[len(chosen) :] == -1).all()
    assert Oracle(config, weights, quantize=True).forward(prompt(1))["mtp_logits"].shape == (0, config["vocab_size"])


def test_yarn_of_the_released_models():
    plain = 1 / 160000 ** (torch.arange(32) / 32)
    keep = 1 - ((torch.arange(32) - 15) / 10).clamp(0, 1)
    torch.testing.assert_close(rope_frequencies(64, 160000, YARN_65536), plain / 16 * (1 - keep) + plain * keep)
    torch.testing.assert_close(rope_frequencies(64, 160000, None), plain)


def all_finite_bf16() -> torch.Tensor:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[torch.isfinite(x)]


def nearest(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Nearest of a rising grid whose even indices have even mantissas; in float64, where the distances are exact."""
    distance = (x.double().abs().clamp(max=grid[-1])[:, None] - grid.double()).abs()
    best = distance.amin(1, keepdim=True)
    odd = torch.arange(len(grid)) % 2
    return torch.where(distance == best, odd, 2).argmin(1)


def test_elements_round_to_nearest_even():
    x = all_finite_bf16()
    assert torch.equal(e2m1_codes(x).long() & 7, nearest(x, E2M1))
    assert torch.equal(e2m1_codes(x) >> 3, torch.signbit(x).to(torch.uint8))
    some = torch.tensor([2.6, 5.1, -5.0, 0.25, 0.75, 3.5, 1e9])
    assert e2m1_values(e2m1_codes(some)).tolist() == [3, 6, -4, 0, 1, 4, 6]
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(e4m3(x).float().abs(), grid[nearest(x, grid)])


def test_scales_and_block_rounding():
    powers = 2.0 ** torch.arange(-20, 20)
    ones = torch.ones_like(powers)
    for limit in (6.0, 448.0):
        for amax, expected in ((powers * limit, powers), (torch.nextafter(powers * limit, ones * 1e30), powers * 2)):
            assert torch.equal(power_of_two_scale(amax, 1e-30, limit), expected)
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(0))
    for rounded, bound in ((fp8_round(x, 128), 2**-4), (fp4_round(x), 2**-2)):
        assert rounded.shape == x.shape
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert (rounded - x).abs().max() <= x.abs().max() * bound
    assert torch.equal(fp8_round(fp8_round(x, 128), 128), fp8_round(x, 128))
    assert torch.equal(fp8_round(x, 128)[:, 128:], fp8_round(x[:, 128:], 128))
    assert torch.equal(fp8_round(torch.zeros(2, 64), 64), torch.zeros(2, 64))
    assert torch.equal(fp4_round(torch.zeros(2, 32)), torch.zeros(2, 32))
    h = hadamard(128)
    assert torch.equal(h @ h.T, 128 * torch.eye(128)) and h[1, :4].tolist() == [1, -1, 1, -1]


def test_nvfp4():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x[0, :16], x[1, 16:32] = 0, 1e-9
    codes, scales, global_scale = nvfp4_quantize(x)
    assert (codes.shape, scales.shape, global_scale.shape) == ((8, 64), (8, 4), ())
    assert (scales.dtype, scales.float().max()) == (torch.float8_e4m3fn, 448)
    for row, block in ((0, 0), (1, 1)):
        assert scales[row, block].float() == 0 and not codes[row, 16 * block : 16 * block + 16].any()
    values = nvfp4_values(codes, scales, global_scale)
    assert (values - x).abs().max() <= x.abs().max() / 6 * 1.07  # half the step from 4 to 6, and the scale's rounding
    codes, scales, global_scale = nvfp4_quantize(torch.zeros(1, 16))
    assert not codes.any() and scales.float() == 0 and global_scale == 0
