"""Samplers: from logits to tokens, on the device, one random stream per sequence.

A draw depends on the sequence's seed and the position of the token alone, so a sequence samples the same tokens in
any batch, slot or chunking. `verify` is the acceptance rule of speculative decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_DRAW, _ACCEPT, _DRAFT = 0, 1, 2  # purposes of a random number at one position


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token, ties to the lower id. repetition_penalty > 1 discourages tokens already seen."""

    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Random tokens. Filters apply in this order: repetition penalty, temperature, top_k, top_p, min_p.

    temperature > 0; top_k: 0 keeps all; top_p in (0, 1]; min_p in [0, 1): least probability relative to the best;
    repetition_penalty > 0: logits of tokens seen in prompt or answer are divided (if positive) or multiplied by it;
    seed: an int, sequence i then uses seed + i, or one int per sequence. Tokens that tie at a border are all kept.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seeds"],
    meta_fields=["greedy", "filters"],
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    """A checked sampler as the device sees it: scalars are traced, so changing one does not recompile.

    seeds: uint32 [B]; greedy, filters: static, which parts of the computation exist.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seeds: jax.Array
    greedy: bool
    filters: tuple[str, ...]

    @property
    def penalizes(self) -> bool:
        return "repetition_penalty" in self.filters


def make_sampler(sampler: Greedy | Sample, batch: int) -> Sampler:
    """Check a sampler's parameters (ValueError names value and limit) and lay it out for `batch` sequences."""
    greedy = isinstance(sampler, Greedy)
    s = Sample(repetition_penalty=sampler.repetition_penalty) if greedy else sampler
    limits = {
        "temperature": (s.temperature > 0, "above 0; use Greedy() for 0"),
        "top_k": (s.top_k >= 0 and int(s.top_k) == s.top_k, "a whole number of at least 0 (0 keeps all)"),
        "top_p": (0 < s.top_p <= 1, "in (0, 1]"),
        "min_p": (0 <= s.min_p < 1, "in [0, 1)"),
        "repetition_penalty": (s.repetition_penalty > 0, "above 0 (1 changes nothing)"),
    }
    for name, (good, limit) in limits.items():
        if not good:
            raise ValueError(f"{name} = {getattr(s, name)} must be {limit}.")
    seeds = np.asarray(s.seed)
    if seeds.ndim == 0:
        seeds = seeds + np.arange(batch)
    if seeds.shape != (batch,):
        raise ValueError(f"{seeds.size} seeds for {batch} sequences; give one int, or one per sequence.")
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    filters = tuple(name for name, value in neutral.items() if getattr(s, name) != value)
    values = [jnp.float32(s.temperature), jnp.int32(s.top_k), jnp.float32(s.top_p), jnp.float32(s.min_p)]
    return Sampler(
        *values, jnp.float32(s.repetition_penalty), jnp.asarray(seeds % 2**32, jnp.uint32), greedy, filters
    )


def filtered(sampler: Sampler, logits: jax.Array, seen: jax.Array | None) -> jax.Array:
    """logits fp32 [B, V], seen bool [B, V] (for the penalty) -> logits of the distribution to draw from, -inf = never."""
    if sampler.penalizes:
        penalty = sampler.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampler.greedy:
        return logits
    logits = logits / sampler.temperature
    if "top_k" in sampler.filters or "top_p" in sampler.filters:
        order = -jnp.sort(-logits, axis=-1)
        keep = jnp.ones(order.shape, bool)
        if "top_k" in sampler.filters:
            keep &= jnp.arange(order.shape[-1]) < sampler.top_k
        if "top_p" in sampler.filters:
            p = jax.nn.softmax(jnp.where(keep, order, -jnp.inf), axis=-1)
            keep &= jnp.cumsum(p, axis=-1) - p < sampler.top_p  # the token that crosses top_p still counts
        least = jnp.min(jnp.where(keep, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if "min_p" in sampler.filters:
        floor = logits.max(-1, keepdims=True) + jnp.log(sampler.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def _keys(sampler: Sampler, positions: jax.Array, purpose: int) -> jax.Array:
    def one(seed, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(one)(sampler.seeds, positions)


def _pick(sampler: Sampler, logits: jax.Array, positions: jax.Array, purpose: int) -> jax.Array:
    if sampler.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = _keys(sampler, positions, purpose)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def draw(sampler: Sampler, logits: jax.Array, seen, positions: jax.Array) -> jax.Array:
    """logits [B, V], positions int32 [B] of the tokens to be drawn -> int32 [B]."""
    return _pick(sampler, filtered(sampler, logits, seen), positions, _DRAW)


def draft(sampler: Sampler, logits: jax.Array, seen, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A guess from the MTP block's logits [B, V] -> (token int32 [B], the filtered logits it was drawn from [B, V])."""
    logits = filtered(sampler, logits, seen)
    return _pick(sampler, logits, positions, _DRAFT), logits


def remember(seen, tokens: jax.Array, keep: jax.Array | None = None):
    """seen bool [B, V] or None, with tokens int32 [B] marked where keep (bool [B])."""
    if seen is None:
        return None
    rows = jnp.arange(tokens.shape[0])
    ids = tokens if keep is None else jnp.where(keep, tokens, seen.shape[-1])
    return seen.at[rows, ids].set(True, mode="drop")


def verify(sampler: Sampler, logits: jax.Array, drafts: jax.Array, draft_logits: jax.Array, seen, positions: jax.Array):
    """Accept a prefix of the drafts so that the tokens follow the model's own distribution.

    logits fp32 [B, k + 1, V]: the model's, after the current token and each draft; drafts int32 [B, k] drawn from
    draft_logits [B, k, V]; positions int32 [B]: of the first draft. Greedy accepts a draft that is the model's choice.
    Else a draft d is accepted with probability min(1, p(d) / q(d)), and the first rejected one is replaced by a draw
    from max(p - q, 0) normalized (Leviathan et al. 2023). Returns (accepted count int32 [B], token after them int32 [B]).
    """
    k = drafts.shape[1]
    still = jnp.ones(positions.shape, bool)
    count = jnp.zeros(positions.shape, jnp.int32)
    token = jnp.zeros(positions.shape, jnp.int32)
    for j in range(k + 1):
        target = filtered(sampler, logits[:, j], seen)
        if j == k:
            return count, jnp.where(still, _pick(sampler, target, positions + j, _DRAW), token)
        d = drafts[:, j]
        if sampler.greedy:
            replacement = _pick(sampler, target, positions + j, _DRAW)
            accepted = replacement == d
        else:
            p, q = jax.nn.softmax(target, axis=-1), jax.nn.softmax(draft_logits[:, j], axis=-1)
            at = d[:, None]
            u = jax.vmap(jax.random.uniform)(_keys(sampler, positions + j, _ACCEPT))
            accepted = u * jnp.take_along_axis(q, at, -1)[:, 0] < jnp.take_along_axis(p, at, -1)[:, 0]
            rest = jnp.maximum(p - q, 0.0)
            rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)  # p == q up to rounding
            replacement = _pick(sampler, jnp.log(rest), positions + j, _DRAW)
        token = jnp.where(still & ~accepted, replacement, token)
        still &= accepted
        count += still
        seen = remember(seen, d)
