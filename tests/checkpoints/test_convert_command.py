"""`dsv4 convert`: plans of Flash and Pro from headers alone, what it prints, exit codes, help."""

import dataclasses
import os
import re
import time

import pytest
from published_headers import write as write_headers

from checkpoints import convert_command, layout, open_source
from checkpoints.conversion import plan_conversion
from checkpoints.matching import declared
from dsv4_jax import FLASH, PRO, params
from dsv4_jax.cli import main
from dsv4_jax.precision import RECIPES
from dsv4_jax.sharding import Context, make_mesh

SIZES = {"flash": (FLASH, 46, 69187, 159.6, 21.13), "pro": (PRO, 64, 145116, 864.7, 111.31)}


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


def run(capsys, *argv):
    code = main(["convert", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("size", SIZES)
def test_dry_run_of_published_sizes_from_headers(size, tmp_path, capsys):
    config, shards, tensors, gigabytes, per_device = SIZES[size]
    write_headers(tmp_path / size, config, shards)
    began = time.perf_counter()
    code, out, err = run(capsys, tmp_path / size, "--dry-run", "--mesh", "tensor=8")
    took = time.perf_counter() - began
    print(f"{size}: {took:.1f} s")
    assert code == 0 and took < 60
    assert f"{tensors} tensors in {shards} files, {gigabytes} GB" in out and "hold their header only" in out
    assert f"on each device of tensor=8, experts split by width: {per_device:.2f} GB" in out
    assert re.search(r"experts +mxfp4 +mxfp4", out) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("recipe", ["official", "nvfp4", "bf16"])
def test_bytes_per_device_are_those_of_the_package(recipe, tmp_path):
    mesh = make_mesh(1, 8)
    config = dataclasses.replace(FLASH, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)  # every kind
    write_headers(tmp_path, config, 2)
    with open_source(tmp_path, headers_only=True) as source:
        plan = plan_conversion(source, recipe)
    for sharding in ("width", "experts"):
        context = Context(config, RECIPES[recipe], mesh, sharding)
        tree = params.abstract(config, RECIPES[recipe])
        assert plan.nbytes == params.nbytes(tree)
        assert plan.bytes_per_device(8, sharding) == params.nbytes_per_device(tree, params.specs(context), mesh)


def test_chunks_of_published_sizes_hold_one_device_s_part():
    """Whatever lies along `tensor` is cut in 8; chunks divide their arrays, and stay within bounds."""
    for config in (FLASH, PRO):
        for path, param in declared(config).items():
            for form in {params.storage(param, recipe) for recipe in RECIPES.values()}:
                for array in layout.arrays_of(path, param.shape, param.axes, form, 8).values():
                    size = array.nbytes // array.chunk_count
                    assert all(n % c == 0 for n, c in zip(array.shape, array.chunks)) and size <= layout.LARGEST_CHUNK
                    for n, c, axis in zip(array.shape, array.chunks, param.axes):
                        if axis in layout.SPLIT_AXES and array.nbytes > 64 * 2**20:
                            assert n // c % 8 == 0 or n < 8, (array, axis)


def test_convert_prints_what_it_did(tmp_path, capsys):
    pytest.importorskip("torch", reason="synthetic publications are written by torch")
    from published import Maker, config_of, write

    source = write(tmp_path / "source", Maker(config_of("official"), "official").make())
    code, out, err = run(capsys, source, tmp_path / "out", "--recipe", "nvfp4")
    assert code == 0 and "largest relative errors: " in out and re.search(r"out: 0\.00 GB in recipe nvfp4, \d+\.\d s", out)
    code, out, err = run(capsys, source, tmp_path / "out")
    assert code == 2 and not out and "exists already" in err and err.count("\n") == 1
    for argv, sentence in (
        ([source], "DST is missing"),
        ([tmp_path / "no", tmp_path / "x"], "no does not exist"),
        ([source, tmp_path / "x", "--mesh", "rows=2"], "write for example tensor=8"),
        ([source, tmp_path / "x", "--workers", "0"], "leaves nobody to work"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and sentence in err and err.count("\n") == 1, err
    (source / "tokenizer.json").unlink()
    scale = next(source.glob("*.safetensors"))
    os.truncate(scale, scale.stat().st_size - 1)
    code, out, err = run(capsys, source, tmp_path / "x")
    assert code == 2 and "is cut off" in err


def test_mesh_and_help(capsys):
    assert convert_command.tensor_of("tensor=4") == convert_command.tensor_of("data=2,tensor=4") == 4
    for text in ("tensor=0", "tensor", "data=2", "tensor=8,"):
        with pytest.raises(ValueError, match="write for example tensor=8"):
            convert_command.tensor_of(text)
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("official", "nvfp4", "bf16", "lossless", "--dry-run", "--allow-inexact", "resumes", "examples:", "bytes per device"):
        assert word in text, word
