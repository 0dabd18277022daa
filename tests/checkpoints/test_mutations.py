"""More than 500 damaged publications: each is refused by a sentence, or loads exactly what its files then mean.

What they mean is told by an independent reader: Hugging Face's safetensors, and the decoding of `published.py` in torch.
"""

import json
import math
import struct
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="synthetic publications are written by torch")

from published import E2M1, KINDS, Maker, config_of, write  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

import checkpoints  # noqa: E402
from checkpoints import matching, names  # noqa: E402
from checkpoints.reader import DTYPES, INDEX  # noqa: E402

EXACT = {"official": "official", "modelopt": "lossless", "compressed-tensors": "fp32", "transformers": "bf16"}
PER_KIND = 130  # times four kinds
SECONDS = 10  # more is a hang


@pytest.fixture(scope="module", params=KINDS)
def publication(request, tmp_path_factory):
    """(kind, files of an intact publication as bytes)."""
    kind = request.param
    made = Maker(config_of(kind), kind).make()
    directory = write(tmp_path_factory.mktemp("intact") / kind, made)
    return kind, {path.name: path.read_bytes() for path in directory.iterdir()}


def shards_of(files):
    return sorted(name for name in files if name.endswith(".safetensors"))


def split(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# --- mutations: each takes (files, random generator) and returns the changed files ------------------------------


def header_edit(edit):
    """`edit(header entry, rng)` of a random tensor of a random shard."""

    def mutate(files, rng):
        name = rng.choice(shards_of(files))
        header, body = split(files[name])
        key = rng.choice(sorted(k for k in header if k != "__metadata__"))
        changed = edit(header, key, rng)
        return files | {name: join(changed or header, body)}

    return mutate


def raw_edit(edit):
    def mutate(files, rng):
        name = rng.choice(shards_of(files))
        return files | {name: edit(files[name], rng)}

    return mutate


def flip(data, at, rng):
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]


def header_length(data):
    return struct.unpack("<Q", data[:8])[0]


def swap_dtype(header, key, rng):
    header[key]["dtype"] = str(rng.choice([d for d in DTYPES if d != header[key]["dtype"]]))


def same_size_dtype(header, key, rng):
    size = DTYPES[header[key]["dtype"]].itemsize
    header[key]["dtype"] = str(rng.choice([d for d in DTYPES if DTYPES[d].itemsize == size and d != header[key]["dtype"]]))


def reshape(header, key, rng):
    shape = header[key]["shape"]
    choices = [
        [math.prod(shape)], shape[::-1], [1, *shape], [*shape, 1], [-1, *shape[1:]], [2**62, 4], [1.0 * s for s in shape],
        "shape", [str(s) for s in shape], shape + [0], [2**63] * 2, [True] * len(shape),
    ]  # fmt: skip
    header[key]["shape"] = choices[rng.integers(len(choices))]


def move_offsets(header, key, rng):
    begin, end = header[key]["data_offsets"]
    step = int(rng.choice([1, -1, 2, 64, -64, 2**40, 2**63]))
    choices = [
        [begin + step, end + step], [begin, end + step], [end + 1, begin], [begin], [begin, end, end], None, [begin + 1, end + 1]
    ]  # fmt: skip
    header[key]["data_offsets"] = choices[rng.integers(len(choices))]


def swap_offsets(header, key, rng):
    """Two tensors exchange their bytes: valid only if their sizes agree, and then it means the other's numbers."""
    other = rng.choice(sorted(k for k in header if k not in ("__metadata__", key)))
    header[key]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[key]["data_offsets"]


def rename(header, key, rng):
    choices = [key + "x", key.replace("layers.0", "layers.7"), key.replace("weight", "scale"), key.upper(), key[1:], "é" + key]
    header[choices[rng.integers(len(choices))]] = header.pop(key)


def drop_tensor(header, key, rng):
    header.pop(key)


def extra_field(header, key, rng):
    header[key]["surprise"] = 1


def poison(files, rng):
    """Bytes 0xFF or 0x7F at the start of a random tensor's data: nan in scales and weights of every format."""
    name = rng.choice(shards_of(files))
    header, body = split(files[name])
    key = rng.choice(sorted(k for k in header if k != "__metadata__"))
    begin, end = header[key]["data_offsets"]
    count = int(min(end - begin, rng.choice([1, 2, 4, 16])))
    return files | {name: join(header, body[:begin] + bytes([int(rng.choice([0xFF, 0x7F]))]) * count + body[begin + count :])}


