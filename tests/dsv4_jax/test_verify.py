"""Verification: identical models are identical, a planted error is found where it is, and bad input is refused first."""

import argparse
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import save
from checkpoints.train_tiny import train_tokenizer
from dsv4_jax import TINY, Model, params, random_model, verify
from dsv4_jax.precision import BF16, NVFP4, OFFICIAL, Recipe

# One layer of each kind and the MTP block; a selection that cuts from position 19 on.
SMALL = dataclasses.replace(
    TINY, vocab_size=512, hidden_size=128, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_attention_heads=2,
    o_groups=2, q_lora_rank=64, index_n_heads=2, index_topk=4, moe_intermediate_size=64, n_routed_experts=4,
    hc_sinkhorn_iters=3, max_position_embeddings=512,
)  # fmt: skip
# A single CSA layer without the MTP block: what `run` needs to compile for several recipes.
ONE_LAYER = dataclasses.replace(SMALL, num_hidden_layers=1, compress_ratios=(4,), num_nextn_predict_layers=0)
LENGTH = 48
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, LENGTH), dtype=np.int32)


@functools.cache
def model(recipe=BF16):
    return random_model(SMALL, recipe)


def zeros(recipe):
    weights = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params.abstract(ONE_LAYER, recipe))
    return Model(weights, ONE_LAYER, recipe)


