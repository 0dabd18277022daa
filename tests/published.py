"""Synthetic published checkpoints: every kind of tensor in every format, written by torch from random bits.

`write` makes a directory with shards and an index; the values of each tensor are kept as fp32, decoded here by torch with
tables and no function of the package, so that a converted model can be compared with them.
"""

import dataclasses
import json

import numpy as np
import torch
from safetensors.torch import save_file

from checkpoints import matching, names
from dsv4_jax import TINY

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Every layer kind, hash and learned routing, MTP; rows and columns that are no multiples of 128, wo_a groups of 64 rows.
ODD = dataclasses.replace(
    TINY, vocab_size=150, hidden_size=96, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_attention_heads=4,
    head_dim=64, qk_rope_head_dim=16, q_lora_rank=160, o_groups=2, o_lora_rank=64, index_n_heads=3, index_head_dim=32,
    index_topk=8, n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=160, num_hash_layers=1,
    max_position_embeddings=4096,
)  # fmt: skip
KINDS = ("official", "modelopt", "compressed-tensors", "transformers")
TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'


class Maker:
    """Random tensors of each format with their values; `tensors` is what is stored, `values` what it means (fp32)."""

    def __init__(self, config, kind: str, seed: int = 0):
        self.config, self.kind = config, kind
        self.random = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self.values: dict[tuple[str, int | None], torch.Tensor] = {}  # (our path, expert)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.random)

    def integers(self, low, high, shape, dtype=torch.uint8):
        return torch.randint(low, high, shape, generator=self.random).to(dtype)

    def plain(self, name, shape, dtype, spread=1.0, center=0.0):
        value = (self.normal(*shape) * spread + center).to(dtype)
        self.tensors[name] = value
        return value.float()

    def fp8(self, name, shape, scale_name=None, scale_dtype="e8m0"):
        rows, columns = shape
        codes = (self.normal(rows, columns) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        blocks = (-(-rows // 128), -(-columns // 128))
        exponent = self.integers(-14, -9, blocks, torch.int32)
        if scale_dtype == "e8m0":
            scale = torch.exp2(exponent.float())
            stored = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        else:
            scale = stored = torch.exp2(exponent.float()) * (1 + torch.rand(blocks, generator=self.random))
        self.tensors[name] = codes
        self.tensors[scale_name or name.removesuffix("weight") + "scale"] = stored
        wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return codes.float() * wide

    def nibbles(self, shape):
        packed = self.integers(0, 256, (shape[0], shape[1] // 2))
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return packed, torch.where(codes >= 8, -1.0, 1.0) * E2M1[(codes & 7).long()]

    def mxfp4(self, name, shape):
        packed, values = self.nibbles(shape)
        exponent = self.integers(-9, -4, (shape[0], shape[1] // 32), torch.int32)
        self.tensors[name] = packed.view(torch.int8)
        self.tensors[name.removesuffix("weight") + "scale"] = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return values * torch.exp2(exponent.float()).repeat_interleave(32, 1)

    def nvfp4(self, name, shape):
        packed, values = self.nibbles(shape)
        scale = (torch.rand((shape[0], shape[1] // 16), generator=self.random) * 400).to(torch.float8_e4m3fn)
        stem = name.removesuffix(".weight")
        one = torch.rand((), generator=self.random) * 1e-4 + 1e-5
        if self.kind == "modelopt":
            parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": one, "input_scale": one * 3}
        else:
            inverse = 1 / one
            one = (1 / inverse.double()).float()
            inverse = inverse.reshape(1)
            parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": inverse, "input_global_scale": inverse * 2}
        self.tensors |= {f"{stem}.{part}": value for part, value in parts.items()}
        return values * scale.float().repeat_interleave(16, 1) * one

    def weight(self, path, param, expert, name):
        """One weight in the format that this kind of publication gives it."""
        shape = matching.source_shape(param, names.row_of(path).transform)
        if self.kind == "transformers":
            return self.plain(name, shape, torch.bfloat16, shape[-1] ** -0.5)
        if param.role == "experts":
            # an MTP block keeps MXFP4 where ModelOpt converts the layers: formats are told tensor by tensor
            mx = self.kind == "official" or path.startswith("mtp.")
            return self.mxfp4(name, shape) if mx else self.nvfp4(name, shape)
        if self.kind == "compressed-tensors":
            return self.fp8(name, shape, name.removesuffix("weight") + "weight_scale", "fp32")
        return self.fp8(name, shape)

    def make(self) -> "Maker":
        config = self.config
        for path, param in matching.declared(config).items():
            for expert in range(param.shape[0]) if param.role == "experts" else [None]:
                name = names.official_name(path, expert)
                if param.role in ("linear", "wo_a", "experts"):
                    value = self.weight(path, param, expert, name)
                elif param.role == "int32":
                    rows = [torch.randperm(param.bound, generator=self.random)[: param.shape[1]] for _ in range(param.shape[0])]
                    value = self.tensors[name] = torch.stack(rows)
                else:
                    dtype = torch.float32 if param.role == "fp32" and self.kind != "transformers" else torch.bfloat16
                    value = self.plain(name, param.shape, dtype, 0.2, 1.0 if param.init == "ones" else 0.0)
                self.values[path, expert] = value
        if self.kind == "transformers":
            self._rename()
        return self

    def _rename(self):
        """Published names -> transformers' names; experts stacked, gate above up."""
        theirs, experts = {}, {}
        for name, value in self.tensors.items():
            what = names.meaning(name)
            row, layer = names.row_of(what.paths[0]), (name.split(".") + [""])[1]
            if what.expert is None:
                theirs[row.others[0][0].format(layer)] = value
            else:
                experts.setdefault(layer, {})[row.ours.rpartition(".")[2], what.expert] = value
        count = self.config.n_routed_experts
        for layer, found in experts.items():
            pairs = [torch.cat([found["w1", e], found["w3", e]]) for e in range(count)]
            theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(pairs)
            theirs[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack([found["w2", e] for e in range(count)])
        self.tensors = theirs


def write(directory, maker: Maker, shards: int = 3, config: dict | None = None):
    """The directory of a publication: config.json, tokenizer.json, shards in a shuffled order, an index."""
    directory.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(sorted(maker.tensors)).tolist()
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: maker.tensors[name].contiguous() for name in order[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config or maker.config.to_json()))
    (directory / "tokenizer.json").write_text(TOKENIZER)
    return directory


def config_of(kind: str):
    return dataclasses.replace(ODD, num_nextn_predict_layers=0, compress_ratios=ODD.layer_ratios) if kind == "transformers" else ODD
