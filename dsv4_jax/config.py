"""Model configuration: the published config.json, read strictly.

Here: `ModelConfig`, the presets FLASH, PRO and TINY, and the reader of both
spellings of config.json (the official one and transformers').
Not here: numeric formats (`precision.py`), parameter shapes (`params.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, Mapping

WINDOW, CSA, HCA = 0, 4, 128  # compress ratios: window only, compressed sparse, heavily compressed


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters of the layers that compress (facts section 2, "Attention")."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float

    def __post_init__(self):
        _check_numbers(self, "rope_scaling.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a DeepSeek-V4 model; field names are those of the official config.json.

    `compress_ratios` has one entry per layer, then one per MTP block; each is 0 (window only),
    4 (CSA) or 128 (HCA). Raises ValueError from the constructor when the fields contradict, or are not of their type.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    num_hash_layers: int
    num_nextn_predict_layers: int
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    rope_theta: float
    sliding_window: int
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    max_position_embeddings: int
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self):
        _check_numbers(self)
        bad = list(dict.fromkeys(_shown(r) for r in self.compress_ratios if type(r) is not int or r not in (WINDOW, CSA, HCA)))
        if bad:
            raise ValueError(
                f"compress_ratios holds [{', '.join(bad[:5])}]; DeepSeek-V4 defines only 0 (window), 4 (CSA) and 128 (HCA). "
                "Replace the entry, or use a model of this architecture."
            )
        expected = self.num_hidden_layers + self.num_nextn_predict_layers
        if len(self.compress_ratios) != expected:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries, but {self.num_hidden_layers} layers and "
                f"{self.num_nextn_predict_layers} MTP blocks need {expected}."
            )
        if self.num_nextn_predict_layers > 1:
            raise ValueError(
                f"num_nextn_predict_layers = {self.num_nextn_predict_layers}, but DeepSeek-V4 has one MTP block at most "
                "(a DSpark draft is another design); set it to 0 to use the trunk alone."
            )
        if any(self.compress_ratios[self.num_hidden_layers :]):
            raise ValueError("the MTP block attends to its window only: its entry of compress_ratios must be 0.")
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of o_groups = {self.o_groups}."
            )
        smallest = min(self.head_dim, self.index_head_dim if CSA in self.compress_ratios else self.head_dim)
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > smallest:
            raise ValueError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even and at most {smallest}, the smallest head."
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} exceeds n_routed_experts = {self.n_routed_experts}."
            )

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compress ratio of each of the `num_hidden_layers` layers (without the MTP block)."""
        return self.compress_ratios[: self.num_hidden_layers]

    def is_hash_layer(self, layer: int) -> bool:
        """Whether `layer` routes by token id (facts section 2, MoE). The MTP block never does."""
        return layer < min(self.num_hash_layers, self.num_hidden_layers)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json: a path, a directory, or its parsed contents.

        Accepts the official spelling (`compress_ratios`, `rope_scaling`) and that of transformers'
        save_pretrained (`layer_types`, `rope_parameters`). Raises ValueError naming every unknown or
        missing field that decides the computation, and refuses DeepSeek-V4.1 by name.
        """
        if not isinstance(source, Mapping):
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            try:
                source = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{path} is not a readable config.json: {_shown(error)}.") from error
            if not isinstance(source, dict):
                raise ValueError(f"{path} is not a readable config.json: it holds no JSON object.")
        try:
            return cls._from_raw(dict(source))
        except (TypeError, KeyError, AttributeError, OverflowError, IndexError) as error:
            raise ValueError(
                f"config.json has a field of the wrong type, or lacks a part of one ({_shown(error)}); take the file from the "
                "published model."
            ) from error

    @classmethod
    def _from_raw(cls, raw: dict[str, Any]) -> "ModelConfig":
        _refuse_other_models(raw)
        if "layer_types" in raw and "compress_ratios" not in raw:
            raw = _from_transformers_spelling(raw)
        for name, required in _REQUIRED_VALUES.items():
            if name in raw and raw[name] is not None and (type(raw[name]) is not type(required) or raw[name] != required):
                raise ValueError(
                    f"{name} = {_shown(raw[name])}, but this implementation of DeepSeek-V4 computes {required!r} only."
                )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(raw) - set(fields) - set(_REQUIRED_VALUES) - _IGNORED)
        if unknown:
            raise ValueError(
                f"config.json has fields this implementation does not know: {_listed(unknown)}. "
                "They could change the computation; remove them if they do not."
            )
        missing = sorted(
            name for name, f in fields.items() if name not in raw and (f.default is dataclasses.MISSING)
        )
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}. Public sources disagree on such values, so none is assumed; "
                "take the file from the published model."
            )
        values = {name: raw[name] for name in fields if name in raw}
        values["compress_ratios"] = tuple(values["compress_ratios"])
        values["rope_scaling"] = _rope_scaling(values["rope_scaling"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The official spelling of this configuration; `from_hf(config.to_json()) == config`."""
        out = dataclasses.asdict(self)
        out["compress_ratios"] = list(self.compress_ratios)
        if self.rope_scaling is not None:
            out["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(self.rope_scaling)}
        return {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], **_REQUIRED_VALUES, **out}


