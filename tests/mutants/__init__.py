"""Defects of one line, injected into our own kernels: what the interpreter must find (see sim_mutants.py).

A mutant replaces one piece of text, which stands once in its file, and names cases that must show the difference: of
`sim_cases.CASES`, or of `drivers.DRIVERS`. Each family has a module with a list MUTANTS.
"""

import dataclasses
import importlib
import pathlib
import pkgutil

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Mutant:
    what: str  # the defect, in a few words
    file: str  # from the root of the repository
    old: str
    new: str
    cases: tuple[str, ...]  # the first one that shows it is enough

    def apply(self, text: str) -> str:
        """The damaged text of its file. ValueError if what it replaces does not stand there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"'{self.what}' replaces text that stands {count} times in {self.file}; write it anew:\n{self.old}")
        return text.replace(self.old, self.new)


def of(file: str, *rows) -> list[Mutant]:
    """Mutants of one file from rows (what, old, new, cases separated by commas)."""
    return [Mutant(what, file, old, new, tuple(cases.split(", "))) for what, old, new, cases in rows]


def all_mutants() -> list[Mutant]:
    """The tables of every family, in the order of the families' names."""
    found = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "MUTANTS", [])
    return found
