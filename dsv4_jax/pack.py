"""Weights of a model in the layout that the kernels of an arch read, and back. Done once, after a restore.

What is packed is visible: quantized weights carry a static `layout`, and ops refuse one they do not take. The layouts
themselves are in `ffi_kernels/layout.py`.
"""

from __future__ import annotations

import dataclasses
import functools

from typing import Any

import jax

import ffi_kernels as ops
from dsv4_jax import params
from dsv4_jax.model import Model
from dsv4_jax.sharding import Context, run_sharded
from ffi_kernels import layout
from ffi_kernels.tensor import LINEAR, layout_of

ARCHS = ("xla", "sim", "sm_90a", "sm_100a")
_PACKED = ("sm_100a",)  # the others read linear weights


def pack_for(model: Model, arch: str) -> Model:
    """`model` with its weights in the layouts that the kernels of `arch` read.

    sm_90a (and sim, xla): the model itself, because their kernels read linear layouts. sm_100a: every NVFP4 weight has
    its block scales in tcgen05 tiles, and w1 and w3 of the routed experts become one tensor under w1 (gate and up
    interleaved by 8 rows), with None under w3; MXFP4, FP8 and plain weights stay linear. On a mesh each device packs
    its own shard. `model` stays valid; `dsv4_jax.load(path, arch=...)` packs without keeping both. Raises ValueError
    for an unknown arch, a model packed before, or rows that cannot be interleaved.
    """
    check_arch(arch)
    packed = sorted(layouts(model) - {LINEAR})
    if packed:
        raise ValueError(f"the model is packed already (layouts {', '.join(packed)}); unpack it first (dsv4_jax.pack.unpack).")
    return model if arch not in _PACKED else _with(model, lambda tensors: pack_tensors(model.context, tensors, arch))


def unpack(model: Model) -> Model:
    """The inverse of `pack_for`, bit for bit: every weight linear. A linear model is returned as it is."""
    return model if layouts(model) == {LINEAR} else _with(model, lambda tensors: _unpack_tensors(model.context, tensors))


def layouts(model: Model) -> set[str]:
    """Names of the layouts that the weights of a model lie in."""
    leaves = jax.tree.leaves(model.weights, is_leaf=lambda leaf: isinstance(leaf, ops.QUANTIZED))
    return {layout_of(leaf) for leaf in leaves}


def check_arch(arch: str) -> None:
    """ValueError unless `arch` is one of ARCHS."""
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r} is not known; choose one of {', '.join(ARCHS)}.")


def pack_tensors(ctx: Context, tensors: dict[str, Any], arch: str) -> None:
    """Pack in place the linear weights of a model, name -> weight, for `arch`; each is replaced as soon as it is packed."""
    if arch not in _PACKED:
        return
    declared = _declared(ctx)
    for name in list(tensors):
        first = name.removesuffix("3") + "1"
        if name.endswith(".experts.w3") and all(isinstance(tensors[n], ops.NVFP4Tensor) for n in (first, name)):
            tensors[first] = _run(ctx, layout.pack_gate_up, declared[name], tensors.pop(first), tensors.pop(name))
            tensors[name] = None
    for name, w in tensors.items():
        if isinstance(w, ops.NVFP4Tensor) and w.layout == LINEAR:
            tensors[name] = _run(ctx, layout.pack_tcgen05, declared[name], w)


def _unpack_tensors(ctx: Context, tensors: dict[str, Any]) -> None:
    declared = _declared(ctx)
    for name, w in tensors.items():
        kind = layout_of(w)
        if kind == layout.TCGEN05_GATE_UP:
            pair = _run(ctx, layout.unpack_gate_up, declared[name], w)
            tensors[name], tensors[name.removesuffix("1") + "3"] = pair
        elif kind == layout.TCGEN05:
            tensors[name] = _run(ctx, layout.unpack_tcgen05, declared[name], w)


def _declared(ctx: Context) -> dict[str, params.Param]:
    declared: dict[str, params.Param] = {}
    params.map_params(declared.__setitem__, ctx.config)
    return declared


def _with(model: Model, change) -> Model:
    """`model` after change(name -> weight), which works in place."""
    tensors: dict[str, Any] = {}
    params.map_params(lambda name, _, leaf: tensors.__setitem__(name, leaf), model.config, model.weights)
    change(tensors)
    return dataclasses.replace(model, weights=params.map_params(lambda name, _: tensors[name], model.config))


def _run(ctx: Context, f, param: params.Param, *weights):
    """f(*weights) on each device's shard; all weights, and those of the result, are split like `param`."""
    if ctx.mesh is None:
        return _local(f, *weights)
    is_weight = lambda leaf: isinstance(leaf, ops.QUANTIZED)  # noqa: E731
    after = jax.tree.map(lambda w: params.spec(ctx, "", param, w), jax.eval_shape(f, *weights), is_leaf=is_weight)
    return _sharded(f, ctx.mesh, tuple(params.spec(ctx, "", param, w) for w in weights), after, *weights)


@functools.partial(jax.jit, static_argnums=0)
def _local(f, *weights):
    return f(*weights)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sharded(f, mesh, in_specs, out_specs, *weights):
    return run_sharded(mesh, f, in_specs, out_specs)(*weights)
