"""Random inputs of the interpreter's tests that are the same on every machine, whichever tests ran before.

A record of a device (sim_record.py) is worth something only where the interpreter can be given the same bits again. So the
numbers start anew with each test, seeded by its name, and come from numpy's frozen generator through integers alone: no
function of a libm, no algorithm that a release of numpy may change.
"""

import os
import zlib

import numpy as np


def current_test() -> str:
    """`file.py::test[parameters]` of the test that runs, empty outside of one."""
    name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    path, found, test = name.partition("::")
    return path.rpartition("/")[2] + found + test


class Draws:
    """Like a numpy Generator, as far as the tests need one. Draws made while a file is imported are seeded alike."""

    def __init__(self):
        self._test, self._numbers = None, np.random.RandomState(0)

    def _source(self) -> np.random.RandomState:
        if (test := current_test()) != self._test:
            self._test, self._numbers = test, np.random.RandomState(zlib.crc32(test.encode()))
        return self._numbers

    def integers(self, low, high=None, size=None, dtype=np.int64):
        """Uniform from [low, high), or [0, low)."""
        return self._source().randint(*((0, low) if high is None else (low, high)), size=size, dtype=dtype)

    def normal(self, size=None):
        """Twelve uniform numbers added up: mean 0, deviation 1, multiples of 2^-16."""
        shape = () if size is None else (size,) if isinstance(size, int) else tuple(size)
        return (self.integers(0, 65536, (12, *shape)).sum(0) - 12 * 32768) / 65536.0

    def permutation(self, values):
        values = np.asarray(values)
        return values[np.argsort(self.integers(0, 2**62, len(values)), kind="stable")]
