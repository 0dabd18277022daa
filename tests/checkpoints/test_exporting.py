"""Back to the official layout: the published bits, whatever the model came from, and the same checkpoint again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="publications are written by torch: pip install torch")

from safetensors import safe_open  # noqa: E402

import dsv4_jax as dsv4  # noqa: E402
from checkpoints import convert, export_hf, exporting, inspect, layout, load, open_source, save  # noqa: E402
from dsv4_jax import RECIPES, TINY, pack, params  # noqa: E402
from models import lively_weights, small_model  # noqa: E402
from published import ODD, Maker, write  # noqa: E402

# wo_a groups of 128 rows and several blocks of columns: scales of groups and of the matrix are the same blocks
WIDE = dataclasses.replace(
    TINY, vocab_size=128, num_hidden_layers=2, compress_ratios=(4, 128, 0), o_lora_rank=128, o_groups=2, n_routed_experts=4,
)  # fmt: skip


def files_of(directory) -> dict[str, bytes]:
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def tensors_of(directory) -> dict[str, tuple]:
    """name -> (dtype, shape, bytes), read by safetensors itself."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                value = opened.get_tensor(name).contiguous()
                found[name] = (value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


@pytest.fixture
def chunked(monkeypatch):
    """Arrays have as many chunks as large ones have."""
    monkeypatch.setattr(layout, "SMALLEST_CHUNK", 1)


def test_official_tensors_come_back(tmp_path, chunked):
    maker = Maker(ODD, "official").make()
    write(tmp_path / "official", maker)
    convert(tmp_path / "official", tmp_path / "ours", "official")
    export_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=200_000)
    expected, found = tensors_of(tmp_path / "official"), tensors_of(tmp_path / "back")
    assert set(found) == set(expected)
    assert not [name for name in expected if found[name] != expected[name]]
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "official" / "tokenizer.json").read_bytes()
    assert dsv4.ModelConfig.from_hf(tmp_path / "back") == ODD
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found) and index["metadata"]["total_size"] == sum(len(b) for *_, b in found.values())
    assert inspect(tmp_path / "back").kind == "official (FP8 + MXFP4)"


