"""Runs of native launches as one custom call, in which a kernel starts while the one before it still runs.

XLA replays a step as one graph, but between two custom calls it waits until every multiprocessor is idle. Inside a custom call
the launch layer does not (driver.cpp, dependent.cuh): the next kernel already reads its weights. `chained` therefore joins the
launches of a traced function. Nothing else changes: the same kernels run in the same order on the same buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.extend
import numpy as np

from ffi_kernels import library
from ffi_kernels.dispatch import current

# Primitives whose result has the bytes of their operand, if it has as many of them.
_VIEWS = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "stop_gradient", "copy"}


def chained(function: Callable) -> Callable:
    """`function`, of arrays in pytrees, with its runs of native launches as one custom call each.

    A run ends where something else needs what one of its launches wrote; what needs nothing of it moves before it.
    Without effect on backend xla.
    """

    @functools.wraps(function)
    def joined(*args):
        if current() not in library.NATIVE:
            return function(*args)
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _Evaluation(jaxpr).results(jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return joined


def is_launch(eqn) -> bool:
    """Whether an equation of a jaxpr is a launch of one of our kernels."""
    return eqn.primitive.name == "ffi_call" and eqn.params["target_name"].startswith("dsv4.")


def _is_view(eqn) -> bool:
    return eqn.primitive.name in _VIEWS and len(eqn.invars) == 1 and eqn.invars[0].aval.size == eqn.outvars[0].aval.size


class _Constant:
    """A number that stands in the jaxpr itself; one of its kind, unlike a Literal, which has no hash."""

    def __init__(self, val):
        self.val = val


class _Evaluation:
    """Evaluates a jaxpr equation by equation, but holds launches back until something needs them."""

    def __init__(self, closed):
        self.jaxpr = closed.jaxpr
        self.values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.root = {}  # a view -> what it views
        self.launches = []  # held back: (equation, operands)
        self.views = []  # of their results
        self.written = set()  # their results
        self.updated = set()  # arguments that they update in place

    def results(self, leaves) -> list:
        self.values.update(zip(self.jaxpr.invars, leaves, strict=True))
        for eqn in self.jaxpr.eqns:
            self.evaluate(eqn)
        self.flush()
        return [self.value(v) for v in self.jaxpr.outvars]

    def value(self, var):
        return var.val if isinstance(var, (_Constant, jax.extend.core.Literal)) else self.values[var]

    def of(self, var):
        return _Constant(var.val) if isinstance(var, jax.extend.core.Literal) else self.root.get(var, var)

    def evaluate(self, eqn) -> None:
        operands = [self.of(v) for v in eqn.invars]
        waits = any(v in self.written for v in operands)
        if is_launch(eqn):
            updates = [i for i, _ in eqn.params["input_output_aliases"]]
            donated = {operands[i] for i in updates}
            if any(operands[i].aval.shape != eqn.invars[i].aval.shape for i in updates):  # XLA updates nothing of another shape
                self.flush()
                return self.bind(eqn)
            if donated & self.written or any(v in self.updated for v in operands):
                self.flush()  # needs the bytes from before an update, or updates a result, which has no name outside of the call
            self.launches.append((eqn, operands))
            self.written.update(eqn.outvars)
            self.updated.update(donated)
            return
        if _is_view(eqn):
            self.root[eqn.outvars[0]] = operands[0]
            if waits:
                self.views.append(eqn)
                return
        elif waits:
            self.flush()
        self.bind(eqn)

    def bind(self, eqn) -> None:
        params = eqn.primitive.get_bind_params(eqn.params)
        results = eqn.primitive.bind(*(self.value(v) for v in eqn.invars), **params)
        self.values.update(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))

    def flush(self) -> None:
        """Emits the launches that were held back, and then the views of their results."""
        launches, views = self.launches, self.views
        self.launches, self.views, self.written, self.updated = [], [], set(), set()
        if len(launches) == 1:
            self.bind(launches[0][0])
        elif launches:
            self.bind_all(launches)
        for eqn in views:
            self.bind(eqn)

    def bind_all(self, launches) -> None:
        results = [v for eqn, _ in launches for v in eqn.outvars]
        result_of = {v: i for i, v in enumerate(results)}
        arguments, argument_of, aliases = [], {}, {}
        for _, operands in launches:
            for var in operands:
                if var not in result_of and var not in argument_of:
                    argument_of[var] = len(arguments)
                    arguments.append(self.value(var))
        attributes = {"launches": np.int64(len(launches))}
        for number, (eqn, operands) in enumerate(launches):
            buffers = [argument_of[v] if v in argument_of else len(arguments) + result_of[v] for v in operands]
            buffers += [len(arguments) + result_of[v] for v in eqn.outvars]
            aliases.update({argument_of[operands[i]]: result_of[eqn.outvars[o]] for i, o in eqn.params["input_output_aliases"]})
            own = {name: getattr(value, "val", value) for name, value in eqn.params["attributes"] if name != "launches"}
            own["slots"] = np.asarray([buffers[s] if s >= 0 else -1 for s in own["slots"]], np.int64)
            maps = np.array(own["tensor_maps"], np.int64).reshape(-1, 18)  # the first number of each is its buffer (launch.TensorMap)
            maps[:, 0] = [buffers[b] for b in maps[:, 0]]
            own["tensor_maps"] = maps.reshape(-1)
            attributes.update({f"{name}_{number}" if number else name: value for name, value in own.items()})
        shapes = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in results)
        call = jax.ffi.ffi_call(library.register("chain", current()), shapes, input_output_aliases=aliases)
        self.values.update(zip(results, call(*arguments, **attributes), strict=True))
