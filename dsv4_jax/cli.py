"""The command `dsv4`: generate, chat, convert, verify, bench. Arguments and printing only; the work is in the modules named so.

Bad input ends in one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

MODEL_HELP = "directory of a checkpoint, or 'tiny' for the embedded model (default: %(default)s)"


def _use_compile_cache() -> None:
    """Compiled programs are kept between runs, unless the user already chose where (or an empty string: nowhere)."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "dsv4_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def parse_mesh_sizes(text: str) -> dict[str, int]:
    """'tensor=8' or 'data=2,tensor=4' -> axis -> size."""
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "tensor") or not size.isdigit() or name in sizes:
            raise ValueError(f"mesh {text!r} is not understood; write for example tensor=8 or data=2,tensor=4.")
        sizes[name] = int(size)
    return sizes


def parse_mesh(text: str | None):
    """'tensor=8' or 'data=2,tensor=4' -> a mesh of this machine's devices; None stays None."""
    from dsv4_jax.sharding import make_mesh

    return None if text is None else make_mesh(**parse_mesh_sizes(text))


def _load(args):
    import jax

    import dsv4_jax

    mesh = parse_mesh(args.mesh)
    # On a CPU, unpacking FP4 in every step costs more than the memory it saves.
    recipe = args.recipe or ("bf16" if jax.default_backend() == "cpu" else "official")
    return dsv4_jax.load(args.model, recipe=recipe, mesh=mesh)


def _sampler(args):
    from dsv4_jax.sampling import Greedy, Sample

    if args.temperature == 0:
        return Greedy(repetition_penalty=args.repetition_penalty)
    return Sample(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help=MODEL_HELP)
    parser.add_argument("--recipe", help="precision: bf16, official or nvfp4 (default: official on a GPU, bf16 on a CPU)")
    parser.add_argument("--mesh", help="devices to split the model over, e.g. tensor=8 or data=2,tensor=4")


def _add_sampling(parser: argparse.ArgumentParser, temperature: float) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 keeps all")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens up to this probability")
    group.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this fraction of the best one")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages tokens already seen")
    group.add_argument("--seed", type=int, default=0, help="of the random draws; a token depends on seed and position only")
    group.add_argument("--draft", type=int, default=0, metavar="K", help="speculative decoding: the MTP block drafts K tokens (1-3)")
    group.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to write (default: %(default)s)")


def _generate(args) -> int:
    from dsv4_jax.generate import generate

    prompts = args.prompt or [sys.stdin.read()]
    model = _load(args)
    loaded = time.perf_counter()
    chunks = generate(
        model, prompts, args.max_new_tokens, _sampler(args), draft_tokens=args.draft, chunk=args.chunk
    )  # fmt: skip
    texts, count, steps, first = list(prompts), 0, 0, None
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    for chunk in chunks:
        count, steps = count + sum(map(len, chunk.tokens)), steps + chunk.steps
        if len(prompts) == 1:
            print(chunk.text[0], end="", flush=True)
        texts = [a + b for a, b in zip(texts, chunk.text)]
        first = first or time.perf_counter()
    if len(prompts) == 1:
        print()
    else:
        for i, text in enumerate(texts):
            print(f"--- {i}\n{text}")
    took = time.perf_counter() - first
    print(
        f"[{count} tokens, {count / max(steps, 1):.2f} per step; first text {first - loaded:.1f} s after loading, "
        f"then {took:.1f} s, compiling included]",
        file=sys.stderr,
    )
    return 0


def _chat(args) -> int:
    from dsv4_jax.chat import chat

    return chat(_load(args), _sampler(args), args.max_new_tokens, thinking=args.thinking, system=args.system, drafts=args.draft)


def _verify(args) -> int:
    from dsv4_jax import verify

    return verify.run(args)


def _bench(args) -> int:
    from dsv4_jax import bench

    return bench.run(args)


def _inspect(args) -> int:
    from rich.console import Console

    from checkpoints import inspecting

    found = inspecting.inspect(args.path, args.mesh and parse_mesh_sizes(args.mesh), args.expert_sharding)
    if args.json:
        print(json.dumps(found.to_json()))
        return 0
    # A pipe is no narrow terminal: nothing is cut there.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(inspecting.tree(found), soft_wrap=not sys.stdout.isatty())
    for notice in found.notices:
        console.print(f"note: {notice}", highlight=False, markup=False)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dsv4`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dsv4", description="DeepSeek-V4 inference in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = commands.add_parser(
        "generate", help="continue prompts", description="Continue prompts as plain text (the embedded model writes Python).",
        epilog="example: dsv4 generate 'def read_lines(path):' --draft 1",
    )  # fmt: skip
    sub.add_argument("prompt", nargs="*", help="one or more prompts; none: standard input")
    _add_model(sub)
    _add_sampling(sub, temperature=0.0)
    sub.add_argument("--chunk", type=int, default=16, help="tokens between hand-overs from the device (default: %(default)s)")
    sub.set_defaults(run=_generate)

    sub = commands.add_parser("chat", help="talk in the terminal", description="A conversation in the chat format of the model.")
    _add_model(sub)
    _add_sampling(sub, temperature=0.7)
    sub.add_argument("--thinking", action="store_true", help="let the model reason first, inside <think>...</think>")
    sub.add_argument("--system", help="system message")
    sub.set_defaults(run=_chat)

    from dsv4_jax import bench, verify

    sub = commands.add_parser("verify", help="measure a recipe against a reference", description=verify.__doc__)
    verify.add_arguments(sub)
    sub.set_defaults(run=_verify)
    sub = commands.add_parser("bench", help="measure speed and sizes", description=bench.__doc__)
    bench.add_arguments(sub)
    sub.set_defaults(run=_bench)

    sub = commands.add_parser(
        "selftest", help="check every kernel of this device",
        description="Run every native kernel of this device against the reference at the shapes of Flash and Pro.",
    )  # fmt: skip
    bench.add_case_arguments(sub)
    sub.set_defaults(run=bench.selftest)

    from checkpoints import convert_command

    sub = commands.add_parser("convert", help="turn published safetensors into a checkpoint of this package")
    convert_command.add_arguments(sub)
    sub.set_defaults(run=convert_command.run)

    sub = commands.add_parser(
        "inspect", help="what a directory of weights holds",
        description="Shapes, formats and bytes of a published checkpoint (official, ModelOpt, compressed-tensors, transformers) "
        "or of one of ours, from headers alone.",
        epilog="example: dsv4 inspect DeepSeek-V4-Flash --mesh tensor=8",
    )  # fmt: skip
    sub.add_argument("path", help="directory of a checkpoint, or 'tiny'")
    sub.add_argument("--mesh", help="tell bytes per device of such a mesh, e.g. tensor=8; the devices need not be here")
    sub.add_argument("--expert-sharding", default="width", choices=("width", "experts"), help="how experts are split (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print one JSON document")
    sub.set_defaults(run=_inspect)

    args = parser.parse_args(argv)
    try:
        _use_compile_cache()
        return args.run(args)
    except (ValueError, NotImplementedError) as error:
        print(f"dsv4 {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
