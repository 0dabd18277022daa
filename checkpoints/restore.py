"""Load a saved model: straight into shards, each device's part read by itself, converted tensor by tensor.

Here: `load`, `load_with_report`, and which formats a checkpoint may hold. Not here: the files (`store.py`), how an array
is read (`reading.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

import ffi_kernels as ops
from checkpoints import store
from checkpoints.reading import LoadReport, Reader
from dsv4_jax import pack, params, precision
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Model
from dsv4_jax.precision import Recipe
from dsv4_jax.sharding import axis_rules, check_mesh
from ffi_kernels.tensor import array_fields

_FORMATS_OF_ROLE = {"plain": ("bfloat16", "float32"), "fp32": ("float32",), "int32": ("int32",)}
_ANY_FORMAT = ("bfloat16", "float32", "fp8", "mxfp4", "nvfp4")


def load(
    path: str | Path, recipe: str | Recipe | None = "bf16", mesh: Mesh | None = None, expert_sharding: str = "width",
    arch: str | None = None,
) -> Model:  # fmt: skip
    """Read a model that `save` or `convert` wrote, in the formats of `recipe`.

    path: its directory, or "tiny" for the embedded model. recipe: a name or a Recipe; None keeps the one it was saved
    with. arch: pack the weights for the kernels of this arch (`dsv4_jax.pack`). Each process reads only what its devices
    hold, whatever mesh the model was saved from; what several of its devices hold is read once. Tensors of another format
    are converted one by one (MXFP4 to NVFP4 without loss, other changes through fp32). Raises ValueError saying what is
    wrong with the directory, the recipe, the mesh or the arch.
    """
    return load_with_report(path, recipe, mesh, expert_sharding, arch)[0]


def load_with_report(
    path: str | Path, recipe: str | Recipe | None = "bf16", mesh: Mesh | None = None, expert_sharding: str = "width",
    arch: str | None = None,
) -> tuple[Model, LoadReport]:  # fmt: skip
    """`load`, and what it read: bytes per device and by the process, and the time."""
    began = time.perf_counter()
    directory = store.directory_of(path)
    description, config = store.description(directory), ModelConfig.from_hf(directory / "config.json")
    recipe = Recipe(**description["recipe"]) if recipe is None else precision.get(recipe)
    check_mesh(config, mesh, expert_sharding)
    if arch is not None:
        pack.check_arch(arch)
    store.check_files(directory, description["files"])
    model = Model(None, config, recipe, mesh, expert_sharding, str(directory))
    with Reader(directory) as reader:
        weights = _restore(directory, model, reader, arch)
    jax.block_until_ready(weights)
    return dataclasses.replace(model, weights=weights), reader.report(time.perf_counter() - began)


def _restore(directory: Path, model: Model, reader: Reader, arch: str | None) -> params.Tree:
    leaves = stored_leaves(directory, model.config, reader.stored())
    plan = _Plan.make(model, leaves)
    tensors: dict[str, Any] = {}
    zeroed: dict[str, jax.Array] = {}
    arrays = reader.arrays(plan.stored)  # in the order of the tensors; read ahead
    for name, like in leaves.items():
        parts = {key: next(arrays) for key in array_fields(type(like)) or ("",)}
        tensors[name] = type(like)(**parts) if array_fields(type(like)) else parts[""]
        form, shardings = plan.wanted[name]
        if params.format_of(like) != form:  # frees what was read
            tensors[name], zeroed[name] = _convert(tensors[name], form, shardings)
    _warn_of_zeros(zeroed)
    if arch is not None:
        pack.pack_tensors(model.context, tensors, arch)
    return params.map_params(lambda name, _: tensors[name], model.config)


def _warn_of_zeros(counts: dict[str, jax.Array]) -> None:
    zeroed = {name: int(count) for name, count in jax.device_get(counts).items() if count}
    if zeroed:
        warnings.warn(
            f"NVFP4 cannot hold the smallest scales of {len(zeroed)} tensors (the first is {next(iter(zeroed))}): "
            f"{sum(zeroed.values())} blocks became zero; recipe='official' keeps them.",
            stacklevel=5,
        )


@functools.lru_cache(maxsize=None)
def _abstract(shape: tuple[int, ...], form: str):
    """A weight of this logical shape and format, as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: params.convert(jnp.zeros(shape, jnp.float32), form))