def flip_data(files, rng):
    name = rng.choice(shards_of(files))
    data = files[name]
    return files | {name: flip(data, int(rng.integers(8 + header_length(data), len(data))), rng)}


def index_edit(edit):
    def mutate(files, rng):
        index = json.loads(files[INDEX])
        key = rng.choice(sorted(index["weight_map"]))
        out = edit(index, key, files, rng)
        return files | {INDEX: out if isinstance(out, bytes) else json.dumps(index).encode()}

    return mutate


def config_edit(files, rng):
    config = json.loads(files["config.json"])
    key = rng.choice(sorted(config))
    values = [None, 0, -1, 3, 10**12, 2.5, "x", [], {}, True, 1e308, [1], config[key]]
    value = values[rng.integers(len(values))]
    if rng.integers(4) == 0:
        config.pop(key)
    else:
        config[key] = value
    return files | {"config.json": json.dumps(config).encode()}


def duplicate_key(data, rng):
    header, body = split(data)
    text = json.dumps(header).encode().replace(b"{", b'{"norm.weight":1,"norm.weight":2,', 1)
    return struct.pack("<Q", len(text)) + text + body


def elsewhere(index, key, files, rng):
    index["weight_map"][key] = str(rng.choice([*shards_of(files), "../x.safetensors", "/etc/passwd", "a.bin", ""]))


