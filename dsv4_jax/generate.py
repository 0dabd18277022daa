"""Generation: prompts in, chunks of tokens out, with the token loop, the sampler and speculation on the device.

One loop serves plain and speculative decoding: a step feeds the current token and k drafts, k = 0 for plain. With
k > 0 the MTP block drafts, the trunk verifies k + 1 tokens at once, and only accepted rows are committed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ffi_kernels as ops
from dsv4_jax import cache as caches
from dsv4_jax import params
from dsv4_jax.cache import DECODE_TOKENS, Chunk, DecodeState
from dsv4_jax.model import (
    Model, accept, advance, advance_mtp, init_state, last_of, on, prefill, state_specs, trunk_logits,
)  # fmt: skip
from dsv4_jax.mtp import mtp, mtp_logits
from dsv4_jax.sampling import Greedy, Sample, Sampler, draft, draw, make_sampler, remember, verify
from dsv4_jax.sharding import BATCH, DATA, Context, run_sharded

PREFILL_CHUNKS = (32, 256)  # tokens per prefill call; few sizes, so that few programs are compiled
MAX_DRAFTS = DECODE_TOKENS - 1


@dataclasses.dataclass(frozen=True)
class Generated:
    """What one chunk of the loop produced, on the host.

    tokens: new token ids per sequence (stop ids excluded). finished: None while a sequence runs, then 'stop' or
    'length'. steps: loop iterations, so that sum(map(len, tokens)) / steps shows what speculation gains. text: the new
    text per sequence, if the prompts were strings.
    """

    tokens: list[list[int]]
    finished: list[str | None]
    steps: int
    text: list[str] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "token", "active", "stopped", "remaining", "seen", "drafts", "draft_logits"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Carry:
    """state; token int32 [B]: emitted, not yet fed; active, stopped bool [B]; remaining int32 [B]: tokens still wanted;
    seen bool [B, V] or None; drafts int32 [B, k] and their logits fp32 [B, k, V], or None."""

    state: DecodeState
    token: jax.Array
    active: jax.Array
    stopped: jax.Array
    remaining: jax.Array
    seen: jax.Array | None
    drafts: jax.Array | None
    draft_logits: jax.Array | None


def _emit(carry: _Carry, tokens: jax.Array, count: jax.Array, stop_ids: jax.Array):
    """Take the first `count` [B] of tokens [B, n] as output. Returns (kept bool [B, n], carry with the bookkeeping)."""
    order = jnp.arange(tokens.shape[1])
    is_stop = (tokens[..., None] == stop_ids).any(-1)
    stops_before = jnp.cumsum(is_stop, axis=1) - is_stop
    reached = carry.active[:, None] & (order < count[:, None]) & (stops_before == 0)
    reached &= order < carry.remaining[:, None]
    kept = reached & ~is_stop
    stopped = carry.stopped | (reached & is_stop).any(-1)
    remaining = carry.remaining - kept.sum(-1)
    active = carry.active & ~stopped & (remaining > 0)
    seen = carry.seen
    if seen is not None:
        for j in range(tokens.shape[1]):
            seen = remember(seen, tokens[:, j], kept[:, j])
    return kept, dataclasses.replace(carry, active=active, stopped=stopped, remaining=remaining, seen=seen)


def _drafts(ctx: Context, weights, state: DecodeState, streams, seen, sampler: Sampler, k: int):
    """k guesses for the tokens after the current one. streams [B, M, D]: of the MTP block, for the current token.

    The block's cache is extended for the guesses only here; the state keeps what is certain.
    """
    tokens, logits, cache = [], [], state.mtp
    for j in range(k):
        guess, drawn_from = draft(sampler, mtp_logits(ctx, weights, streams), seen, state.position + 1 + j)
        tokens.append(guess)
        logits.append(drawn_from)
        seen = remember(seen, guess)
        if j + 1 < k:
            chunk = Chunk.make(state.position + j, jnp.ones_like(guess), 1)
            out, cache, rows = mtp(ctx, weights, cache, streams[:, None], guess[:, None], chunk)
            (cache,) = caches.commit((cache,), (rows,), chunk)
            streams = out[:, 0]
    return jnp.stack(tokens, 1), jnp.stack(logits, 1)


def _begin(ctx: Context, weights, logits, carry: _Carry, sampler: Sampler, stop_ids, k: int):
    """The first token, from the prompt's logits [B, V], and the first drafts."""
    state = carry.state
    token = draw(sampler, logits, carry.seen, state.position)
    kept, carry = _emit(carry, token[:, None], jnp.ones_like(token), stop_ids)
    if k:
        pair = Chunk.make(state.position - 1, jnp.ones_like(token), 1)
        out, state = advance_mtp(ctx, weights, state, state.hidden[:, None], token[:, None], pair)
        drafts, drawn_from = _drafts(ctx, weights, state, out[:, 0], carry.seen, sampler, k)
        carry = dataclasses.replace(carry, drafts=drafts, draft_logits=drawn_from)
    return token[:, None], kept, dataclasses.replace(carry, state=state, token=token)


