"""Meshes and collectives: which logical axis lives on which mesh axis, and every collective a step makes.

The step runs inside one `shard_map` over the mesh axes `data` (requests) and `tensor` (heads, o-groups, expert
width or experts, vocabulary). Inside, arrays are local shards; `Context` offers the collectives, which are no-ops
without a mesh. Replicated over `tensor`: the latent projections (wq_a, wkv), compressors, the indexer and all
caches, because there is one KV head, and because scoring 64 index heads locally is cheaper than one all-reduce.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import Recipe

DATA, TENSOR = "data", "tensor"
EXPERT_SHARDINGS = ("width", "experts")


def make_mesh(data: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of data x tensor devices. ValueError if there are fewer devices."""
    devices = jax.devices() if devices is None else devices
    if data < 1 or tensor < 1 or data * tensor > len(devices):
        raise ValueError(
            f"a mesh of data={data} x tensor={tensor} needs {data * tensor} devices, but there are {len(devices)}; "
            "shrink the mesh (on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight)."
        )
    return Mesh(np.asarray(devices[: data * tensor]).reshape(data, tensor), (DATA, TENSOR))


def check_mesh(config: ModelConfig, mesh: Mesh | None, expert_sharding: str) -> None:
    """ValueError with the offending size unless `mesh` can hold the model."""
    if expert_sharding not in EXPERT_SHARDINGS:
        raise ValueError(f"expert_sharding = {expert_sharding!r} is not one of {', '.join(EXPERT_SHARDINGS)}.")
    if mesh is None:
        return
    if tuple(mesh.axis_names) != (DATA, TENSOR):
        raise ValueError(
            f"the mesh has axes {tuple(mesh.axis_names)}, but the model is written for ('data', 'tensor'); "
            "make it with dsv4_jax.make_mesh(data=..., tensor=...)."
        )
    n = mesh.shape[TENSOR]
    sizes = {
        "num_attention_heads": config.num_attention_heads, "o_groups": config.o_groups,
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
    }  # fmt: skip
    if expert_sharding == "experts":
        sizes["n_routed_experts"] = config.n_routed_experts
    for name, size in sizes.items():
        if size % n:
            divisors = [d for d in range(1, n) if not any(s % d for s in sizes.values())]
            raise ValueError(f"tensor={n} does not divide {name} = {size}; use one of tensor={divisors} for this model.")


def axis_rules(expert_sharding: str) -> dict[str | None, str | None]:
    """Logical axis -> mesh axis. Logical axes that are absent are replicated."""
    rules = {"heads": TENSOR, "groups": TENSOR, "vocab": TENSOR, "embed_columns": TENSOR, "shared_width": TENSOR}
    rules["expert_width" if expert_sharding == "width" else "experts"] = TENSOR
    return rules


@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer must know besides its weights: configuration, recipe, and the mesh axis it is split over.

    `record`, when given, is a dict that layers fill with named intermediates (for `verify` and training).
    """

    config: ModelConfig
    recipe: Recipe
    mesh: Mesh | None = None
    expert_sharding: str = "width"
    record: dict | None = dataclasses.field(default=None, compare=False, hash=False)

    @property
    def tensor_size(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape[TENSOR]

    def psum(self, x: jax.Array) -> jax.Array:
        """Sum over the shards of `tensor`."""
        return x if self.tensor_size == 1 else jax.lax.psum(x, TENSOR)

    def pmax(self, x: jax.Array) -> jax.Array:
        """Largest over the shards of `tensor`."""
        return x if self.tensor_size == 1 else jax.lax.pmax(x, TENSOR)

    def gather_last(self, x: jax.Array) -> jax.Array:
        """Concatenate the shards of `tensor` along the last axis."""
        return x if self.tensor_size == 1 else jax.lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True)

    def any_request(self, flag: jax.Array) -> jax.Array:
        """Whether the scalar bool `flag` holds on any shard of `data`."""
        if self.mesh is None or self.mesh.shape[DATA] == 1:
            return flag
        return jax.lax.psum(flag.astype(np.int32), DATA) > 0

    def save(self, name: str, value) -> None:
        """Record a named intermediate if somebody asked for it."""
        if self.record is not None:
            self.record[name] = value


def run_sharded(mesh: Mesh | None, f, in_specs, out_specs):
    """`f` inside the one shard_map of a step, or `f` itself without a mesh."""
    if mesh is None:
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


BATCH = PartitionSpec(DATA)
