"""The ring of weights, the sums of a team and the staged inputs of linear and experts (include/ring.cuh, stage.cuh, tile.cuh)."""

from mutants import of

RING, STAGE, TILE = (f"ffi_kernels/native/include/{name}.cuh" for name in ("ring", "stage", "tile"))

MUTANTS = [
    *of(
        RING,
        ("waits for one slot too few", "copy_async_wait<ahead - 1>();", "copy_async_wait<ahead>();", "linear nvfp4, experts nvfp4"),
        ("no __syncwarp after the wait for a slot", "copy_async_wait<ahead - 1>();\n    __syncwarp();", "copy_async_wait<ahead - 1>();", "linear nvfp4"),
        ("the other slot is refilled", "if (ahead == kRing) refill(slot == slots ? slots + (kRing - 1) * kSlot : slot - kSlot);", "if (ahead == kRing) refill(slot);", "linear nvfp4 turns"),
        ("the ring never wraps", "slot = slot == slots + (kRing - 1) * kSlot ? slots : slot + kSlot", "slot = slot + kSlot", "linear nvfp4 turns"),
        ("the last slot is not filled at the start", "if (filled >= most ||", "if (filled >= most - 1 ||", "linear nvfp4"),
        ("no group where nothing was copied", "    copy_async_commit();  // also when empty", "    if (unit < units) copy_async_commit();  // also when empty", "linear nvfp4"),
        ("scales of NVFP4 of the wrong unit", "scale += step * 32;", "scale += step * 16;", "linear nvfp4 alone"),
        ("scales of MXFP4 of the wrong unit", "scale += step * 16;", "scale += step * 8;", "linear mxfp4 alone"),
        ("one byte of a word of FP8 scales", "~uint64_t(3)), 4);", "~uint64_t(3)), 1);", "linear fp8"),
        ("an FP8 scale at the end of its word", "<< (8 * (byte & 3)) : 0", "<< 24 : 0", "linear ragged fp8"),
        ("FP8 scales behind the end of their row", "unit * 2 + id < scale_bytes ? uint32_t(*scale)", "true ? uint32_t(*scale)", "linear ragged fp8"),
        ("every warp of a team reads the first unit", "(id >> 3) * w.row_bytes + unit * kUnit + (id & 7) * 16", "(id >> 3) * w.row_bytes + (id & 7) * 16", "linear nvfp4"),
        ("16 bytes behind the end of a row", "unit * kUnit + 128 < bytes", "unit * kUnit + 128 <= bytes", "linear ragged bf16"),
        ("rows behind the end of a matrix", "const bool row = whole || (id >> 3) + 4 * i < rows;", "const bool row = true;", "linear ragged bf16"),
        ("the barrier of a team waits for another one's warps", '>> split_log2), "r"(32 << split_log2)', '>> split_log2), "r"(64 << split_log2)', "linear nvfp4"),
        ("all teams share a barrier", '"r"((kTileWarps + int(warp_id())) >> split_log2)', '"r"(kTileWarps >> split_log2)', "linear many ragged, linear grouped"),
        ("the sum leaves a warp out", "s < 1 << split_log2; ++s", "s + 1 < 1 << split_log2; ++s", "linear nvfp4"),
        ("the lower rows of a warp's sums overlap the upper ones", "(g + 8) * kColumns + 2 * t", "(g + 4) * kColumns + 2 * t", "linear bf16"),
        ("MXFP4 sums lack their factor", "if (format >= kMxfp4)", "if (format > kMxfp4)", "linear mxfp4"),
    ),
    *of(
        STAGE,
        ("no barrier between the largest magnitudes and the global scale", "atomicMax(amax + c.row, most);\n      });\n      __syncthreads();", "atomicMax(amax + c.row, most);\n      });", "linear ragged nvfp4"),
        ("no barrier after the magnitudes are cleared", "amax[i] = 0;\n      __syncthreads();\n      each(", "amax[i] = 0;\n      each(", "linear ragged nvfp4"),
        ("no barrier between the global scale and its use", "    if (global) __syncthreads();  // the chunks", "    // the chunks", "linear nvfp4"),
        ("the inputs are not swizzled", "column_chunk(c.k / 8) * 16)", "(c.k / 8) * 16)", "linear bf16"),
        ("scales of FP8 inputs in the wrong column", "out.scale[k / 128 * kColumns + column] = power_of_two(exponent);", "out.scale[k / 128 * kColumns] = power_of_two(exponent);", "linear fp8"),
        ("scales of given FP8 inputs of the wrong block", "in.scale[row * ((in.k + 127) / 128) + k / 128]", "in.scale[row * ((in.k + 127) / 128)]", "linear fp8 given"),
        ("a chunk behind the end of a row of inputs", "if (k >= in.k) return raw;", "if (k > in.k) return raw;", "linear ragged bf16"),
        ("chunks are taken twice", "k += kTileThreads * 8;", "k += kTileThreads * 4;", "linear ragged nvfp4, experts batches"),
        ("the global scale of another row", "nvfp4_global_scale(amax[i]) : r.in", "nvfp4_global_scale(amax[0]) : r.in", "linear nvfp4"),
        ("the padding of a column is not cleared", "r.column >= 0 && c.k < padded_k(r.in.k)) use(r, c, raw[i])", "r.column >= 0 && c.k < r.in.k) use(r, c, raw[i])", "linear ragged bf16"),
    ),
    *of(
        TILE,
        ("another swizzle of the slots", "((row & 1) << 2) | ((row >> 1) & 3)", "((row & 1) << 2) | (row & 3)", "linear bf16"),
        ("slots are written without the swizzle", "swizzled(row, lane & 7) * 16", "(lane & 7) * 16", "linear bf16"),
        ("the slot is filled again before all of it is read", "  const Lane& lane = ring.lane;\n", "  const Lane& lane = ring.lane;\n  ring.release();\n", "linear fp8 turns, linear nvfp4 turns"),
        ("the lower rows of a tile come from one row above", "high[s] = load16(slot + (lane.chunk ^ (s * 64)) + 8 * kUnit);", "high[s] = load16(slot + (lane.chunk ^ (s * 64)) + 7 * kUnit);", "linear bf16"),
        ("the wrong byte of a word of FP8 scales", "block * 4) >> (8 * (address & 3)))", "block * 4) >> 24)", "linear ragged fp8, linear fp8"),
        ("MXFP4 scales of the upper rows for the lower ones", "load4(scales + 8 * 16 + s * 4)", "load4(scales + s * 4)", "linear mxfp4"),
        ("NVFP4 scales of the wrong blocks", "low_scales[j] = e4m3x2_to_f16x2(load2(scales + s * 8));", "low_scales[j] = e4m3x2_to_f16x2(load2(scales + s * 4));", "linear nvfp4"),
        ("the block's scale of FP8 inputs for the next block", "in.scale + (2 * unit + block) * kColumns * 4", "in.scale + (2 * unit) * kColumns * 4", "linear fp8"),
    ),
]  # fmt: skip