def _step(ctx: Context, weights, carry: _Carry, sampler: Sampler, stop_ids, k: int):
    """Feed the current token and the drafts; emit 1 to k + 1 tokens. Returns (tokens, kept [B, k + 1], carry)."""
    state, before = carry.state, carry.active
    fed = carry.token[:, None] if not k else jnp.concatenate([carry.token[:, None], carry.drafts], axis=1)
    whole = Chunk.make(state.position, jnp.where(before, k + 1, 0), k + 1)
    streams, state, pending = advance(ctx, weights, state, fed, whole)
    logits = trunk_logits(ctx, weights, streams)
    if k:
        count, token = verify(sampler, logits, carry.drafts, carry.draft_logits, carry.seen, state.position + 1)
        order = jnp.arange(k + 1)
        after = jnp.concatenate([carry.drafts, token[:, None]], axis=1)
        after = jnp.where(order == count[:, None], token[:, None], after)
    else:
        token = draw(sampler, logits[:, 0], carry.seen, state.position + 1)
        count, after = jnp.zeros_like(token), token[:, None]
    taken = Chunk.make(state.position, jnp.where(before, count + 1, 0), k + 1)
    state = accept(state, pending, taken)
    kept, carry = _emit(carry, after, count + 1, stop_ids)
    if k:
        out, state = advance_mtp(ctx, weights, state, streams, after, taken)
        drafts, drawn_from = _drafts(ctx, weights, state, last_of(out, taken), carry.seen, sampler, k)
        state = dataclasses.replace(state, hidden=last_of(streams, taken))
        carry = dataclasses.replace(carry, drafts=drafts, draft_logits=drawn_from)
    return after, kept, dataclasses.replace(carry, state=state, token=token)


def _loop(ctx: Context, weights, carry: _Carry, sampler: Sampler, stop_ids, k: int, steps: int):
    """Up to `steps` steps. Returns (carry, tokens int32 [B, steps * (k + 1)], their count [B], steps taken)."""
    batch = carry.token.shape[0]
    rows = jnp.arange(batch)[:, None]
    room = steps * (k + 1)

    def body(loop):
        i, _, carry, out, count = loop
        tokens, kept, carry = _step(ctx, weights, carry, sampler, stop_ids, k)
        place = jnp.where(kept, count[:, None] + jnp.cumsum(kept, axis=1) - 1, room)
        out = out.at[rows, place].set(tokens, mode="drop")
        return i + 1, ctx.any_request(carry.active.any()), carry, out, count + kept.sum(-1)

    start = (0, ctx.any_request(carry.active.any()), carry, jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, jnp.int32))
    i, _, carry, out, count = jax.lax.while_loop(lambda s: (s[0] < steps) & s[1], body, start)
    return carry, out, count, i