def rope_frequencies(config: ModelConfig, ratio: int) -> list[float]:
    """Rotation per token, in radians, of each of the rope_dim/2 pairs of a layer with this compress ratio.

    Window-only layers use rope_theta without scaling; layers that compress use compress_rope_theta
    with YaRN, whose magnitude factor is not applied (facts section 2).
    """
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if ratio else config.rope_theta
    frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    scaling = config.rope_scaling
    if not ratio or scaling is None:
        return frequencies

    def pair_of(rotations: float) -> float:  # the pair that makes this many rotations over the original context
        return dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    keep = [1 - min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)]
    return [f / scaling.factor * (1 - k) + f * k for f, k in zip(frequencies, keep)]


def _shown(value) -> str:
    """A value that came from a file, in one short line."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return "".join(c if c.isprintable() else " " for c in text[:120]) + ("..." if len(text) > 120 else "")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(name if name.isidentifier() and len(name) < 60 else _shown(name) for name in names[:10]) + more


def _check_numbers(config, prefix: str = "") -> None:
    """ValueError unless every int and float field holds such a number in a range that makes sense."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if field.type == "int":
            fits = type(value) is int and abs(value) < 2**31
        elif field.type == "float":
            fits = type(value) in (int, float) and abs(value) < 1e30  # nan and inf are not
        else:
            continue
        if not fits:
            raise ValueError(f"{name} = {_shown(value)}, which is no {field.type} that this could be; take config.json from the published model.")
        if value < 0 or value == 0 and name not in _MAY_BE_ZERO:
            raise ValueError(f"{name} = {value} is not positive; correct it in config.json.")


_MAY_BE_ZERO = {"num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "hc_eps", "rms_norm_eps"}
_REQUIRED_VALUES = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# Fields that say how the model was trained, stored or served; none changes what a token computes.
_IGNORED = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "expert_dtype", "quantization_config", "pad_token_id", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "output_hidden_states", "output_attentions", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "_name_or_path",
    "partial_rotary_factor", "auto_map", "_attn_implementation",
}  # fmt: skip
_LAYER_TYPES = {"sliding_attention": WINDOW, "compressed_sparse_attention": CSA, "heavily_compressed_attention": HCA}


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    names = [_shown(name).strip("'") for name in (raw.get("model_type", ""), *(raw.get("architectures") or []))]
    if any(re.search(r"v4[._-]?1", name, re.IGNORECASE) for name in names) or any(k.startswith("engram") for k in raw):
        raise ValueError(
            f"this is DeepSeek-V4.1 ({', '.join(filter(None, names))}), another architecture (shared caches, engram "
            "tables); this package implements DeepSeek-V4: take a V4 Flash or V4 Pro checkpoint."
        )
    if raw.get("model_type") != "deepseek_v4":
        raise ValueError(
            f"model_type = {_shown(raw.get('model_type'))}; this package implements 'deepseek_v4' only."
        )


