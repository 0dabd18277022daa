"""`dsv4 inspect`: every format told tensor by tensor from headers, sizes equal to what is on disk and on devices."""

import dataclasses
import json

import jax
import pytest

pytest.importorskip("torch", reason="publications are written by torch: pip install torch")

import dsv4_jax as dsv4  # noqa: E402
from checkpoints import inspecting, load, matching, open_source, reader, save  # noqa: E402
from checkpoints.inspecting import inspect, tree  # noqa: E402
from checkpoints.reading import size_text  # noqa: E402
from dsv4_jax import FLASH, PRO, params  # noqa: E402
from dsv4_jax.cli import main  # noqa: E402
from models import small_model  # noqa: E402
from published import KINDS, ODD, Maker, config_of, write  # noqa: E402
from published_headers import write as write_headers  # noqa: E402

EXPECTED = {
    "official": ("official (FP8 + MXFP4)", {"mxfp4", "fp8", "bfloat16", "float32", "int64"}),
    "modelopt": ("ModelOpt NVFP4 (official names)", {"mxfp4", "nvfp4", "fp8", "bfloat16", "float32", "int64"}),
    "compressed-tensors": ("compressed-tensors NVFP4 (official names)", {"mxfp4", "nvfp4", "fp8", "bfloat16", "float32", "int64"}),
    "transformers": ("transformers (not quantized)", {"bfloat16", "int64"}),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {kind: write(root / kind, Maker(config_of(kind), kind).make()) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_published_format(published, kind):
    found = inspect(published[kind])
    assert (found.kind, set(found.bytes_of_format)) == EXPECTED[kind]
    assert found.config == config_of(kind) and found.files == 3 and found.mesh is None
    declared = matching.declared(found.config)
    assert {t.name: t.shape for t in found.tensors} == {name: param.shape for name, param in declared.items()}
    with open_source(published[kind]) as source:
        unused = sum(e.nbytes for name, e in source.tensors.items() if name.endswith(("input_scale", "input_global_scale")))
        assert found.nbytes == source.nbytes - unused, "every byte of the files belongs to one parameter"
    formats = {t.name: t.format for t in found.tensors}
    assert formats["layers.1.ffn.experts.w1"] == {"official": "mxfp4", "transformers": "bfloat16"}.get(kind, "nvfp4")
    if kind != "transformers":
        assert formats["mtp.ffn.experts.w2"] == "mxfp4", "told by the tensor, not by a global flag"


def test_no_tensor_is_read(published, monkeypatch):
    monkeypatch.setattr(reader.Source, "pread", lambda *_: pytest.fail("a tensor was read"))
    assert inspect(published["official"], {"tensor": 2}).nbytes_per_device


def test_own_checkpoints_and_bytes_per_device(tmp_path):
    model = small_model("nvfp4")
    save(model, tmp_path / "own")
    for data, tensor, experts in [(1, 8, "width"), (2, 4, "experts")]:
        found = inspect(tmp_path / "own", {"data": data, "tensor": tensor}, experts)
        assert found.kind == "dsv4_jax checkpoint (format_version 1, recipe nvfp4)" and not found.notices
        assert found.nbytes == params.nbytes(model.weights)
        loaded = load(tmp_path / "own", None, dsv4.make_mesh(data, tensor), experts)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded.weights))
        assert found.nbytes_per_device == held == sum(t.nbytes_per_device for t in found.tensors)
    assert inspect("tiny").config == dsv4.TINY


def test_a_mesh_larger_than_this_machine():
    """128 devices are not here; nothing is placed. What eight would not divide is counted whole, and said."""
    found = inspect("tiny", {"data": 64, "tensor": 2})
    assert found.nbytes / 2 < found.nbytes_per_device < found.nbytes and found.mesh == {"data": 64, "tensor": 2}
    found = inspect("tiny", {"tensor": 8})
    assert "parts that tensor=8 does not divide in this format, and are counted whole" in found.notices[0]


