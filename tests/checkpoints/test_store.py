"""Saving and loading: the same bits, in every format and on every mesh; and a sentence for everything that can break."""

import asyncio
import dataclasses
import functools
import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import checkpoints
import dsv4_jax as dsv4
import ffi_kernels as ops
from checkpoints import layout, load, matching, save, store
from dsv4_jax import RECIPES, TINY, params
from dsv4_jax.sharding import Context

# Widths of whole FP8 blocks on each of two devices; odd vocabulary, one layer of each kind, and the MTP block.
SMALL = dataclasses.replace(
    TINY, vocab_size=136, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), n_routed_experts=4, head_dim=128,
    q_lora_rank=64, index_n_heads=2, o_lora_rank=32,
)  # fmt: skip
TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'


@functools.cache
def numbers() -> dict:
    """fp32 weights with a wide range of magnitudes."""
    rng = np.random.default_rng(0)

    def one(name, param):
        if param.role == "int32":
            return jnp.asarray(rng.integers(0, param.bound, param.shape, dtype=np.int32))
        return jnp.asarray(rng.standard_normal(param.shape) * np.exp(rng.standard_normal(param.shape)), jnp.float32)

    return params.map_params(one, SMALL)


@functools.cache
def small_model(recipe: str) -> dsv4.Model:
    recipe = RECIPES[recipe]
    weights = params.map_params(lambda _, p, leaf: params.convert(leaf, params.storage(p, recipe)), SMALL, numbers())
    return dsv4.Model(weights, SMALL, recipe)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """recipe name -> directory of `small_model`."""
    root = tmp_path_factory.mktemp("stored")

    @functools.cache
    def directory(recipe: str):
        save(small_model(recipe), root / recipe, tokenizer_json=TOKENIZER, metadata={"steps": 7})
        return root / recipe

    return directory


@pytest.fixture
def copy(stored, tmp_path):
    """A copy of a stored model, to be broken."""
    return shutil.copytree(stored("official"), tmp_path / "copy")


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    named = jax.tree_util.tree_leaves_with_path(actual)
    for (path, a), b in zip(named, jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        a, b = (np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8) for x in (a, b))
        assert np.array_equal(a, b), path


def sentence(error) -> str:
    text = str(error.value)
    assert text[-1] in ".?" and "\n" not in text, text
    return text


# --- the same bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip(stored, recipe):
    directory = stored(recipe)
    for model in (load(directory, recipe), load(str(directory), recipe=None)):
        assert_same_bits(model.weights, small_model(recipe).weights)
        assert (model.config, model.recipe, model.mesh) == (SMALL, RECIPES[recipe], None)
        assert model.source == str(directory)
        assert model.tokenizer.encode("b").ids == [1]
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "dsv4.json", "tokenizer.json", "weights"]
    description = json.loads((directory / "dsv4.json").read_text())
    assert (description["format_version"], description["metadata"]) == (1, {"steps": 7})
    assert description["formats"]["experts"] == [params.storage(params.Param((), (), "experts"), RECIPES[recipe])]
    assert dsv4.ModelConfig.from_hf(directory) == SMALL


def test_every_bit_pattern_survives(tmp_path):
    rng = np.random.default_rng(1)

    def bits(leaf):
        return jnp.asarray(np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape))

    for recipe in ("official", "nvfp4"):
        model = dsv4.Model(jax.tree.map(bits, params.abstract(SMALL, RECIPES[recipe])), SMALL, RECIPES[recipe])
        codes = np.asarray(jax.tree.leaves(model.weights["layers"][0]["attn"]["wo_a"])[0]).view(np.uint8)
        assert len(np.unique(codes)) == 256
        save(model, tmp_path / recipe)
        assert_same_bits(load(tmp_path / recipe, recipe).weights, model.weights)


