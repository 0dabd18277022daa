"""Which published tensors make which parameter, and in which format each is stored: decided tensor by tensor.

`match` needs headers only. It compares every name, shape and dtype with what `dsv4_jax/params.py` declares and lists all
that is unknown, missing, twice there, or of the wrong shape or type. Not here: reading or converting values.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from checkpoints import names
from checkpoints.reader import Entry, Source, SourceError
from dsv4_jax import params
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import Param

FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK = 128, 32, 16
_PLAIN_DTYPES = {"plain": ("BF16", "F32"), "fp32": ("F32", "BF16"), "int32": ("I64", "I32")}
_FORM_OF_DTYPE = {"BF16": "bfloat16", "F32": "float32", "I64": "int64", "I32": "int32"}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One matrix (or vector) of the source that becomes a parameter or one expert of it.

    path: dotted path of our tree. expert: index on the stacked axis, or None for the whole parameter. form: 'fp8',
    'mxfp4', 'nvfp4', 'bfloat16', 'float32', 'int64' or 'int32'. parts: 'data', 'scale', 'global_scale' -> Entry.
    transform: of `names.py`. reciprocal: the value is divided by the global scale, as compressed-tensors stores it.
    """

    path: str
    expert: int | None
    form: str
    parts: dict[str, Entry]
    transform: str
    reciprocal: bool = False

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.parts.values())


@dataclasses.dataclass(frozen=True)
class Matched:
    """A source understood: configuration, declared parameters by path, the pieces of each, and what is left out.

    dropped: tensors that other engines need and this one does not (static activation scales, a DSpark draft).
    """

    config: ModelConfig
    declared: dict[str, Param]
    pieces: dict[str, list[Piece]]
    dropped: list[str]
    notices: list[str]


def declared(config: ModelConfig) -> dict[str, Param]:
    """Every parameter of a model by its dotted path."""
    found: dict[str, Param] = {}
    params.map_params(found.__setitem__, config)
    return found


def _config(source: Source) -> tuple[ModelConfig, bool, list[str]]:
    """(configuration, whether tensors of `mtp.` are those of a DSpark draft, notices)."""
    raw: dict[str, Any] = dict(source.config)
    notices = []
    drafts = {name.split(".")[1] for name in source.tensors if name.startswith("mtp.")}
    count = raw.get("num_nextn_predict_layers", 0)
    dspark = [key for key in raw if "dspark" in key.lower()]
    draft = bool(dspark) or (type(count) is int and count > 1) or bool(drafts - {"0"})
    if draft:
        raw = {key: value for key, value in raw.items() if key not in dspark} | {"num_nextn_predict_layers": 0}
        ratios, layers = raw.get("compress_ratios"), raw.get("num_hidden_layers")
        if isinstance(ratios, list) and type(layers) is int:
            raw["compress_ratios"] = ratios[:layers]
        notices.append(
            f"the DSpark draft (mtp.*, {sum(name.startswith('mtp.') for name in source.tensors)} tensors) is of another "
            "design and is left out: the trunk converts, without a block that drafts"
        )
    if any("engram" in name for name in source.tensors):
        raw["model_type"] = "deepseek_v4.1"  # refused by name, with the way out
    path = source.directory / "config.json"
    try:
        config = ModelConfig.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if config.num_hidden_layers > len(source.tensors):
        raise ValueError(
            f"{path} has num_hidden_layers = {config.num_hidden_layers}, but there are {len(source.tensors)} tensors only; "
            "take the file from the published model."
        )
    return config, draft, notices


def match(source: Source) -> Matched:
    """What each tensor of `source` is, from headers only.

    SourceError lists every tensor that is unknown, missing, twice there, or of the wrong shape or type.
    """
    config, is_draft, notices = _config(source)
    expected = declared(config)
    problems: list[str] = []
    dropped: set[str] = set()
    groups: dict[tuple[str, int | None], dict[str, tuple[Entry, str]]] = {}
    for name, entry in source.tensors.items():
        if is_draft and name.startswith("mtp."):
            dropped.add(name)
            continue
        what = names.meaning(name)
        if what is None:
            problems.append(f"{name} is unknown")
            continue
        for path, transform in zip(what.paths, what.transforms):
            if path not in expected:
                problems.append(f"{name} belongs to no parameter of this configuration")
            elif what.expert is not None and what.expert >= config.n_routed_experts:
                problems.append(f"{name} is beyond the n_routed_experts = {config.n_routed_experts} of config.json")
            else:
                found = groups.setdefault((path, what.expert), {})
                other = found.setdefault(what.suffix, (entry, transform))[0]
                if other is not entry:
                    problems.append(f"{name} is the same tensor as {other.name}")
    pieces: dict[str, list[Piece]] = {path: [] for path in expected}
    seen: dict[str, set[int | None]] = {path: set() for path in expected}
    for (path, expert), found in groups.items():
        seen[path].add(expert)
        piece = _piece(path, expert, expected[path], found, problems, dropped)
        if piece is not None:
            pieces[path].append(piece)
    for path, param in expected.items():
        pieces[path].sort(key=lambda piece: piece.expert or 0)
        problems += _incomplete(path, param, seen[path])
    if problems:
        raise SourceError(source.directory, problems, _way_out(problems, config))
    return Matched(config, expected, pieces, sorted(dropped), source.notices + notices)