def test_experts_of_two_formats(tmp_path):
    maker = Maker(ODD, "official").make()
    other = Maker(ODD, "modelopt", seed=1).make()
    name = "layers.0.ffn.experts.1.w1"
    del maker.tensors[f"{name}.weight"], maker.tensors[f"{name}.scale"]
    maker.tensors |= {key: value for key, value in other.tensors.items() if key.startswith(f"{name}.")}
    found = inspect(write(tmp_path / "mixed", maker), {"tensor": 1})
    w1 = next(t for t in found.tensors if t.name == "layers.0.ffn.experts.w1")
    assert w1.format == "mxfp4+nvfp4" and w1.nbytes == w1.nbytes_per_device


@pytest.mark.parametrize("config, total", [(FLASH, 159.6e9), (PRO, 864.7e9)], ids=["flash", "pro"])
def test_published_sizes_from_headers_alone(tmp_path, config, total):
    """A directory whose files end after their headers: planning a download needs no more."""
    write_headers(tmp_path, config, shards=1)
    found = inspect(tmp_path, {"tensor": 8})
    assert abs(found.nbytes - total) < 0.001 * total
    assert "hold their header only" in found.notices[0]
    ctx = dataclasses.replace(dsv4.Model(None, config, dsv4.RECIPES["official"]).context, mesh=dsv4.make_mesh(1, 8))
    weights = params.abstract(config, dsv4.RECIPES["official"])
    held = params.nbytes_per_device(weights, params.specs(ctx), ctx.mesh)
    assert found.nbytes_per_device == held and held < total / 7
    layers = [str(branch.label) for branch in tree(found).children if "layers." in str(branch.label)]
    assert len(layers) <= 6 and any("..." in label and "alike" in label for label in layers)


# --- the command ------------------------------------------------------------------------------------------------


def test_command_draws_a_tree(published, capsys):
    assert main(["inspect", str(published["modelopt"]), "--mesh", "tensor=2"]) == 0
    out = capsys.readouterr().out
    assert "ModelOpt NVFP4 (official names)" in out and "on each device of data=1 x tensor=2" in out
    line = next(line for line in out.splitlines() if "w2  [3, 96, 160]  nvfp4" in line)
    size = 3 * (96 * 80 + 96 * 10 + 4)
    assert f"{size / 1000:.4g} kB" in line and "per device" in line
    assert all(name in out for name in ("layers.0", "attn_sink  [4]  float32", "tid2eid", "mtp", "hc_head", "note: "))


def test_command_writes_json(published, capsys):
    assert main(["inspect", str(published["official"]), "--json", "--mesh", "tensor=2", "--expert-sharding", "width"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = inspect(published["official"], {"tensor": 2})
    assert told == json.loads(json.dumps(found.to_json()))
    assert told["bytes"] == sum(t["bytes"] for t in told["tensors"]) and told["mesh"] == {"data": 1, "tensor": 2}
    assert told["bytes_per_device"] == sum(t["bytes_per_device"] for t in told["tensors"])
    assert dsv4.ModelConfig.from_hf(told["config"]) == ODD


def test_alike_layers_are_named_shortly():
    assert inspecting._ranges(["2"]) == "2"
    assert inspecting._ranges(["0", "1"]) == "0-1"
    assert inspecting._ranges(["2", "4", "6", "8"]) == "2, 4, ..., 8"
    assert inspecting._ranges(["3", "7", "8"]) == "3, 7, 8"
    assert size_text(999) == "999 B" and size_text(159_600_000_000) == "159.6 GB"


def test_sentences(published, tmp_path, capsys):
    def refused(*arguments):
        assert main(["inspect", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("dsv4 inspect: ") and err.count("\n") == 1
        return err

    assert "does not exist; give a directory" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds neither dsv4.json" in refused(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "file is a file; give the directory" in refused(tmp_path / "file")
    assert "mesh 'x=2' is not understood" in refused(published["official"], "--mesh", "x=2")
    assert "tensor=3 does not divide" in refused(published["official"], "--mesh", "tensor=3")
    maker = Maker(ODD, "official").make()
    del maker.tensors["norm.weight"]
    assert "norm.weight is missing" in refused(write(tmp_path / "less", maker))
    config = ODD.to_json() | {"model_type": "deepseek_v4_1"}
    assert "DeepSeek-V4.1" in refused(write(tmp_path / "other", Maker(ODD, "official").make(), config=config))
