"""How fast a conversion is: against a plain copy of the same bytes through Python in the same run, and per core.

    python -m checkpoints.bench_convert --gb 4

Writes a synthetic official checkpoint with matrices of Flash's size (one layer, as many experts as fit), copies it,
converts it, alternately, and prints a table and one JSON line. Both ends with the bytes on disk (sync).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from checkpoints import layout, matching, names
from checkpoints import requantize as rq
from checkpoints.reader import DTYPES
from ffi_kernels import library

BUFFER = 2 * 2**20
_EXPONENTS = (110, 121)  # e8m0 bytes of the scales: a range that NVFP4 holds


def synthetic_config(gigabytes: float):
    """One CSA layer of Flash with the published vocabulary and as many experts as `gigabytes` allow (6 at least)."""
    from dsv4_jax.config import FLASH

    one = dataclasses.replace(
        FLASH, num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=0, num_nextn_predict_layers=0, n_routed_experts=6
    )
    fixed = sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in official_entries(one))
    expert = 3 * one.hidden_size * one.moe_intermediate_size * 17 // 32
    return dataclasses.replace(one, n_routed_experts=6 + max(0, math.ceil((gigabytes * 1e9 - fixed) / expert)))


def official_entries(config) -> list[tuple[str, str, tuple[int, ...]]]:
    """(published name, dtype, shape) of every tensor of the official format, in the order of our tree."""
    found = []
    for path, param in matching.declared(config).items():
        for expert in range(param.shape[0]) if param.role == "experts" else [None]:
            shape = matching.source_shape(param, names.row_of(path).transform)
            name, scale = names.official_name(path, expert), names.official_name(path, expert, ".scale")
            if param.role in ("linear", "wo_a"):
                found += [(name, "F8_E4M3", shape), (scale, "F8_E8M0", tuple(-(-n // 128) for n in shape))]
            elif param.role == "experts":
                found += [(name, "I8", (shape[0], shape[1] // 2)), (scale, "F8_E8M0", (shape[0], shape[1] // 32))]
            else:
                found.append((name, {"plain": "BF16", "fp32": "F32", "int32": "I64"}[param.role], shape))
    return found


def write_synthetic(directory: Path, config, shards: int = 4) -> int:
    """An official checkpoint of random valid bytes; returns its size in bytes."""
    rng = np.random.default_rng(0)
    values = rng.integers(0x20, 0x5F, 2**24, dtype=np.uint8)  # as e4m3, bf16 and fp32: numbers, none of them nan
    scales = rng.integers(*_EXPONENTS, 2**24, dtype=np.uint8)
    entries, weight_map, total = official_entries(config), {}, 0
    directory.mkdir(parents=True)
    for shard in range(shards):
        file, header, at, order = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", {}, 0, []
        for name, dtype, shape in entries[len(entries) * shard // shards : len(entries) * (shard + 1) // shards]:
            size = math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            weight_map[name], at = file, at + size
            order.append((dtype, size))
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for dtype, size in order:
                pool = np.zeros(2**24, np.uint8) if dtype == "I64" else scales if dtype == "F8_E8M0" else values
                for start in range(0, size, len(pool)):
                    out.write(pool[: min(len(pool), size - start)].data)
            total += out.tell()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config.to_json()))
    return total


def plain_copy(source: Path, destination: Path) -> float:
    """Seconds to copy the files of a directory through Python and have them on disk."""
    destination.mkdir()
    buffer = memoryview(bytearray(BUFFER))
    began = time.perf_counter()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as read, (destination / path.name).open("wb", buffering=0) as write:
            while count := read.readinto(buffer):
                write.write(buffer[:count])
    os.sync()
    return time.perf_counter() - began


def requantize_rates(repeats: int = 5) -> dict[str, float]:
    """MB (10**6 bytes) of published weights without their scales, changed per second of CPU time on one core; in memory, the
    error of FP8 -> NVFP4 and bf16 -> NVFP4 measured on the way."""
    rng = np.random.default_rng(0)
    codes = (rng.standard_normal((2048, 4096)) * 60).clip(-448, 448).astype(layout.E4M3).view(np.uint8)
    scale = np.repeat(np.repeat(rng.integers(*_EXPONENTS, (16, 32), dtype=np.uint8), 128, axis=0), 8, axis=1)
    wide = (rq.E4M3[codes[:1024]] * np.float32(2.0**-10)).astype(layout.BFLOAT16)
    occurring = np.arange(*_EXPONENTS, dtype=np.uint8)
    which = rng.integers(0, len(occurring), (2048, 256), dtype=np.uint8)

    def rate(f, nbytes: int) -> float:
        best = math.inf
        for _ in range(repeats):
            began = time.thread_time()  # of this core alone, whatever else the machine does
            f()
            best = min(best, time.thread_time() - began)
        return nbytes / best / 1e6

    unit = np.float32(1 / 2688)
    return {
        "fp8_to_nvfp4_mb_per_s": rate(lambda: rq.fp8_to_nvfp4(codes, scale, unit), codes.nbytes),
        "bf16_to_nvfp4_mb_per_s": rate(lambda: rq.encode_nvfp4(wide, unit), wide.nbytes),
        "mxfp4_to_bf16_mb_per_s": rate(lambda: rq.Decoder("mxfp4", rq.power_of_two(occurring), layout.BFLOAT16).rows(codes, which), codes.nbytes),
    }


def main(argv: list[str] | None = None) -> int:
    from checkpoints.conversion import convert

    parser = argparse.ArgumentParser(prog="python -m checkpoints.bench_convert", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.0, help="size of the synthetic checkpoint (default: %(default)s; 2.4 at least)")
    parser.add_argument("--dir", type=Path, help="where to write (default: a temporary directory); needs three times --gb")
    parser.add_argument("--recipe", default="official", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="copies and conversions, alternating (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="threads of the conversion")
    args = parser.parse_args(argv)
    rates = requantize_rates()
    base = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=args.dir))
    try:
        size = write_synthetic(base / "source", synthetic_config(args.gb))
        os.sync()
        copies, conversions = [], []
        for _ in range(args.rounds):
            copies.append(plain_copy(base / "source", base / "copy"))
            shutil.rmtree(base / "copy")
            done = convert(base / "source", base / "converted", args.recipe, workers=args.workers)
            conversions.append(done.seconds)
            shutil.rmtree(base / "converted")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    figures = {
        "bytes": size, "recipe": args.recipe, "copy_s": [round(s, 3) for s in copies],
        "convert_s": [round(s, 3) for s in conversions], "ratio": round(min(copies) / min(conversions), 3),
        "copy_mb_per_s": round(size / min(copies) / 1e6), "convert_mb_per_s": round(size / min(conversions) / 1e6),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "requantized_by": "numpy" if library.host_function("dsv4_nvfp4_of_fp8") is None else "the native library",
    } | {name: round(value) for name, value in rates.items()}  # fmt: skip
    for name, value in figures.items():
        print(f"{name:34} {value}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
