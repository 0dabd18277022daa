"""The decode step at the shapes of Flash or Pro, on one device, with random weights made in place.

Layers and experts may be trimmed until the weights fit: the bytes read per token and layer stay those of the real model.
Not here: trained checkpoints and meshes (`bench.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import tempfile
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ffi_kernels as ops
from dsv4_jax import cache as caches
from dsv4_jax import params, precision
from dsv4_jax.config import PRESETS, ModelConfig
from dsv4_jax.model import Model, local_decode_step, on
from dsv4_jax.precision import Recipe
from ffi_kernels.bench import kept, roofline

STEPS = 64  # of one timed loop
LOOPS = 5


def trimmed(config: ModelConfig, layers: int | None, experts: int | None) -> ModelConfig:
    """The configuration with only its first `layers` layers and `experts` routed experts. ValueError outside its range."""
    n, e = layers or config.num_hidden_layers, experts or config.n_routed_experts
    if not 1 <= n <= config.num_hidden_layers or not config.num_experts_per_tok <= e <= config.n_routed_experts:
        raise ValueError(
            f"layers = {n} and experts = {e} must lie in 1..{config.num_hidden_layers} and "
            f"{config.num_experts_per_tok}..{config.n_routed_experts} for this model."
        )
    return dataclasses.replace(
        config, num_hidden_layers=n, n_routed_experts=e, num_hash_layers=min(config.num_hash_layers, n),
        compress_ratios=(*config.compress_ratios[:n], config.compress_ratios[-1]),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(1, 2))
def _weight(key, param, recipe: Recipe):
    if param.role != "experts":
        return params.initial(param, recipe, key)
    one = dataclasses.replace(param, shape=param.shape[1:])  # one expert after another: the fp32 numbers of all are too many
    return jax.lax.map(lambda k: params.initial(one, recipe, k), jax.random.split(key, param.shape[0]))


def random_weights(config: ModelConfig, recipe: Recipe):
    """Random weights, made one by one on the device; without the MTP block."""
    keys = iter(jax.random.split(jax.random.key(0), 10**4))
    tree = params.declare(config)
    tree.pop("mtp")
    return jax.tree.map(lambda p: _weight(next(keys), p, recipe), tree, is_leaf=lambda x: isinstance(x, params.Param))


def random_state(config: ModelConfig, recipe: Recipe, batch: int, context: int, room: int) -> caches.DecodeState:
    """A state with `context` tokens behind every sequence and room for more, its caches filled with random entries.

    At the end of the model's positions the room is taken from the context.
    """
    max_len = min(context + room, config.max_position_embeddings)

    def fill(path, leaf):
        key = jax.random.fold_in(jax.random.key(1), zlib.crc32(jax.tree_util.keystr(path).encode()))
        if isinstance(leaf, ops.FP8KVCache):
            width = leaf.data.shape[-1] - config.qk_rope_head_dim
            rows = jax.random.normal(key, (*leaf.data.shape[:-1], width), jnp.bfloat16)
            return ops.encode_kv(rows, config.qk_rope_head_dim)
        if isinstance(leaf, ops.MXFP4Tensor):
            return ops.quantize_mxfp4(jax.random.normal(key, leaf.shape, jnp.bfloat16))
        if leaf.dtype == jnp.int32:
            return leaf
        return jax.random.normal(key, leaf.shape, leaf.dtype)

    kinds = (ops.FP8KVCache, ops.MXFP4Tensor)
    with ops.backend("xla"):
        state = caches.init(config, recipe, batch, max_len, mtp=False)
        filled = [
            jax.jit(lambda c: jax.tree_util.tree_map_with_path(fill, c, is_leaf=lambda x: isinstance(x, kinds)), donate_argnums=0)(layer)
            for layer in state.layers
        ]
    return dataclasses.replace(state, layers=tuple(filled), position=jnp.full((batch,), max_len - room, jnp.int32))


@functools.partial(jax.jit, donate_argnums=(2,))
def _loop(model: Model, token, state, steps):
    """`steps` greedy tokens on the device."""

    def body(_, carry):
        logits, state = local_decode_step(model.context, model.weights, *carry)
        return jnp.argmax(logits, -1).astype(jnp.int32), state

    with on(model):
        return jax.lax.fori_loop(0, steps, body, (token, state))


def bytes_per_token(config: ModelConfig, weights, state) -> int:
    """Bytes that a step must read: every weight but the experts not picked and the rows of tables, and the caches."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = jax.tree_util.keystr(path)
        if "'embed'" in name or "tid2eid" in name:
            continue
        share = config.num_experts_per_tok / config.n_routed_experts if "'experts'" in name else 1.0
        total += int(leaf.nbytes * share)
    for layer in state.layers:
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
            name = jax.tree_util.keystr(path)
            if ".compressed" in name and layer.index is not None:
                total += leaf.nbytes * min(config.index_topk, leaf.shape[1]) // leaf.shape[1]
            else:
                total += leaf.nbytes
    return total


