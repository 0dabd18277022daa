"""The name table is complete both ways, and every misfit of names, shapes and dtypes is listed."""

import collections
import dataclasses
import re
from pathlib import Path

import published_headers
import pytest

from checkpoints import matching, names
from checkpoints.reader import Entry, Source, SourceError
from dsv4_jax import FLASH, PRO, TINY

COUNTS = {"flash": (FLASH, 69187), "pro": (PRO, 145116), "tiny": (TINY, 427)}


def source_of(config, change=lambda tensors: None, raw=None):
    """A Source in memory, after `change` has edited its {name: (dtype, shape)}."""
    tensors = published_headers.official_tensors(config)
    change(tensors)
    entries = {name: Entry(name, dtype, tuple(shape), "x.safetensors", 0, 0) for name, (dtype, shape) in tensors.items()}
    return Source(Path("model"), entries, {}, raw or config.to_json(), [])


@pytest.mark.parametrize("size", COUNTS)
def test_every_parameter_once_and_every_tensor_once(size):
    config, count = COUNTS[size]
    source = source_of(config)
    assert len(source.tensors) == count
    matched = matching.match(source)
    used = collections.Counter(entry.name for pieces in matched.pieces.values() for p in pieces for entry in p.parts.values())
    assert set(used) == set(source.tensors) and set(used.values()) == {1} and not matched.dropped
    assert matched.pieces.keys() == matching.declared(config).keys()
    for path, pieces in matched.pieces.items():
        experts = [piece.expert for piece in pieces]
        assert experts == (list(range(config.n_routed_experts)) if ".experts." in path else [None]), path
        for piece in pieces:  # and back: from our path to the published name
            assert names.official_name(path, piece.expert) == piece.parts["data"].name


def test_every_row_is_used_and_names_are_unambiguous():
    paths = {re.sub(r"^layers\.\d+\.", "layers.{}.", path) for path in matching.declared(FLASH)}
    assert paths == {row.ours for row in names.TABLE} and len(paths) == len(names.TABLE)
    spelled = collections.defaultdict(list)
    for row in names.TABLE:
        for name, how in {(row.official, row.transform), *row.others}:
            spelled[name].append((row.ours, how))
    fused = {name: rows for name, rows in spelled.items() if len(rows) > 1}
    assert fused == {
        "model.layers.{}.mlp.experts.gate_up_proj": [
            ("layers.{}.ffn.experts.w1", names.FIRST_HALF), ("layers.{}.ffn.experts.w3", names.SECOND_HALF)
        ]
    }  # fmt: skip


def test_quantizable_rows_are_those_whose_parameters_have_formats():
    for path, param in matching.declared(TINY).items():
        assert names.row_of(path).quantizable == (param.role in ("linear", "wo_a", "experts")), path


@pytest.mark.parametrize(
    "name",
    ["", "layers.0", "layers.00.attn_norm.weight", "layers.-1.attn_norm.weight", "layers.1.attn_norm.scale", "embed.scale",
     "layers.0.ffn.experts.01.w1.weight", "layers.0.ffn.experts.0.w4.weight", "mtp.1.enorm.weight", "layers.0.enorm.weight",
     "model.layers.0.mlp.experts.gate_up_proj.scale", "layers.{}.attn_norm.weight", "layers.0.ffn.experts.{e}.w1.weight",
     "layers.9999999.attn_norm.weight", "layers.0.attn.wq_a.weight.weight", "LAYERS.0.attn_norm.weight"],
)  # fmt: skip
def test_names_that_are_none(name):
    assert names.meaning(name) is None


def drop(*gone):
    return lambda tensors: [tensors.pop(name) for name in gone]


def put(**new):
    return lambda tensors: tensors.update({k.replace("__", "."): v for k, v in new.items()})