@pytest.mark.parametrize("target", RECIPES)
@pytest.mark.parametrize("source", RECIPES)
def test_every_recipe_loads_from_every_other(stored, source, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dsv4.load(stored(source), target)

    def expect(_, param, leaf):
        return params.convert(leaf, params.storage(param, RECIPES[target]))

    assert_same_bits(model.weights, params.map_params(expect, SMALL, small_model(source).weights))
    if (source, target) == ("official", "nvfp4"):
        before, after = (m.weights["layers"][1]["ffn"]["experts"]["w2"] for m in (small_model(source), model))
        assert_same_bits(ops.dequantize(after), ops.dequantize(before))


def test_formats_may_differ_from_tensor_to_tensor(tmp_path):
    mixed = dict(small_model("nvfp4").weights, mtp=small_model("official").weights["mtp"])
    save(dataclasses.replace(small_model("nvfp4"), weights=mixed), tmp_path / "mixed")
    description = json.loads((tmp_path / "mixed" / "dsv4.json").read_text())
    assert description["formats"]["experts"] == ["mxfp4", "nvfp4"]
    model = load(tmp_path / "mixed", "nvfp4")
    assert_same_bits(model.weights["layers"], mixed["layers"])
    expected = params.convert(mixed["mtp"]["ffn"]["experts"]["w1"], "nvfp4")
    assert_same_bits(model.weights["mtp"]["ffn"]["experts"]["w1"], expected)


def test_scales_beyond_nvfp4_are_reported(tmp_path):
    weights = jax.tree.map(lambda x: x, small_model("official").weights)  # a copy of the containers
    w1 = weights["layers"][1]["ffn"]["experts"]["w1"]
    scale = w1.scale.at[0, :2, 0].set(90).at[0, 2, 0].set(140)
    weights["layers"][1]["ffn"]["experts"]["w1"] = ops.MXFP4Tensor(w1.data, scale)
    save(dataclasses.replace(small_model("official"), weights=weights), tmp_path / "wide")
    with pytest.warns(UserWarning, match=r"layers\.1\.ffn\.experts\.w1\): 2 blocks became zero; recipe='official'"):
        load(tmp_path / "wide", "nvfp4")


# --- meshes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, target, data, tensor, experts",
    [
        ("bf16", "bf16", 1, 8, "width"),
        ("bf16", "bf16", 2, 4, "experts"),
        ("official", "official", 4, 2, "width"),
        ("nvfp4", "nvfp4", 1, 2, "experts"),
        ("official", "bf16", 1, 8, "width"),
        ("official", "nvfp4", 2, 2, "width"),
        ("bf16", "official", 1, 2, "experts"),
    ],
)
def test_loads_into_shards(stored, source, target, data, tensor, experts):
    mesh = dsv4.make_mesh(data, tensor)
    model = load(stored(source), target, mesh, experts)
    expected = params.shardings(Context(SMALL, RECIPES[target], mesh, experts))
    for leaf, sharding in zip(jax.tree.leaves(model.weights), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    w1 = jax.tree.leaves(model.weights["layers"][0]["ffn"]["experts"]["w1"])[0]
    assert w1.addressable_shards[0].data.size == w1.size // tensor
    assert_same_bits(model.weights, load(stored(source), target).weights)
    assert (model.mesh, model.expert_sharding) == (mesh, experts)


def test_bad_mesh_is_refused(stored):
    with pytest.raises(ValueError, match=r"tensor=3 does not divide num_attention_heads = 8; use one of tensor=\[1, 2\]"):
        load(stored("bf16"), mesh=dsv4.make_mesh(1, 3))
    with pytest.raises(ValueError, match=r"axes \('x',\), but the model is written for \('data', 'tensor'\)"):
        load(stored("bf16"), mesh=jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("x",)))
    with pytest.raises(ValueError, match="cannot be split 8 ways"):
        load(stored("official"), "official", dsv4.make_mesh(1, 8))
    with pytest.raises(ValueError, match="expert_sharding = 'rows'"):
        load(stored("bf16"), expert_sharding="rows")


# --- size and surroundings --------------------------------------------------------------------------------------


