"""Parameters: each declared once; initial values, formats, shardings, restore targets and sizes derive from that.

The tree uses the names of the published checkpoint: `weights["layers"][3]["attn"]["compressor"]["wkv"]` is the tensor
layers.3.attn.compressor.wkv.weight. Experts are stacked on a leading axis E, and wo_a is [groups, o_lora_rank, K].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ffi_kernels as ops
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.precision import Recipe
from dsv4_jax.sharding import Context, axis_rules
from ffi_kernels.tensor import LINEAR, layout_of

Tree = Any


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: logical shape, logical axis names (None = never sharded), role, initializer.

    role: 'linear', 'wo_a' and 'experts' have the format the recipe gives them; 'plain' has the activation dtype;
    'fp32' and 'int32' are what they say. init: 'normal', 'ones', 'zeros', 'hash' (random expert ids).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: str = "plain"
    init: str = "normal"
    bound: int = 0  # of 'hash': ids lie in [0, bound)


def declare(config: ModelConfig) -> Tree:
    """The tree of `Param`s of a model."""
    c, d, v = config, config.hidden_size, config.vocab_size
    tree = {
        "embed": Param((v, d), (None, "embed_columns")),
        "head": Param((v, d), ("vocab", None)),
        "norm": _norm(d),
        "hc_head": _hc(c, head=True),
        "layers": [_block(c, ratio, c.is_hash_layer(i)) for i, ratio in enumerate(c.layer_ratios)],
    }
    if c.num_nextn_predict_layers:
        tree["mtp"] = _block(c, 0, False) | {
            "e_proj": Param((d, d), (None, None), "linear"),
            "h_proj": Param((d, d), (None, None), "linear"),
            "enorm": _norm(d), "hnorm": _norm(d), "norm": _norm(d), "hc_head": _hc(c, head=True),
        }  # fmt: skip
    return tree


def _norm(width: int) -> Param:
    return Param((width,), (None,), init="ones")


def _hc(c: ModelConfig, head: bool = False) -> Tree:
    mixes = c.hc_mult if head else (2 + c.hc_mult) * c.hc_mult
    return {
        "fn": Param((mixes, c.hc_mult * c.hidden_size), (None, None), "fp32"),
        "base": Param((mixes,), (None,), "fp32", "zeros"),
        "scale": Param((1 if head else 3,), (None,), "fp32", "ones"),
    }


def _compressor(c: ModelConfig, ratio: int, width: int) -> Tree:
    channels = width * (2 if ratio == CSA else 1)
    return {
        "wkv": Param((channels, c.hidden_size), (None, None)),
        "wgate": Param((channels, c.hidden_size), (None, None)),
        "norm": _norm(width),
        "ape": Param((ratio, channels), (None, None), "fp32", "zeros"),
    }


def _block(c: ModelConfig, ratio: int, is_hash: bool) -> Tree:
    d, k, f, e = c.hidden_size, c.head_dim, c.moe_intermediate_size, c.n_routed_experts
    heads, groups = c.num_attention_heads, c.o_groups
    attn = {
        "wq_a": Param((c.q_lora_rank, d), (None, None), "linear"),
        "q_norm": _norm(c.q_lora_rank),
        "wq_b": Param((heads * k, c.q_lora_rank), ("heads", None), "linear"),
        "wkv": Param((k, d), (None, None), "linear"),
        "kv_norm": _norm(k),
        "wo_a": Param((groups, c.o_lora_rank, heads // groups * k), ("groups", None, None), "wo_a"),
        "wo_b": Param((d, groups * c.o_lora_rank), (None, "groups"), "linear"),
        "attn_sink": Param((heads,), ("heads",), "fp32", "zeros"),
    }
    if ratio:
        attn["compressor"] = _compressor(c, ratio, k)
    if ratio == CSA:
        attn["indexer"] = {
            "wq_b": Param((c.index_n_heads * c.index_head_dim, c.q_lora_rank), (None, None), "linear"),
            "weights_proj": Param((c.index_n_heads, d), (None, None)),
            "compressor": _compressor(c, ratio, c.index_head_dim),
        }
    gate = {"weight": Param((e, d), (None, None))}
    if is_hash:
        gate["tid2eid"] = Param((c.vocab_size, c.num_experts_per_tok), (None, None), "int32", "hash", bound=e)
    else:
        gate["bias"] = Param((e,), (None,), "fp32", "zeros")
    wide, narrow = ("experts", "expert_width", None), ("experts", None, "expert_width")
    return {
        "attn_norm": _norm(d), "ffn_norm": _norm(d), "hc_attn": _hc(c), "hc_ffn": _hc(c), "attn": attn,
        "ffn": {
            "gate": gate,
            "experts": {
                "w1": Param((e, f, d), wide, "experts"),
                "w2": Param((e, d, f), narrow, "experts"),
                "w3": Param((e, f, d), wide, "experts"),
            },
            "shared_experts": {
                "w1": Param((f, d), ("shared_width", None), "linear"),
                "w2": Param((d, f), (None, "shared_width"), "linear"),
                "w3": Param((f, d), ("shared_width", None), "linear"),
            },
        },
    }  # fmt: skip


def _is_param(x) -> bool:
    return isinstance(x, Param)


def map_params(f, config: ModelConfig, *trees: Tree) -> Tree:
    """`f(name, param, *leaves)` over the declared tree; a leaf of `trees` may be a quantized array. name is dotted."""
    def call(path, param, *leaves):
        return f(".".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path), param, *leaves)

    return jax.tree_util.tree_map_with_path(call, declare(config), *trees, is_leaf=_is_param)


def storage(param: Param, recipe: Recipe) -> str:
    """Format of a parameter under a recipe: 'fp8', 'mxfp4', 'nvfp4', or a dtype name."""
    if param.role in ("linear", "wo_a", "experts"):
        kind = getattr(recipe, param.role)
        return recipe.dtype if kind == "plain" else kind
    return {"plain": recipe.dtype, "fp32": "float32", "int32": "int32"}[param.role]


def format_of(leaf) -> str:
    """The format of a weight in the vocabulary of `storage`."""
    kinds = {ops.FP8Tensor: "fp8", ops.MXFP4Tensor: "mxfp4", ops.NVFP4Tensor: "nvfp4"}
    return kinds.get(type(leaf)) or jnp.dtype(leaf.dtype).name


def convert(leaf, target: str):
    """A weight in another format; MXFP4 to NVFP4 keeps every number, other changes go through fp32."""
    return leaf if format_of(leaf) == target else _converted(leaf, target)


@functools.partial(jax.jit, static_argnums=1)  # one program per shape and format, not one per operation
def _converted(leaf, target: str):
    with ops.backend("xla"):  # weights are converted once, in any size: that is not what the kernels of a step are for
        if target == "nvfp4" and isinstance(leaf, ops.MXFP4Tensor):
            return ops.mxfp4_to_nvfp4(leaf)[0]
        values = leaf if isinstance(leaf, (jax.Array, np.ndarray)) else ops.dequantize(leaf)
        quantize = {"fp8": ops.quantize_fp8_weight, "mxfp4": ops.quantize_mxfp4, "nvfp4": ops.quantize_nvfp4_weight}
        return quantize[target](jnp.asarray(values)) if target in quantize else jnp.asarray(values).astype(target)


def to_recipe(weights: Tree, config: ModelConfig, recipe: Recipe) -> Tree:
    """Weights of any formats -> the formats of `recipe`."""
    return map_params(lambda _, param, leaf: convert(leaf, storage(param, recipe)), config, weights)


def initial(param: Param, recipe: Recipe, key: jax.Array, std: float = 0.02):
    """One random weight in its format under `recipe`; a pure function of `key`."""
    if param.init == "hash":
        # Each token gets distinct experts: the first X of a random permutation.
        order = jnp.argsort(jax.random.uniform(key, (param.shape[0], param.bound)), axis=-1)
        return order[:, : param.shape[1]].astype(jnp.int32)
    values = {
        "normal": lambda: jax.random.normal(key, param.shape, jnp.float32) * std,
        "ones": lambda: jnp.ones(param.shape, jnp.float32),
        "zeros": lambda: jnp.zeros(param.shape, jnp.float32),
    }[param.init]()
    return convert(values, storage(param, recipe))


def init(config: ModelConfig, recipe: Recipe, key: jax.Array, std: float = 0.02) -> Tree:
    """Random weights in the formats of `recipe`; a pure function of `key`."""
    leaves, treedef = jax.tree.flatten(declare(config), is_leaf=_is_param)
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return map_params(lambda _, param, k: initial(param, recipe, k, std), config, jax.tree.unflatten(treedef, keys))


def abstract(config: ModelConfig, recipe: Recipe) -> Tree:
    """ShapeDtypeStructs in the formats of `recipe`: restore target and input of `jax.eval_shape`."""
    return map_params(lambda _, param: _abstract(param, recipe), config)


@functools.cache  # layers are alike, and every load asks several times
def _abstract(param: Param, recipe: Recipe):
    return jax.eval_shape(lambda: initial(param, recipe, jax.random.key(0)))


def spec(ctx: Context, name: str, param: Param, leaf):
    """PartitionSpecs of one weight, in the structure of the leaf (None of a w3 that is packed into w1)."""
    sizes, rules = {} if ctx.mesh is None else dict(ctx.mesh.shape), axis_rules(ctx.expert_sharding)
    axes = [rules.get(a) if sizes.get(rules.get(a), 1) > 1 else None for a in param.axes]
    layout = layout_of(leaf)
    for i, axis in enumerate(axes):
        if axis is None or layout != LINEAR:  # a packed weight was split before it was packed, shard by shard
            continue
        # A shard must hold whole blocks of scales, or the same numbers would need another scale on each device.
        parts = [t.shape[i] for t in jax.tree.leaves(leaf) if len(t.shape) == len(param.shape)]
        if any(size % sizes[axis] for size in parts):
            raise ValueError(
                f"{name} {param.shape} in format {format_of(leaf)} cannot be split {sizes[axis]} ways along axis {i}: "
                f"its data and scales have {parts} entries there; use a smaller {axis} axis or another recipe."
            )
    full = PartitionSpec(*axes)
    if isinstance(leaf, ops.NVFP4Tensor):  # scale and global_scale may have axes of their own behind those of the weight
        return ops.NVFP4Tensor(full, full, PartitionSpec(*axes[:-2]), layout)
    return jax.tree.map(lambda _: full, leaf)


def specs(ctx: Context, weights: Tree | None = None) -> Tree:
    """PartitionSpec of every array of the weights, in their structure; without weights, of the recipe's formats."""
    weights = abstract(ctx.config, ctx.recipe) if weights is None else weights
    return map_params(lambda name, param, leaf: spec(ctx, name, param, leaf), ctx.config, weights)


def shardings(ctx: Context) -> Tree:
    """NamedSharding of every array of the weights in the recipe's formats; needs a mesh."""
    return jax.tree.map(
        lambda s: NamedSharding(ctx.mesh, s), specs(ctx), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def nbytes(tree: Tree) -> int:
    """Bytes of all arrays of a tree (concrete or abstract), over all devices."""
    return sum(math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for t in jax.tree.leaves(tree))


def nbytes_per_device(tree: Tree, tree_specs: Tree, mesh: Mesh) -> int:
    """Bytes that one device holds of a tree with these PartitionSpecs."""
    leaves = jax.tree.leaves(tree)
    flat = jax.tree.leaves(tree_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    split = [math.prod(mesh.shape[a] for a in spec if a is not None) for spec in flat]
    return sum(math.prod(t.shape) * jnp.dtype(t.dtype).itemsize // n for t, n in zip(leaves, split, strict=True))
