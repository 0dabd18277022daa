"""One task of a conversion: read a matrix by slabs of rows, check its values, change its format, write it.

Memory is bounded by the slab, not by the tensor. Values that no checkpoint should hold (scales or weights that are not
numbers, ids out of range) and blocks that a lossless conversion would lose raise `ValueProblem`, a sentence.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints import requantize as rq
from checkpoints.planning import Task
from checkpoints.reader import Entry, Source
from checkpoints.requantize import FP8_BLOCK, Error

SLAB = 4 * 2**20  # elements that are converted at a time
COPY = 2 * 2**20  # bytes that are copied at a time: they stay in the cache between reading and writing
_local = threading.local()


def _buffer(size: int) -> np.ndarray:
    """Bytes that this thread reuses for every copy: fresh memory would cost as much as the copy."""
    if getattr(_local, "buffer", np.empty(0)).size < size:
        _local.buffer = np.empty(size, np.uint8)
    return _local.buffer


class ValueProblem(ValueError):
    """A value that stops the conversion; says which and how many."""


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
    return _Run(task, source, weights, strict, allow_inexact).run()


class _Run:
    def __init__(self, task: Task, source: Source, weights: Path, strict: bool, allow_inexact: bool):
        self.task, self.source, self.weights = task, source, weights
        self.strict, self.allow_inexact = strict, allow_inexact
        self.form, self.data = task.piece.form, task.piece.parts["data"]
        self.scale_entry = task.piece.parts.get("scale")
        self.rows_per_slab = max(FP8_BLOCK, SLAB // max(task.columns, 1) // FP8_BLOCK * FP8_BLOCK)

    def run(self) -> Report:
        pair = (self.form, self.task.target)
        if pair == ("fp8", "fp8"):
            return self._fp8_to_fp8()
        if pair == ("mxfp4", "mxfp4"):
            return self._copied_fp4(self._e8m0(self.scale_entry, self.task.row, self.task.rows))
        if pair == ("nvfp4", "nvfp4"):
            scale, global_scale = self._nvfp4_scales()
            return self._copied_fp4(scale, global_scale)
        if pair == ("mxfp4", "nvfp4"):
            return self._mxfp4_to_nvfp4()
        if pair == ("fp8", "nvfp4") and self.scale_entry.dtype == "F8_E8M0" and self.task.columns % rq.NVFP4_BLOCK == 0:
            return self._fp8_to_nvfp4()
        if self.form in ("bfloat16", "float32", "int32", "int64") and self.task.target in ("bfloat16", "float32", "int32"):
            return self._plain()
        return self._through_fp32()

    # --- reading and writing -----------------------------------------------------------------------------------

    def _read(self, entry: Entry, start: int, rows: int, columns: int, dtype=np.uint8) -> np.ndarray:
        """Rows [start, start + rows) of the task, from an entry with this many columns."""
        first = (self.task.row + start) * columns
        return self.source.read_flat(entry, first, first + rows * columns).view(dtype).reshape(rows, columns)

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

    def _slabs(self, rows_at_once: int | None = None):
        step = rows_at_once or self.rows_per_slab
        for start in range(0, self.task.rows, step):
            yield start, min(step, self.task.rows - start)

    def _copy(self, columns: int, check=None) -> None:
        buffer = _buffer(min(self.task.rows * columns, max(COPY, columns)))
        for start, rows in self._slabs(max(1, COPY // max(columns, 1))):
            block = buffer[: rows * columns]
            offset = self.data.offset + (self.task.row + start) * columns
            self.source.pread(self.data.file, offset, memoryview(block))
            block = block.reshape(rows, columns)
            if check:
                check(block)
            self._write("data", start, block)

    # --- scales ------------------------------------------------------------------------------------------------

    def _e8m0(self, entry: Entry, start: int, rows: int) -> np.ndarray:
        columns = entry.shape[-1]
        scale = self.source.read_flat(entry, start * columns, (start + rows) * columns).view(np.uint8).reshape(rows, columns)
        bad = int((scale == 255).sum())
        if bad:
            raise ValueProblem(f"{entry.name} holds {bad} scales that are not a number (the e8m0 byte 255)")
        return scale

    def _fp8_scale(self) -> tuple[np.ndarray, int, np.ndarray | None]:
        """(fp32 scale [rows of scales, K/128], rows of the source per row of scales, e8m0 bytes if all are powers of two)."""
        entry = self.scale_entry
        if entry.dtype == "F8_E8M0":
            scale = self._e8m0(entry, 0, entry.shape[0])
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

    def _nvfp4_scales(self) -> tuple[np.ndarray, np.float32]:
        entry = self.scale_entry
        columns = entry.shape[-1]
        scale = self._read(entry, 0, self.task.rows, columns)
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

    # --- from a format to itself, or without loss --------------------------------------------------------------

    def _copied_fp4(self, scale: np.ndarray, global_scale: np.float32 | None = None) -> Report:
        self._copy(self.task.columns // 2)
        self._write("scale", 0, scale)
        if global_scale is not None:
            self._write_global(global_scale)
        return Report()

    def _mxfp4_to_nvfp4(self) -> Report:
        scale, global_scale, lost = rq.mxfp4_scale_to_nvfp4(self._e8m0(self.scale_entry, self.task.row, self.task.rows))
        inexact = 0
        for row in np.flatnonzero(lost.any(1)):
            used = self._read(self.data, int(row), 1, self.task.columns // 2).reshape(-1, rq.MXFP4_BLOCK // 2).any(-1)
            inexact += int((lost[row] & used).sum())
        if inexact and not self.allow_inexact:
            raise ValueProblem(
                f"{self.data.name} has {inexact} blocks more than 2**17 below its largest scale, which NVFP4 cannot hold; "
                "--allow-inexact sets them to zero, --recipe official keeps them"
            )
        self._copied_fp4(scale, global_scale)
        return Report(inexact)

    def _fp8_to_fp8(self) -> Report:
        task = self.task
        _, rows_per_scale, powers = self._fp8_scale()
        blocks = None if powers is None else _block_rows(powers, rows_per_scale, task.row, task.rows)
        if blocks is None:
            if not self.allow_inexact:
                raise ValueProblem(
                    f"{self.data.name} has scales that one power of two per 128 x 128 cannot hold; use --recipe nvfp4 or "
                    "bf16, or --allow-inexact to requantize it and report the error"
                )
            return self._through_fp32()
        self._copy(task.columns, self._refuse_nan_codes)
        self._write("scale", 0, blocks)
        return Report()

    def _refuse_nan_codes(self, codes: np.ndarray) -> None:
        bad = int(np.count_nonzero((codes & np.uint8(0x7F)) == 0x7F))
        if bad:
            raise ValueProblem(f"{self.data.name} holds {bad} weights that are not a number (the e4m3 code 0x7F)")

    # --- conversions -------------------------------------------------------------------------------------------

    def _fp8_to_nvfp4(self) -> Report:
        task = self.task
        entry = self.scale_entry
        first = task.row // FP8_BLOCK
        bytes_ = self._e8m0(entry, first, -(-(task.row + task.rows) // FP8_BLOCK) - first)
        powers = rq.power_of_two(bytes_)
        amax = np.float32(0)
        for start, rows in self._block_slabs():
            codes = self._read(self.data, start, rows, task.columns)
            self._refuse_nan_codes(codes)
            largest = np.zeros(bytes_.shape[1] * FP8_BLOCK, np.uint8)
            largest[: task.columns] = np.maximum.reduce(codes & np.uint8(0x7F), axis=0)
            tiles = rq.E4M3[largest.reshape(-1, FP8_BLOCK).max(1)]
            with np.errstate(over="ignore"):
                amax = max(amax, (tiles * powers[(task.row + start) // FP8_BLOCK - first]).max())
        if not np.isfinite(amax):
            raise ValueProblem(f"{self.data.name} times its scales is beyond what fp32 can hold")
        converter = rq.FP8ToNVFP4(bytes_, float(amax))
        per_block = np.repeat(bytes_, FP8_BLOCK // rq.NVFP4_BLOCK, axis=1)[:, : task.columns // rq.NVFP4_BLOCK]
        for start, rows in self._slabs():
            codes = self._read(self.data, start, rows, task.columns)
            row_blocks = (task.row + np.arange(start, start + rows)) // FP8_BLOCK - first
            data, scale = converter.rows(codes, per_block[row_blocks])
            self._write("data", start, data)
            self._write("scale", start, scale)
        self._write_global(converter.global_scale)
        return Report(0, converter.error())

    def _block_slabs(self):
        """Slabs that lie within one row of 128 x 128 blocks of the source."""
        start = 0
        while start < self.task.rows:
            stop = min(self.task.rows, start + FP8_BLOCK - (self.task.row + start) % FP8_BLOCK)
            yield start, stop - start
            start = stop

    def _plain(self) -> Report:
        task, inexact = self.task, 0
        target = task.arrays[""].dtype
        size = self.data.np_dtype.itemsize
        for start, rows in self._slabs(max(1, COPY // max(task.columns * size, 1))):
            block = self._read(self.data, start, rows, task.columns, self.data.np_dtype)
            if task.target == "int32":
                bad = int(((block < 0) | (block >= task.bound)).sum())
                if bad:
                    raise ValueProblem(f"{self.data.name} holds {bad} expert ids outside [0, {task.bound})")
            else:
                self._refuse_nan(block)
            changed = block if block.dtype == target else self._cast(block, target)
            if block.dtype == np.float32 and target != np.float32:
                inexact += int((changed.astype(np.float32) != block).sum())
            self._write("", start, changed)
        if inexact and self.strict and not self.allow_inexact:
            raise ValueProblem(
                f"{self.data.name} is fp32, and {inexact} of its values are no bf16 numbers; --recipe fp32 keeps them, "
                "--allow-inexact rounds them"
            )
        return Report(inexact)

    def _refuse_nan(self, block: np.ndarray) -> None:
        if block.dtype == ml_dtypes.bfloat16:
            bad = int(np.count_nonzero((block.view(np.uint16) & np.uint16(0x7FFF)) > 0x7F80))
        else:
            bad = int(np.count_nonzero(np.isnan(block)))
        if bad:
            raise ValueProblem(f"{self.data.name} holds {bad} values that are not a number")

    def _cast(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):
            out = values.astype(dtype)
        if dtype == ml_dtypes.bfloat16 and values.dtype == np.float32:
            lost = int(np.count_nonzero((out.view(np.uint16) & np.uint16(0x7FFF)) == 0x7F80) - np.count_nonzero(np.isinf(values)))
            if lost:
                raise ValueProblem(f"{self.data.name} holds {lost} values beyond what bf16 can hold; --recipe fp32 keeps them")
        return out

    def _through_fp32(self) -> Report:
        """Any format to any other: decode a slab to fp32, encode it, and measure what was lost."""
        task, total = self.task, Error()
        global_scale = None
        if task.target == "nvfp4":
            global_scale = rq.nvfp4_global_scale(max(float(np.abs(x).max(initial=0)) for _, x in self._decoded()))
            self._write_global(global_scale)
        for start, values in self._decoded():
            after = self._encode(start, values, global_scale)
            total += Error.between(values, after)
        return Report(0, total)

    def _decoded(self):
        """(first row, fp32 values) of each slab."""
        task, columns = self.task, self.task.columns
        if self.form == "fp8":
            scale, rows_per_scale, _ = self._fp8_scale()
        elif self.form == "mxfp4":
            scale = rq.power_of_two(self._e8m0(self.scale_entry, task.row, task.rows))
        elif self.form == "nvfp4":
            scale, global_scale = self._nvfp4_scales()
        for start, rows in self._slabs():
            if self.form in ("bfloat16", "float32"):
                block = self._read(self.data, start, rows, columns, self.data.np_dtype)
                self._refuse_nan(block)
                values = block.astype(np.float32)
            elif self.form == "fp8":
                codes = self._read(self.data, start, rows, columns)
                self._refuse_nan_codes(codes)
                which = (task.row + np.arange(start, start + rows)) // rows_per_scale
                with np.errstate(over="ignore"):  # refused below
                    values = rq.E4M3[codes] * rq.expand_fp8_scale(scale[which], columns)
            else:
                values = rq.unpack_e2m1(self._read(self.data, start, rows, columns // 2))
                block_scale = scale[start : start + rows]
                if self.form == "mxfp4":
                    values = rq.decode_blocks(values, block_scale)
                else:
                    values = rq.decode_blocks(values, rq.E4M3[block_scale]) * global_scale
            if not np.isfinite(values).all():
                raise ValueProblem(f"{self.data.name} times its scales is beyond what fp32 can hold")
            yield start, values

    def _encode(self, start: int, values: np.ndarray, global_scale) -> np.ndarray:
        """Write a slab in the target format; what it holds now, as fp32."""
        target = self.task.target
        if target in ("bfloat16", "float32"):
            out = self._cast(values, self.task.arrays[""].dtype)
            self._write("", start, out)
            return out.astype(np.float32)
        if target == "fp8":
            data, scale = rq.encode_fp8(values)
            self._write("scale", start // FP8_BLOCK, scale)
            scale = np.repeat(rq.power_of_two(scale), FP8_BLOCK, axis=0)[: len(values)]
            after = rq.E4M3[data] * rq.expand_fp8_scale(scale, values.shape[1])
        elif target == "mxfp4":
            data, scale = rq.encode_mxfp4(values)
            self._write("scale", start, scale)
            after = rq.decode_blocks(rq.unpack_e2m1(data), rq.power_of_two(scale))
        else:
            data, scale = rq.encode_nvfp4(values, global_scale)
            self._write("scale", start, scale)
            after = rq.decode_blocks(rq.unpack_e2m1(data), rq.E4M3[scale]) * global_scale
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
