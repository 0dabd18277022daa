"""Named cases of the native ops at the shapes of real models: what `dsv4 selftest` checks and `dsv4 bench kernels` times.

Each family has a module with `cases(shapes) -> list[Case]`. Not here: tests of odd shapes and hostile inputs (tests/).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of one model; letters as in the whole project (D model, H heads, K head_dim, E experts, F expert width)."""

    name: str
    hidden: int  # D
    heads: int  # H
    head_dim: int  # K
    rope_dim: int  # R
    q_lora: int
    o_groups: int
    o_lora: int
    index_heads: int
    index_dim: int
    index_topk: int
    window: int
    experts: int  # E
    per_token: int
    expert_width: int  # F
    streams: int  # M
    vocab: int


FLASH = Shapes("flash", 4096, 64, 512, 64, 1024, 8, 1024, 64, 128, 512, 128, 256, 6, 2048, 4, 129280)
PRO = Shapes("pro", 7168, 128, 512, 64, 1536, 16, 1024, 64, 128, 1024, 128, 384, 6, 3072, 4, 129280)
MODELS = {"flash": FLASH, "pro": PRO}


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape.

    make(key) -> tuple of random inputs (a pytree, made under jit on the device). run(*inputs) -> pytree of outputs, by
    the op on the current backend. same(outputs) reduces both results to what must agree, by default everything.
    bytes and flops are what the op cannot do without: each input read once, each output written once.
    bounds: name of the entry of `compare.BOUNDS` that both results must keep. peer: the same work by XLA's libraries
    from the same inputs, for the benchmark, or None. rows: tokens of the step, R. speed: how many times the FLOP of a bf16 product
    the tensor cores do with these operands in the same time. arch: the only native backend that it is a case of, or None.
    refusal() -> a sentence where it cannot run, or None.
    """

    name: str
    op: str
    make: Callable[..., tuple]
    run: Callable[..., Any]
    bytes: int
    flops: int
    bounds: str
    rows: int = 1
    same: Callable[[Any], Any] = lambda outputs: outputs
    peer: Callable[..., Any] | None = None
    speed: int = 1
    arch: str | None = None
    refusal: Callable[[], str | None] = lambda: None


def all_cases(shapes: Shapes) -> list[Case]:
    """The cases of every family, in the order of the families' names."""
    found = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found += importlib.import_module(f"{__name__}.{module.name}").cases(shapes)
    return found
