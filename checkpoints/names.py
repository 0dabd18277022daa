"""The one table of names: published tensors <-> paths of our tree, one row per kind of tensor, read both ways.

Our tree already uses the published names; what differs is their shape: experts are stacked, wo_a is per group, and
hyper-connection parameters are nested. A row gives the official name and transformers' ones of the unquantized tensor;
the formats of a weight are told by the suffixes of its parts (`FORMATS`), the same for every spelling of the names.
Not here: shapes and dtypes (`dsv4_jax/params.py` declares, `matching.py` compares).
"""

from __future__ import annotations

import dataclasses
import functools
import re

# How the source array becomes the one of our tree; experts are always stacked, rows first.
SAME = "same"
GROUPS = "groups"  # [groups * o_lora_rank, K] <-> [groups, o_lora_rank, K]
EXPERT = "expert"  # [rows, K] <-> one slice of [experts, rows, K]
STACKED = "stacked"  # [experts, rows, K], all at once
FIRST_HALF, SECOND_HALF = "first half", "second half"  # of the rows of [experts, 2 * rows, K]


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor. {} stands for the number of a layer, {e} for that of an expert.

    ours: dotted path of our tree. official: published name, with the suffix of a plain tensor. others: (name,
    transform) of transformers, as it names them in memory (stacked or expert by expert) and as it saves them.
    transform: of the official name.
    """

    ours: str
    official: str
    others: tuple[tuple[str, str], ...]
    transform: str = SAME
    quantizable: bool = False


def _row(ours: str, official: str, *others: str | tuple[str, str], transform: str = SAME, quantizable: bool = False) -> Row:
    pairs = tuple((o, transform) if isinstance(o, str) else o for o in others)
    return Row(ours, official, pairs, transform, quantizable)


def _linear(ours: str, theirs: str, transform: str = SAME) -> Row:
    return _row(ours, f"{ours}.weight", *([f"{theirs}.weight"] if theirs else []), transform=transform, quantizable=True)


def _plain(ours: str, *theirs: str) -> Row:
    return _row(ours, f"{ours}.weight", *theirs)


def _hyper_connection(site: str, theirs: str) -> tuple[Row, ...]:
    parts = ("fn", "base", "scale")
    return tuple(_row(f"hc_{site}.{part}", f"hc_{site}_{part}", *([f"{theirs}{part}"] if theirs else [])) for part in parts)


def _compressor(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        _plain(f"{ours}.wkv", f"{theirs}.kv_proj.weight"),
        _plain(f"{ours}.wgate", f"{theirs}.gate_proj.weight"),
        _plain(f"{ours}.norm", f"{theirs}.kv_norm.weight"),
        _row(f"{ours}.ape", f"{ours}.ape", f"{theirs}.position_bias"),
    )


def _experts(ours: str, theirs: str, stacked: str, part: str) -> Row:
    return _row(
        f"ffn.experts.{ours}", f"ffn.experts.{{e}}.{ours}.weight", (f"mlp.experts.{{e}}.{theirs}.weight", EXPERT),
        (f"mlp.experts.{stacked}", part), transform=EXPERT, quantizable=True,
    )  # fmt: skip


BLOCK = (
    _plain("attn_norm", "input_layernorm.weight"),
    _plain("ffn_norm", "post_attention_layernorm.weight"),
    *_hyper_connection("attn", "attn_hc."),
    *_hyper_connection("ffn", "ffn_hc."),
    _linear("attn.wq_a", "self_attn.q_a_proj"),
    _plain("attn.q_norm", "self_attn.q_a_norm.weight"),
    _linear("attn.wq_b", "self_attn.q_b_proj"),
    _linear("attn.wkv", "self_attn.kv_proj"),
    _plain("attn.kv_norm", "self_attn.kv_norm.weight", "attn.norm.weight"),  # the latter as save_pretrained writes it
    _linear("attn.wo_a", "self_attn.o_a_proj", GROUPS),
    _linear("attn.wo_b", "self_attn.o_b_proj"),
    _row("attn.attn_sink", "attn.attn_sink", "self_attn.sinks"),
    *_compressor("attn.compressor", "self_attn.compressor"),
    _linear("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    _plain("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj.weight"),
    *_compressor("attn.indexer.compressor", "self_attn.compressor.indexer"),
    _row("ffn.gate.weight", "ffn.gate.weight", "mlp.gate.weight"),
    _row("ffn.gate.bias", "ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    _row("ffn.gate.tid2eid", "ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    _experts("w1", "gate_proj", "gate_up_proj", FIRST_HALF),
    _experts("w2", "down_proj", "down_proj", STACKED),
    _experts("w3", "up_proj", "gate_up_proj", SECOND_HALF),
    _linear("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    _linear("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
    _linear("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
)
TOP = (
    _plain("embed", "model.embed_tokens.weight"),
    _plain("head", "lm_head.weight"),
    _plain("norm", "model.norm.weight"),
    *_hyper_connection("head", "model.hc_head.hc_"),
)
MTP = (  # a block that sees its window only and routes by scores; transformers has none
    *(row for row in BLOCK if not re.search("compressor|indexer|tid2eid", row.ours)),
    _linear("e_proj", ""),
    _linear("h_proj", ""),
    _plain("enorm"),
    _plain("hnorm"),
    _plain("norm"),
    *_hyper_connection("head", ""),
)


def _under(prefix: str, official: str, theirs: str | None, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(
        dataclasses.replace(
            row, ours=prefix + row.ours, official=official + row.official,
            # save_pretrained keeps most official names below its own prefix
            others=() if theirs is None else tuple((theirs + name, how) for name, how in (*row.others, (row.official, row.transform))),
        )
        for row in rows
    )  # fmt: skip


TABLE: tuple[Row, ...] = (
    *TOP,
    *_under("layers.{}.", "layers.{}.", "model.layers.{}.", BLOCK),
    *_under("mtp.", "mtp.0.", None, MTP),
)

# Parts of a weight in each format: part of our tensor -> (what replaces ".weight" in its name, dtypes it may have).
# "dropped" parts say how another engine quantizes activations; ours are scaled by what they hold.
FORMATS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "plain": {"data": (".weight", ("BF16", "F32"))},
    "fp8": {"data": (".weight", ("F8_E4M3",)), "scale": (".scale", ("F8_E8M0", "F32"))},
    "fp8 (weight_scale_inv)": {"data": (".weight", ("F8_E4M3",)), "scale": (".weight_scale_inv", ("F8_E8M0", "F32"))},
    "fp8 (weight_scale)": {"data": (".weight", ("F8_E4M3",)), "scale": (".weight_scale", ("F8_E8M0", "F32", "BF16"))},
    "mxfp4": {"data": (".weight", ("I8", "U8")), "scale": (".scale", ("F8_E8M0",))},
    "nvfp4": {
        "data": (".weight", ("U8",)), "scale": (".weight_scale", ("F8_E4M3",)),
        "global_scale": (".weight_scale_2", ("F32",)), "dropped": (".input_scale", ("F32",)),
    },
    "nvfp4 (compressed-tensors)": {
        "data": (".weight_packed", ("U8",)), "scale": (".weight_scale", ("F8_E4M3",)),
        "global_scale": (".weight_global_scale", ("F32",)), "dropped": (".input_global_scale", ("F32",)),
    },
}  # fmt: skip
SUFFIXES = tuple(sorted({suffix for parts in FORMATS.values() for suffix, _ in parts.values()}, key=len, reverse=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Meaning:
    """What a published name stands for: rows of the table (two for a fused gate_up_proj), with the transform of each,
    the dotted path of each in our tree, the expert or None, and the suffix of the part ('.weight', '.scale', '')."""

    paths: tuple[str, ...]
    transforms: tuple[str, ...]
    expert: int | None
    suffix: str


@functools.cache
def _lookup() -> dict[str, tuple[tuple[Row, str], ...]]:
    """Name pattern -> (row, transform) pairs."""
    found: dict[str, list[tuple[Row, str]]] = {}
    for row in TABLE:
        for name, how in ((row.official, row.transform), *row.others):
            found.setdefault(name, []).append((row, how))
    return {name: tuple(rows) for name, rows in found.items()}


_LAYER = re.compile(r"^(model\.)?layers\.(0|[1-9]\d{0,5})\.")
_EXPERT = re.compile(r"\.experts\.(0|[1-9]\d{0,5})\.")


def meaning(name: str) -> Meaning | None:
    """What a published tensor is, by its name alone; None for a name that the table does not have.

    >>> meaning("layers.3.ffn.experts.7.w1.scale")
    Meaning(paths=('layers.3.ffn.experts.w1',), transforms=('expert',), expert=7, suffix='.scale')
    """
    if "{" in name:
        return None
    layer = _LAYER.match(name)
    pattern = f"{layer.group(1) or ''}layers.{{}}.{name[layer.end() :]}" if layer else name
    expert = _EXPERT.search(pattern)
    if expert:
        pattern = f"{pattern[: expert.start()]}.experts.{{e}}.{pattern[expert.end() :]}"
    table = _lookup()
    rows, suffix = table.get(pattern), ".weight" if pattern.endswith(".weight") else ""
    if rows is None:
        suffix = next((s for s in SUFFIXES if pattern.endswith(s)), None)
        rows = suffix and table.get(pattern.removesuffix(suffix) + ".weight")
        if not rows or not all(row.quantizable for row, _ in rows):
            return None
    number = layer.group(2) if layer else ""
    return Meaning(
        tuple(row.ours.format(number) for row, _ in rows), tuple(how for _, how in rows),
        int(expert.group(1)) if expert else None, suffix,
    )  # fmt: skip


@functools.cache
def _by_path() -> dict[str, Row]:
    return {row.ours: row for row in TABLE}


def row_of(path: str) -> Row:
    """The row of a dotted path of our tree; KeyError for a path that is none."""
    return _by_path()[re.sub(r"^layers\.\d+\.", "layers.{}.", path)]


def official_name(path: str, expert: int | None = None, suffix: str = ".weight") -> str:
    """Our dotted path -> the published name; `expert` picks one of a stacked tensor, `suffix` a part of it.

    >>> official_name("mtp.hc_head.fn"), official_name("layers.3.ffn.experts.w1", expert=7, suffix=".scale")
    ('mtp.0.hc_head_fn', 'layers.3.ffn.experts.7.w1.scale')
    """
    name = row_of(path).official
    layer = re.match(r"layers\.(\d+)\.", path)
    if layer:
        name = name.replace("{}", layer.group(1), 1)
    if expert is not None:
        name = name.replace("{e}", str(expert))
    return name if suffix == ".weight" else name.removesuffix(".weight") + suffix
