"""One task of a conversion: read a matrix by slabs of rows, change its format, write it. Memory is bounded by the slab.

Blocks that a lossless conversion would lose, and ids out of range, raise `ValueProblem`, as the values that `matrix.py` refuses.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints import requantize as rq
from checkpoints.matrix import PLAIN, Matrix, ValueProblem
from checkpoints.planning import Task
from checkpoints.reader import Source
from checkpoints.requantize import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, Error

COPY = 2 * 2**20  # bytes that are copied at a time: they stay in the cache between reading and writing
_local = threading.local()


def _buffer(size: int) -> np.ndarray:
    """Bytes that this thread reuses for every copy: fresh memory would cost as much as the copy."""
    if getattr(_local, "buffer", np.empty(0)).size < size:
        _local.buffer = np.empty(size, np.uint8)
    return _local.buffer


@dataclasses.dataclass
class Report:
    """What a conversion did to a tensor. inexact: blocks or values that changed although they should not have."""

    inexact: int = 0
    error: Error | None = None

    def to_json(self) -> list:
        return [self.inexact, None if self.error is None else [self.error.squared_error, self.error.squared_norm, self.error.largest]]

    @classmethod
    def from_json(cls, value: list) -> "Report":
        return cls(value[0], None if value[1] is None else Error(*value[1]))

    def __add__(self, other: "Report") -> "Report":
        errors = [e for e in (self.error, other.error) if e is not None]
        return Report(self.inexact + other.inexact, sum(errors, Error()) if errors else None)


def run(task: Task, source: Source, weights: Path, *, strict: bool, allow_inexact: bool) -> Report:
    """Convert one task into the arrays under `weights`. ValueProblem if its values do not allow that."""
    return _Run(task, Matrix(task, source), weights, strict, allow_inexact).run()


@dataclasses.dataclass
class _Run:
    task: Task
    matrix: Matrix
    weights: Path
    strict: bool
    allow_inexact: bool

    def run(self) -> Report:
        form, target = self.matrix.form, self.task.target
        simple = form in ("mxfp4", "nvfp4") or self.matrix.has_power_of_two_scales
        if target == form == "fp8":
            return self._fp8_to_fp8()
        if target == form == "mxfp4":
            return self._copied_fp4(self.matrix.e8m0())
        if target == form == "nvfp4":
            return self._copied_fp4(*self.matrix.nvfp4_scales())
        if target == "nvfp4":
            return self._mxfp4_to_nvfp4() if form == "mxfp4" else self._fp8_to_nvfp4() if simple else self._to_nvfp4()
        if target in PLAIN and form in PLAIN:
            return self._plain()
        return self._dequantized() if target in PLAIN and simple else self._through_fp32()

    # --- writing -----------------------------------------------------------------------------------------------

    def _write(self, part: str, row: int, block: np.ndarray) -> None:
        """Rows of one array of the task; `block` is [rows, columns] in bytes or in the array's dtype."""
        array = self.task.arrays[part]
        block = block.view(array.dtype)
        if self.task.vector:
            block, start = block.reshape(-1), (row,)
        elif self.task.lead is None:
            start = (row, 0)
        else:
            block, start = block[None], (self.task.lead, row, 0)
        array.write(self.weights, start, block)

    def _write_global(self, value: np.float32) -> None:
        array, lead = self.task.arrays["global_scale"], self.task.lead
        array.write(self.weights, () if lead is None else (lead,), np.full(array.shape and (1,), value, np.float32))

    def _copy(self, columns: int, check=None) -> None:
        data, buffer = self.matrix.data, _buffer(min(self.task.rows * columns, max(COPY, columns)))
        for start, rows in self.matrix.slabs(max(1, COPY // max(columns, 1))):
            block = buffer[: rows * columns]
            self.matrix.source.pread(data.file, data.offset + (self.task.row + start) * columns, memoryview(block))
            block = block.reshape(rows, columns)
            if check:
                check(block)
            self._write("data", start, block)

    # --- from a format to itself, or without loss --------------------------------------------------------------

    def _copied_fp4(self, scale: np.ndarray, global_scale: np.float32 | None = None) -> Report:
        self._copy(self.task.columns // 2)
        self._write("scale", 0, scale)
        if global_scale is not None:
            self._write_global(global_scale)
        return Report()

    def _mxfp4_to_nvfp4(self) -> Report:
        name = self.matrix.data.name
        scale, global_scale, lost = rq.mxfp4_scale_to_nvfp4(self.matrix.e8m0())
        inexact, error = 0, None
        for row in np.flatnonzero(lost.any(1)):  # a block of zeros is exact under any scale
            used = self.matrix.packed(int(row), 1).reshape(-1, MXFP4_BLOCK // 2).any(-1)
            inexact += int((lost[row] & used).sum())
        if inexact and not self.allow_inexact:
            raise ValueProblem(
                f"{name} has {inexact} blocks more than 2**17 below its largest scale, which NVFP4 cannot hold; "
                "--allow-inexact sets them to zero, --recipe official keeps them"
            )
        if inexact:
            error = Error()
            for start, values in self.matrix.numbers():
                gone = np.repeat(lost[start : start + len(values)], MXFP4_BLOCK, axis=1)
                error += Error.between(values, np.where(gone, np.float32(0), values))
        self._copied_fp4(scale, global_scale)
        return Report(inexact, error)

    def _fp8_to_fp8(self) -> Report:
        task = self.task
        _, rows_per_scale, powers = self.matrix.fp8_scale()
        blocks = None if powers is None else _block_rows(powers, rows_per_scale, task.row, task.rows)
        if blocks is None:
            if not self.allow_inexact:
                raise ValueProblem(
                    f"{self.matrix.data.name} has scales that one power of two per 128 x 128 cannot hold; use --recipe nvfp4 or "
                    "bf16, or --allow-inexact to requantize it and report the error"
                )
            return self._through_fp32()
        self._copy(task.columns, self.matrix.magnitudes)
        self._write("scale", 0, blocks)
        return Report()

    # --- conversions -------------------------------------------------------------------------------------------

    def _fp8_to_nvfp4(self) -> Report:
        """From FP8 under powers of two."""
        scale, error = self.matrix.e8m0(), Error()
        global_scale = rq.nvfp4_global_scale(self.matrix.largest_of_fp8(scale))
        self._write_global(global_scale)
        per_block = np.repeat(scale, FP8_BLOCK // NVFP4_BLOCK, axis=1)[:, : self.task.columns // NVFP4_BLOCK]
        for start, rows in self.matrix.slabs():
            codes, of_rows = self.matrix.codes(start, rows, are_checked=True), (self.task.row + np.arange(start, start + rows)) // FP8_BLOCK
            error += self._write_nvfp4(start, rq.fp8_to_nvfp4(codes, per_block[of_rows], global_scale))
        return Report(0, error)

    def _to_nvfp4(self) -> Report:
        """From numbers that are plain, or FP8 under scales that are no powers of two."""
        largest = (rq.largest_magnitude(x) for _, x in self.matrix.numbers())
        global_scale, error = rq.nvfp4_global_scale(max(largest, default=np.float32(0))), Error()
        self._write_global(global_scale)
        for start, numbers in self.matrix.numbers():
            error += self._write_nvfp4(start, rq.encode_nvfp4(numbers, global_scale))
        return Report(0, error)

    def _write_nvfp4(self, start: int, encoded: tuple[np.ndarray, np.ndarray, Error]) -> Error:
        data, scale, lost = encoded
        self._write("data", start, data)
        self._write("scale", start, scale)
        return lost

    def _plain(self) -> Report:
        task, data, inexact = self.task, self.matrix.data, 0
        target = task.arrays[""].dtype
        for start, rows in self.matrix.slabs(max(1, COPY // max(task.columns * data.np_dtype.itemsize, 1))):
            block = self.matrix.plain(start, rows)
            if task.target == "int32":
                bad = int(((block < 0) | (block >= task.bound)).sum())
                if bad:
                    raise ValueProblem(f"{data.name} holds {bad} expert ids outside [0, {task.bound})")
            changed = block if block.dtype == target else self._cast(block, target)
            if block.dtype == np.float32 and target != np.float32:
                inexact += int((changed.astype(np.float32) != block).sum())
            self._write("", start, changed)
        if inexact and self.strict and not self.allow_inexact:
            raise ValueProblem(
                f"{data.name} is fp32, and {inexact} of its values are no bf16 numbers; --recipe fp32 keeps them, "
                "--allow-inexact rounds them"
            )
        return Report(inexact)

    def _cast(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):
            out = values.astype(dtype)
        if dtype == ml_dtypes.bfloat16 and values.dtype == np.float32:
            lost = int(np.count_nonzero((out.view(np.uint16) & np.uint16(0x7FFF)) == 0x7F80) - np.count_nonzero(np.isinf(values)))
            if lost:
                raise ValueProblem(f"{self.matrix.data.name} holds {lost} values beyond what bf16 can hold; --recipe fp32 keeps them")
        return out

    def _dequantized(self) -> Report:
        """FP4, or FP8 under powers of two, to plain numbers."""
        task, matrix, factor = self.task, self.matrix, np.float32(1)
        if matrix.form == "nvfp4":
            codes, factor = matrix.nvfp4_scales()
        else:
            codes = matrix.e8m0()
        occurring, place = np.unique(codes), np.zeros(256, np.uint8)
        place[occurring] = np.arange(len(occurring))
        scales = rq.E4M3[occurring] if matrix.form == "nvfp4" else rq.power_of_two(occurring)
        decoder = rq.Decoder(matrix.form, scales, task.arrays[""].dtype, factor)
        for start, rows in matrix.slabs():
            of_rows = np.arange(start, start + rows)
            if matrix.form == "fp8":
                data, of_rows = matrix.codes(start, rows), (task.row + of_rows) // FP8_BLOCK
            else:
                data = matrix.packed(start, rows)
            self._write("", start, decoder.rows(data, place[codes[of_rows]]))
        if decoder.beyond:
            raise ValueProblem(f"{matrix.data.name} times its scales is beyond what {task.target} can hold")
        return Report(0, decoder.lost)

    def _through_fp32(self) -> Report:
        """To FP8 or MXFP4, or from FP8 under other scales to plain numbers; measures what is lost."""
        total = Error()
        for start, values in self.matrix.numbers():
            values = values.astype(np.float32, copy=False)
            total += Error.between(values, self._encode(start, values))
        return Report(0, total)

    def _encode(self, start: int, values: np.ndarray) -> np.ndarray:
        """Write a slab in the target format; what it holds now, as fp32."""
        target = self.task.target
        if target in PLAIN:
            out = self._cast(values, self.task.arrays[""].dtype)
            self._write("", start, out)
            return out.astype(np.float32)
        if target == "fp8":
            data, scale = rq.encode_fp8(values)
            self._write("scale", start // FP8_BLOCK, scale)
            scale = np.repeat(rq.power_of_two(scale), FP8_BLOCK, axis=0)[: len(values)]
            after = np.take(rq.E4M3, data) * rq.expand_fp8_scale(scale, values.shape[1])
        else:
            data, scale = rq.encode_mxfp4(values)
            self._write("scale", start, scale)
            after = rq.decode_blocks(rq.unpack_e2m1(data), rq.power_of_two(scale))
        self._write("data", start, data)
        return after


def _block_rows(powers: np.ndarray, rows_per_scale: int, row: int, rows: int) -> np.ndarray | None:
    """The e8m0 bytes of the 128-row blocks of rows [row, row + rows), or None where one block would need several."""
    out = []
    for first in range(row, row + rows, FP8_BLOCK):
        last = min(first + FP8_BLOCK, row + rows) - 1
        span = powers[first // rows_per_scale : last // rows_per_scale + 1]
        if (span != span[0]).any():
            return None
        out.append(span[0])
    return np.stack(out)