def with_weight(base, name, change):
    """`base` with one weight replaced by change(weight)."""
    weights = params.map_params(lambda n, _, leaf: change(leaf) if n == name else leaf, base.config, base.weights)
    assert any(a is not b for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(base.weights))), f"no weight {name}"
    return dataclasses.replace(base, weights=weights)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A directory with a random model and a tokenizer."""
    path = tmp_path_factory.mktemp("stored") / "small"
    save(random_model(ONE_LAYER, OFFICIAL), path, tokenizer_json=train_tokenizer(["def f(x):\n    return x\n"] * 9, 512).to_str())
    return path


def arguments(stored, *more):
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return parser.parse_args(["--model", str(stored), "--tokens", "96", "--length", str(LENGTH), *more])


def test_identical_models():
    report = verify.compare(model(), model(), TOKENS)
    names = [f"layers.{i}.{site}" for i in range(3) for site in ("attn", "ffn")] + ["hidden", "logits", "mtp_logits"]
    assert [s.name for s in report.sites] == names
    assert all((s.cosine, s.relative_error, s.worst_cosine) == (1, 0, 1) for s in report.sites)
    cut = LENGTH - 19  # position 19 is the first to see more than 4 entries
    assert report.recalls == (verify.Recall(1, 1.0, 2 * cut),)
    assert all(passed for _, passed in report.gates.values())


@pytest.mark.parametrize("layer", range(3))
def test_a_planted_error_is_found_at_its_layer(layer):
    broken = with_weight(model(), f"layers.{layer}.attn.wo_b", lambda w: -w)
    report = verify.compare(broken, model(), TOKENS)
    assert report.worst.name == f"layers.{layer}.attn"
    assert report.worst.cosine == pytest.approx(-1, abs=1e-3) and report.worst.relative_error == pytest.approx(2, abs=1e-2)
    before = [s for s in report.sites if s.name.startswith("layers.") and int(s.name.split(".")[1]) < layer]
    assert all(s.cosine == 1 and s.relative_error == 0 for s in before), "layers before the error are untouched"
    assert report.site("logits").cosine < 1


def test_the_worst_position():
    a = np.ones((2, 5, 8), np.float32)
    b = a.copy()
    b[1, 3, :4] = -1
    site = verify._site("x", a, b)
    assert site.worst == (1, 3) and site.worst_cosine == 0 and site.cosine == pytest.approx(0.9)
    assert site.relative_error == pytest.approx(math.sqrt(4 * 4 / 80))
    zero = np.zeros_like(a)
    assert verify._site("x", zero, zero).cosine == 1 and verify._site("x", zero, a).cosine == 0
    assert verify._site("x", a, zero).relative_error == math.inf
    a[0, 2] = np.nan
    assert verify._site("x", a, b).worst == (0, 2)


def test_recall_counts_what_both_chose():
    picks = np.full((1, 24, 4), -1)
    picks[0, 19:] = [0, 1, 2, 3]
    other = picks.copy()
    other[0, 20] = [4, 3, 2, 1]
    other[0, 23] = [5, 4, 1, 0]
    other[0, 3, 0] = 0  # before a selection cuts nothing counts
    a, b = ({"layers.1.topk": p, "logits": np.zeros((1, 24, 1))} for p in (other, picks))
    assert verify._recall(SMALL, 1, a, b) == verify.Recall(1, (5 * 4 - 3) / 20, 5)
    short = {"layers.1.topk": picks[:, :19], "logits": np.zeros((1, 19, 1))}
    assert verify._recall(SMALL, 1, short, short) == verify.Recall(1, None, 0)


def test_perplexity():
    logits = np.zeros((2, LENGTH, SMALL.vocab_size), np.float32)
    logits[:, 1:, 7] = 1.0
    guesses = np.zeros((2, LENGTH - 1, SMALL.vocab_size), np.float32)
    guesses[0, :, 7] = 1.0
    tokens = np.full((2, LENGTH), 9)
    tokens[:, 1] = 3
    found = verify.quality({"logits": logits, "mtp_logits": guesses}, tokens, nbytes=100)
    v, n = SMALL.vocab_size, LENGTH - 1
    nats = (math.log(v) + (n - 1) * math.log(v - 1 + math.e)) / n
    assert found["nats_per_token"] == pytest.approx(nats) and found["perplexity"] == pytest.approx(math.exp(nats))
    assert found["bits_per_byte"] == pytest.approx(2 * n * nats / math.log(2) / 100)
    assert found["mtp_agreement"] == 0.5

    measured = verify.perplexity(model(), TOKENS)
    assert measured["nats_per_token"] == pytest.approx(math.log(v), abs=0.5) and measured["bits_per_byte"] is None


def test_weights_with_nan_are_named():
    plain = zeros(BF16)
    bad = with_weight(plain, "layers.0.attn.wkv", lambda w: w.at[3, 5].set(jnp.nan))
    bad = with_weight(bad, "norm", lambda w: w.at[0].set(-jnp.inf))
    assert sorted(verify.nan_weights(bad)) == ["layers.0.attn.wkv", "norm"] and not verify.nan_weights(plain)
    for recipe, name, part, value in (
        (OFFICIAL, "layers.0.attn.wo_b", "scale", 255),
        (OFFICIAL, "layers.0.attn.wo_b", "data", jnp.nan),
        (OFFICIAL, "layers.0.ffn.experts.w2", "scale", 255),
        (NVFP4, "layers.0.ffn.experts.w1", "scale", jnp.nan),
        (NVFP4, "layers.0.attn.wq_a", "global_scale", jnp.inf),
    ):
        def change(leaf):
            array = getattr(leaf, part)
            return dataclasses.replace(leaf, **{part: array.reshape(-1).at[-1].set(value).reshape(array.shape)})

        good = zeros(recipe)
        assert verify.nan_weights(with_weight(good, name, change)) == [name] and not verify.nan_weights(good)
    everything = jax.tree.map(lambda w: jnp.full_like(w, 255) if w.dtype == jnp.uint8 else w, zeros(NVFP4))
    assert not verify.nan_weights(everything), "255 is two good FP4 numbers"


def test_recipes():
    found = {r.name: r for r in verify.variants()}
    assert list(found)[:3] == ["bf16", "official", "nvfp4"] and len(found) == 9
    assert found["bf16+kv=fp8"] == Recipe("bf16+kv=fp8", kv="fp8")
    assert found["bf16+experts=nvfp4"] == Recipe("bf16+experts=nvfp4", experts="nvfp4")
    assert verify.variants(NVFP4)[0] is NVFP4 and len(verify.variants(NVFP4)) == 9
    assert verify.recipe_named("nvfp4+kv=plain+index=plain") == dataclasses.replace(
        NVFP4, name="nvfp4+kv=plain+index=plain", kv="plain", index="plain"
    )
    for wrong in ("int4", "bf16+speed=high", "bf16+kv", "bf16+kv=int4", "bf16+name=x", "bf16+"):
        with pytest.raises(ValueError, match=r"\.$"):
            verify.recipe_named(wrong)


def test_held_out_tokens(stored, tmp_path):
    from checkpoints import load

    small = load(stored)
    tokens, nbytes = verify.held_out_tokens(small, 200, LENGTH)
    again, same = verify.held_out_tokens(small, 200, LENGTH)
    assert tokens.dtype == np.int32 and tokens.shape == (4, LENGTH) and tokens[0, 0] == SMALL.bos_token_id
    assert np.array_equal(tokens, again) and nbytes == same
    assert nbytes >= 4 * (LENGTH - 10)

    text = tmp_path / "a.txt"
    text.write_text("größe = 1\n" * 3, "utf-8")
    whole = verify.held_out_tokens(small, 200, 20, text)[0].shape[0] * 20
    ids = small.tokenizer.encode("größe = 1\n" * 3, add_special_tokens=False).ids
    assert whole <= len(ids) + 2 < whole + 20
    tokens, nbytes = verify.held_out_tokens(small, 200, len(ids) + 2, text)
    assert tokens.tolist() == [[0, *ids, 1]] and nbytes == len(text.read_bytes())

    for count, length, source, message in (
        (10, 20, None, "20 tokens do not fit"),
        (200, 1, None, "1 tokens do not fit"),
        (2000, 1000, None, "512 positions"),
        (400, 400, text, "take a longer text"),
        (200, 20, tmp_path / "none.txt", "none.txt cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            verify.held_out_tokens(small, count, length, source)
    with pytest.raises(ValueError, match="no tokenizer"):
        verify.held_out_tokens(model(), 200, LENGTH)


def test_the_command(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "variants", lambda base: [base, verify.recipe_named("bf16+kv=fp8")])
    picture = tmp_path / "out.png"
    args = arguments(stored, "--plot", str(picture), "--recipe", "official", "--strict")
    code = verify.run(args)
    lines = capsys.readouterr().out.strip().splitlines()
    document = json.loads(lines[-1])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (document["recipe"], document["against"], document["tokens"]) == ("official", "bf16", 96)
    assert [r["recipe"] for r in document["recipes"]] == ["bf16", "official", "bf16+kv=fp8"]
    assert document["recipes"][0]["delta_percent"] == 0 and document["recipes"][0]["logits_cosine"] == 1
    assert document["recipes"][1]["logits_cosine"] == document["gates"]["logits cosine"]["figure"] < 1
    assert code == int(not all(g["passed"] for g in document["gates"].values()))
    printed = "\n".join(lines[:-1])
    for word in ("layers.0.ffn", "recall@4", "bf16+kv=fp8", "Farthest from bf16: layers.0", "logits cosine 0.9", "n/a"):
        assert word in printed, word

    args = arguments(stored, "--recipe", "bf16", "--only", "--strict")
    args.length = 16  # nothing cuts
    assert verify.run(args) == 0
    out = capsys.readouterr().out
    assert "n/a: no selection cuts" in out and "logits cosine 1.000000, at least 0.999 wanted: pass" in out
    assert json.loads(out.splitlines()[-1])["gates"]["indexer recall"]["passed"] is None


def test_refusals(stored, tmp_path, capsys):
    rotten = with_weight(zeros(BF16), "layers.0.attn.wkv", lambda w: w.at[0, 0].set(jnp.nan))
    save(rotten, tmp_path / "rotten", tokenizer_json=(stored / "tokenizer.json").read_text())
    for args, message in (
        (arguments(tmp_path / "rotten"), "layers.0.attn.wkv"),
        (arguments(stored, "--recipe", "int4"), "int4"),
        (arguments(stored, "--against", "bf16+x=y"), "'x' is no field"),
        (arguments(stored, "--plot", str(tmp_path / "no" / "a.png")), "existing directory"),
        (arguments(tmp_path / "nowhere"), "does not exist"),
        (arguments(stored, "--length", "513"), "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            verify.run(args)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="different configurations"):
        verify.compare(model(), zeros(BF16), TOKENS)
    for tokens in (TOKENS[0], TOKENS[:, :1], TOKENS.astype(float), TOKENS + SMALL.vocab_size):
        with pytest.raises(ValueError, match="tokens? "):
            verify.record(model(), tokens)