def _sampler_specs(sampler: Sampler):
    replicated = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), sampler)
    return dataclasses.replace(replicated, seeds=BATCH)


@functools.partial(jax.jit, static_argnums=(5, 6), donate_argnums=(2,))
def _begin_jit(model: Model, logits, carry, sampler, stop_ids, k, backend):
    ctx = model.context
    f = functools.partial(_begin, ctx, k=k)
    ins = None
    if model.mesh is not None:
        replicated = jax.sharding.PartitionSpec()
        ins = (params.specs(ctx, model.weights), BATCH, state_specs(carry), _sampler_specs(sampler), replicated)
    with on(model, backend):
        return run_sharded(model.mesh, f, ins, BATCH)(model.weights, logits, carry, sampler, stop_ids)


@functools.partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=(1,))
def _loop_jit(model: Model, carry, sampler, stop_ids, k, steps, backend):
    ctx = model.context
    f = functools.partial(_loop, ctx, k=k, steps=steps)
    ins = outs = None
    if model.mesh is not None:
        replicated = jax.sharding.PartitionSpec()
        ins = (params.specs(ctx, model.weights), state_specs(carry), _sampler_specs(sampler), replicated)
        outs = (state_specs(carry), BATCH, BATCH, replicated)
    with on(model, backend):
        return run_sharded(model.mesh, f, ins, outs)(model.weights, carry, sampler, stop_ids)