def program_figures(text: str, layers: int) -> dict:
    """Kernels of a step and per layer, read from the compiled HLO of the loop: ours, XLA's fusions, library products and copies."""
    native = len(re.findall(r'custom_call_target="dsv4\.', text))
    products = len(re.findall(r'custom_call_target="__cu|= \S+ dot\(|kind=kCustom', text))
    others = len(re.findall(r"= .* (?:fusion|copy|sort)\(.*while/body", text))
    return {
        "native_launches": native, "native_launches_per_layer": native / layers, "kernels_per_layer": (native + products + others) / layers,
        "xla_products": products,
    }  # fmt: skip


def launch_figures(run, steps: int) -> dict:
    """Driver calls per step of run() by kind, out of a profile: one decode step should be one cuGraphLaunch. Empty without a GPU."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        profiles = [jax.profiler.ProfileData.from_file(str(path)) for path in Path(directory).rglob("*.xplane.pb")]
        events = (event for profile in profiles for plane in profile.planes for line in plane.lines for event in line.events)
        calls = collections.Counter(event.name for event in events if event.name.startswith("cu"))
    kinds = {"graph_launches": "cuGraphLaunch", "kernel_launches": "cuLaunchKernel"}
    counted = {f"{kind}_per_step": sum(n for call, n in calls.items() if call.startswith(name)) / steps for kind, name in kinds.items()}
    return counted if any(counted.values()) else {}


def run(
    name: str, recipe: str, layers: int | None, experts: int | None, contexts: list[int], batches: list[int],
    out: str | None = None, limit_s: float | None = None,
) -> dict:  # fmt: skip
    """Figures of the step of a published configuration: all contexts at the first batch, then at the next one.

    Prints progress as it goes, and keeps the figures of each setting in the file `out` at once; begins none after `limit_s`
    seconds. A setting that does not fit the device has its sentence under 'error'.
    """
    config, recipe = trimmed(PRESETS[name], layers, experts), precision.get(recipe)
    began = time.perf_counter()
    weights = jax.block_until_ready(random_weights(config, recipe))
    model = Model(weights, config, recipe)
    read, _ = roofline()
    device = jax.devices()[0]
    made_s = time.perf_counter() - began
    print(f"{params.nbytes(weights) / 1e9:.1f} GB of random weights in {made_s:.1f} s; read {read / 1e12:.2f} TB/s", flush=True)
    about = {
        "model": name, "recipe": recipe.name, "layers": config.num_hidden_layers, "experts": config.n_routed_experts,
        "device": f"{device.platform} {device.device_kind}", "backend": model.backend, "read_gbs": read / 1e9,
        "weight_bytes": params.nbytes(weights),
    }  # fmt: skip

    def settings():
        for batch in batches:
            for context in contexts:
                row = {**about, "context": context, "batch": batch}
                try:
                    yield {**row, **_time(model, batch, context, read)}
                except jax.errors.JaxRuntimeError as error:
                    yield {**row, "error": str(error).strip().splitlines()[0][:300]}

    steps = []
    for row in kept(settings(), out, None if limit_s is None else limit_s - made_s):
        steps.append({k: v for k, v in row.items() if k not in about})
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in steps[-1].items()), flush=True)
    return {**about, "steps": steps}


def _time(model: Model, batch: int, context: int, read: float) -> dict:
    config = model.config
    state = random_state(config, model.recipe, batch, context, room=(LOOPS + 3) * STEPS)
    need = bytes_per_token(config, model.weights, state)
    token = jnp.arange(batch, dtype=jnp.int32) % config.vocab_size
    began = time.perf_counter()
    lowered = _loop.lower(model, token, state, STEPS)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    seconds, host = [], []
    for _ in range(LOOPS + 1):
        start = time.perf_counter()
        token, state = compiled(model, token, state, STEPS)
        host.append((time.perf_counter() - start) / STEPS)
        jax.block_until_ready(token)
        seconds.append((time.perf_counter() - start) / STEPS)
    step = float(np.median(seconds[1:]))
    row = {
        "ms_per_step": 1e3 * step, "roofline_ms": 1e3 * need / read, "roofline_percent": 100 * need / read / step,
        "host_ms_per_step": 1e3 * float(np.median(host[1:])), "trace_s": traced - began, "compile_s": ended - traced,
        **program_figures(compiled.as_text(), config.num_hidden_layers),
    }  # fmt: skip
    try:
        return {**row, **launch_figures(lambda: jax.block_until_ready(compiled(model, token, state, STEPS)), STEPS)}
    except (RuntimeError, OSError) as error:  # a profiler that is missing or busy must not cost the times
        return {**row, "profile_error": str(error).strip().splitlines()[0][:300]}
