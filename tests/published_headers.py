"""Header-only publications of any size: what is known of a model before its data is downloaded."""

import json
import math

from checkpoints import matching, names

ITEMSIZE = {"BF16": 2, "F32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def official_tensors(config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name -> (dtype, shape) of the official format."""
    found = {}
    for path, param in matching.declared(config).items():
        for expert in range(param.shape[0]) if param.role == "experts" else [None]:
            shape = matching.source_shape(param, names.row_of(path).transform)
            name = names.official_name(path, expert)
            if param.role in ("linear", "wo_a"):
                found[name] = ("F8_E4M3", shape)
                found[names.official_name(path, expert, ".scale")] = ("F8_E8M0", tuple(-(-n // 128) for n in shape))
            elif param.role == "experts":
                found[name] = ("I8", (shape[0], shape[1] // 2))
                found[names.official_name(path, expert, ".scale")] = ("F8_E8M0", (shape[0], shape[1] // 32))
            else:
                found[name] = ({"plain": "BF16", "fp32": "F32", "int32": "I64"}[param.role], shape)
    return found


def write(directory, config, shards: int):
    """The publication in `directory`: shards of which only the headers are there."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = official_tensors(config)
    listed, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {}, 0
        for name in listed[len(listed) * shard // shards : len(listed) * (shard + 1) // shards]:
            dtype, shape = tensors[name]
            size = math.prod(shape) * ITEMSIZE[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config.to_json()))
    return tensors