def prefill_prompts(model: Model, prompts: Sequence[Sequence[int]], state: DecodeState):
    """Feed ragged prompts chunk by chunk; returns (logits fp32 [B, V] after each prompt, state)."""
    lengths = np.asarray([len(p) for p in prompts])
    size = next((c for c in PREFILL_CHUNKS if c >= lengths.max()), PREFILL_CHUNKS[-1])
    tokens = np.zeros((len(prompts), -(-lengths.max() // size) * size), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    logits = None
    for begin in range(0, tokens.shape[1], size):
        here = np.clip(lengths - begin, 0, size)
        new, state = prefill(model, tokens[:, begin : begin + size], here, state)
        logits = new if logits is None else jnp.where((here > 0)[:, None], new, logits)
    return logits, state


def _encode(model: Model, prompts) -> tuple[list[list[int]], bool]:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(
            f"prompts = {prompts!r} is not a list of prompts; pass a non-empty list of strings or of token id lists."
        )
    as_text = all(isinstance(p, str) for p in prompts)
    if as_text:
        if empty := [i for i, p in enumerate(prompts) if not p]:
            raise ValueError(f"prompt {empty[0]} is empty; a prompt needs at least one character.")
        bos = model.config.bos_token_id
        prompts = [[bos, *e.ids] for e in model.tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
    ids = []
    for i, prompt in enumerate(prompts):
        row = np.asarray(prompt)
        if row.ndim != 1 or not row.size:
            raise ValueError(f"prompt {i} is empty or not a list of token ids; a prompt needs at least one token.")
        if not np.issubdtype(row.dtype, np.integer) or row.min() < 0 or row.max() >= model.config.vocab_size:
            bad = row[(row < 0) | (row >= model.config.vocab_size)] if np.issubdtype(row.dtype, np.integer) else row
            raise ValueError(
                f"prompt {i} holds token id {bad[0]}, outside the vocabulary [0, {model.config.vocab_size}); "
                "was it encoded with another model's tokenizer?"
            )
        ids.append(row.tolist())
    return ids, as_text


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampler: Greedy | Sample = Greedy(),
    *,
    draft_tokens: int = 0,
    stop_ids: Sequence[int] | None = None,
    max_len: int | None = None,
    chunk: int = 16,
) -> Iterator[Generated]:
    """Continue each prompt; yields chunks as the device finishes them.

    prompts: strings (BOS is put before them) or lists of token ids (used as they are). draft_tokens: 0 for plain
    decoding, 1 to 3 for speculative decoding with the MTP block, which gives the same greedy tokens and the same
    distribution. stop_ids: default the end-of-sequence id. max_len: capacity of the caches, default what is needed.
    chunk: loop steps between hand-overs to the host. Arguments are checked before the first token: ValueError.
    """
    ids, as_text = _encode(model, prompts)
    if max_new_tokens < 1 or chunk < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} and chunk = {chunk} must both be at least 1.")
    if not 0 <= draft_tokens <= MAX_DRAFTS:
        raise ValueError(f"draft_tokens = {draft_tokens} is outside [0, {MAX_DRAFTS}]; 0 means plain decoding.")
    longest = max(map(len, ids))
    limit = model.config.max_position_embeddings if max_len is None else max_len
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens = {max_new_tokens}, together more than "
            f"{'max_len' if max_len is not None else 'max_position_embeddings'} = {limit}; shorten the prompt, ask for "
            "fewer tokens" + (", or raise max_len." if max_len is not None else ".")
        )
    make_sampler(sampler, len(ids))
    return _generate(model, ids, as_text, max_new_tokens, sampler, draft_tokens, stop_ids, max_len, chunk, model.backend)


def _generate(model, ids, as_text, max_new_tokens, sampler, k, stop_ids, max_len, chunk, backend) -> Iterator[Generated]:
    count = len(ids)
    group = 1 if model.mesh is None else model.mesh.shape[DATA]
    padded = ids + [ids[0]] * (-count % group)  # filler sequences that never run
    batch = len(padded)
    if max_len is None:  # a few sizes, so that prompts of different length share compiled programs
        need = max(map(len, ids)) + max_new_tokens
        max_len = min(max(-(-need // 1024) * 1024, 1024), model.config.max_position_embeddings)
    checked = make_sampler(sampler, count)
    if batch > count:
        checked = dataclasses.replace(checked, seeds=jnp.pad(checked.seeds, (0, batch - count)))
    # -1 stands for "none": no token has that id, and XLA of jax 0.11 crashes on an empty array inside shard_map.
    stops = jnp.asarray([model.config.eos_token_id] if stop_ids is None else list(stop_ids) or [-1], jnp.int32)

    with on(model, backend):
        logits, state = prefill_prompts(model, padded, init_state(model, batch, max_len, mtp=k > 0))
    seen = None
    if checked.penalizes:
        marks = np.zeros((batch, model.config.vocab_size), bool)
        for row, prompt in zip(marks, padded):
            row[prompt] = True
        seen = jnp.asarray(marks)
    active = jnp.arange(batch) < count
    left = jnp.full((batch,), max_new_tokens, jnp.int32)
    carry = _Carry(state, jnp.zeros((batch,), jnp.int32), active, jnp.zeros((batch,), bool), left, seen, None, None)
    tokens, kept, carry = _begin_jit(model, logits, carry, checked, stops, k, backend)

    streams = None
    if as_text:
        from dsv4_jax.tokenizer import TextStream

        streams = [TextStream(model.tokenizer) for _ in range(count)]

    def hand_over(tokens: list[list[int]], steps: int) -> Generated:
        running, stopped = np.asarray(carry.active), np.asarray(carry.stopped)
        finished = [None if running[i] else "stop" if stopped[i] else "length" for i in range(count)]
        text = None
        if streams is not None:
            text = [s.feed(t, last=f is not None) for s, t, f in zip(streams, tokens, finished)]
        return Generated(tokens, finished, steps, text)

    tokens, kept = np.asarray(tokens), np.asarray(kept)
    yield hand_over([tokens[i, : kept[i].sum()].tolist() for i in range(count)], 1)
    while np.asarray(carry.active).any():
        carry, out, lengths, steps = _loop_jit(model, carry, checked, stops, k, chunk, backend)
        out, lengths = np.asarray(out), np.asarray(lengths)
        yield hand_over([out[i, : lengths[i]].tolist() for i in range(count)], int(steps))
