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
    sub.add_argument("--model", default="tiny", help="directory of a checkpoint, 'tiny', or 'flash' or 'pro' for random weights of those shapes (default: %(default)s)")
    sub.add_argument("--recipe", help="precision recipe (default: bf16, for random weights official)")
    sub.add_argument("--mesh", help="devices to split the model over, e.g. tensor=8")
    sub.add_argument("--batch", type=_sizes, default=[1], help="sequences; for random weights a list, e.g. 1,4,16 (default: 1)")
    sub.add_argument("--context", type=_sizes, help="tokens before the loop (default: 256); for random weights a list (default: 1K,8K,128K,1M)")
    sub.add_argument("--tokens", type=int, default=256, help="tokens to time, per sequence (default: %(default)s)")
    sub.add_argument("--draft", type=int, default=0, metavar="K", help="speculative decoding with K drafted tokens")
    sub.add_argument("--layers", type=int, help="random weights: only the first LAYERS layers")
    sub.add_argument("--experts", type=int, help="random weights: only EXPERTS routed experts, so that they fit one device")
    sub.add_argument("--kernels", action="store_true", help="random weights: print what each kernel of a step takes, from a profile")
    _add_keeping(sub, "context and batch")
    sub.set_defaults(bench=_decode)

    sub = what.add_parser(
        "kernels", help="time the native ops one by one",
        description="Time the native ops of this device at the shapes of real models, beside the roofline and XLA.",
        epilog="time_us: from one call to the next in a chain, where a kernel starts while the one before it ends, as in a decode step; "
        "bandwidth, tflops and percent of the roofline are made of it. alone_us: from one call to the next where no kernel starts early, as "
        "are xla_us and peer_us. All launched as graphs, on copies of the inputs that are more than the caches hold.",
    )  # fmt: skip
    add_case_arguments(sub)
    sub.add_argument("--no-peers", action="store_true", help="leave out the times of XLA's own kernels")
    sub.set_defaults(bench=_kernels)

    sub = what.add_parser("lower", help="trace and lower without weights", description="Trace and lower one decode step.")
    sub.add_argument("--model", default="flash", choices=("flash", "pro", "tiny"), help="configuration (default: %(default)s)")
    sub.add_argument("--recipe", default="official", help="precision recipe (default: %(default)s)")
    sub.add_argument("--mesh", default="tensor=8", help="fake CPU devices (default: %(default)s)")
    sub.add_argument("--expert-sharding", default="width", help="width or experts (default: %(default)s)")
    sub.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    sub.add_argument("--max-len", type=int, default=131072, help="capacity of the caches in tokens (default: %(default)s)")
    sub.set_defaults(bench=_lower)


