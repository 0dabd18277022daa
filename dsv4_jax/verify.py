"""How far a recipe is from a reference, where, and what that costs in quality.

Two models of one configuration, their weights in different formats, run on the same held-out text. Compared are the
outputs of attention and experts of every layer, the residual and the logits (errors accumulate: this is the end-to-end
view), what the indexers select, and the perplexity. Not here: single ops against their reference (the kernels' tests).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import sysconfig
from pathlib import Path
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import params, precision
from dsv4_jax.config import CSA, HCA, WINDOW, ModelConfig
from dsv4_jax.model import Model, forward_recorded
from dsv4_jax.precision import BF16, Recipe

GATES = {"logits cosine": 0.999, "indexer recall": 0.99}  # least values, end to end
CHANGES = ("kv=fp8", "index=fp4", "linear=fp8", "experts=mxfp4", "linear=nvfp4", "experts=nvfp4")
Recording = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Site:
    """An intermediate of model a against model b. cosine: mean over positions; relative_error: ||a - b|| / ||b|| over
    everything; worst: (sequence, position) of the lowest cosine, worst_cosine."""

    name: str
    cosine: float
    relative_error: float
    worst: tuple[int, int]
    worst_cosine: float


@dataclasses.dataclass(frozen=True)
class Recall:
    """The share of b's selection that a's indexer of this layer finds, over the `positions` that see more entries than
    are kept; None if there are none."""

    layer: int
    recall: float | None
    positions: int


@dataclasses.dataclass(frozen=True)
class Report:
    """sites: 'layers.N.attn' and 'layers.N.ffn' in order, 'hidden', 'logits' and, with an MTP block, 'mtp_logits'.
    recalls: one per CSA layer. topk: how many entries an indexer keeps."""

    sites: tuple[Site, ...]
    recalls: tuple[Recall, ...]
    topk: int

    def site(self, name: str) -> Site:
        return next(s for s in self.sites if s.name == name)

    @property
    def worst(self) -> Site:
        """The layer site with the lowest mean cosine; nan is lowest."""
        layers = [s for s in self.sites if s.name.startswith("layers.")]
        return min(layers, key=lambda s: -math.inf if math.isnan(s.cosine) else s.cosine)

    @property
    def recall(self) -> float | None:
        """The lowest recall of a layer; None if no selection cuts."""
        return min((r.recall for r in self.recalls if r.positions), default=None)

    @property
    def gates(self) -> dict[str, tuple[float | None, bool | None]]:
        """Gate -> (figure, passed), or (None, None) where nothing could be measured."""
        figures = {"logits cosine": self.site("logits").cosine, "indexer recall": self.recall}
        return {g: (f, None if f is None else f >= GATES[g]) for g, f in figures.items()}


@jax.jit
def _recorded(model: Model, tokens: jax.Array) -> dict[str, jax.Array]:
    logits, found = forward_recorded(model, tokens)
    found["logits"] = logits
    names = [f"layers.{i}.{site}" for i in range(model.config.num_hidden_layers) for site in ("attn", "ffn", "topk")]
    return {name: found[name] for name in (*names, "hidden", "logits", "mtp_logits") if name in found}


def record(model: Model, tokens, tick: Callable[[], None] = lambda: None) -> Recording:
    """The sites of `Report` and the selections 'layers.N.topk' for int tokens [B, T >= 2], on the host.

    Sequences run one by one (no result depends on another sequence); `tick` is called after each.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.shape[0] or tokens.shape[1] < 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}; give integers [sequences, 2 tokens or more].")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(
            f"token ids reach from {tokens.min()} to {tokens.max()}, but the vocabulary is [0, {model.config.vocab_size}); "
            "were they encoded with another model's tokenizer?"
        )
    if model.mesh is not None:
        raise ValueError("intermediates are recorded on one device; load the model without a mesh.")
    rows, model = [], dataclasses.replace(model, source=None)  # the directory is no reason to compile again
    for row in tokens.astype(np.int32):
        rows.append(jax.device_get(_recorded(model, row[None])))
        tick()
    return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}


