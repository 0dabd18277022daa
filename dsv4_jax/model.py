"""The model: `Model`, and the functions that run it. One token's way: `decode_step` -> `advance` -> `block` -> `head`.

Public functions are jitted, donate the state, and run inside one shard_map when the model has a mesh. The functions
named `local_*` are their insides, on local shards, for loops that stay on the device (`generate.py`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import ffi_kernels as ops
from dsv4_jax import cache as caches
from dsv4_jax import params
from dsv4_jax.block import Residual, blocks
from dsv4_jax.cache import DECODE_TOKENS, Chunk, DecodeState, Pending
from dsv4_jax.config import ModelConfig
from dsv4_jax.layers import embed, head, kernels_for, to_streams
from dsv4_jax.mtp import mtp
from dsv4_jax.precision import Recipe
from dsv4_jax.sharding import BATCH, DATA, Context, check_mesh, run_sharded


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=["config", "recipe", "mesh", "expert_sharding", "source"],
)
@dataclasses.dataclass(frozen=True)
class Model:
    """Weights (a pytree, see `params.py`) and everything static about them.

    mesh: None for one device, else a mesh with axes ('data', 'tensor'). expert_sharding: 'width' splits every expert
    (latency), 'experts' deals them out (throughput). source: directory it was loaded from, or None.
    """

    weights: dict
    config: ModelConfig
    recipe: Recipe
    mesh: Mesh | None = None
    expert_sharding: str = "width"
    source: str | None = None

    @property
    def context(self) -> Context:
        return Context(self.config, self.recipe, self.mesh, self.expert_sharding)

    @property
    def backend(self) -> str:
        """The backend that a call made now is traced for: the forced one, else this device's; `xla` for fp32 activations."""
        return ops.current(self.recipe.activation_dtype)

    @property
    def tokenizer(self):
        """The `tokenizers.Tokenizer` beside the weights; ValueError if the model has none."""
        from dsv4_jax.tokenizer import load_tokenizer

        return load_tokenizer(self.source)


def random_model(config: ModelConfig, recipe: Recipe, seed: int = 0, mesh: Mesh | None = None, **kwargs) -> Model:
    """A model with random weights in the formats of `recipe`, made in place on the devices of `mesh`."""
    check_mesh(config, mesh, kwargs.get("expert_sharding", "width"))
    model = Model(None, config, recipe, mesh, **kwargs)
    out = None if mesh is None else params.shardings(model.context)
    make = jax.jit(lambda: params.init(config, recipe, jax.random.key(seed)), out_shardings=out)
    return dataclasses.replace(model, weights=make())


# --- on local shards --------------------------------------------------------------------------------------------


def advance(ctx: Context, weights: dict, state: DecodeState, tokens: jax.Array, chunk: Chunk):
    """Run tokens int32 [B, T] through all layers without accepting any.

    Returns (streams [B, T, M, D], state with new compressed entries, one Pending per layer).
    """
    with kernels_for(*tokens.shape):
        return _advance(ctx, weights, state, tokens, chunk)


def _advance(ctx: Context, weights: dict, state: DecodeState, tokens: jax.Array, chunk: Chunk):
    # XLA sums products of another shape in another order, and a token must not depend on its company: steps of all
    # widths have one shape. Unpacking quantized weights makes that too slow; there only a lone token is not alone.
    count = tokens.shape[1]
    width = DECODE_TOKENS if ctx.recipe.linear == "plain" else 2
    few = count < width and ops.current() == "xla"
    if few:
        tokens = jnp.pad(tokens, ((0, 0), (0, width - count)))
        chunk = Chunk.make(chunk.start, chunk.length, width)
    residual = Residual(to_streams(ctx, embed(ctx, weights["embed"], tokens)))
    names = [f"layers.{i}" for i in range(len(state.layers))]
    residual, layers, pending = blocks(ctx, names, weights["layers"], state.layers, residual, tokens, chunk, ctx.config.layer_ratios)
    streams = residual.settled()
    if few:
        streams, pending = jax.tree.map(lambda x: x[:, :count], (streams, pending))
    return streams, dataclasses.replace(state, layers=layers), pending


def accept(state: DecodeState, pending: tuple[Pending, ...], chunk: Chunk) -> DecodeState:
    """Commit the first `chunk.length` tokens of the chunk that produced `pending`."""
    return dataclasses.replace(state, layers=caches.commit(state.layers, pending, chunk), position=chunk.end)


def last_of(x: jax.Array, chunk: Chunk) -> jax.Array:
    """x [B, T, ...] -> [B, ...] at each sequence's last token that counts."""
    at = jnp.maximum(chunk.length - 1, 0)
    return jnp.take_along_axis(x, at.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]


def trunk_logits(ctx: Context, weights: dict, streams: jax.Array) -> jax.Array:
    """Residual streams [..., M, D] after the last layer -> logits fp32 [..., V]."""
    return head(ctx, streams, weights["hc_head"], weights["norm"], weights["head"])


