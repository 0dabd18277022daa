"""One published matrix as a task of a conversion meets it: rows, scales and numbers, read by slabs and checked.

Values that no checkpoint should hold (scales or weights that are not numbers) raise `ValueProblem`, a sentence.
Not here: changing formats (`transcode.py`, `requantize.py`), bytes of files (`reader.py`).
"""

from __future__ import annotations

import math
from typing import Iterator

import ml_dtypes
import numpy as np

from checkpoints import requantize as rq
from checkpoints.planning import Task
from checkpoints.reader import Entry, Source
from checkpoints.requantize import FP8_BLOCK

SLAB = 2**20  # elements that are converted at a time: what they need mostly stays in the cache
PLAIN = ("bfloat16", "float32", "int32", "int64")


class ValueProblem(ValueError):
    """A value that stops the conversion; says which and how many."""


class Matrix:
    """The rows of a task. form: of the source; data, scale: where its parts lie."""

    def __init__(self, task: Task, source: Source):
        self.task, self.source = task, source
        self.form, self.data, self.scale = task.piece.form, task.piece.parts["data"], task.piece.parts.get("scale")
        self._rows_per_slab = max(FP8_BLOCK, SLAB // max(task.columns, 1) // FP8_BLOCK * FP8_BLOCK)

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether its dtype says so; fp32 scales may be powers of two all the same."""
        return self.scale is not None and self.scale.dtype == "F8_E8M0"

    def slabs(self, rows_at_once: int | None = None) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of the parts that are in memory at a time."""
        step = rows_at_once or self._rows_per_slab
        for start in range(0, self.task.rows, step):
            yield start, min(step, self.task.rows - start)

    def slabs_of_scales(self) -> Iterator[tuple[int, int]]:
        """Slabs that lie within one row of 128 x 128 blocks of the source."""
        start = 0
        while start < self.task.rows:
            stop = min(self.task.rows, start + FP8_BLOCK - (self.task.row + start) % FP8_BLOCK)
            yield start, stop - start
            start = stop

    def _read(self, entry: Entry, start: int, rows: int, columns: int, dtype=np.uint8) -> np.ndarray:
        """Rows [start, start + rows) of the task, from an entry with this many columns."""
        first = (self.task.row + start) * columns
        return self.source.read_flat(entry, first, first + rows * columns).view(dtype).reshape(rows, columns)

    # --- data --------------------------------------------------------------------------------------------------

    def packed(self, start: int, rows: int) -> np.ndarray:
        """Rows of FP4 data, two codes to a byte."""
        return self._read(self.data, start, rows, self.task.columns // 2)

    def codes(self, start: int, rows: int, are_checked: bool = False) -> np.ndarray:
        """Rows of FP8 data, e4m3 bytes."""
        codes = self._read(self.data, start, rows, self.task.columns)
        if not are_checked:
            self.magnitudes(codes)
        return codes

    def magnitudes(self, codes: np.ndarray) -> np.ndarray:
        """e4m3 bytes without their signs."""
        magnitudes = codes & np.uint8(0x7F)
        if magnitudes.max(initial=0) == 0x7F:
            bad = int(np.count_nonzero(magnitudes == 0x7F))
            raise ValueProblem(f"{self.data.name} holds {bad} weights that are not a number (the e4m3 code 0x7F)")
        return magnitudes

    def plain(self, start: int, rows: int) -> np.ndarray:
        """Rows of plain data in the dtype it has."""
        block = self._read(self.data, start, rows, self.task.columns, self.data.np_dtype)
        bad = 0
        if block.dtype == ml_dtypes.bfloat16:
            bad = int(np.count_nonzero((block.view(np.uint16) & np.uint16(0x7FFF)) > 0x7F80))
        elif block.dtype == np.float32:
            bad = int(np.count_nonzero(np.isnan(block)))
        if bad:
            raise ValueProblem(f"{self.data.name} holds {bad} values that are not a number")
        return block

    # --- scales ------------------------------------------------------------------------------------------------

    def e8m0(self) -> np.ndarray:
        """Biased exponents: of the task's rows (MXFP4), or of all blocks of the tensor (FP8)."""
        entry = self.scale
        start, rows = (0, entry.shape[0]) if self.form == "fp8" else (self.task.row, self.task.rows)
        columns = entry.shape[-1]
        scale = self.source.read_flat(entry, start * columns, (start + rows) * columns).view(np.uint8).reshape(rows, columns)
        bad = int((scale == 255).sum())
        if bad:
            raise ValueProblem(f"{entry.name} holds {bad} scales that are not a number (the e8m0 byte 255)")
        return scale

    def fp8_scale(self) -> tuple[np.ndarray, int, np.ndarray | None]:
        """(fp32 scale [rows of scales, K/128], rows of the source per row of scales, e8m0 bytes if all are powers of two)."""
        entry = self.scale
        if self.has_power_of_two_scales:
            scale = self.e8m0()
            return rq.power_of_two(scale), FP8_BLOCK, scale
        scale = self.source.read(entry).astype(np.float32)
        bad = int((~(np.isfinite(scale) & (scale > 0))).sum())
        if bad:
            raise ValueProblem(f"{entry.name} holds {bad} scales that are not positive numbers")
        total, width = self.data.shape[0], -(-self.task.columns // FP8_BLOCK)
        if entry.shape == (-(-total // FP8_BLOCK), width):
            rows = FP8_BLOCK
        elif scale.size == 1:  # one for all
            scale, rows = np.full((1, width), scale.reshape(()), np.float32), total
        else:  # one per row
            scale, rows = np.repeat(scale.reshape(total, 1), width, axis=1), 1
        mantissa, exponent = np.frexp(scale)
        fits = (mantissa == 0.5).all() and (np.abs(exponent - 1) <= 127).all()
        return scale, rows, (exponent + 126).astype(np.uint8) if fits else None

    def nvfp4_scales(self) -> tuple[np.ndarray, np.float32]:
        """(e4m3 bytes of the task's blocks, global scale as a factor)."""
        entry = self.scale
        scale = self._read(entry, 0, self.task.rows, entry.shape[-1])
        bad = int((scale > 0x7E).sum())  # the sign, or not a number
        if bad:
            raise ValueProblem(f"{entry.name} holds {bad} block scales that are negative or not a number")
        entry = self.task.piece.parts["global_scale"]
        values = self.source.read(entry).reshape(-1)  # of wo_a, one per group where they differ
        value = np.float32(values[self.task.lead if values.size > 1 else 0])
        with np.errstate(all="ignore"):
            wanted = np.float32(1) / value if self.task.piece.reciprocal else value
        if not (np.isfinite(value) and 2.0**-126 <= wanted < math.inf):
            raise ValueProblem(f"{entry.name} is {value}, which is no positive normal number")
        return scale, wanted

    # --- numbers -----------------------------------------------------------------------------------------------

    def largest_of_fp8(self, scale: np.ndarray) -> np.float32:
        """The largest magnitude under e8m0 bytes of all blocks of the tensor."""
        powers, amax = rq.power_of_two(scale), np.float32(0)
        for start, rows in self.slabs_of_scales():
            largest = np.zeros(scale.shape[1] * FP8_BLOCK, np.uint8)
            largest[: self.task.columns] = self.magnitudes(self.codes(start, rows, are_checked=True)).max(0)
            with np.errstate(over="ignore"):  # refused below
                tiles = rq.E4M3[largest.reshape(-1, FP8_BLOCK).max(1)] * powers[(self.task.row + start) // FP8_BLOCK]
            amax = max(amax, tiles.max())
        self._refuse_infinite(amax)
        return amax

    def _refuse_infinite(self, amax: np.float32) -> None:
        if not np.isfinite(amax):
            raise ValueProblem(f"{self.data.name} times its scales is beyond what fp32 can hold")

    def numbers(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, finite numbers) of each slab: plain ones in their dtype, others in fp32."""
        columns = self.task.columns
        if self.form in PLAIN:
            for start, rows in self.slabs():
                block = self.plain(start, rows)
                if not np.isfinite(rq.largest_magnitude(block)):
                    raise ValueProblem(f"{self.data.name} holds infinite values, which only the recipes bf16 and fp32 keep")
                yield start, block
            return
        factor, rows_per_scale = np.float32(1), 1
        if self.form == "fp8":
            scale, rows_per_scale, _ = self.fp8_scale()
        elif self.form == "mxfp4":
            scale = rq.power_of_two(self.e8m0())
        else:
            codes, factor = self.nvfp4_scales()
            scale = rq.E4M3[codes]
        for start, rows in self.slabs():
            with np.errstate(over="ignore"):  # refused below
                if self.form == "fp8":
                    which = (self.task.row + np.arange(start, start + rows)) // rows_per_scale
                    values = np.take(rq.E4M3, self.codes(start, rows)) * rq.expand_fp8_scale(scale[which], columns)
                else:
                    values = rq.decode_blocks(rq.unpack_e2m1(self.packed(start, rows)), scale[start : start + rows])
                    values *= factor
            self._refuse_infinite(rq.largest_magnitude(values))
            yield start, values
