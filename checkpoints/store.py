"""Models on disk: save and load, with Orbax.

One layout. A model is a directory:
  config.json      the configuration, in the official spelling
  dsv4.json        {format_version, recipe, formats, metadata, files}; formats is a summary for people, role ->
                   formats; files is weights/... -> [bytes, crc32]
  tokenizer.json   if it was given
  weights/         an Orbax checkpoint: one array per name, 'layers.3.attn.wkv' for a plain tensor and
                   'layers.3.attn.wkv.data', '.scale', '.global_scale' for the parts of a quantized one
The format of a tensor is told by its parts, so a checkpoint may mix formats.
Not here: reading published safetensors, names of other libraries (`names.py`, `from_transformers.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

import ffi_kernels as ops
from dsv4_jax import params, precision
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Model
from dsv4_jax.precision import Recipe
from dsv4_jax.sharding import axis_rules, check_mesh

FORMAT_VERSION = 1
EMBEDDED = "tiny"
CHUNK_BYTES = 16 * 2**20  # the unit of reading: a device that restores a shard reads the chunks it touches
CHECKED_BYTES = 2**30  # larger checkpoints are checked by the sizes of their files only, not by their contents
_PARTS = {
    kind: tuple(f.name for f in dataclasses.fields(kind)) for kind in (ops.NVFP4Tensor, ops.MXFP4Tensor, ops.FP8Tensor)
}
_FORMATS_OF_ROLE = {"plain": ("bfloat16", "float32"), "fp32": ("float32",), "int32": ("int32",)}
_ANY_FORMAT = ("bfloat16", "float32", "fp8", "mxfp4", "nvfp4")


# --- save -------------------------------------------------------------------------------------------------------


def save(model: Model, path: str | Path, *, tokenizer_json: str | None = None, metadata: dict | None = None) -> None:
    """Write a model, its weights in the formats they have, to the new directory `path`.

    tokenizer_json: the contents of a tokenizer.json. metadata: anything JSON can hold. Nothing half-written appears
    under `path`: everything goes to a sibling directory that is renamed at the end. Raises ValueError if `path`
    exists or the tokenizer is not JSON.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; a checkpoint is never overwritten: delete it first or save elsewhere.")
    if tokenizer_json is not None:
        _parse_json(tokenizer_json, "tokenizer_json", "pass the contents of a tokenizer.json, not its path")
    arrays, formats = _named_arrays(model)
    description = {
        "format_version": FORMAT_VERSION,
        "recipe": dataclasses.asdict(model.recipe),
        "formats": formats,
        "metadata": metadata or {},
    }
    json.dumps(description)  # before anything is written: metadata may not be JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent.resolve()))
    try:
        _write_arrays(partial / "weights", arrays)
        files = sorted(f for f in (partial / "weights").rglob("*") if f.is_file())
        description["files"] = {f.relative_to(partial).as_posix(): [f.stat().st_size, _crc32(f)] for f in files}
        if tokenizer_json is not None:
            (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, content in (("config.json", model.config.to_json()), ("dsv4.json", description)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp keeps everybody else out
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _named_arrays(model: Model) -> tuple[dict[str, jax.Array], dict[str, list[str]]]:
    """(name -> array, role -> formats that occur)."""
    arrays: dict[str, jax.Array] = {}
    formats: dict[str, set[str]] = {}

    def add(name: str, param: params.Param, leaf) -> None:
        formats.setdefault(param.role, set()).add(params.format_of(leaf))
        parts = _PARTS.get(type(leaf))
        arrays.update({f"{name}.{part}": getattr(leaf, part) for part in parts} if parts else {name: leaf})

    params.map_params(add, model.config, model.weights)
    return arrays, {role: sorted(found) for role, found in sorted(formats.items())}


def _write_arrays(directory: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    chunked = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    save_args = ocp.args.PyTreeSave(arrays, save_args={name: chunked for name in arrays})
    with ocp.PyTreeCheckpointer(use_ocdbt=True) as checkpointer:
        checkpointer.save(directory.resolve(), args=save_args)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


# --- load -------------------------------------------------------------------------------------------------------


def load(
    path: str | Path, recipe: str | Recipe | None = "bf16", mesh: Mesh | None = None, expert_sharding: str = "width"
) -> Model:
    """Read a model that `save` wrote, in the formats of `recipe`.

    path: its directory, or "tiny" for the embedded model. recipe: a name or a Recipe; None keeps the one it was saved
    with. Tensors already in the wanted format are restored straight into their shards of `mesh`; others are converted
    one by one (MXFP4 to NVFP4 without loss, other changes through fp32). Raises ValueError saying what is wrong
    with the directory, the recipe or the mesh.
    """
    directory = _directory(path)
    description, config = _description(directory), ModelConfig.from_hf(directory / "config.json")
    recipe = Recipe(**description["recipe"]) if recipe is None else precision.get(recipe)
    check_mesh(config, mesh, expert_sharding)
    _check_files(directory, description["files"])
    model = Model(None, config, recipe, mesh, expert_sharding, str(directory))
    return dataclasses.replace(model, weights=_restore(directory, model))


def _directory(path: str | Path) -> Path:
    embedded = str(path) == EMBEDDED
    directory = Path(__file__).parent / EMBEDDED if embedded else Path(path)
    if not directory.exists():
        if embedded:
            raise ValueError(f"the embedded model is not part of this installation ({directory} does not exist).")
        raise ValueError(f'{path} does not exist; give a directory written by checkpoints.save, or "{EMBEDDED}".')
    if not directory.is_dir():
        raise ValueError(f"{path} is a file; give the directory of a model written by checkpoints.save.")
    if not (directory / "dsv4.json").is_file():
        if any(directory.glob("*.safetensors*")):
            raise ValueError(
                f"{path} is a Hugging Face checkpoint (safetensors), not one of this package; convert it first "
                "(dsv4 convert), and load what that wrote."
            )
        raise ValueError(
            f"{path} is not a model of this package: it holds no dsv4.json; was it written by checkpoints.save?"
        )
    return directory


def _parse_json(text: str, what: str, way_out: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not readable JSON ({error}); {way_out}.") from error


def _description(directory: Path) -> dict[str, Any]:
    path = directory / "dsv4.json"
    text = path.read_text(encoding="utf-8", errors="replace")
    description = _parse_json(text, str(path), "the checkpoint is damaged: copy or save it again")
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, but this package reads {FORMAT_VERSION} only; load it with the "
            "package that wrote it, or save it again with this one."
        )
    complete = set(description.get("recipe") or ()) == {f.name for f in dataclasses.fields(Recipe)}
    if not complete or not isinstance(description.get("files"), dict):
        raise ValueError(f"{path} lacks the recipe or the files of the checkpoint; it is damaged: copy or save it again.")
    return description


def _check_files(directory: Path, files: dict[str, list[int]]) -> None:
    """ValueError naming the first file of the checkpoint that is missing, cut off or altered."""
    thorough = sum(size for size, _ in files.values()) <= CHECKED_BYTES
    for name, (size, crc32) in files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            trouble = "is missing"
        elif found != size:
            trouble = f"has {found} bytes instead of {size}"
        elif thorough and _crc32(path) != crc32:
            trouble = "was altered: its contents do not match their checksum"
        else:
            continue
        raise ValueError(f"the checkpoint {directory} is damaged: {name} {trouble}. Copy or save it again.")


def _restore(directory: Path, model: Model) -> params.Tree:
    import orbax.checkpoint as ocp

    weights = directory / "weights"
    with ocp.PyTreeCheckpointer(use_ocdbt=True) as checkpointer:
        stored = _reading(directory, lambda: _stored_arrays(checkpointer.metadata(weights.resolve())))
        leaves = _stored_leaves(directory, model.config, stored)
        plan = _Plan.make(model, leaves)
        restore_args = {
            name: ocp.ArrayRestoreArgs(sharding=plan.stored[name], global_shape=s.shape, dtype=s.dtype)
            for name, s in stored.items()
        }
        args = ocp.args.PyTreeRestore(item=stored, restore_args=restore_args)
        arrays = _reading(directory, lambda: checkpointer.restore(weights.resolve(), args=args))
    restored = {name: _from_parts(name, leaf, arrays) for name, leaf in leaves.items()}
    del arrays  # conversion frees what it replaces
    return _converted(model, restored, plan)


def _reading(directory: Path, read):
    """`read()`, with whatever Orbax and TensorStore raise said in a sentence."""
    try:
        return read()
    except (jax.errors.JaxRuntimeError, MemoryError):  # the devices' trouble, not the files'
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].split(" See full")[0][:300]
        raise ValueError(
            f"the checkpoint {directory} is damaged or incomplete: Orbax cannot read {directory / 'weights'} "
            f"({first_line}). Copy or save it again."
        ) from error


def _stored_arrays(metadata) -> dict[str, jax.ShapeDtypeStruct]:
    """name -> shape and dtype of what the Orbax directory holds."""
    if metadata.item_metadata is None:
        raise ValueError("its metadata is missing")
    tree = metadata.item_metadata.tree
    return {name: jax.ShapeDtypeStruct(tuple(array.shape), array.dtype) for name, array in tree.items()}


@functools.lru_cache(maxsize=None)
def _abstract(shape: tuple[int, ...], form: str):
    """A weight of this logical shape and format, as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: params.convert(jnp.zeros(shape, jnp.float32), form))


def _from_parts(name: str, like, arrays: dict[str, Any]):
    """The arrays of one tensor in the structure of `like`."""
    parts = _PARTS.get(type(like))
    return type(like)(**{part: arrays[f"{name}.{part}"] for part in parts}) if parts else arrays[name]


def _stored_leaves(directory: Path, config: ModelConfig, stored: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
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
        for field in _PARTS.get(type(like), ("",)):
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
        one_device = SingleDeviceSharding(jax.devices()[0])

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
            for part in _PARTS.get(type(like), ("",)):
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


def _converted(model: Model, restored: dict[str, Any], plan: _Plan) -> params.Tree:
    """The tree of weights, each tensor in its wanted format; what was restored is freed tensor by tensor."""
    zeroed = {}
    for name, (form, shardings) in plan.wanted.items():
        if params.format_of(restored[name]) != form:
            restored[name], zeroed[name] = _convert(restored[name], form, shardings)
    zeroed = {name: int(count) for name, count in jax.device_get(zeroed).items() if count}
    if zeroed:
        warnings.warn(
            f"NVFP4 cannot hold the smallest scales of {len(zeroed)} tensors (the first is {next(iter(zeroed))}): "
            f"{sum(zeroed.values())} blocks became zero; recipe='official' keeps them.",
            stacklevel=3,
        )
    return params.map_params(lambda name, _: restored[name], model.config)