def _within_capacity(state: DecodeState, logits: jax.Array) -> jax.Array:
    return jnp.where((state.position <= state.max_len)[:, None], logits, jnp.nan)


def advance_mtp(ctx: Context, weights: dict, state: DecodeState, streams: jax.Array, next_tokens, chunk: Chunk):
    """Run the MTP block over pairs (residual of token p, token p + 1) and commit them. Returns (streams, state)."""
    out, cache, rows = mtp(ctx, weights, state.mtp, streams, next_tokens, chunk)
    return out, dataclasses.replace(state, mtp=caches.commit((cache,), (rows,), chunk)[0])


def local_prefill(ctx: Context, weights: dict, tokens: jax.Array, lengths: jax.Array, state: DecodeState):
    """See `prefill`. With an MTP cache, pairs every token of the chunk with the residual of the one before it."""
    chunk = Chunk.make(state.position, lengths, tokens.shape[1])
    streams, new, pending = advance(ctx, weights, state, tokens, chunk)
    new = accept(new, pending, chunk)
    logits = _within_capacity(new, trunk_logits(ctx, weights, last_of(streams, chunk)))
    if state.mtp is None:
        return logits, new
    before = jnp.concatenate([state.hidden[:, None], streams[:, :-1]], axis=1)
    pairs = Chunk.make(state.position - 1, lengths, tokens.shape[1])  # position -1, before the first token, is invalid
    _, new = advance_mtp(ctx, weights, new, before, tokens, pairs)
    hidden = jnp.where((lengths > 0)[:, None, None], last_of(streams, chunk), state.hidden)
    return logits, dataclasses.replace(new, hidden=hidden)


def local_decode_step(ctx: Context, weights: dict, tokens: jax.Array, state: DecodeState):
    """See `decode_step`."""
    return local_prefill(ctx, weights, tokens[:, None], jnp.ones_like(tokens), state)


def on(model: Model, backend: str | None = None):
    """Context in which a jitted function traces: its static argument `backend` keeps programs of two backends apart."""
    return ops.backend(backend or model.backend)


# --- public -----------------------------------------------------------------------------------------------------


def state_specs(state):
    """PartitionSpecs of a state, or of anything else whose arrays lead with the batch: requests over `data`."""
    return jax.tree.map(lambda _: BATCH, state)


def _check_batch(model: Model, batch: int) -> None:
    if batch < 1:
        raise ValueError(f"the batch has {batch} sequences; give at least one.")
    if model.mesh is not None and batch % model.mesh.shape[DATA]:
        raise ValueError(
            f"a batch of {batch} cannot be split over data={model.mesh.shape[DATA]} devices; pad it to a multiple."
        )


def _check_tokens(config: ModelConfig, tokens) -> None:
    """Ids are checked where they are on the host; on the device an unknown id yields nan logits."""
    if isinstance(tokens, jax.Array) or not np.size(tokens):
        return
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens have dtype {tokens.dtype}; token ids are integers.")
    bad = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if bad.size:
        raise ValueError(
            f"token id {int(bad.flat[0])} is outside the vocabulary [0, {config.vocab_size}); "
            "was the text encoded with another model's tokenizer?"
        )


def init_state(model: Model, batch: int, max_len: int, mtp: bool = False) -> DecodeState:
    """A fresh state for `batch` sequences of up to `max_len` tokens; `mtp` adds what speculative decoding needs.

    Raises ValueError for sizes that are not positive, beyond max_position_embeddings, or that the mesh cannot split.
    """
    _check_batch(model, batch)
    limit = model.config.max_position_embeddings
    if not 1 <= max_len <= limit:
        raise ValueError(f"max_len = {max_len} is outside [1, {limit}], the positions this model was made for.")
    if mtp and not model.config.num_nextn_predict_layers:
        raise ValueError("this model has no MTP block (num_nextn_predict_layers = 0); leave mtp=False.")
    return _init_state(model.config, model.recipe, model.mesh, batch, max_len, mtp)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _init_state(config, recipe, mesh, batch, max_len, mtp):
    state = caches.init(config, recipe, batch, max_len, mtp)
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, BATCH))


@functools.partial(jax.jit, donate_argnums=(3,), static_argnums=(4,))
def _prefill(model: Model, tokens, lengths, state, backend: str | None = None):
    ctx = model.context
    specs = (params.specs(ctx, model.weights), BATCH, BATCH, state_specs(state)) if model.mesh else None
    run = run_sharded(model.mesh, functools.partial(local_prefill, ctx), specs, specs and (BATCH, specs[3]))
    with on(model, backend):
        return run(model.weights, tokens.astype(jnp.int32), lengths.astype(jnp.int32), state)