def compare(model_a: Model, model_b: Model, tokens) -> Report:
    """Both models on int tokens [B, T]; b is the reference. ValueError unless they have one configuration."""
    if model_a.config != model_b.config:
        raise ValueError("the two models have different configurations; compare recipes of one model.")
    return compare_recordings(model_a.config, record(model_a, tokens), record(model_b, tokens))


def compare_recordings(config: ModelConfig, a: Recording, b: Recording) -> Report:
    """`compare` for what `record` returned."""
    names = [f"layers.{i}.{site}" for i in range(config.num_hidden_layers) for site in ("attn", "ffn")]
    names += [name for name in ("hidden", "logits", "mtp_logits") if name in b]
    recalls = [_recall(config, i, a, b) for i, ratio in enumerate(config.layer_ratios) if ratio == CSA]
    return Report(tuple(_site(name, a[name], b[name]) for name in names), tuple(recalls), config.index_topk)


def _site(name: str, a: np.ndarray, b: np.ndarray) -> Site:
    cosines, error, size = [], 0.0, 0.0
    for x, y in zip(a, b, strict=True):
        x, y = (v.reshape(len(v), -1).astype(np.float64) for v in (x, y))
        product = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        cosine = (x * y).sum(-1) / np.where(product == 0, 1, product)  # 0 where one of the two is zero
        cosines.append(np.where((x == y).all(-1), 1.0, np.clip(cosine, -1, 1)))
        error, size = error + ((x - y) ** 2).sum(), size + (y**2).sum()
    cosines = np.stack(cosines)
    at = np.unravel_index(np.argmin(cosines), cosines.shape)  # a nan counts as the lowest
    relative = math.sqrt(error / size) if size else (math.inf if error else 0.0)
    return Site(name, float(cosines.mean()), relative, (int(at[0]), int(at[1])), float(cosines[at]))


def _recall(config: ModelConfig, layer: int, a: Recording, b: Recording) -> Recall:
    visible = (np.arange(b["logits"].shape[1]) + 1) // CSA
    cut = visible > config.index_topk
    if not cut.any():
        return Recall(layer, None, 0)
    chosen = []
    for recording in (a, b):
        picks = recording[f"layers.{layer}.topk"][:, cut]
        chosen.append(np.zeros((*picks.shape[:2], visible[-1] + 1), bool))
        np.put_along_axis(chosen[-1], picks, True, axis=-1)  # -1 marks the last column, which is no entry
    both, wanted = (chosen[0] & chosen[1])[..., :-1].sum(), chosen[1][..., :-1].sum()
    return Recall(layer, float(both / wanted), chosen[1].shape[0] * chosen[1].shape[1])


def perplexity(model: Model, tokens, nbytes: int | None = None) -> dict[str, float | None]:
    """nats_per_token and perplexity of int tokens [B, T]; bits_per_byte if given the bytes of text that tokens[:, 1:]
    stand for; mtp_agreement: how often the MTP block guesses the trunk's next greedy token."""
    return quality(record(model, tokens), tokens, nbytes)


def quality(recording: Recording, tokens, nbytes: int | None = None) -> dict[str, float | None]:
    """`perplexity` for what `record` returned."""
    total, agreement = 0.0, None
    for logits, row in zip(recording["logits"], np.asarray(tokens), strict=True):
        logits = logits[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        total += float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), row[1:]]).sum())
    nats = total / np.asarray(tokens)[:, 1:].size
    if "mtp_logits" in recording:
        agreement = float((recording["mtp_logits"].argmax(-1) == recording["logits"][:, 1:].argmax(-1)).mean())
    bits = total / math.log(2) / nbytes if nbytes else None
    return {"nats_per_token": nats, "perplexity": float(np.exp(nats)), "bits_per_byte": bits, "mtp_agreement": agreement}


