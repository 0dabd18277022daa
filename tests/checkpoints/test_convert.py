"""Conversion of every published format: the numbers, the bits, the logits; memory; and what a checkpoint says of itself."""

import dataclasses
import functools
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="synthetic publications are written by torch")

from published import KINDS, TOKENIZER, Maker, config_of, write  # noqa: E402

import checkpoints  # noqa: E402
import dsv4_jax as dsv4  # noqa: E402
import ffi_kernels as ops  # noqa: E402
from checkpoints import bench_convert, matching, names  # noqa: E402
from dsv4_jax import params, precision  # noqa: E402
from dsv4_jax.config import ModelConfig  # noqa: E402

ROOT = Path(__file__).parents[2]
numbers = jax.jit(ops.dequantize)
# The recipe that holds each publication without any change of a number.
EXACT = {"official": "official", "modelopt": "lossless", "compressed-tensors": "fp32", "transformers": "bf16"}


@functools.cache
def maker(kind) -> Maker:
    return Maker(config_of(kind), kind).make()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(kind, recipe) -> the Conversion of a synthetic publication."""
    root = tmp_path_factory.mktemp("convert")

    @functools.cache
    def make(kind, recipe):
        if not (root / kind).exists():
            write(root / kind, maker(kind))
        return checkpoints.convert(root / kind, root / f"{kind}-{recipe}", recipe)

    return make


def leaves_of(model):
    found = {}
    params.map_params(lambda path, _, leaf: found.__setitem__(path, leaf), model.config, model.weights)
    return found


def value_of(maker, path, param):
    """What the publication means, in the shape of our tree, decoded by torch."""
    experts = range(param.shape[0]) if param.role == "experts" else [None]
    return torch.stack([maker.values[path, e] for e in experts]).numpy().reshape(param.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_the_published_one(kind, converted):
    done = converted(kind, EXACT[kind])
    model = checkpoints.load(done.destination, recipe=None)
    assert model.config == config_of(kind) and not done.reports
    for path, leaf in leaves_of(model).items():
        expected = value_of(maker(kind), path, done.plan.matched.declared[path])
        np.testing.assert_array_equal(np.asarray(numbers(leaf)), expected.astype(np.float32), err_msg=path)


def test_official_keeps_every_published_bit(converted):
    model = checkpoints.load(converted("official", "official").destination, recipe=None)
    assert model.recipe == precision.OFFICIAL
    left = dict(maker("official").tensors)

    def published(name):
        return left.pop(name).contiguous().view(torch.uint8).numpy()

    for path, leaf in leaves_of(model).items():
        experts = range(leaf.shape[0]) if ".experts." in path else [None]
        parts = {".weight": "data", ".scale": "scale"} if type(leaf) in ops.QUANTIZED else {"": None}
        for suffix, part in parts.items():
            ours = np.asarray(leaf if part is None else getattr(leaf, part))
            for e in experts:
                theirs = published(names.official_name(path, e, suffix or ".weight"))
                mine = ours if e is None else ours[e]
                if mine.dtype == np.int32:
                    mine = mine.astype(np.int64)
                if path.endswith("wo_a") and part == "scale":  # groups of 64 rows share the scales of 128
                    theirs = np.repeat(theirs, 2, axis=0)[: len(mine)].reshape(mine.shape)
                assert np.ascontiguousarray(mine).tobytes() == theirs.tobytes(), (path, e, part)
    assert not left, "every published tensor is somewhere in the model"


def test_nvfp4_keeps_the_experts_and_requantizes_the_rest_as_the_reference_does(converted):
    done = converted("official", "nvfp4")
    model = checkpoints.load(done.destination, recipe=None)
    exact = leaves_of(checkpoints.load(converted("official", "official").destination, recipe=None))
    changed = set()
    for path, leaf in leaves_of(model).items():
        if isinstance(leaf, ops.NVFP4Tensor):
            expected = params.convert(exact[path], "nvfp4")
            for part in ("data", "scale", "global_scale"):
                a, b = (np.ascontiguousarray(np.asarray(getattr(t, part))) for t in (leaf, expected))
                np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=f"{path}.{part}")
            if ".experts." in path:
                np.testing.assert_array_equal(np.asarray(numbers(leaf)), np.asarray(numbers(exact[path])))
            else:
                changed.add(path)
    assert set(done.reports) == changed and len(changed) > 20
    told = json.loads((done.destination / "dsv4.json").read_text())["metadata"]["conversion"]["changed"]
    for path in changed:
        before, after = (np.asarray(numbers(t)).astype(np.float64) for t in (exact[path], leaves_of(model)[path]))
        error = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert abs(told[path]["relative_error"] - error) < 1e-5 and 0.05 < error < 0.15
        assert abs(told[path]["largest_error"] - np.abs(after - before).max()) <= 1e-6 * np.abs(before).max()
        assert (told[path]["from"], told[path]["to"]) == ("fp8", "nvfp4")


def test_modelopt_formats_are_told_tensor_by_tensor(converted):
    done = converted("modelopt", "lossless")
    forms = {path: {piece.form for piece in pieces} for path, pieces in done.plan.matched.pieces.items() if "experts" in path}
    assert forms["layers.1.ffn.experts.w2"] == {"nvfp4"} and forms["mtp.ffn.experts.w2"] == {"mxfp4"}
    recipe = checkpoints.load(done.destination, recipe=None).recipe
    assert (recipe.linear, recipe.wo_a, recipe.experts, recipe.kv) == ("fp8", "fp8", "nvfp4", "fp8")
    assert all(name.endswith("input_scale") for name in done.plan.matched.dropped) and len(done.plan.matched.dropped) == 27


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors", "transformers"])
def test_official_refuses_what_it_cannot_hold(kind, converted, tmp_path):
    with pytest.raises(ValueError, match="cannot hold them without loss.*--allow-inexact") as error:
        converted(kind, "official")
    assert "(layers" in str(error.value) or "(model.layers" in str(error.value)
    source = write(tmp_path / kind, maker(kind))
    done = checkpoints.convert(source, tmp_path / "out", "official", allow_inexact=True)
    assert {done.plan.forms[path] for path in done.reports} <= {"mxfp4", "fp8"} and len(done.reports) >= 9
    exact = leaves_of(checkpoints.load(converted(kind, EXACT[kind]).destination, recipe=None))
    for path, leaf in leaves_of(checkpoints.load(done.destination, recipe=None)).items():
        if path in done.reports:  # requantized exactly as the package would on load
            values = numbers(exact[path]) if path != "embed" else exact[path]
            expected = params.convert(values, done.plan.forms[path])
            np.testing.assert_array_equal(np.asarray(leaf.scale).view(np.uint8), np.asarray(expected.scale).view(np.uint8))
            np.testing.assert_array_equal(np.asarray(leaf.data).view(np.uint8), np.asarray(expected.data).view(np.uint8))


# --- against transformers ---------------------------------------------------------------------------------------


@functools.cache
def transformers_pair():
    """(transformers model of odd sizes, the same configuration as ours)."""
    from oracle.test_oracle import YARN_65536, transformers_model

    theirs = transformers_model(
        vocab_size=150, hidden_size=96, moe_intermediate_size=160, num_attention_heads=4, o_groups=2, o_lora_rank=64, head_dim=64,
        q_lora_rank=160, index_n_heads=17, index_head_dim=32, index_topk=8, n_routed_experts=4, num_experts_per_tok=2,
        num_hash_layers=1, rope_parameters=YARN_65536, max_position_embeddings=16 * 65536,
    )  # fmt: skip
    return theirs, ModelConfig.from_hf(theirs.config.to_dict())


def set_values(theirs, made):
    """The decoded values of a publication into a transformers model."""
    state = theirs.state_dict()
    for path, param in matching.declared(made.config).items():
        value = torch.from_numpy(np.array(value_of(made, path, param)))
        layer = path.split(".")[1] if path.startswith("layers.") else ""
        others = names.row_of(path).others
        name, how = next((o for o in others if o[1] in (names.FIRST_HALF, names.SECOND_HALF, names.STACKED)), others[0])
        target = state[name.format(layer)]
        if how == names.FIRST_HALF:
            target[:, : param.shape[1]] = value
        elif how == names.SECOND_HALF:
            target[:, param.shape[1] :] = value
        else:
            target.copy_(value.reshape(target.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_on_the_dequantized_weights(kind, tmp_path):
    theirs, config = transformers_pair()
    made = Maker(config, kind, seed=5).make()
    set_values(theirs, made)
    tokens = torch.randint(150, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits[0].numpy()
    checkpoints.convert(write(tmp_path / "source", made), tmp_path / "model", "fp32")
    model = dataclasses.replace(checkpoints.load(tmp_path / "model", None), source=None)  # else compiled for each directory
    actual = np.asarray(dsv4.forward(model, tokens.numpy().astype(np.int32)))[0]
    difference = np.abs(actual - expected).max()
    print(f"{kind}: {difference:.1e} of {np.abs(expected).max():.2f}")
    assert difference <= 2e-4 and expected.std() > 0.05


def test_a_directory_that_transformers_saved(tmp_path):
    theirs, config = transformers_pair()
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="400KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    done = checkpoints.convert(tmp_path / "saved", tmp_path / "model", "lossless")
    assert done.plan.recipe.dtype == "float32" and done.plan.config == config
    tokens = torch.randint(150, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits[0].numpy()
    model = checkpoints.load(tmp_path / "model", None)
    assert np.abs(np.asarray(dsv4.forward(model, tokens.numpy().astype(np.int32)))[0] - expected).max() <= 2e-4
    with pytest.raises(ValueError, match="are float32, and recipe official stores"):
        checkpoints.convert(tmp_path / "saved", tmp_path / "other", "official")


# --- the checkpoint itself --------------------------------------------------------------------------------------


def test_what_a_checkpoint_says_of_itself(converted):
    done = converted("official", "official")
    source, made = done.destination.parent / "official", json.loads((done.destination / "dsv4.json").read_text())
    told = made["metadata"]["conversion"]["source"]
    for file in source.glob("*.safetensors"):
        assert told["files"][file.name] == {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert told["config_sha256"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    assert told["formats"]["experts"] == {"mxfp4": 36} and told["tensors"] == len(maker("official").tensors)
    assert (done.destination / "tokenizer.json").read_text() == TOKENIZER
    assert ModelConfig.from_hf(done.destination) == config_of("official")
    assert made["recipe"] == dataclasses.asdict(precision.OFFICIAL) and made["formats"]["experts"] == ["mxfp4"]
    assert sorted(p.name for p in done.destination.parent.glob(".*")) == [], "nothing half-written stays"


def test_orbax_itself_restores_it(converted):
    import orbax.checkpoint as ocp

    done = converted("official", "official")
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore((done.destination / "weights").resolve())
    loaded = leaves_of(checkpoints.load(done.destination, recipe=None))
    assert set(restored) == {array.name for array in done.plan.all_arrays}
    for path in ("embed", "layers.1.attn.wo_a", "layers.2.ffn.experts.w2", "layers.0.ffn.gate.tid2eid"):
        for part in ("data", "scale") if path + ".data" in restored else ("",):
            ours = getattr(loaded[path], part) if part else loaded[path]
            np.testing.assert_array_equal(np.asarray(restored[f"{path}.{part}".rstrip(".")]).view(np.uint8), np.asarray(ours).view(np.uint8))


def test_sharded_loads_of_a_chunked_checkpoint(tmp_path, monkeypatch):
    from checkpoints import layout

    monkeypatch.setattr(layout, "SMALLEST_CHUNK", 1)
    made = Maker(dataclasses.replace(dsv4.TINY, vocab_size=256, num_hidden_layers=2, compress_ratios=(4, 128, 0)), "official").make()
    source = write(tmp_path / "source", made)
    whole, cut = (checkpoints.convert(source, tmp_path / f"{n}", "official", tensor=n) for n in (1, 8))
    assert sum(a.chunk_count for a in cut.plan.all_arrays) > 3 * sum(a.chunk_count for a in whole.plan.all_arrays)
    expected = checkpoints.load(whole.destination, "nvfp4")
    for mesh, sharding in ((None, "width"), (dsv4.make_mesh(1, 2), "width"), (dsv4.make_mesh(2, 2), "experts")):
        model = checkpoints.load(cut.destination, "nvfp4", mesh, sharding)
        for a, b in zip(jax.tree.leaves(model.weights), jax.tree.leaves(expected.weights), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


MEMORY = """
import re, sys
from pathlib import Path
from checkpoints.conversion import convert
def peak():  # of this program: ru_maxrss would still tell of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
before = peak()
convert(sys.argv[1], sys.argv[2], sys.argv[3], workers=3)
print(before, peak())
"""


@pytest.fixture(scope="module")
def large_source(tmp_path_factory):
    """Most of it is experts and the embedding: the largest tensor has 201 MB."""
    source = tmp_path_factory.mktemp("large") / "source"
    bench_convert.write_synthetic(source, dataclasses.replace(bench_convert.synthetic_config(0), vocab_size=24576, n_routed_experts=12))
    yield source
    shutil.rmtree(source)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to know the peak of memory")
@pytest.mark.parametrize("recipe", ["official", "nvfp4", "bf16"])
def test_memory_is_bounded(recipe, large_source, tmp_path):
    """What is written has 0.7 to 1.9 GB: the limit below does not allow it whole."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(large_source), str(tmp_path / "out"), recipe], cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak = map(int, run.stdout.split())
    shutil.rmtree(tmp_path / "out")  # pytest would keep it for three runs
    largest = 24576 * 4096 * 2
    print(f"{recipe}: {before / 2**20:.0f} MiB before, peak {peak / 2**20:.0f} MiB; largest tensor {largest / 2**20:.0f} MiB")
    assert peak < 3 * largest + 2**30
    assert peak - before < 500 * 2**20, "a few slabs for each of three threads"