def prefill(model: Model, tokens, lengths, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """Append a chunk of prompt tokens to each sequence. Any chunking of a prompt gives the same result.

    tokens: int [B, T]; lengths: int [B], how many of the T count (the rest is padding of any id; 0 leaves a sequence
    as it is); state: donated. Returns logits fp32 [B, V] after each sequence's last counted token (meaningless where
    lengths is 0), and the new state. Raises ValueError for wrong shapes or ids, and for a prompt beyond max_len.
    """
    tokens_shape = np.shape(tokens)
    if len(tokens_shape) != 2 or not tokens_shape[1]:
        raise ValueError(f"prefill takes tokens [batch, tokens >= 1], got shape {tokens_shape}; a prompt is never empty.")
    if np.shape(lengths) != tokens_shape[:1] or state.position.shape != tokens_shape[:1]:
        raise ValueError(
            f"prefill got tokens {tokens_shape}, lengths {np.shape(lengths)} and a state of {state.position.shape[0]} "
            "sequences; all must have the same batch."
        )
    _check_tokens(model.config, tokens)
    if not isinstance(lengths, jax.core.Tracer) and not isinstance(state.position, jax.core.Tracer):
        longest, ends = np.max(np.asarray(lengths)), np.asarray(state.position) + np.asarray(lengths)
        if longest > tokens_shape[1] or np.min(np.asarray(lengths)) < 0:
            raise ValueError(f"lengths {np.asarray(lengths).tolist()} must lie in [0, {tokens_shape[1]}], the chunk's size.")
        if ends.max() > state.max_len:
            raise ValueError(
                f"the prompt would reach {int(ends.max())} tokens, but the state holds max_len = {state.max_len}; "
                "make it with a larger max_len or shorten the prompt."
            )
    return _prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), state, model.backend)


@functools.partial(jax.jit, donate_argnums=(2,), static_argnums=(3,))
def _decode_step(model: Model, tokens, state, backend: str | None = None):
    ctx = model.context
    specs = (params.specs(ctx, model.weights), BATCH, state_specs(state)) if model.mesh else None
    run = run_sharded(model.mesh, functools.partial(local_decode_step, ctx), specs, specs and (BATCH, specs[2]))
    with on(model, backend):
        return run(model.weights, tokens.astype(jnp.int32), state)


def decode_step(model: Model, tokens, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """One token per sequence: int [B] -> (logits fp32 [B, V], new state). The state is donated and updated in place.

    Compiles once for all positions. Beyond max_len the logits are nan. Raises ValueError for a wrong shape or id.
    """
    if np.shape(tokens) != state.position.shape:
        raise ValueError(
            f"decode_step takes one token per sequence, int [{state.position.shape[0]}], got shape {np.shape(tokens)}."
        )
    _check_tokens(model.config, tokens)
    return _decode_step(model, jnp.asarray(tokens), state, model.backend)


def local_forward(ctx: Context, weights: dict, tokens: jax.Array):
    """See `forward`; returns (logits, streams)."""
    batch, length = tokens.shape
    state = caches.init(ctx.config, ctx.recipe, batch, length, mtp=False)
    chunk = Chunk.make(state.position, jnp.full((batch,), length, jnp.int32), length)
    streams, _, _ = advance(ctx, weights, state, tokens, chunk)
    return trunk_logits(ctx, weights, streams), streams


@functools.partial(jax.jit, static_argnums=(2,))
def _forward(model: Model, tokens, backend: str | None = None):
    ctx = model.context
    specs = (params.specs(ctx, model.weights), BATCH) if model.mesh else None
    run = run_sharded(model.mesh, lambda w, t: local_forward(ctx, w, t)[0], specs, BATCH)
    with on(model, backend):
        return run(model.weights, tokens.astype(jnp.int32))


def forward(model: Model, tokens) -> jax.Array:
    """Whole sequences without a cache: int [B, T] -> logits fp32 [B, T, V]. Differentiable on the `xla` backend."""
    shape = np.shape(tokens)
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"forward takes tokens [batch, tokens >= 1], got shape {shape}.")
    _check_batch(model, shape[0])
    _check_tokens(model.config, tokens)
    return _forward(model, jnp.asarray(tokens), model.backend)


def forward_recorded(model: Model, tokens) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`forward` that also returns the intermediates of every block by name ('layers.2.attn', 'layers.2.topk', ...),
    the residual under 'hidden' and, with an MTP block, its logits [B, T - 1, V] under 'mtp_logits'. One device only."""
    from dsv4_jax.mtp import mtp_logits

    record: dict[str, jax.Array] = {}
    ctx = dataclasses.replace(model.context, record=record)
    with on(model):
        logits, streams = local_forward(ctx, model.weights, tokens)
        record["hidden"] = streams
        if model.config.num_nextn_predict_layers and tokens.shape[1] > 1:
            batch, pairs = tokens.shape[0], tokens.shape[1] - 1
            cache = caches.init_layer(model.config, model.recipe, 0, batch, pairs)
            chunk = Chunk.make(jnp.zeros((batch,), jnp.int32), jnp.full((batch,), pairs, jnp.int32), pairs)
            out, _, _ = mtp(ctx, model.weights, cache, streams[:, :-1], tokens[:, 1:], chunk)
            record["mtp_logits"] = mtp_logits(ctx, model.weights, out)
    return logits, record
