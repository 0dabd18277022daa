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


def bytes_per_step(config: ModelConfig, weights, state) -> int:
    """Bytes that a step must read: every weight but the experts that no sequence picks and the rows of tables, and the caches.

    Experts: as many different ones as sequences are expected to pick that pick evenly and without regard to each other.
    """
    picked = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** state.position.shape[0]
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = jax.tree_util.keystr(path)
        if "'embed'" in name or "tid2eid" in name:
            continue
        total += int(leaf.nbytes * (picked if "'experts'" in name else 1))
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
    native = sum(map(int, re.findall(r'custom_call_target="dsv4\..*?\blaunches = (\d+)', text)))
    products = len(re.findall(r'custom_call_target="__cu|= \S+ dot\(|kind=kCustom', text))
    others = len(re.findall(r"= .* (?:fusion|copy|sort)\(.*while/body", text))
    return {
        "native_launches": native, "native_launches_per_layer": native / layers, "kernels_per_layer": (native + products + others) / layers,
        "xla_products": products,
    }  # fmt: skip


def profiled(run, steps: int) -> dict:
    """`profile_figures` of run(), which makes `steps` decode steps."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        return profile_figures([jax.profiler.ProfileData.from_file(str(path)) for path in Path(directory).rglob("*.xplane.pb")], steps)


def profile_figures(profiles, steps: int) -> dict:
    """What `jax.profiler.ProfileData` of `steps` decode steps say about one of them. Empty without a GPU.

    graph_launches_per_step, kernel_launches_per_step: driver calls of the kind; a decode step should be one graph launch.
    driver_ms_per_step: host time inside driver calls, those that wait for the device left out. kernels: see `kernel_table`.
    kernel_ms_per_step: their sum; span_ms_per_step: from the first one's start to the last one's end, both under the profiler.
    """
    calls, kernels = [], []
    for plane in (plane for profile in profiles for plane in profile.planes):
        for line in plane.lines:
            if not plane.name.startswith("/device:GPU"):
                calls += [(event.name, event.duration_ns) for event in line.events if event.name.startswith("cu")]
            elif "XLA" not in line.name:  # the lines of that name repeat the kernels, as HLO ops and modules
                kernels += [(event.name, event.start_ns, event.duration_ns) for event in line.events]
    figures = {}
    if calls:
        for kind, call in {"graph_launches": "cuGraphLaunch", "kernel_launches": "cuLaunchKernel"}.items():
            figures[f"{kind}_per_step"] = sum(name.startswith(call) for name, _ in calls) / steps
        figures["driver_ms_per_step"] = sum(ns for name, ns in calls if "Synchronize" not in name) / steps / 1e6
    if kernels:
        table = kernel_table(kernels, steps)
        first, last = min(start for _, start, _ in kernels), max(start + ns for _, start, ns in kernels)
        figures["kernel_ms_per_step"] = sum(row["us_per_step"] for row in table) / 1e3
        figures["span_ms_per_step"] = (last - first) / steps / 1e6
        figures["kernels"] = table
    return figures


def kernel_table(events, steps: int) -> list[dict]:
    """Kernels and copies, given as (name, start_ns, duration_ns), by their share of the time of all; the longest first.

    median_us: from start to end, which for a kernel that starts early includes waiting for those before it. us_per_step: without
    the time in which an earlier one still ran, so that the sum is the time in which anything ran.
    """
    durations, added, ended = collections.defaultdict(list), collections.Counter(), 0
    for name, start, ns in sorted(events, key=lambda event: event[1]):
        durations[name].append(ns)
        added[name] += max(start + ns - max(start, ended), 0)
        ended = max(ended, start + ns)
    total = sum(added.values())
    rows = [
        {
            "name": name, "launches_per_step": len(each) / steps, "median_us": float(np.median(each)) / 1e3,
            "us_per_step": added[name] / steps / 1e3, "percent": 100 * added[name] / max(total, 1),
        }
        for name, each in durations.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["us_per_step"])


def _print_row(row: dict, kernels: bool) -> None:
    figures = {name: value for name, value in row.items() if name != "kernels"}
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), flush=True)
    if kernels and (table := row.get("kernels")):
        print(f"  {'kernel':<60}{'per step':>10}{'median us':>11}{'us/step':>10}{'percent':>9}")
        for one in table:
            print(
                f"  {one['name'][:59]:<60}{one['launches_per_step']:10.2f}{one['median_us']:11.2f}{one['us_per_step']:10.1f}"
                f"{one['percent']:9.1f}", flush=True,
            )  # fmt: skip


def run(
    name: str, recipe: str, layers: int | None, experts: int | None, contexts: list[int], batches: list[int],
    out: str | None = None, limit_s: float | None = None, kernels: bool = False,
) -> dict:  # fmt: skip
    """Figures of the step of a published configuration: all contexts at the first batch, then at the next one.

    Prints progress as it goes, with `kernels` also each setting's `kernel_table`, and keeps the figures of each setting in the
    file `out` at once; begins none after `limit_s` seconds. A setting that does not fit the device has its sentence under
    'error'.
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
        _print_row(steps[-1], kernels)
    return {**about, "steps": steps}


def _time(model: Model, batch: int, context: int, read: float) -> dict:
    """ms_per_step: from the call to the last token. call_ms_per_step: until the call returns, which is as long where the loop
    reads its condition back. cpu_ms_per_step: CPU time of all threads of the process meanwhile, waits that spin included."""
    config = model.config
    state = random_state(config, model.recipe, batch, context, room=(LOOPS + 3) * STEPS)
    need = bytes_per_step(config, model.weights, state)
    token = jnp.arange(batch, dtype=jnp.int32) % config.vocab_size
    began = time.perf_counter()
    lowered = _loop.lower(model, token, state, STEPS)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    loops = []
    for _ in range(LOOPS + 1):
        start, cpu = time.perf_counter(), time.process_time()
        token, state = compiled(model, token, state, STEPS)
        returned = time.perf_counter()
        jax.block_until_ready(token)
        loops.append((time.perf_counter() - start, returned - start, time.process_time() - cpu))
    step, call, cpu = (np.median(loops[1:], axis=0) / STEPS).tolist()
    row = {
        "ms_per_step": 1e3 * step, "roofline_ms": 1e3 * need / read, "roofline_percent": 100 * need / read / step,
        "call_ms_per_step": 1e3 * call, "cpu_ms_per_step": 1e3 * cpu, "trace_s": traced - began, "compile_s": ended - traced,
        **program_figures(compiled.as_text(), config.num_hidden_layers),
    }  # fmt: skip
    try:
        return {**row, **profiled(lambda: jax.block_until_ready(compiled(model, token, state, STEPS)), STEPS)}
    except (RuntimeError, OSError) as error:  # a profiler that is missing or busy must not cost the times
        return {**row, "profile_error": str(error).strip().splitlines()[0][:300]}
