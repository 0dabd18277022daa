"""The functions of a model agree with one another: forward, prefill in any chunking, decode steps, batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax as dsv4
from models import PAIR, SMALL, small_model, tokens

FP32_ROUNDING = 2e-5  # sums of a few hundred fp32 products in another order, through four layers; logits are O(1)


WIDTHS = (1, 6, 132, 530)  # arrays that chunks are padded to: few, because each is a compilation


def run_chunks(model, row, sizes, max_len=640, slot=0, batch=1):
    """Logits after each chunk of one sequence that sits in `slot` of a batch whose other slots stay empty."""
    state = dsv4.init_state(model, batch, max_len)
    out, at = [], 0
    for size in sizes:
        chunk = np.full((batch, min(w for w in WIDTHS if w >= size)), 7, np.int32)
        lengths = np.zeros(batch, np.int32)
        chunk[slot, :size], lengths[slot] = row[at : at + size], size
        logits, state = dsv4.prefill(model, chunk, lengths, state)
        at += size
        out.append(np.asarray(logits[slot]))
    return np.stack(out), state


def test_every_chunking_and_decode_agree_with_forward():
    model, row = small_model("fp32"), tokens(530)[0]
    whole = np.asarray(dsv4.forward(model, row[None])[0])
    assert np.isfinite(whole).all() and whole.std() > 0.05
    for sizes in ([530], [128] * 4, [127, 1, 127, 1, 129, 129], [3, 1, 4, 120, 5, 128, 130, 131], [65] * 8):
        logits, _ = run_chunks(model, row, sizes)
        ends = np.cumsum(sizes) - 1
        np.testing.assert_allclose(logits, whole[ends], atol=FP32_ROUNDING, err_msg=f"chunks {sizes}")
    state = dsv4.init_state(model, 1, 640)
    for i in range(300):  # crosses 4, the window, 128, and index_topk = 16 entries at position 67
        logits, state = dsv4.decode_step(model, row[i : i + 1], state)
        np.testing.assert_allclose(logits[0], whole[i], atol=FP32_ROUNDING, err_msg=f"position {i}")


@pytest.mark.parametrize("length", [1, 3, 4, 5, 63, 64, 67, 68, 127, 128, 129, 255, 256, 257])
def test_prefill_equals_decode_steps_at_borders(length):
    model, row = small_model("fp32"), tokens(260, seed=5)[0]
    logits, state = run_chunks(model, row, [length])
    after, state = dsv4.decode_step(model, row[length : length + 1], state)
    whole = np.asarray(dsv4.forward(model, row[None])[0])
    np.testing.assert_allclose(logits[0], whole[length - 1], atol=FP32_ROUNDING)
    np.testing.assert_allclose(after[0], whole[length], atol=FP32_ROUNDING)


@pytest.mark.parametrize("recipe", ["bf16", "official", "nvfp4"])
def test_quantized_recipes_run_all_functions(recipe):
    """bf16 rounding flips routes and selections, so the paths agree in distribution, not in each number."""
    model, row = small_model(recipe, PAIR), tokens(200, seed=2)[0]
    whole = np.asarray(dsv4.forward(model, row[None])[0])
    logits, state = run_chunks(model, row, [64, 64, 72], max_len=256)
    want = whole[[63, 127, 199]]
    assert np.isfinite(whole).all() and np.isfinite(logits).all()
    cosine = (logits * want).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.median(cosine) > {"bf16": 0.98, "official": 0.98, "nvfp4": 0.85}[recipe], cosine
    step, _ = dsv4.decode_step(model, row[:1], state)
    assert np.isfinite(step).all()


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "official", "nvfp4"])
def test_ragged_batch_is_each_alone_bit_for_bit(recipe):
    model, rows, lengths = small_model(recipe, PAIR), tokens(96, batch=4, seed=3), np.array([96, 1, 50, 7])
    together, state = dsv4.prefill(model, rows, lengths, dsv4.init_state(model, 4, 640))
    following = np.array([5, 6, 7, 8])
    after, state = dsv4.decode_step(model, following, state)
    for slot in range(4):
        alone = np.full_like(rows, 9)  # other contents in the other slots
        alone[slot] = rows[slot]
        ones = np.full(4, 3)
        ones[slot] = lengths[slot]
        logits, other = dsv4.prefill(model, alone, ones, dsv4.init_state(model, 4, 640))
        tokens_after = np.full(4, 1)
        tokens_after[slot] = following[slot]
        step, other = dsv4.decode_step(model, tokens_after, other)
        np.testing.assert_array_equal(logits[slot], together[slot], err_msg=f"prefill, slot {slot}")
        np.testing.assert_array_equal(step[slot], after[slot], err_msg=f"decode, slot {slot}")


def test_slot_does_not_matter():
    model, row = small_model("fp32"), tokens(130, seed=4)[0]
    a, _ = run_chunks(model, row, [65, 65], slot=0, batch=3)
    b, _ = run_chunks(model, row, [65, 65], slot=2, batch=3)
    np.testing.assert_array_equal(a, b)


def test_requests_one_after_another_are_each_alone():
    """A public reference leaks compressor scores from one request into the next; fresh states cannot."""
    model, first, second = small_model("fp32"), tokens(150, seed=6)[0], tokens(150, seed=7)[0]
    alone, _ = run_chunks(model, second, [75, 75])
    run_chunks(model, first, [75, 75])
    again, _ = run_chunks(model, second, [75, 75])
    np.testing.assert_array_equal(alone, again)


def test_length_zero_leaves_a_sequence_as_it_is():
    model, rows = small_model("fp32"), tokens(40, batch=2, seed=8)
    _, state = dsv4.prefill(model, rows, np.array([40, 40]), dsv4.init_state(model, 2, 640))
    kept = jax.tree.map(lambda x: np.asarray(x).copy(), state)
    _, state = dsv4.prefill(model, rows, np.array([0, 40]), state)
    for old, new in zip(jax.tree.leaves(kept), jax.tree.leaves(state)):
        np.testing.assert_array_equal(old[0], new[0])
    assert state.position.tolist() == [40, 80]


def test_decode_compiles_once_and_updates_in_place():
    model = small_model("bf16")
    state = dsv4.init_state(model, 1, 640)
    from dsv4_jax.model import _decode_step

    token = jnp.zeros((1,), jnp.int32)
    compiled = _decode_step.lower(model, token, state).compile()
    inputs, aliased = len(jax.tree.leaves(state)), compiled.as_text().split("input_output_alias={")[1].split("entry_computation")[0]
    assert aliased.count("may-alias") + aliased.count("must-alias") == inputs
    before = _decode_step._cache_size()
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.layers)}
    for _ in range(5):
        _, state = dsv4.decode_step(model, token, state)
    assert _decode_step._cache_size() - before <= 1
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.layers)} == pointers


def test_pure_under_jit_grad_and_vmap():
    model, row = small_model("fp32"), jnp.asarray(tokens(20, seed=9))

    def loss(weights):
        logits = dsv4.forward(dataclasses.replace(model, weights=weights), row)
        return -jax.nn.log_softmax(logits[0, :-1])[jnp.arange(19), row[0, 1:]].mean()

    value, grads = jax.jit(jax.value_and_grad(loss, allow_int=True))(model.weights)
    assert np.isfinite(value)
    moved = {name for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "attn_sink") if np.abs(grads["layers"][1]["attn"][name]).max() > 0}
    assert moved == {"wq_a", "wq_b", "wkv", "wo_a", "wo_b", "attn_sink"}
    assert np.abs(grads["layers"][2]["attn"]["compressor"]["wgate"]).max() == 0  # no block of 128 closes in 20 tokens
    assert np.abs(grads["layers"][1]["attn"]["compressor"]["wgate"]).max() > 0
    direction = grads["embed"] / jnp.linalg.norm(grads["embed"])
    nudged = [loss({**model.weights, "embed": model.weights["embed"] + s * 1e-4 * direction}) for s in (1, -1)]
    np.testing.assert_allclose((nudged[0] - nudged[1]) / 2e-4, jnp.linalg.norm(grads["embed"]), rtol=0.02)

    states = [dsv4.init_state(model, 1, 64) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    many, _ = jax.vmap(dsv4.decode_step, in_axes=(None, 0, 0))(model, jnp.arange(3)[:, None], stacked)
    one, _ = dsv4.decode_step(model, jnp.array([2]), dsv4.init_state(model, 1, 64))
    np.testing.assert_allclose(many[2], one, atol=FP32_ROUNDING)


def test_capacity_and_unknown_ids_show_as_nan_on_the_device():
    model = small_model("fp32")
    logits, state = dsv4.prefill(model, tokens(64), np.array([64]), dsv4.init_state(model, 1, 64))
    assert np.isfinite(logits).all()
    logits, _ = dsv4.decode_step(model, jnp.array([1]), state)
    assert np.isnan(logits).all()
    logits, _ = dsv4.decode_step(model, jnp.array([SMALL.vocab_size]), dsv4.init_state(model, 1, 64))
    assert np.isnan(logits).all()


def test_bad_input_is_a_sentence():
    model = small_model("fp32")
    state = dsv4.init_state(model, 1, 16)
    cases = [
        (lambda: dsv4.prefill(model, np.zeros((1, 0), int), np.array([0]), state), "never empty"),
        (lambda: dsv4.prefill(model, tokens(17), np.array([17]), state), "max_len = 16"),
        (lambda: dsv4.prefill(model, np.array([[256]]), np.array([1]), state), "256 is outside the vocabulary"),
        (lambda: dsv4.prefill(model, tokens(4), np.array([5]), state), r"must lie in \[0, 4\]"),
        (lambda: dsv4.prefill(model, tokens(4, batch=2), np.array([4, 4]), state), "same batch"),
        (lambda: dsv4.decode_step(model, np.array([-1]), state), "-1 is outside"),
        (lambda: dsv4.decode_step(model, np.array([[1]]), state), "one token per sequence"),
        (lambda: dsv4.init_state(model, 0, 16), "at least one"),
        (lambda: dsv4.init_state(model, 1, 5000), r"outside \[1, 4096\]"),
        (lambda: dsv4.forward(model, np.array([[0.5]])), "token ids are integers"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