def _sizes(text: str) -> list[int]:
    """'1K,8K,1M' -> [1024, 8192, 1048576]."""
    sizes = [re.fullmatch(r"(\d+)([KM]?)", part) for part in text.split(",")]
    if not all(sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes like 1,4,16 or 1K,128K,1M")
    return [int(m[1]) * {"": 1, "K": 2**10, "M": 2**20}[m[2]] for m in sizes]


def _add_keeping(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", metavar="FILE", help=f"append the figures of each {what} to FILE as they come, a line of JSON each")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"begin no other {what} after S seconds")


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases of which backend: the arguments that `dsv4 bench kernels` and `dsv4 selftest` share."""
    parser.add_argument("--model", default="flash,pro", help="shapes of which models (default: %(default)s)")
    parser.add_argument("--only", metavar="REGEX", help="only the cases whose 'model/name' matches, e.g. 'linear' or 'flash/attention'")
    parser.add_argument("--backend", help="native backend to run (default: that of this device)")
    _add_keeping(parser, "case")


def native_backend(name: str | None) -> str:
    """The native backend to run cases on; ValueError where there is none."""
    import ffi_kernels as ops

    chosen = name or ops.current()
    if chosen == "xla":
        raise ValueError(f"{jax.devices()[0]} has no native kernels; choose --backend sim to interpret them (small cases only).")
    with ops.backend(chosen):
        return chosen


def selftest(args) -> int:
    """`dsv4 selftest`: every kernel of this device against the reference; exit code 1 if one is wrong."""
    from ffi_kernels import bench as kernels

    backend = native_backend(args.backend)
    rows = []
    for row in kernels.kept(kernels.selftest(args.model, args.only, backend), args.out, args.seconds):
        rows.append(row)
        print(f"{row['model']:<6} {row['case']:<48} {row['bounds']:<9} {row['verdict']}", flush=True)
    agree = sum(row["verdict"] == "ok" for row in rows)
    absent = sum(row["verdict"].startswith(kernels.NOT_HERE) for row in rows)
    failed = len(rows) - agree - absent
    print(f"{agree} of {len(rows)} cases agree with the reference on {backend}" + (f"; {absent} cannot run here" if absent else ""))
    print(json.dumps({"device": jax.devices()[0].device_kind, "backend": backend, "failed": failed, "absent": absent, "cases": rows}))
    return 1 if failed else 0


def _kernels(args) -> dict:
    from ffi_kernels import bench as kernels

    backend = native_backend(args.backend)
    read, flops = kernels.roofline()
    print(f"roofline measured now: read {read / 1e9:.0f} GB/s, bf16 {flops / 1e12:.0f} TFLOP/s", flush=True)
    columns = ("time_us", "alone_us", "bandwidth_gbs", "tflops", "roofline_percent", "xla_us", "peer_us")
    print(f"{'case':<56}" + "".join(f"{c:>17}" for c in columns))
    rows = []
    for row in kernels.kept(kernels.time_cases(args.model, args.only, backend, not args.no_peers), args.out, args.seconds):
        rows.append(row)
        figures = row.get("error") or "".join(f"{row[c]:17.1f}" if c in row else f"{'-':>17}" for c in columns)
        print(f"{row['model'] + '/' + row['case']:<56}{figures}", flush=True)
    return {"device": jax.devices()[0].device_kind, "backend": backend, "read_gbs": read / 1e9, "bf16_tflops": flops / 1e12, "cases": rows}


def run(args) -> int:
    """Run the chosen benchmark; prints its table and its JSON line. Returns the exit code."""
    figures = args.bench(args)
    scalars = {name: value for name, value in figures.items() if not isinstance(value, list)}
    width = max(map(len, scalars))
    for name, value in scalars.items():
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
    from ffi_kernels.bench import kept

    if args.model in _published():
        return _random_step(args)
    if args.layers or args.experts or args.kernels:
        raise ValueError(
            f"--layers and --experts trim random weights, --kernels profiles their step; --model {args.model} is a checkpoint: "
            "leave them out."
        )
    contexts = args.context or [256]
    if len(args.batch) > 1 or len(contexts) > 1 or min(*args.batch, *contexts, args.tokens) < 1:
        raise ValueError(
            f"batch = {args.batch}, context = {contexts} and tokens = {args.tokens} must each be one number of at least 1."
        )
    args.batch, args.context = args.batch[0], contexts[0]
    model = dsv4_jax.load(args.model, recipe=args.recipe or "bf16", mesh=parse_mesh(args.mesh))
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
    figures = {
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
    return next(kept([figures], args.out))


def _random_step(args) -> dict:
    from dsv4_jax import bench_step

    if args.mesh or args.draft:
        raise ValueError("random weights are timed on one device without drafts; leave out --mesh and --draft.")
    contexts = args.context or [2**10, 2**13, 2**17, 2**20]
    if min(*args.batch, *contexts) < 1:
        raise ValueError(f"batch = {args.batch} and context = {contexts} must be at least 1.")
    recipe = args.recipe or "official"
    return bench_step.run(
        args.model, recipe, args.layers, args.experts, contexts, args.batch, args.out, args.seconds, args.kernels
    )


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
