"""Small random models shared by tests; made once per process."""

import dataclasses
import functools

import jax
import numpy as np

import dsv4_jax as dsv4
from dsv4_jax import params
from dsv4_jax.model import Model
from dsv4_jax.precision import RECIPES

# Every layer kind, hash and learned routing, MTP; a top-k that cuts from position 63 on; the smallest sizes that all
# formats allow.
SMALL = dataclasses.replace(
    dsv4.TINY, vocab_size=256, hidden_size=128, q_lora_rank=64, head_dim=128, num_attention_heads=8, o_lora_rank=32,
    index_n_heads=16, index_topk=16, moe_intermediate_size=128, n_routed_experts=8, max_position_embeddings=4096,
)  # fmt: skip
# Two layers, CSA and HCA, for what is slow to compile; its widths also split into whole FP8 blocks on two devices.
PAIR = dataclasses.replace(
    SMALL, num_hidden_layers=2, compress_ratios=(4, 128, 0), num_hash_layers=0, moe_intermediate_size=256, o_lora_rank=128
)  # fmt: skip


def lively_weights(config, seed: int) -> dict:
    """Random fp32 weights in which nothing is trivial: sinks, biases, norms, ape and hyper-connections all differ."""
    rng = np.random.default_rng(seed)

    def one(name, param, leaf):
        if param.init == "hash":
            return rng.permuted(np.tile(np.arange(param.bound), (leaf.shape[0], 1)), axis=1)[:, : leaf.shape[1]].astype(leaf.dtype)
        base, spread = {"ones": (1.0, 0.3), "zeros": (0.0, 0.3), "normal": (0.0, 0.06)}[param.init]
        return (base + spread * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return params.map_params(one, config, params.abstract(config, RECIPES["fp32"]))


@functools.cache
def small_model(recipe: str, config=SMALL, seed: int = 0) -> Model:
    weights = jax.tree.map(jax.numpy.asarray, lively_weights(config, seed))
    return Model(params.to_recipe(weights, config, RECIPES[recipe]), config, RECIPES[recipe])


def tokens(count: int, batch: int = 1, seed: int = 0, vocab: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (batch, count)).astype(np.int32)
