"""Speed and sizes: a table for people, then one JSON line for programs.

`decode` runs the token loop of a model and times it. `lower` traces and lowers one decode step of a published
configuration on fake devices, without weights: does it trace, how long does that take, what would a device hold.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dsv4 bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    sub = what.add_parser("decode", help="time the token loop", description="Time the token loop of a model on this machine.")
    sub.add_argument("--model", default="tiny", help="directory of a checkpoint, or 'tiny' (default: %(default)s)")
    sub.add_argument("--recipe", default="bf16", help="precision recipe (default: %(default)s)")
    sub.add_argument("--mesh", help="devices to split the model over, e.g. tensor=8")
    sub.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    sub.add_argument("--context", type=int, default=256, help="prompt tokens before the loop (default: %(default)s)")
    sub.add_argument("--tokens", type=int, default=256, help="tokens to time, per sequence (default: %(default)s)")
    sub.add_argument("--draft", type=int, default=0, metavar="K", help="speculative decoding with K drafted tokens")
    sub.set_defaults(bench=_decode)

    sub = what.add_parser("lower", help="trace and lower without weights", description="Trace and lower one decode step.")
    sub.add_argument("--model", default="flash", choices=("flash", "pro", "tiny"), help="configuration (default: %(default)s)")
    sub.add_argument("--recipe", default="official", help="precision recipe (default: %(default)s)")
    sub.add_argument("--mesh", default="tensor=8", help="fake CPU devices (default: %(default)s)")
    sub.add_argument("--expert-sharding", default="width", help="width or experts (default: %(default)s)")
    sub.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    sub.add_argument("--max-len", type=int, default=131072, help="capacity of the caches in tokens (default: %(default)s)")
    sub.set_defaults(bench=_lower)


def run(args) -> int:
    """Run the chosen benchmark; prints its table and its JSON line. Returns the exit code."""
    figures = args.bench(args)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    print(json.dumps(figures))
    return 0


def hlo_op_counts(text: str) -> collections.Counter:
    """Instructions of a compiled HLO module by name, all computations together."""
    return collections.Counter(re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?\s([a-z][\w\-]*)\(", text, re.MULTILINE))


def stablehlo_op_counts(text: str) -> collections.Counter:
    """Operations that one call of a StableHLO module executes, by name; the body of a loop counts once."""
    functions = {}
    for body in re.split(r"\n  func\.func ", text)[1:]:
        name = re.search(r"@([\w.]+)\(", body).group(1)
        ops = collections.Counter(re.findall(r'= "?(?:stablehlo|chlo)\.(\w+)', body))
        functions[name] = ops, re.findall(r"\bcall @([\w.]+)\(", body)

    @functools.cache
    def total(name):
        ops, callees = functions[name]
        return sum((total(callee) for callee in callees), ops)

    return total("main")


def _decode(args) -> dict:
    import dsv4_jax
    from dsv4_jax import cache
    from dsv4_jax.cli import parse_mesh
    from dsv4_jax.generate import generate
    from dsv4_jax.model import _decode_step

    if min(args.batch, args.context, args.tokens) < 1:
        raise ValueError(
            f"batch = {args.batch}, context = {args.context} and tokens = {args.tokens} must all be at least 1."
        )
    model = dsv4_jax.load(args.model, recipe=args.recipe, mesh=parse_mesh(args.mesh))
    state = dsv4_jax.init_state(model, args.batch, 1024)
    began = time.perf_counter()
    lowered = _decode_step.lower(model, jnp.zeros((args.batch,), jnp.int32), state)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()

    prompts = np.random.default_rng(0).integers(8, model.config.vocab_size, (args.batch, args.context)).tolist()
    chunk = min(64, args.tokens)

    def loop() -> tuple[int, int, float]:
        total = steps = 0
        start = None
        for part in generate(
            model, prompts, args.tokens + 1, draft_tokens=args.draft, stop_ids=(), chunk=chunk
        ):  # the first part is the prompt's: the clock starts after it
            if start is not None:
                total, steps = total + len(part.tokens[0]), steps + part.steps
            start = start or time.perf_counter()
        return total, steps, time.perf_counter() - start

    loop()
    total, steps, seconds = min((loop() for _ in range(3)), key=lambda r: r[2])
    recipe = model.recipe
    device = jax.devices()[0]
    return {
        "model": args.model, "recipe": recipe.name, "device": f"{device.platform} {device.device_kind}",
        "devices": 1 if model.mesh is None else model.mesh.size, "batch": args.batch, "context": args.context,
        "tokens_per_s": args.batch * total / seconds, "ms_per_token": 1e3 * seconds / total,
        "ms_per_step": 1e3 * seconds / steps, "tokens_per_step": total / steps,
        "hlo_ops": sum(hlo_op_counts(compiled.as_text()).values()),
        "trace_s": traced - began, "compile_s": ended - traced,
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(model.weights)),
        "state_bytes_per_token": cache.bytes_per_token(model.config, recipe),
        **{f"state_bytes_per_token_{n}": cache.bytes_per_token(c, recipe) for n, c in _published().items()},
    }  # fmt: skip


def _published() -> dict:
    from dsv4_jax.config import FLASH, PRO

    return {"flash": FLASH, "pro": PRO}


def _lower(args) -> dict:
    from dsv4_jax.cli import parse_mesh

    wanted = int(np.prod([int(n) for n in re.findall(r"=(\d+)", args.mesh)] or [1]))
    try:  # fake devices must be asked for before the first use of a device
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        pass
    return lower(args.model, args.recipe, parse_mesh(args.mesh), args.expert_sharding, args.batch, args.max_len)


def lower(name: str, recipe: str, mesh, expert_sharding: str = "width", batch: int = 1, max_len: int = 131072) -> dict:
    """Trace and lower one decode step of a preset from abstract weights; returns seconds, bytes and collectives."""
    from dsv4_jax import cache, params, precision
    from dsv4_jax.config import PRESETS
    from dsv4_jax.model import Model, _decode_step, state_specs
    from dsv4_jax.sharding import BATCH, Context, check_mesh
    from jax.sharding import NamedSharding

    config, recipe = PRESETS[name], precision.get(recipe)
    check_mesh(config, mesh, expert_sharding)
    began = time.perf_counter()
    ctx = Context(config, recipe, mesh, expert_sharding)
    weights = params.abstract(config, recipe)
    specs = params.specs(ctx)

    def placed(shapes, shardings):
        return jax.tree.map(lambda t, s: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=s), shapes, shardings)

    state = jax.eval_shape(lambda: cache.init(config, recipe, batch, max_len, False))
    by_request = jax.tree.map(lambda _: NamedSharding(mesh, BATCH), state)
    model = Model(placed(weights, params.shardings(ctx)), config, recipe, mesh, expert_sharding)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=NamedSharding(mesh, BATCH))
    lowered = _decode_step.lower(model, tokens, placed(state, by_request))
    text = lowered.as_text()
    seconds = time.perf_counter() - began
    counts = stablehlo_op_counts(text)
    return {
        "model": name, "recipe": recipe.name, "mesh": dict(mesh.shape), "batch": batch, "max_len": max_len,
        "trace_and_lower_s": seconds, "stablehlo_ops": sum(counts.values()),
        "collectives": {c: counts[c] for c in COLLECTIVES if counts[c]},
        "weight_bytes": params.nbytes(weights),
        "weight_bytes_per_device": params.nbytes_per_device(weights, specs, mesh),
        "state_bytes_per_device": params.nbytes_per_device(state, state_specs(state), mesh),
        "state_bytes_per_token": cache.bytes_per_token(config, recipe),
    }  # fmt: skip