LAYER = "layers.1.attn.wq_a"
CHANGES = {
    "embed.weight is missing": drop("embed.weight"),
    "layers.2.attn.attn_sink is missing": drop("layers.2.attn.attn_sink"),
    "layers.0.ffn.experts.3.w2.weight is missing": drop("layers.0.ffn.experts.3.w2.weight", "layers.0.ffn.experts.3.w2.scale"),
    f"{LAYER}.weight has the parts (weight F8_E4M3), which are no format": drop(f"{LAYER}.scale"),
    f"{LAYER}.scale has the parts (scale F8_E8M0), which are no format": drop(f"{LAYER}.weight"),
    "layers.0.attn.novelty.weight is unknown": put(layers__0__attn__novelty__weight=("BF16", (2,))),
    "layers.9.attn_norm.weight belongs to no parameter": put(layers__9__attn_norm__weight=("BF16", (256,))),
    "layers.0.attn.compressor.ape belongs to no parameter": put(layers__0__attn__compressor__ape=("F32", (4, 256))),
    "layers.0.ffn.experts.8.w1.weight is beyond the n_routed_experts = 8": put(layers__0__ffn__experts__8__w1__weight=("I8", (256, 128))),
    "model.embed_tokens.weight is the same tensor as embed.weight": put(model__embed_tokens__weight=("BF16", (2048, 256))),
    "embed.weight is BF16 [2048, 128] instead of [2048, 256]": put(embed__weight=("BF16", (2048, 128))),
    "embed.weight is F16 instead of BF16 or F32": put(embed__weight=("F16", (2048, 256))),
    "layers.1.attn.wq_a.scale is F8_E8M0 [1, 1] instead of [1, 2]": put(layers__1__attn__wq_a__scale=("F8_E8M0", (1, 1))),
    "(weight F8_E4M3, scale F8_E4M3), which are no format": put(layers__1__attn__wq_a__scale=("F8_E4M3", (1, 2))),
    "norm.weight is BF16 [256, 1] instead of [256]": put(norm__weight=("BF16", (256, 1))),
    "layers.0.ffn.gate.tid2eid is F32 instead of I64 or I32": put(layers__0__ffn__gate__tid2eid=("F32", (2048, 2))),
    "layers.0.ffn.experts.0.w1.scale is F8_E8M0 [256, 16] instead of [256, 8]": put(layers__0__ffn__experts__0__w1__scale=("F8_E8M0", (256, 16))),
    "layers.0.ffn.experts.w1 is there as a whole and again expert by expert": put(
        model__layers__0__mlp__experts__gate_up_proj=("BF16", (8, 512, 256))
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", CHANGES)
def test_misfits_are_named(sentence):
    with pytest.raises(SourceError) as error:
        matching.match(source_of(TINY, CHANGES[sentence]))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_all_misfits_are_listed_and_the_text_is_bounded():
    def many(tensors):
        for name in list(tensors):
            if ".experts." in name or name == "head.weight":
                del tensors[name]

    with pytest.raises(SourceError) as error:
        matching.match(source_of(TINY, many))
    assert len(error.value.problems) == 1 + 15  # each stack of experts is one problem
    with pytest.raises(SourceError) as error:
        matching.match(source_of(TINY, lambda tensors: tensors.update({f"x{i}": ("BF16", (1,)) for i in range(5000)})))
    assert len(error.value.problems) == 5000 and len(str(error.value)) < 1500 and "and 4980 more" in str(error.value)


def test_a_missing_mtp_block_tells_how_to_go_on_without():
    def trunk(tensors):
        for name in [n for n in tensors if n.startswith("mtp.")]:
            del tensors[name]

    with pytest.raises(SourceError, match="To load the trunk alone, set num_nextn_predict_layers to 0"):
        matching.match(source_of(TINY, trunk))
    alone = dataclasses.replace(TINY, num_nextn_predict_layers=0, compress_ratios=TINY.layer_ratios)
    assert not any(path.startswith("mtp") for path in matching.match(source_of(TINY, trunk, alone.to_json())).pieces)


@pytest.mark.parametrize("how", ["count", "names", "field"])
def test_dspark_drafts_are_left_out_with_a_notice(how):
    raw = TINY.to_json()
    if how == "count":
        raw |= {"num_nextn_predict_layers": 3, "compress_ratios": raw["compress_ratios"] + [0, 0]}
    if how == "field":
        raw["dspark_config"] = {"layers": 3}

    def draft(tensors):
        tensors["mtp.0.draft_proj.weight"] = ("BF16", (7, 7))
        if how != "field":
            tensors["mtp.2.markov.weight"] = ("BF16", (9,))

    matched = matching.match(source_of(TINY, draft, raw))
    assert matched.config.num_nextn_predict_layers == 0 and matched.config.layer_ratios == TINY.layer_ratios
    assert all(name.startswith("mtp.") for name in matched.dropped) and len(matched.dropped) > 20
    assert "DSpark draft" in matched.notices[0] and not any(path.startswith("mtp") for path in matched.pieces)


def test_v4_1_is_refused():
    for change, raw in (
        (lambda tensors: tensors.update({"layers.0.engram.table": ("BF16", (4,))}), TINY.to_json()),
        (lambda tensors: None, TINY.to_json() | {"model_type": "deepseek_v4_1"}),
        (lambda tensors: None, TINY.to_json() | {"engram_layers": [1]}),
    ):
        with pytest.raises(ValueError, match="this is DeepSeek-V4.1.*another architecture"):
            matching.match(source_of(TINY, change, raw))
