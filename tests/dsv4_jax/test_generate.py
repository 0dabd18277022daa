"""Generation: the loop on the device, samplers, speculative decoding, stops, bad input."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dsv4_jax as dsv4
from dsv4_jax.generate import generate
from dsv4_jax.sampling import Greedy, Sample, filtered, make_sampler, verify
from ffi_kernels import library
from models import PAIR, SMALL, small_model, tokens

PROMPTS = [tokens(n, seed=n)[0].tolist() for n in (1, 5, 130, 40)]


def collect(model, prompts=PROMPTS, count=40, **options):
    out, last = [[] for _ in prompts], None
    for last in generate(model, prompts, count, **options):
        for row, new in zip(out, last.tokens):
            row.extend(new)
    return out, last.finished


def plain_greedy(model, prompt, count):
    """By hand: prefill (padded, so that prompts of all lengths share a program), argmax, decode_step."""
    padded = np.array([prompt + [0] * (max(map(len, PROMPTS)) - len(prompt))])
    logits, state = dsv4.prefill(model, padded, np.array([len(prompt)]), dsv4.init_state(model, 1, 1024))
    out = []
    for _ in range(count):
        out.append(int(np.argmax(logits[0])))
        logits, state = dsv4.decode_step(model, np.array(out[-1:]), state)
    return out


def test_greedy_equals_the_steps_by_hand():
    model = small_model("fp32")
    got, finished = collect(model, stop_ids=())
    assert got == [plain_greedy(model, p, 40) for p in PROMPTS] and finished == ["length"] * 4


@pytest.mark.parametrize("drafts", [1, 3])
def test_speculation_does_not_change_greedy_tokens(drafts):
    """200 tokens from prompts of several alignments: drafts are rejected inside and across blocks of 4 and 128. Two: the tests below."""
    model = small_model("fp32")
    assert collect(model, count=200, stop_ids=(), draft_tokens=drafts) == collect(model, count=200, stop_ids=())


def test_fp32_runs_on_xla_where_a_native_backend_is_the_default(monkeypatch):
    """As on an H200: the native kernels serve bf16 only, and asking for an exact recipe there must still give tokens."""
    model = small_model("fp32")
    want = collect(model, PROMPTS[:1], 6, stop_ids=(), draft_tokens=1)
    monkeypatch.setattr(library, "of_device", lambda: "sm_90a")
    monkeypatch.setattr(library, "why_not", lambda name: None)
    monkeypatch.delenv("DSV4_BACKEND", raising=False)
    assert (model.backend, small_model("bf16").backend) == ("xla", "sm_90a")
    assert collect(model, PROMPTS[:1], 6, stop_ids=(), draft_tokens=1) == want


def test_a_perfect_draft_is_accepted(monkeypatch):
    """With the trunk's own continuation as drafts, each step emits k + 1 tokens, and they are the plain tokens."""
    module = importlib.import_module("dsv4_jax.generate")  # the name dsv4_jax.generate is the function
    model = small_model("fp32")
    want = collect(model, PROMPTS[:1], 90, stop_ids=())[0][0]
    known = jnp.asarray(PROMPTS[0] + want + [0] * 8)

    def oracle_drafts(ctx, weights, state, streams, seen, sampler, k):
        at = state.position[:, None] + 1 + jnp.arange(k)
        return known[at], jnp.zeros((*at.shape, SMALL.vocab_size))

    monkeypatch.setattr(module, "_drafts", oracle_drafts)
    jax.clear_caches()
    parts = list(generate(model, PROMPTS[:1], 90, stop_ids=(), draft_tokens=2))
    jax.clear_caches()
    assert sum((p.tokens[0] for p in parts), []) == want
    assert sum(p.steps for p in parts[1:]) == -(-89 // 3)


def test_sampling_depends_on_seed_and_position_only():
    model, sampler = small_model("fp32"), Sample(temperature=1.5, seed=[3, 4, 5, 6])
    together, _ = collect(model, sampler=sampler, stop_ids=())
    again, _ = collect(model, sampler=sampler, stop_ids=(), chunk=7)
    assert together == again
    alone, _ = collect(model, [PROMPTS[2]] * 4, sampler=Sample(temperature=1.5, seed=[9, 8, 5, 7]), stop_ids=())
    assert alone[2] == together[2] and len({tuple(a) for a in alone}) == 4


def probabilities(logits, **options):
    sampler = make_sampler(Sample(**options), 1)
    seen = jnp.zeros((1, len(logits)), bool).at[0, 0].set(True)
    return np.asarray(jax.nn.softmax(filtered(sampler, jnp.asarray([logits], jnp.float32), seen))[0])


def test_filters():
    logits = np.log([0.5, 0.25, 0.15, 0.07, 0.03])
    np.testing.assert_allclose(probabilities(logits), np.exp(logits), rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, top_k=2), [2 / 3, 1 / 3, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, top_p=0.7), [2 / 3, 1 / 3, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, top_p=0.4), [1, 0, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, min_p=0.29), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, temperature=0.5)[1] / 0.0625, 1 / 0.3408, rtol=1e-3)
    penalized = probabilities(logits, repetition_penalty=2.0)  # log 0.5 is negative: doubled
    np.testing.assert_allclose(penalized, np.array([0.25, 0.25, 0.15, 0.07, 0.03]) / 0.75, rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, top_k=3, top_p=0.8), [0.5 / 0.75, 0.25 / 0.75, 0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_rejection_sampling_keeps_the_distribution(k):
    """Draft from q, verify against p: the emitted tokens are distributed as p. 40,000 independent trials, chi-square."""
    rng, trials, vocab = np.random.default_rng(0), 40_000, 6
    p = jnp.asarray(rng.normal(size=(k + 1, vocab)) * 1.5, jnp.float32)
    q = jnp.asarray(rng.normal(size=(k, vocab)) * 1.5, jnp.float32)
    sampler = make_sampler(Sample(seed=7), trials)
    from dsv4_jax.sampling import draft

    at = jnp.full((trials,), 11, jnp.int32)
    drafts = jnp.stack([draft(sampler, jnp.tile(q[j], (trials, 1)), None, at + j)[0] for j in range(k)], 1)
    count, token = verify(
        sampler, jnp.tile(p, (trials, 1, 1)), drafts, jnp.tile(q, (trials, 1, 1)), None, at
    )  # fmt: skip
    emitted = np.concatenate([np.asarray(drafts), np.zeros((trials, 1), int)], 1)
    emitted[np.arange(trials), np.asarray(count)] = np.asarray(token)
    for j in range(k + 1):  # token j of those trials that got that far
        reached = np.asarray(count) >= j
        observed = np.bincount(emitted[reached, j], minlength=vocab)
        expected = np.asarray(jax.nn.softmax(p[j])) * reached.sum()
        assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3, (j, observed, expected)
    accept = float(jnp.minimum(jax.nn.softmax(p[0]), jax.nn.softmax(q[0])).sum())
    assert abs((np.asarray(count) >= 1).mean() - accept) < 0.01


def test_speculative_sampling_end_to_end_follows_the_model():
    """The third sampled token of 2,048 sequences, plain and speculative, comes from one distribution. One layer: many sequences."""
    one = dataclasses.replace(PAIR, num_hidden_layers=1, compress_ratios=(4, 0), n_routed_experts=4, moe_intermediate_size=64)
    model, prompt = small_model("fp32", one), tokens(6, seed=1)[0].tolist()
    counts = []
    for drafts, seed in ((0, 0), (1, 100_000)):
        hist = np.zeros(one.vocab_size)
        for block in range(2):
            sampler = Sample(temperature=0.7, top_k=4, seed=seed + 1024 * block)
            out, _ = collect(model, [prompt] * 1024, 3, sampler=sampler, draft_tokens=drafts, stop_ids=(), max_len=16)
            hist += np.bincount([row[2] for row in out], minlength=one.vocab_size)
        counts.append(hist)
    used = (counts[0] + counts[1]) >= 10
    table = np.array([counts[0][used], counts[1][used]])
    assert used.sum() >= 4 and stats.chi2_contingency(table).pvalue > 1e-3


def test_stop_ids_finish_one_sequence_and_not_the_others():
    model = small_model("fp32")
    free, _ = collect(model, stop_ids=())
    stop = free[0][10]
    got, finished = collect(model, stop_ids=[stop])
    for row, whole, how in zip(got, free, finished):
        end = whole.index(stop) if stop in whole else len(whole)
        assert row == whole[:end] and how == ("stop" if end < len(whole) else "length")
    assert collect(model, stop_ids=[stop], draft_tokens=2) == (got, finished)


def test_repetition_penalty_counts_prompt_and_answer():
    model = small_model("fp32")
    out, _ = collect(model, sampler=Greedy(repetition_penalty=50.0), stop_ids=())
    for prompt, row in zip(PROMPTS, out):
        assert len(set(row)) == len(row) and not set(row) & set(prompt)
    assert collect(model, sampler=Greedy(repetition_penalty=50.0), stop_ids=(), draft_tokens=2)[0] == out


def test_bad_input_is_a_sentence():
    model = small_model("fp32")
    cases = [
        (dict(prompts=[]), "not a list of prompts"),
        (dict(prompts="text"), "not a list of prompts"),
        (dict(prompts=[[]]), "prompt 0 is empty"),
        (dict(prompts=[""]), "prompt 0 is empty"),
        (dict(prompts=["text"]), "no tokenizer"),
        (dict(prompts=[[1], [256]]), "prompt 1 holds token id 256"),
        (dict(prompts=[[1] * 30], max_new_tokens=10, max_len=32), "more than max_len = 32"),
        (dict(prompts=[[1]], max_new_tokens=0), "at least 1"),
        (dict(prompts=[[1]], draft_tokens=4), r"outside \[0, 3\]"),
        (dict(prompts=[[1]], sampler=Sample(temperature=0)), "use Greedy"),
        (dict(prompts=[[1]], sampler=Sample(top_p=1.5)), r"top_p = 1.5 must be in \(0, 1\]"),
        (dict(prompts=[[1]], sampler=Sample(seed=[1, 2])), "2 seeds for 1 sequences"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            generate(model, **options)


@pytest.mark.parametrize("recipe, lengths", [("bf16", (1, 3)), ("official", (2,))], ids=["bf16", "official"])
def test_speculation_on_the_embedded_model_is_exact_and_pays(recipe, lengths):
    """In bf16 a sum taken in another order would flip a near tie sooner or later; 4 x 150 tokens, every draft length."""
    model = dsv4.load("tiny", recipe=recipe)
    prompts = ["import os\n\n\ndef walk(", "class Stack:\n    def __init__(self", '"""Parse a date.\n', "for key, value in "]

    def text(drafts):
        parts = list(generate(model, prompts, 150, stop_ids=(), draft_tokens=drafts))
        return ["".join(t) for t in zip(*(p.text for p in parts))], sum(p.steps for p in parts)

    plain, steps = text(0)
    for drafts in lengths:
        got, fewer = text(drafts)
        assert got == plain
        assert steps / fewer > 1.4, (drafts, steps, fewer)