def _way_out(problems: list[str], config: ModelConfig) -> str:
    mtp = [p for p in problems if p.startswith("mtp.") and p.endswith("is missing")]
    if len(mtp) == len(problems) and config.num_nextn_predict_layers:
        return "To load the trunk alone, set num_nextn_predict_layers to 0 in config.json and shorten compress_ratios by one."
    return "Was config.json taken from another model, or is a file of another version? Download them again."


def _incomplete(path: str, param: Param, seen: set[int | None]) -> list[str]:
    if param.role != "experts" or not seen:
        return [] if seen else [f"{names.official_name(path).replace('{e}', '*')} is missing"]
    if None in seen:
        return [f"{path} is there as a whole and again expert by expert"] if len(seen) > 1 else []
    missing = (e for e in range(param.shape[0]) if e not in seen)
    count = param.shape[0] - len(seen)
    shown = list(itertools.islice(missing, 3))
    found = [f"{names.official_name(path, e)} is missing" for e in shown]
    return found + ([f"{count - 3} more experts of {path} are missing"] if count > 3 else [])


def _piece(path, expert, param: Param, found: dict[str, tuple[Entry, str]], problems: list[str], dropped: set[str]) -> Piece | None:
    """The format of one weight by the suffixes and dtypes of its parts; problems are appended."""
    transforms = {how for _, how in found.values()}
    entries = {suffix: entry for suffix, (entry, _) in found.items()}
    first = next(iter(entries.values()))
    if len(transforms) > 1:
        problems.append(f"{first.name} and {len(entries) - 1} other parts of it are spelled in two ways")
        return None
    transform = transforms.pop()
    if param.role in _PLAIN_DTYPES:
        if first.dtype not in _PLAIN_DTYPES[param.role]:
            problems.append(f"{first.name} is {first.dtype} instead of {' or '.join(_PLAIN_DTYPES[param.role])}")
            return None
        form, parts, reciprocal = _FORM_OF_DTYPE[first.dtype], {"data": first}, False
    else:
        matching = [(key, spec) for key, spec in names.FORMATS.items() if _fits(entries, spec)]
        if len(matching) != 1:
            held = ", ".join(f"{entry.name.rpartition('.')[2]} {entry.dtype}" for entry in entries.values())
            problems.append(f"{first.name} has the parts ({held}), which are no format that is known")
            return None
        key, spec = matching[0]
        parts = {part: entries[suffix] for part, (suffix, _) in spec.items() if suffix in entries} or {"data": entries[""]}
        parts = {part: parts[part] for part in ("data", "scale", "global_scale", "dropped") if part in parts}
        unused = parts.pop("dropped", None)
        if unused is not None:
            dropped.add(unused.name)
        form = _FORM_OF_DTYPE[parts["data"].dtype] if key == "plain" else key.split(" ")[0]
        reciprocal = "compressed-tensors" in key
    piece = Piece(path, expert, form, parts, transform, reciprocal)
    trouble = _wrong_shapes(piece, param)
    problems += trouble
    return None if trouble else piece


def _fits(entries: dict[str, Entry], spec: dict[str, tuple[str, tuple[str, ...]]]) -> bool:
    suffixes = {suffix: dtypes for suffix, dtypes in spec.values()}
    if "" in entries:  # a stacked tensor of transformers
        return spec is names.FORMATS["plain"] and entries[""].dtype in suffixes[".weight"] and len(entries) == 1
    needed = {suffix for part, (suffix, _) in spec.items() if part != "dropped"}
    return needed <= set(entries) <= set(suffixes) and all(e.dtype in suffixes[s] for s, e in entries.items())


def source_shape(param: Param, transform: str) -> tuple[int, ...]:
    """Logical shape of the published tensor that holds this parameter (or one expert of it, or it and its sibling)."""
    if transform == names.GROUPS:
        return (param.shape[0] * param.shape[1], param.shape[2])
    if transform == names.EXPERT:
        return param.shape[1:]
    if transform in (names.FIRST_HALF, names.SECOND_HALF):
        return (param.shape[0], 2 * param.shape[1], param.shape[2])
    return param.shape


def fp8_scale_shapes(shape: tuple[int, ...], dtype: str) -> list[tuple[int, ...]]:
    """Shapes the scale of an FP8 matrix may have: per 128 x 128; fp32 scales also per row, and for the whole."""
    rows, columns = shape
    blocks = [(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))]
    return blocks if dtype == "F8_E8M0" else blocks + [(rows, 1), (rows,), (1,), ()]


def _wrong_shapes(piece: Piece, param: Param) -> list[str]:
    shape = source_shape(param, piece.transform)
    data = piece.parts["data"]
    block = {"mxfp4": MXFP4_BLOCK, "nvfp4": NVFP4_BLOCK}.get(piece.form)
    wanted: dict[str, list[tuple[int, ...]]] = {"data": [shape]}
    if block is not None:
        if shape[-1] % block:
            return [f"{data.name} is {piece.form}, whose blocks of {block} do not divide its {shape[-1]} columns"]
        wanted = {"data": [(*shape[:-1], shape[-1] // 2)], "scale": [(*shape[:-1], shape[-1] // block)], "global_scale": [(), (1,)]}
        if piece.transform == names.GROUPS:  # our own exports: one per group
            wanted["global_scale"].append(param.shape[:1])
    elif piece.form == "fp8":
        wanted["scale"] = fp8_scale_shapes(shape, piece.parts["scale"].dtype)
    return [
        f"{entry.name} is {entry.dtype} {list(entry.shape)} instead of {' or '.join(str(list(w)) for w in wanted[part])}"
        for part, entry in piece.parts.items()
        if entry.shape not in wanted[part]
    ]