def test_the_embedded_size_fits_a_repository(tmp_path):
    rng = np.random.default_rng(0)
    tree = params.abstract(TINY, RECIPES["official"])
    tree = jax.tree.map(lambda t: np.frombuffer(rng.bytes(t.size * t.dtype.itemsize), t.dtype).reshape(t.shape), tree)
    save(dsv4.Model(jax.tree.map(jnp.asarray, tree), TINY, RECIPES["official"]), tmp_path / "model")
    files = [f for f in (tmp_path / "model").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12e6 and len(files) < 60  # 20 to 30, by when the writer flushes


def test_loads_inside_a_running_event_loop(stored):
    async def notebook():
        return load(stored("official"), "official")

    assert_same_bits(asyncio.run(notebook()).weights, small_model("official").weights)


def test_tokenizer_sentences(stored, copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not a readable tokenizer") as error:
        load(copy, "official").tokenizer
    sentence(error)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer.json; copy the model's tokenizer.json there"):
        load(shutil.move(copy, f"{copy}2"), "official").tokenizer
    with pytest.raises(ValueError, match="was not loaded from a directory, so it has no tokenizer"):
        small_model("bf16").tokenizer


# --- what can break ---------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_nothing_half_written_stays(stored, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists already; a checkpoint is never overwritten") as error:
        save(small_model("bf16"), tmp_path / "taken")
    sentence(error)
    with pytest.raises(ValueError, match="tokenizer_json is not readable JSON .* pass the contents of a tokenizer.json"):
        save(small_model("bf16"), tmp_path / "new", tokenizer_json="tokenizer.json")
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(small_model("bf16"), tmp_path / "new", metadata={"what": object()})
    write = store._write_arrays

    def full_disk(directory, arrays):
        write(directory, arrays)
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "_write_arrays", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(small_model("bf16"), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and not list((tmp_path / "taken").iterdir())


def test_not_a_checkpoint(tmp_path, monkeypatch):
    def refused(path):
        with pytest.raises(ValueError) as error:
            load(path)
        return sentence(error)

    assert "nowhere does not exist; give a directory written by checkpoints.save" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "file is a file; give the directory" in refused(tmp_path / "file")
    (tmp_path / "hf").mkdir()
    assert "holds no dsv4.json; was it written by checkpoints.save?" in refused(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text("{}")
    text = refused(tmp_path / "hf")
    assert "is a Hugging Face checkpoint (safetensors), not one of this package; convert it first" in text
    monkeypatch.setattr(store, "EMBEDDED", "nothing")
    assert "the embedded model is not part of this installation" in refused("nothing")


def test_unknown_recipe(stored):
    with pytest.raises(ValueError, match="recipe 'int8' is not known; choose one of bf16, official, nvfp4, fp32"):
        load(stored("official"), "int8")


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("format_version", 2, "has format_version 2, but this package reads 1 only"),
        ("format_version", None, "has format_version None"),
        ("recipe", {"name": "bf16"}, "lacks the recipe or the files of the checkpoint"),
        ("recipe", [field.name for field in dataclasses.fields(RECIPES["bf16"])], "lacks the recipe or the files of the checkpoint"),
        ("files", [], "lacks the recipe or the files of the checkpoint"),
        ("files", {"weights/x": 5}, "lacks the recipe or the files of the checkpoint"),
        ("files", {"weights/x": [-1.5, None]}, "lacks the recipe or the files of the checkpoint"),
        ("files", {"weights/../config.json": [5, None]}, "lacks the recipe or the files of the checkpoint"),
        ("files", {"/etc/passwd": [5, None]}, "lacks the recipe or the files of the checkpoint"),
    ],
)
def test_wrong_description(copy, field, value, expected):
    description = json.loads((copy / "dsv4.json").read_text()) | {field: value}
    (copy / "dsv4.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        load(copy)
    sentence(error)


def test_the_largest_model_in_the_finest_chunks_may_be_described():
    """Every file of the arrays has an entry in dsv4.json, whose size is limited."""
    declared = matching.declared(dsv4.PRO).items()
    stored = {path: layout.arrays_of(path, p.shape, p.axes, params.storage(p, RECIPES["official"]), split=64) for path, p in declared}
    files = sum(array.chunk_count for arrays in stored.values() for array in arrays.values())
    longest = len('    "weights/layers.60.ffn.shared_experts.w1.global_scale/63.63.63": [67108864, null],') + 20
    assert 500_000 < files < store.MOST_FILES and files * longest < store.LARGEST_DESCRIPTION


def test_any_damaged_file_is_named(copy):
    """Cut, emptied, altered or missing: whatever file it is, and without noise from the libraries beneath."""
    files = [f for f in copy.rglob("*") if f.is_file() and f.name != "tokenizer.json"]
    assert len(files) > 8
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        altered = whole[:middle] + b"\0" + whole[middle + 1 :]
        damages = {"cut": whole[:middle], "empty": b"", "altered": altered, "gone": None}
        for kind, content in damages.items():
            if content == whole:
                continue
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            with pytest.raises(ValueError, match="damaged|is not a readable config.json|holds no dsv4.json") as error:
                load(copy, "official")
            assert file.name in str(error.value), (file, kind)
            file.write_bytes(whole)
    load(copy, "official")


def test_what_orbax_cannot_read_is_a_sentence(copy, monkeypatch):
    """A large checkpoint is checked by size only; then Orbax itself meets the damage."""
    monkeypatch.setattr(store, "CHECKED_BYTES", 0)
    manifest = copy / "weights" / "manifest.ocdbt"
    manifest.write_bytes(bytes(manifest.stat().st_size))
    with pytest.raises(ValueError, match="copy is damaged or incomplete: Orbax cannot read .*weights") as error:
        load(copy, "official")
    sentence(error)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4, 0]}, "layers.3.attn.attn_sink is missing"),
        ({"num_hidden_layers": 2, "compress_ratios": [0, 4, 0]}, "layers.2.attn.attn_sink belongs to no tensor"),
        ({"vocab_size": 144}, "embed is bfloat16[136, 256] instead of bfloat16[144, 256]"),
        ({"n_routed_experts": 5}, "experts.w1.data is uint8[4, 256, 128] instead of uint8[5, 256, 128]"),
        ({"o_lora_rank": 33}, "wo_a.data is float8_e4m3fn[8, 32, 128] instead of float8_e4m3fn[8, 33, 128]"),
        ({"moe_intermediate_size": 40}, "w2 has the format mxfp4, which its shape does not allow"),
    ],
)
def test_weights_that_do_not_fit_the_config(copy, change, expected):
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the weights of .* do not fit its config.json") as error:
        load(copy, "official")
    assert expected in sentence(error)


def test_formats_that_a_tensor_never_has(tmp_path):
    weights = dict(small_model("bf16").weights, head=small_model("official").weights["mtp"]["e_proj"])
    save(dataclasses.replace(small_model("bf16"), weights=weights), tmp_path / "odd")
    with pytest.raises(ValueError, match="head has the format fp8"):
        load(tmp_path / "odd")


def test_exports():
    assert checkpoints.FORMAT_VERSION == store.FORMAT_VERSION == 1 and len(jax.devices()) == 8