DEEP = b"[" * 200_000
BROKEN_INDEXES = (b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', DEEP)
MUTATIONS = {
    "truncated": raw_edit(lambda d, r: d[: int(r.integers(len(d)))]),
    "cut by one byte": raw_edit(lambda d, r: d[:-1]),
    "longer": raw_edit(lambda d, r: d + bytes(int(r.integers(1, 100)))),
    "header byte flipped": raw_edit(lambda d, r: flip(d, int(r.integers(8, 8 + header_length(d))), r)),
    "length byte flipped": raw_edit(lambda d, r: flip(d, int(r.integers(8)), r)),
    "hostile length": raw_edit(lambda d, r: struct.pack("<Q", int(r.choice([0, 1, 2**31, 2**40, 2**63 - 1]))) + d[8:]),
    "header of brackets": raw_edit(lambda d, r: struct.pack("<Q", len(DEEP)) + DEEP),
    "header of something else": raw_edit(lambda d, r: join([[], 1, "x", None, {"a": 1}, {"a": {}}][r.integers(6)], b"")),
    "huge number": raw_edit(lambda d, r: struct.pack("<Q", 5042) + b'{"a":' + b"9" * 5036 + b"}"),
    "duplicate key": raw_edit(duplicate_key),
    "dtype swapped": header_edit(swap_dtype),
    "dtype of the same size": header_edit(same_size_dtype),
    "shape": header_edit(reshape),
    "offsets": header_edit(move_offsets),
    "offsets exchanged": header_edit(swap_offsets),
    "renamed": header_edit(rename),
    "tensor dropped": header_edit(drop_tensor),
    "extra field": header_edit(extra_field),
    "poisoned": poison,
    "data bit flipped": flip_data,
    "index entry missing": index_edit(lambda i, k, f, r: i["weight_map"].pop(k) and None),
    "index entry elsewhere": index_edit(elsewhere),
    "index entry too many": index_edit(lambda i, k, f, r: i["weight_map"].__setitem__("x" + k, i["weight_map"][k])),
    "index broken": index_edit(lambda i, k, f, r: BROKEN_INDEXES[r.integers(7)]),
    "shard missing": lambda f, r: (lambda gone: {k: v for k, v in f.items() if k != gone})(r.choice(shards_of(f))),
    "shard exchanged": lambda f, r: f | dict(zip(shards_of(f), [f[n] for n in reversed(shards_of(f))])),
    "config": config_edit,
    "config broken": lambda f, r: f | {"config.json": [b"", b"null", b"{", DEEP, b"\xff\xfe", b"[1]"][r.integers(6)]},
    "no config": lambda f, r: {k: v for k, v in f.items() if k != "config.json"},
    "tokenizer broken": lambda f, r: f | {"tokenizer.json": [b"", b"{", DEEP, b"\xff"][r.integers(4)]},
}  # fmt: skip


# --- what the files mean, read by others ------------------------------------------------------------------------


def tensors_of(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def decode(tensors, name):
    """fp32 value of the matrix `name` ('...weight'), by the parts that are there."""
    stem = name.removesuffix(".weight")

    def nibbles(packed):
        packed = packed.view(torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return torch.where(codes >= 8, -1.0, 1.0) * E2M1[(codes & 7).long()]

    if f"{stem}.weight_packed" in tensors:
        one = (1 / tensors[f"{stem}.weight_global_scale"].double()).float()
        return nibbles(tensors[f"{stem}.weight_packed"]) * tensors[f"{stem}.weight_scale"].float().repeat_interleave(16, 1) * one
    data = tensors[name]
    if f"{stem}.weight_scale_2" in tensors:
        return nibbles(data) * tensors[f"{stem}.weight_scale"].float().repeat_interleave(16, 1) * tensors[f"{stem}.weight_scale_2"]
    scale = tensors.get(f"{stem}.scale", tensors.get(f"{stem}.weight_scale"))
    if scale is None:
        return data.float()
    if data.dtype in (torch.int8, torch.uint8):
        return nibbles(data) * scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    scale = scale.float()  # of FP8: per 128 x 128
    wide = scale.repeat_interleave(128, 0)[: data.shape[0]].repeat_interleave(128, 1)[:, : data.shape[1]]
    return data.float() * wide


def meaning(directory, config):
    """path -> fp32 value, of a directory that was accepted."""
    tensors, found = tensors_of(directory), {}
    for path, param in matching.declared(config).items():
        row = names.row_of(path)
        if any(name.startswith("model.") for name in tensors):
            layer = path.split(".")[1] if path.startswith("layers.") else ""
            name, how = next((o for o in row.others if o[1] in (names.FIRST_HALF, names.SECOND_HALF, names.STACKED)), row.others[0])
            value = tensors[name.format(layer)]
            half = param.shape[1] if len(param.shape) > 1 else 0
            value = value[:, :half] if how == names.FIRST_HALF else value[:, half:] if how == names.SECOND_HALF else value
            found[path] = value.float()
        elif param.role in ("linear", "wo_a", "experts"):
            experts = range(param.shape[0]) if param.role == "experts" else [None]
            found[path] = torch.stack([decode(tensors, names.official_name(path, e)) for e in experts])
        else:
            found[path] = tensors[names.official_name(path)].float()
        found[path] = found[path].reshape(param.shape).numpy()
    return found


def check(directory, kind, out):
    """'refused' with a sentence, or 'loaded' exactly what the files mean."""
    began = time.perf_counter()
    try:
        done = checkpoints.convert(directory, out, EXACT[kind], workers=1)
        model = checkpoints.load(out, recipe="fp32") if (out / "dsv4.json").exists() else None
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and text[-1] in ".?" and len(text) < 6000 and not out.exists(), text
        text.encode("utf-8")
        return "refused"
    finally:
        assert time.perf_counter() - began < SECONDS
    from dsv4_jax import params

    expected = meaning(directory, done.plan.config)
    leaves = {}
    params.map_params(lambda path, _, leaf: leaves.__setitem__(path, np.asarray(leaf)), model.config, model.weights)
    for path, leaf in leaves.items():
        assert not np.isnan(leaf).any(), path
        np.testing.assert_array_equal(leaf.astype(np.float32), expected[path], err_msg=path)
    return "loaded"


def test_damage_is_refused_or_loaded_as_it_reads(publication, tmp_path):
    kind, files = publication
    rng = np.random.default_rng(KINDS.index(kind))
    outcome = {}
    for number in range(PER_KIND):
        what = list(MUTATIONS)[number % len(MUTATIONS)]
        directory, out = tmp_path / f"{number}", tmp_path / f"{number}.out"
        directory.mkdir()
        for name, content in MUTATIONS[what](dict(files), rng).items():
            (directory / name).write_bytes(content)
        try:
            result = check(directory, kind, out)
        except SafetensorError as error:
            raise AssertionError(f"{number}, {what}: accepted what safetensors itself refuses") from error
        except BaseException as error:
            raise AssertionError(f"{number}, {what}: {type(error).__name__}: {error}") from error
        outcome.setdefault(what, []).append(result)
    print({what: f"{r.count('loaded')} of {len(r)} loaded" for what, r in outcome.items()})
    always_fatal = {"truncated", "cut by one byte", "longer", "hostile length", "header of brackets", "duplicate key", "offsets", "tensor dropped",
                    "index entry missing", "index entry too many", "index broken", "shard missing", "shard exchanged", "config broken",
                    "no config", "tokenizer broken", "huge number", "header of something else", "extra field"}  # fmt: skip
    assert all(set(outcome[what]) == {"refused"} for what in always_fatal), outcome
    assert sum(len(r) for r in outcome.values()) == PER_KIND and "loaded" in outcome["data bit flipped"]