@jax.jit
def _broken(leaf) -> jax.Array:
    """Whether a weight in any format holds nan or inf; of uint8 parts only e8m0 scales can, as 255."""
    floats = [v for v in jax.tree.leaves(leaf) if jnp.issubdtype(v.dtype, jnp.floating)]
    bad = [~jnp.isfinite(v.astype(jnp.float32)).all() for v in floats]
    if getattr(leaf, "scale", None) is not None and leaf.scale.dtype == jnp.uint8:
        bad.append((leaf.scale == 255).any())
    return jnp.any(jnp.asarray(bad)) if bad else jnp.bool_(False)


def nan_weights(model: Model) -> list[str]:
    """Names ('layers.3.attn.wkv') of the weights that hold nan or inf in their values or scales."""
    found: list[tuple[str, jax.Array]] = []
    params.map_params(lambda name, _, leaf: found.append((name, _broken(leaf))), model.config, model.weights)
    return [name for name, bad in found if bad]


def recipe_named(text: str) -> Recipe:
    """A recipe by name, or with changes: 'bf16+kv=fp8+index=fp4'. ValueError says what is not understood."""
    base, *changes = text.split("+")
    values = dict(change.partition("=")[::2] for change in changes)
    unknown = set(values) - {f.name for f in dataclasses.fields(Recipe)} | {"name"} & set(values)
    if unknown:
        raise ValueError(f"recipe {text!r}: {min(unknown)!r} is no field of a recipe; write for example bf16+kv=fp8.")
    return dataclasses.replace(precision.get(base), name=text, **values) if values else precision.get(base)


def variants(base: Recipe = BF16) -> list[Recipe]:
    """The recipes of the table: `base`, bf16, official, nvfp4, and one change at a time from bf16."""
    others = [BF16, precision.OFFICIAL, precision.NVFP4, *(recipe_named(f"bf16+{change}") for change in CHANGES)]
    return [base, *(r for r in others if r != base)]


def held_out_tokens(model: Model, count_tokens: int, length: int, text: str | Path | None = None):
    """(np.int32 [B, length], bytes of text that all but the first of each row stand for, or None if unknown).

    Of Python's standard library the files that the embedded model was not trained on, or the UTF-8 file `text`, each
    between BOS and EOS, in one stream; rows are taken at even distances, count_tokens in all or what there is.
    """
    config, tokenizer = model.config, model.tokenizer
    if not 2 <= length <= min(count_tokens, config.max_position_embeddings):
        raise ValueError(
            f"sequences of {length} tokens do not fit: take 2 or more, at most the {count_tokens} tokens in all and the "
            f"{config.max_position_embeddings} positions of this model."
        )
    if text is None:
        from checkpoints.train_tiny import read_files

        texts = read_files(Path(sysconfig.get_paths()["stdlib"]))[1]
    else:
        try:
            texts = [Path(text).read_text("utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{text} cannot be read as UTF-8 text ({error}); name a text file.") from error
    bos, eos = config.bos_token_id, config.eos_token_id
    encoded = [[bos, *e.ids, eos] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    stream = np.concatenate(encoded).astype(np.int32)
    if len(stream) < length:
        raise ValueError(f"the text has {len(stream)} tokens, less than a sequence of {length}; take a longer text or shorter ones.")
    rows = min(count_tokens, len(stream)) // length
    tokens = np.stack([stream[i : i + length] for i in np.linspace(0, len(stream) - length, rows).astype(int)])

    special = {bos, eos, *tokenizer.get_added_tokens_decoder()}  # the others have, byte-level, one character per byte
    sizes = np.zeros(stream.max() + 1, np.int64)
    for i in np.unique(stream).tolist():
        sizes[i] = 0 if i in special else len(tokenizer.id_to_token(i))
    byte_level = sizes[stream].sum() == sum(len(t.encode()) for t in texts)
    return tokens, int(sizes[tokens[:, 1:]].sum()) if byte_level else None


def _figure(value: float | None, form: str = ".6f") -> str:
    return "n/a" if value is None else format(value, form)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], caption: str):
    from rich import box
    from rich.table import Table

    left = {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0, **left)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _site_table(config: ModelConfig, report: Report, title: str):
    kinds = {WINDOW: "window", CSA: "CSA", HCA: "HCA"}
    recalls = {f"layers.{r.layer}.attn": _figure(r.recall, ".4f") for r in report.recalls}
    rows = []
    for s in report.sites:
        kind = kinds[config.layer_ratios[int(s.name.split(".")[1])]] if s.name.endswith(".attn") else ""
        figures = f"{s.cosine:.6f}", f"{s.relative_error:.5f}", "{}:{}".format(*s.worst), f"{s.worst_cosine:.4f}"
        rows.append((s.name, kind, *figures, recalls.get(s.name, "")))
    cut = max((r.positions for r in report.recalls), default=0)
    caption = f"Worst position as sequence:position. Recall over the {cut} positions that see more than {report.topk} entries."
    return _table(title, ("site", "kind", "cosine", "rel. error", "worst at", "cosine", f"recall@{report.topk}"), rows, caption)


