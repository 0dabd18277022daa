"""The reader of safetensors directories: reads what it should, allocates nothing by a claim, and lists what is wrong."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import open_source, reader
from checkpoints.reader import SourceError


def header_file(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def tensor(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_reads_tensors_rows_and_scalars(directory):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((5, 3, 4)).astype(np.float32), "b": rng.integers(0, 9, (7,)), "c": np.full((), 3, np.float32),
        "d": rng.standard_normal((4, 2)).astype(ml_dtypes.bfloat16), "e": np.zeros((0, 4), np.int8),
    }  # fmt: skip
    save_file(arrays, directory / "model.safetensors", metadata={"format": "np"})
    with open_source(directory) as source:
        assert set(source.tensors) == set(arrays) and source.nbytes == sum(a.nbytes for a in arrays.values())
        for name, array in arrays.items():
            found = source.read(name)
            assert (found.shape, found.dtype) == (array.shape, array.dtype)
            assert found.tobytes() == array.tobytes()
        np.testing.assert_array_equal(source.read("a", 1, 3), arrays["a"][1:3])
        np.testing.assert_array_equal(source.read("a", 3), arrays["a"][3:])
        assert source.read("a", 4, 2).shape == (0, 3, 4)
        np.testing.assert_array_equal(source.read_flat(source.tensors["b"], 2, 5), arrays["b"][2:5])
    assert not source._open


def test_a_file_cut_after_opening_is_a_sentence(directory):
    save_file({"a": np.zeros(1000, np.float32)}, directory / "model.safetensors")
    with open_source(directory) as source:
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(ValueError, match="model.safetensors ends at byte 2000, where [0-9]+ more belong to a tensor"):
            source.read("a")


BAD = {
    "has 3 bytes, fewer than the 8": lambda p: p.write_bytes(b"abc"),
    "claims a header of 9223372036854775807 bytes, but at most 20 are possible": lambda p: header_file(p, {"__metadata__": {}}, length=2**63 - 1),
    "is not readable JSON": lambda p: header_file(p, b"{]"),
    "nested too deeply": lambda p: header_file(p, b"[" * 2000),
    "it has 1000000 opening brackets, more than 2000": lambda p: header_file(p, b"[" * 10**6),
    "the key 'a' occurs twice": lambda p: header_file(p, b'{"a":1,"a":2}'),
    "the key 'shape' occurs twice": lambda p: header_file(p, b'{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}', b"x" * 8),
    "is not a JSON object": lambda p: header_file(p, [1]),
    "not an object of strings": lambda p: header_file(p, {"__metadata__": {"a": 3}}),
    "a of model.safetensors is not described by": lambda p: header_file(p, {"a": {"dtype": "F32"}}),
    "has the dtype 'F4'": lambda p: header_file(p, {"a": tensor("F4")}, b"x" * 8),
    """has the dtype "['x']\"""": lambda p: header_file(p, {"a": tensor(["x"])}, b"x" * 8),
    "not a list of non-negative integers": lambda p: header_file(p, {"a": tensor(shape=(-2, -1))}, b"x" * 8),
    "has the shape [2.0]": lambda p: header_file(p, {"a": tensor(shape=(2.0,))}, b"x" * 8),
    "has the shape [True, 2]": lambda p: header_file(p, {"a": tensor(shape=(True, 2))}, b"x" * 8),
    "which takes 85070591730234615828950163710522949636 bytes": lambda p: header_file(p, {"a": tensor("I8", (2**63 - 2, 2**63 - 2))}, b"x" * 8),
    "has 9 axes, more than 8": lambda p: header_file(p, {"a": tensor(shape=(1,) * 8 + (2,))}, b"x" * 8),
    "not two non-negative integers": lambda p: header_file(p, {"a": tensor(begin=-8, end=0)}, b"x" * 8),
    "data_offsets span 4": lambda p: header_file(p, {"a": tensor(end=4)}, b"x" * 4),
    "overlaps the tensor before it": lambda p: header_file(p, {"a": tensor(), "b": tensor(begin=4, end=12)}, b"x" * 12),
    "leaves a hole before it": lambda p: header_file(p, {"a": tensor(), "b": tensor(begin=16, end=24)}, b"x" * 24),
    "model.safetensors is cut off: it has": lambda p: header_file(p, {"a": tensor()}, b"x" * 7),
    "is longer than it says": lambda p: header_file(p, {"a": tensor()}, b"x" * 9),
    "which is no name that a person gave": lambda p: header_file(p, {"a\nb": tensor()}, b"x" * 8),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_hostile_files(sentence, directory):
    BAD[sentence](directory / "model.safetensors")
    tracemalloc.start()
    try:
        with pytest.raises(SourceError) as error:
            open_source(directory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert peak < 64 * 2**20, "what a file claims is not allocated"


def test_claims_beyond_the_limit_of_headers(directory):
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)  # a hole: the file is as large as it claims
    with pytest.raises(SourceError, match="claims a header of 8589934592 bytes, but at most 33554432 are possible"):
        open_source(directory)


def test_index_and_shards_must_agree(directory):
    def index(**weight_map):
        (directory / reader.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    for name in ("x", "y"):
        save_file({name: np.zeros(2, np.float32)}, directory / f"{name}.safetensors")
    index(x="x.safetensors", y="y.safetensors")
    assert set(open_source(directory).tensors) == {"x", "y"}
    for weight_map, sentence in (
        ({"x": "x.safetensors", "y": "x.safetensors"}, "lists y, which x.safetensors lacks"),
        ({"x": "x.safetensors", "y": "z.safetensors"}, "z.safetensors with 1 tensors is missing"),
        ({"x": "x.safetensors", "y": "../y.safetensors"}, "names '../y.safetensors', which is not the plain name"),
        ({"x": "y.safetensors", "z": "x.safetensors"}, "x is in x.safetensors, but model.safetensors.index.json says y.safetensors"),
    ):
        index(**weight_map)
        with pytest.raises(SourceError) as error:
            open_source(directory)
        assert sentence in str(error.value)
    (directory / reader.INDEX).unlink()
    save_file({"x": np.zeros(2, np.float32)}, directory / "y.safetensors")
    with pytest.raises(SourceError, match="x is in x.safetensors and again in y.safetensors"):
        open_source(directory)


def test_directories_that_are_none(directory):
    for path, sentence in ((directory / "no", "does not exist"), (directory / "config.json", "is a file"), (directory, "holds no .safetensors file")):
        with pytest.raises(ValueError, match=sentence):
            open_source(path)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, which could run code, and is never read"):
        open_source(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist; copy it from the published model"):
        open_source(directory)


def test_headers_alone_can_be_planned_but_not_read(directory):
    header_file(directory / "model.safetensors", {"a": tensor()}, b"x" * 3)
    with pytest.raises(SourceError, match="cut off"):
        open_source(directory)
    source = open_source(directory, headers_only=True)
    assert "1 of 1 files hold their header only" in source.notices[0]
    with pytest.raises(ValueError, match="only its header was downloaded"):
        source.read("a")
