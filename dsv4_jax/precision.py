"""Precision recipes: which format each kind of weight and cache has, and the dtype of activations.

A weight's format decides its input's: FP8 and MXFP4 weights take FP8 activations, NVFP4 weights NVFP4 ones
(wo_a in FP8 takes plain input, as the official code computes it). Rounding itself lives in `ffi_kernels`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

_CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "linear": ("plain", "fp8", "nvfp4"),
    "wo_a": ("plain", "fp8", "nvfp4"),
    "experts": ("plain", "mxfp4", "nvfp4"),
    "kv": ("plain", "fp8"),
    "index": ("plain", "fp4"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Formats of one way to run the model.

    dtype: activations and plain weights. linear: wq_a, wq_b, wkv, wo_b, the indexer's wq_b, the shared expert,
    e_proj and h_proj. wo_a, experts: those. kv: window and compressed entries. index: the indexer's queries and keys
    (fp4 includes the Hadamard rotation). The gate, compressors, norms, embedding and head are never quantized.
    """

    name: str
    dtype: str = "bfloat16"
    linear: str = "plain"
    wo_a: str = "plain"
    experts: str = "plain"
    kv: str = "plain"
    index: str = "plain"

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"recipe field {field} = {getattr(self, field)!r} is not one of {', '.join(choices)}.")
        if self.dtype == "float32" and (self.kv, self.index) != ("plain", "plain"):
            raise ValueError("the quantized caches hold bf16 RoPE channels; use dtype='bfloat16' with them.")

    @property
    def activation_dtype(self):
        return jnp.dtype(self.dtype)


FP32 = Recipe("fp32", dtype="float32")
BF16 = Recipe("bf16")
OFFICIAL = Recipe("official", linear="fp8", wo_a="fp8", experts="mxfp4", kv="fp8", index="fp4")
NVFP4 = Recipe("nvfp4", linear="nvfp4", wo_a="nvfp4", experts="nvfp4", kv="fp8", index="fp4")
RECIPES = {r.name: r for r in (BF16, OFFICIAL, NVFP4, FP32)}


def get(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or a Recipe unchanged. ValueError names the unknown one and the known."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is not known; choose one of {', '.join(RECIPES)}, or pass a Recipe.")
    return RECIPES[recipe]
