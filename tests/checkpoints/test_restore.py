"""Restoring reads what a device holds and no more, counted in bytes; on any mesh, in several processes, packed or not."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import dsv4_jax as dsv4
from checkpoints import layout, load, load_with_report, save
from checkpoints.reading import size_text
from dsv4_jax import pack, params
from dsv4_jax.sharding import Context
from models import PAIR, SMALL, small_model

ROOT = Path(__file__).parents[2]


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def on_mesh(model, mesh, expert_sharding="width"):
    context = Context(model.config, model.recipe, mesh, expert_sharding)
    weights = jax.device_put(model.weights, params.shardings(context))
    return dataclasses.replace(model, weights=weights, mesh=mesh, expert_sharding=expert_sharding)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """recipe, sharded when saved or not -> directory of a model whose arrays have as many chunks as large ones have."""
    root, made = tmp_path_factory.mktemp("chunked"), {}

    def directory(recipe: str, mesh=None, config=SMALL) -> Path:
        key = f"{recipe}-{mesh and mesh.shape['tensor']}-{config.num_hidden_layers}"
        if key not in made:
            model = small_model(recipe, config)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layout, "SMALLEST_CHUNK", 1)
                save(model if mesh is None else on_mesh(model, mesh), root / key)
            made[key] = root / key
        return made[key]

    return directory


def replicated_bytes(model) -> int:
    """Bytes of the arrays that every device holds whole."""
    leaves, specs = jax.tree.leaves(model.weights), jax.tree.leaves(params.specs(model.context), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    return sum(x.nbytes for x, spec in zip(leaves, specs, strict=True) if not any(spec))


@pytest.mark.parametrize(
    "recipe, data, tensor, experts",
    [("bf16", 1, 8, "width"), ("bf16", 1, 4, "experts"), ("nvfp4", 1, 8, "width"), ("nvfp4", 2, 4, "experts"), ("bf16", 4, 2, "width")],
)
def test_a_device_reads_exactly_what_it_holds(chunked, recipe, data, tensor, experts):
    directory, mesh = chunked(recipe), dsv4.make_mesh(data, tensor)
    model, report = load_with_report(directory, recipe, mesh, experts)
    assert_same_bits(model.weights, small_model(recipe).weights)
    held = params.nbytes_per_device(model.weights, params.specs(model.context), mesh)
    assert held < 0.75 * report.stored_bytes, "the mesh splits the model"
    assert set(report.bytes_read) == set(mesh.devices.flat)
    assert {report.bytes_read[device] for device in mesh.devices.flat} == {held}
    # measured by TensorStore, not computed by us: every byte once per process, and the headers of the arrays
    headers = sum(f.stat().st_size for f in directory.rglob(".zarray"))
    assert report.process_bytes == report.stored_bytes == params.nbytes(model.weights)
    assert report.file_bytes == report.process_bytes + headers
    assert f"at most {size_text(held)} for one of its {data * tensor} devices" in str(report) and report.seconds > 0


def test_shards_of_one_row_of_the_mesh_are_read_once(chunked):
    """Beside the arrays that are not split, a device reads one part in eight."""
    model, report = load_with_report(chunked("bf16"), "bf16", dsv4.make_mesh(1, 8))
    whole = replicated_bytes(model)
    assert report.bytes_read[jax.devices()[3]] == whole + (report.stored_bytes - whole) // 8


def test_one_device_reads_everything_once(chunked):
    for directory in (chunked("official"), "tiny"):
        model, report = load_with_report(directory, None)
        assert report.bytes_read == {jax.devices()[0]: report.stored_bytes}
        assert report.process_bytes == report.stored_bytes == params.nbytes(model.weights)


def test_compressed_small_models_count_their_chunks_unpacked():
    _, report = load_with_report("tiny", "official")
    assert 0 < report.file_bytes < report.process_bytes


def test_counting_tells_a_layout_that_does_not_fit(tmp_path):
    """Arrays in one chunk each: every device must read them whole, and the report says so."""
    save(small_model("bf16"), tmp_path / "whole")
    model, report = load_with_report(tmp_path / "whole", "bf16", dsv4.make_mesh(1, 8))
    assert set(report.bytes_read.values()) == {report.stored_bytes} and report.process_bytes > 4 * report.stored_bytes
    assert_same_bits(model.weights, small_model("bf16").weights)


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
@pytest.mark.parametrize("data, tensor, experts", [(1, 2, "width"), (2, 4, "experts"), (8, 1, "width"), (1, 8, "width")])
def test_saved_on_one_mesh_loaded_on_another(chunked, recipe, data, tensor, experts):
    directory = chunked(recipe, dsv4.make_mesh(1, 8))
    assert not (directory / "weights" / "manifest.ocdbt").exists()
    model = load(directory, recipe, dsv4.make_mesh(data, tensor), experts)
    assert_same_bits(model.weights, small_model(recipe).weights)
    for leaf, sharding in zip(jax.tree.leaves(model.weights), jax.tree.leaves(params.shardings(model.context)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert_same_bits(load(directory, recipe).weights, small_model(recipe).weights)


def test_saved_bytes_do_not_depend_on_the_mesh(chunked):
    one, eight = chunked("nvfp4"), chunked("nvfp4", dsv4.make_mesh(1, 8))
    files = sorted(f.relative_to(one) for f in one.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(eight) for f in eight.rglob("*") if f.is_file()) and len(files) > 1000
    assert all((one / f).read_bytes() == (eight / f).read_bytes() for f in files)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_it(chunked):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((chunked("nvfp4") / "weights").resolve())
    w1 = small_model("nvfp4").weights["layers"][0]["ffn"]["experts"]["w1"]
    for part in ("data", "scale", "global_scale"):
        assert np.asarray(tree[f"layers.0.ffn.experts.w1.{part}"]).tobytes() == np.asarray(getattr(w1, part)).tobytes()


def test_conversion_while_loading_reads_the_stored_format(chunked):
    """MXFP4 experts in their shards, converted there; FP8 blocks that eight devices cannot split come whole."""
    directory, mesh = chunked("official", config=PAIR), dsv4.make_mesh(1, 8)
    model, report = load_with_report(directory, "nvfp4", mesh)
    assert_same_bits(model.weights, load(directory, "nvfp4").weights)
    experts = sum(x.nbytes for w in small_model("official", PAIR).weights["layers"] for x in jax.tree.leaves(w["ffn"]["experts"]))
    assert max(report.bytes_read.values()) < report.stored_bytes - 0.8 * experts


@pytest.mark.parametrize("tensor", [None, 4])
def test_packed_while_loading(chunked, tensor):
    mesh = tensor and dsv4.make_mesh(1, tensor)
    packed = dsv4.load(chunked("nvfp4"), "nvfp4", mesh, arch="sm_100a")
    linear = load(chunked("nvfp4"), "nvfp4", mesh)
    assert_same_bits(packed.weights, pack.pack_for(linear, "sm_100a").weights)
    assert_same_bits(dsv4.load(chunked("nvfp4"), "nvfp4", mesh, arch="sm_90a").weights, linear.weights)
    with pytest.raises(ValueError, match="arch 'sm_61' is not known"):
        load(chunked("nvfp4"), "nvfp4", arch="sm_61")


def test_a_packed_model_is_saved_linear(tmp_path):
    save(pack.pack_for(small_model("nvfp4"), "sm_100a"), tmp_path / "packed")
    assert_same_bits(load(tmp_path / "packed", None).weights, small_model("nvfp4").weights)


PROCESS = """
    import json, sys
    import jax
    jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
    import numpy as np
    import dsv4_jax as dsv4
    from checkpoints import load_with_report
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    model, report = load_with_report(sys.argv[3], "nvfp4", dsv4.make_mesh(1, 8))
    w1 = model.weights["layers"][1]["ffn"]["experts"]["w1"].data
    sums = {s.device.id: int(np.asarray(s.data).astype(np.int64).sum()) for s in w1.addressable_shards}
    print(json.dumps([{d.id: n for d, n in report.bytes_read.items()}, report.process_bytes, report.file_bytes, sums]))
"""


def test_each_process_reads_its_part(chunked):
    """Two processes of four devices each: neither reads what only the other holds."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(i), address, str(chunked("nvfp4"))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    results = [json.loads(out.splitlines()[-1]) for out, _ in outputs]

    model, report = load_with_report(chunked("nvfp4"), "nvfp4", dsv4.make_mesh(1, 8))
    each, w1 = report.bytes_read[jax.devices()[0]], model.weights["layers"][1]["ffn"]["experts"]["w1"].data
    whole = replicated_bytes(model)
    for bytes_read, process_bytes, file_bytes, sums in results:
        assert len(bytes_read) == 4 and set(bytes_read.values()) == {each}
        assert process_bytes == whole + (report.stored_bytes - whole) // 2
        assert process_bytes <= file_bytes < process_bytes + (report.file_bytes - report.process_bytes) + 1
    sums = {int(device): total for result in results for device, total in result[3].items()}
    local = [int(np.asarray(s.data).astype(np.int64).sum()) for s in w1.addressable_shards]
    assert sorted(sums.values()) == sorted(local) and len(sums) == 8