def plot(path: str | Path, report: Report, table: list[dict], title: str) -> None:
    """A PNG: 1 - cosine per layer and site, recall per CSA layer, perplexity of each row of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.8), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 3, 6))
    layers = len([s for s in report.sites if s.name.endswith(".attn")])
    for site, marker in (("attn", "o"), ("ffn", "s")):
        values = [max(1 - report.site(f"layers.{i}.{site}").cosine, 1e-9) for i in range(layers)]
        left.plot(range(layers), values, marker=marker, label=site)
    ends = [s for s in report.sites if not s.name.startswith("layers.")]
    left.scatter(range(layers, layers + len(ends)), [max(1 - s.cosine, 1e-9) for s in ends], marker="D", color="black")
    left.axhline(1 - GATES["logits cosine"], color="gray", linestyle="--", label=f"gate of the logits, {GATES['logits cosine']}")
    left.set(title="Distance per layer and site", xlabel="layer", ylabel="1 - cosine", yscale="log")
    shown = range(0, layers, -(-layers // 12))  # labels that do not touch
    labels = [*map(str, shown), *(s.name.replace("_", "\n") for s in ends)]
    left.set_xticks([*shown, *range(layers, layers + len(ends))], labels)
    left.tick_params(axis="x", rotation=90 if layers > 12 else 0)
    left.legend(loc="lower left")

    measured = [r for r in report.recalls if r.positions]
    middle.bar([str(r.layer) for r in measured], [r.recall for r in measured], width=0.5, color="tab:green")
    middle.tick_params(axis="x", rotation=90 if layers > 12 else 0)
    middle.axhline(GATES["indexer recall"], color="gray", linestyle="--", label=f"gate, {GATES['indexer recall']}")
    middle.set(title=f"Recall of the indexer's {report.topk}", xlabel="CSA layer", ylabel="recall", ylim=(0, 1.15))
    middle.legend(loc="upper right")

    values = [row["perplexity"] for row in table]
    bars = right.barh([row["recipe"] for row in table], values, color="tab:blue")
    right.bar_label(bars, [f"{row['perplexity']:.4g} ({row['delta_percent']:+.2f} %)" for row in table], padding=3)
    right.set(title="Held-out perplexity", xlabel="perplexity", xlim=(0, 1.45 * max(filter(math.isfinite, values), default=1)))
    right.invert_yaxis()
    figure.savefig(path, format="png", dpi=120)


def add_arguments(parser) -> None:
    """The arguments of `dsv4 verify`, on an argparse parser."""
    recipe = "a recipe, or one with changes, like bf16+kv=fp8"
    parser.add_argument("--model", default="tiny", help="directory of a checkpoint, or 'tiny', the embedded one (default: %(default)s)")
    parser.add_argument("--recipe", default="nvfp4", help=f"what is measured: {recipe} (default: %(default)s)")
    parser.add_argument("--against", default="bf16", help="the recipe it is measured against (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text in all, or what there is (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", help="text to measure on (default: held-out files of Python's standard library)")
    parser.add_argument("--plot", metavar="PNG", nargs="?", const="verify.png", help="draw the figures, too (without a name: %(const)s)")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 if a gate fails")
    parser.add_argument("--only", action="store_true", help="skip the table of all recipes, most of the time this takes")


def _load(path: str, recipe: Recipe) -> Model:
    from checkpoints import load

    model = load(path, recipe)
    if broken := nan_weights(model):
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(f"{path} holds nan or inf in {', '.join(broken[:5])}{more}, so nothing is measured; repair it.")
    return model


def run(args) -> int:
    """`dsv4 verify`: prints tables and, as the last line, one JSON document. Returns 1 for a failed gate if --strict."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    recipe, against = recipe_named(args.recipe), recipe_named(args.against)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("plots are drawn with matplotlib, which is not installed; install it or leave --plot out.")
    if args.plot and (Path(args.plot).is_dir() or not Path(args.plot).absolute().parent.is_dir()):
        raise ValueError(f"{args.plot} is no file in an existing directory; name the PNG to write with --plot.")
    reference, model = _load(args.model, against), _load(args.model, recipe)
    tokens, nbytes = held_out_tokens(reference, args.tokens, args.length, args.text)
    others = [] if args.only else [r for r in variants(against) if r not in (recipe, against)]
    console, table = Console(highlight=False, markup=False), []
    count = TextColumn("{task.completed}/{task.total} sequences")
    columns = TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(tokens) * (2 + len(others)))
        expected = None

        def measure(one: Model) -> Report:
            nonlocal expected
            progress.update(bar, description=f"{one.recipe.name}: compiles, then runs")
            found = record(one, tokens, functools.partial(progress.advance, bar))
            expected = found if expected is None else expected
            against_it, row = compare_recordings(one.config, found, expected), quality(found, tokens, nbytes)
            first = table[0]["perplexity"] if table else row["perplexity"]
            row |= {"delta_percent": 100 * (row["perplexity"] / first - 1), "recall": against_it.recall}
            table.append({"recipe": one.recipe.name} | row | {"logits_cosine": against_it.site("logits").cosine})
            return against_it

        measure(reference)
        report = measure(model)
        for other in others:
            measure(_load(args.model, other))

    size = f"{tokens.shape[0]} x {tokens.shape[1]} tokens of {args.text or 'held-out files of the standard library'}"
    title = f"{args.model}: {recipe.name} against {against.name}, {size}"
    console.print(_site_table(model.config, report, title))
    rows = [
        (r["recipe"], f"{r['nats_per_token']:.4f}", f"{r['perplexity']:.4g}", f"{r['delta_percent']:+.2f}",
         _figure(r["mtp_agreement"], ".3f"), f"{r['logits_cosine']:.6f}", _figure(r["recall"], ".4f"))
        for r in table
    ]  # fmt: skip
    header = ("recipe", "nats/token", "perplexity", "%", "MTP", "logits cos", "recall")
    caption = f"% of perplexity, cosine of the logits and least recall of a layer: against {against.name}. MTP: guessed right."
    console.print(_table("Quality", header, rows, caption))
    console.print(f"Farthest from {against.name}: {report.worst.name}, cosine {report.worst.cosine:.6f}.")
    for gate, (figure, passed) in report.gates.items():
        verdict = "n/a: no selection cuts, take a larger --length" if passed is None else "pass" if passed else "FAIL"
        console.print(f"{gate} {_figure(figure)}, at least {GATES[gate]} wanted: {verdict}")
    if args.plot:
        plot(args.plot, report, table, title)
        console.print(f"Plot: {args.plot}")
    gates = {g: {"figure": f, "at_least": GATES[g], "passed": passed} for g, (f, passed) in report.gates.items()}
    document = {"model": args.model, "recipe": recipe.name, "against": against.name, "text": args.text, "tokens": tokens.size,
                "length": tokens.shape[1], "bytes": nbytes, "report": dataclasses.asdict(report), "worst": report.worst.name,
                "recipes": table, "gates": gates}  # fmt: skip
    without_nan = json.loads(json.dumps(document), parse_constant=lambda _: None)  # JSON has no nan and inf: null
    print(json.dumps(without_nan))
    return int(args.strict and any(passed is False for _, passed in report.gates.values()))