def wide_model(recipe):
    """In memory, with another scale in every group, and every 128 columns, of wo_a."""
    weights = lively_weights(WIDE, seed=0)
    for block in (*weights["layers"], weights["mtp"]):
        groups, _, columns = block["attn"]["wo_a"].shape
        block["attn"]["wo_a"] *= 2 ** np.arange(groups * columns // 128).reshape(groups, 1, -1).repeat(128, axis=2).astype(np.float32)
    return dsv4.Model(params.to_recipe(jax.tree.map(jax.numpy.asarray, weights), WIDE, RECIPES[recipe]), WIDE, RECIPES[recipe])


@pytest.mark.parametrize("recipe", ["official", "nvfp4", "bf16", "fp32"])
@pytest.mark.parametrize("config", ["odd", "wide"])
def test_converting_an_export_gives_the_same_checkpoint(tmp_path, recipe, config, chunked):
    if config == "odd":  # from a publication, by conversion
        write(tmp_path / "official", Maker(ODD, "official").make())
        convert(tmp_path / "official", tmp_path / "first", recipe)
    else:
        export_hf(wide_model(recipe), tmp_path / "random")
        convert(tmp_path / "random", tmp_path / "first", recipe)
    export_hf(tmp_path / "first", tmp_path / "exported", shard_bytes=300_000)
    convert(tmp_path / "exported", tmp_path / "second", recipe)
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    description = [json.loads(files.pop("dsv4.json")) for files in (first, second)]
    assert first == second and len(first) > 200, "every array, config and tokenizer"
    assert description[0]["files"] == description[1]["files"] and description[0]["recipe"] == description[1]["recipe"]
    assert not description[1]["metadata"]["conversion"]["changed"], "nothing was rounded on the way"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_in_memory_and_its_checkpoint_export_alike(tmp_path, recipe):
    model = small_model(recipe)
    save(model, tmp_path / "saved")
    export_hf(model, tmp_path / "memory")
    export_hf(tmp_path / "saved", tmp_path / "disk")
    assert files_of(tmp_path / "memory") == files_of(tmp_path / "disk")


def test_the_embedded_model_survives_the_round_trip(tmp_path):
    """Its groups of wo_a have 32 rows: blocks of 128 rows span four of them, so each row carries its scale."""
    export_hf("tiny", tmp_path / "tiny")
    convert(tmp_path / "tiny", tmp_path / "again", "official")
    first, second = load("tiny", "official"), load(tmp_path / "again", None)
    assert jax.tree.structure(first.weights) == jax.tree.structure(second.weights)
    for a, b in zip(jax.tree.leaves(first.weights), jax.tree.leaves(second.weights), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert second.tokenizer.encode("def f").ids == first.tokenizer.encode("def f").ids


def test_sharded_and_packed_models_export_the_same_bytes(tmp_path):
    model = small_model("nvfp4")
    mesh = dsv4.make_mesh(1, 8)
    context = dataclasses.replace(model, mesh=mesh).context
    sharded = dataclasses.replace(model, mesh=mesh, weights=jax.device_put(model.weights, params.shardings(context)))
    export_hf(model, tmp_path / "plain")
    export_hf(pack.pack_for(sharded, "sm_100a"), tmp_path / "packed")
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "packed")


def test_experts_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    save(small_model("official"), tmp_path / "saved")
    export_hf(tmp_path / "saved", tmp_path / "at once")
    monkeypatch.setattr(exporting, "SLAB_BYTES", 1)
    largest = []
    read = exporting._Weights.read

    def watched(self, path, part, start=None, stop=None):
        values = read(self, path, part, start, stop)
        if ".experts." in path:
            largest.append(values.shape[0])
        return values

    monkeypatch.setattr(exporting._Weights, "read", watched)
    monkeypatch.setattr("checkpoints.reading.Reader.rows_per_chunk", lambda *_: 2)
    seen = []
    export_hf(tmp_path / "saved", tmp_path / "in pairs", progress=lambda done, total: seen.append((done, total)))
    assert set(largest) == {2}
    assert files_of(tmp_path / "at once") == files_of(tmp_path / "in pairs")
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_offsets_are_aligned(tmp_path):
    export_hf(small_model("nvfp4"), tmp_path / "out")
    with open_source(tmp_path / "out") as source:
        assert not [e.name for e in source.tensors.values() if e.offset % e.np_dtype.itemsize]


# --- what can go wrong ------------------------------------------------------------------------------------------


def test_nothing_half_written_appears(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists already; a checkpoint is never overwritten"):
        export_hf(small_model("bf16"), tmp_path / "taken")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(exporting, "_pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        export_hf(small_model("bf16"), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_sentences(tmp_path):
    with pytest.raises(ValueError, match="shard_bytes = 0 is no size of a file"):
        export_hf("tiny", tmp_path / "out", shard_bytes=0)
    with pytest.raises(ValueError, match="nowhere does not exist; give a directory"):
        export_hf(tmp_path / "nowhere", tmp_path / "out")
    config = dataclasses.replace(TINY, num_hidden_layers=1, compress_ratios=(0, 0), num_attention_heads=4, o_groups=2)
    weights = jax.tree.map(lambda x: x, small_model("official", config).weights)  # 2 groups of 32 rows and 256 columns
    wo_a = weights["layers"][0]["attn"]["wo_a"]
    weights["layers"][0]["attn"]["wo_a"] = dataclasses.replace(wo_a, scale=wo_a.scale.at[0, 0, 0].add(1))
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wo_a has FP8 scales per group of o_lora_rank = 32 rows .* recipe='bf16'"):
        export_hf(dsv4.Model(weights, config, RECIPES["official"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())