def stored_leaves(directory: Path, config: ModelConfig, stored: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Every tensor of `config` in the format it is stored in (abstract). ValueError unless exactly these are there."""
    leaves: dict[str, Any] = {}
    problems: list[str] = []
    left = dict(stored)

    def take(name: str, param: params.Param) -> None:
        parts = {part: left.pop(f"{name}.{part}", None) for part in ("data", "scale", "global_scale")}
        plain = left.pop(name, None)
        if plain is not None:
            form = jnp.dtype(plain.dtype).name
        elif parts["data"] is None or parts["scale"] is None:
            problems.append(f"{name} is missing")
            return
        elif parts["global_scale"] is not None:
            form = "nvfp4"
        else:
            form = "fp8" if parts["data"].dtype == jnp.float8_e4m3fn else "mxfp4"
        if form not in _FORMATS_OF_ROLE.get(param.role, _ANY_FORMAT):
            problems.append(f"{name} has the format {form}")
            return
        try:
            like = _abstract(param.shape, form)
        except ValueError as error:
            problems.append(f"{name} has the format {form}, which its shape does not allow ({error})")
            return
        for field in array_fields(type(like)) or ("",):
            key, want = (f"{name}.{field}", getattr(like, field)) if field else (name, like)
            if stored[key].shape != want.shape or stored[key].dtype != want.dtype:
                found = f"{stored[key].dtype}{list(stored[key].shape)}"
                problems.append(f"{key} is {found} instead of {want.dtype}{list(want.shape)}")
        leaves[name] = like

    params.map_params(take, config)
    problems += [f"{name} belongs to no tensor of the model" for name in sorted(left)]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"the weights of {directory} do not fit its config.json: {'; '.join(problems[:5])}{more}. "
            "Was config.json edited, or copied from another model?"
        )
    return leaves


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Where arrays go. stored: array name -> Sharding to restore into. wanted: tensor name -> (format, shardings in
    the structure of the tensor, or None for one device)."""

    stored: dict[str, Sharding]
    wanted: dict[str, tuple[str, Any]]

    @classmethod
    def make(cls, model: Model, leaves: dict[str, Any]) -> "_Plan":
        declared: dict[str, params.Param] = {}
        params.map_params(lambda name, param: declared.__setitem__(name, param), model.config)
        final: dict[str, Any] = {}
        if model.mesh is not None:
            shardings = params.shardings(model.context)
            params.map_params(lambda name, _, s: final.__setitem__(name, s), model.config, shardings)
        wanted = {name: (params.storage(p, model.recipe), final.get(name)) for name, p in declared.items()}

        rules = axis_rules(model.expert_sharding)
        one_device = SingleDeviceSharding(jax.local_devices()[0])

        def while_stored(param: params.Param, shape: tuple[int, ...]) -> Sharding:
            """The final axes where they divide this array; what the stored format does not allow is replicated."""
            if model.mesh is None:
                return one_device
            axes = [rules.get(axis) for axis in param.axes]
            fits = (a if a and n % model.mesh.shape[a] == 0 else None for a, n in zip(axes, shape))
            return NamedSharding(model.mesh, PartitionSpec(*fits))

        stored: dict[str, Sharding] = {}
        for name, like in leaves.items():
            same = params.format_of(like) == wanted[name][0] and model.mesh is not None
            for part in array_fields(type(like)) or ("",):
                key, array = (f"{name}.{part}", getattr(like, part)) if part else (name, like)
                if same:
                    stored[key] = getattr(final[name], part) if part else final[name]
                else:
                    stored[key] = while_stored(declared[name], array.shape)
        return cls(stored, wanted)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(tensor, form: str, shardings):
    """(The tensor in another format and in its shards, int32 count of its blocks that became zero).

    Compiled once per shape and pair of formats: fewer and smaller programs than one for the whole tree.
    """
    lossless = form == "nvfp4" and isinstance(tensor, ops.MXFP4Tensor)
    tensor, zeroed = ops.mxfp4_to_nvfp4(tensor) if lossless else (params.convert(tensor, form), jnp.int32(0))
    return tensor if shardings is None else jax.lax.with_sharding_constraint(tensor, shardings), zeroed