def _from_transformers_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers names layers and ropes by kind; it never instantiates the MTP block."""
    rates = raw.pop("compress_rates", None) or {}
    unknown = sorted(set(raw["layer_types"]) - set(_LAYER_TYPES))
    if unknown:
        raise ValueError(f"layer_types holds {_shown(unknown)}; DeepSeek-V4 defines only {sorted(_LAYER_TYPES)}.")
    raw["compress_ratios"] = [
        rates.get(kind, _LAYER_TYPES[kind]) if _LAYER_TYPES[kind] else 0 for kind in raw.pop("layer_types")
    ]
    mlp_kinds = raw.pop("mlp_layer_types")
    raw["num_hash_layers"] = sum(kind == "hash_moe" for kind in mlp_kinds)
    if mlp_kinds != ["hash_moe"] * raw["num_hash_layers"] + ["moe"] * (len(mlp_kinds) - raw["num_hash_layers"]):
        raise ValueError(f"mlp_layer_types = {_shown(mlp_kinds)}: the hash-routed layers must come first.")
    raw["num_nextn_predict_layers"] = 0
    rope = raw.pop("rope_parameters")
    if set(rope) != {"main", "compress"}:
        raise ValueError(f"rope_parameters has the keys {_shown(sorted(rope))}; expected 'main' and 'compress'.")
    raw["rope_theta"] = rope["main"]["rope_theta"]
    raw["compress_rope_theta"] = rope["compress"]["rope_theta"]
    raw["rope_scaling"] = rope["compress"] if rope["compress"].get("rope_type") == "yarn" else None
    if "qk_rope_head_dim" not in raw:
        raw["qk_rope_head_dim"] = int(raw["head_dim"] * raw["partial_rotary_factor"])
    return raw


def _rope_scaling(raw: Mapping[str, Any] | None) -> RopeScaling | None:
    if raw is None:
        return None
    kind = raw.get("type", raw.get("rope_type", "yarn"))
    if kind != "yarn":
        raise ValueError(f"rope_scaling type {_shown(kind)} is not known; DeepSeek-V4 uses 'yarn'.")
    missing = sorted({f.name for f in dataclasses.fields(RopeScaling)} - set(raw))
    if missing:
        raise ValueError(f"rope_scaling lacks {', '.join(missing)}; take config.json from the published model.")
    return RopeScaling(**{f.name: raw[f.name] for f in dataclasses.fields(RopeScaling)})


_YARN = RopeScaling(factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)

FLASH = ModelConfig(
    vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, head_dim=512,
    qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024,
    compress_ratios=(0, 0) + (4, 128) * 20 + (4, 0), index_n_heads=64, index_head_dim=128, index_topk=512,
    n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048, routed_scaling_factor=1.5,
    num_hash_layers=3, num_nextn_predict_layers=1, compress_rope_theta=160000, rope_scaling=_YARN, rope_theta=10000,
    sliding_window=128, swiglu_limit=10.0, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6,
    max_position_embeddings=1048576,
)  # fmt: skip
PRO = dataclasses.replace(
    FLASH, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536, o_groups=16,
    compress_ratios=(128, 128) + (4, 128) * 29 + (4, 0), index_topk=1024, n_routed_experts=384,
    moe_intermediate_size=3072, routed_scaling_factor=2.5,
)  # fmt: skip
# The embedded model: every layer kind of Flash at a size that trains in minutes and decodes on a laptop.
TINY = dataclasses.replace(
    FLASH, vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, head_dim=128, q_lora_rank=128,
    o_groups=8, o_lora_rank=32, compress_ratios=(0, 4, 128, 4, 0), index_n_heads=8, index_topk=64,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, num_hash_layers=1,
    max_position_embeddings=8192,
)  # fmt: skip
PRESETS = {"flash": FLASH, "pro": PRO, "tiny": TINY}
