"""Rows: norms, quantizers, cache entries, routing, index scores."""

from mutants import of

NORM, QUANTIZE, ROUTER, INDEXER, ENTRIES = (f"ffi_kernels/native/cuda/{name}.cu" for name in ("norm", "quantize", "router", "indexer", "entries"))
CODES, WARP_ROW, SCORES, INTEGERS = (f"ffi_kernels/native/include/{name}.cuh" for name in ("row_codes", "warp_row", "index_scores", "index_integers"))
WGMMA = "ffi_kernels/native/sm90a/indexer_wgmma.cu"

MUTANTS = [
    *of(
        NORM,
        ("Hadamard: no barrier between the steps", "    __syncthreads();\n    for (int pair", "    for (int pair", "norm hadamard"),
        ("Hadamard: a difference the wrong way round", "values[i + step] = a - b;", "values[i + step] = b - a;", "norm hadamard"),
        ("RoPE: the angles of another row", "(row / p.repeat) % p.count", "row % p.count", "norm rope"),
        ("RoPE: rows behind the end", "  if (row >= p.rows) return;\n  Pack x", "  Pack x", "norm rope"),
    ),
    *of(
        CODES,
        ("no barrier between the warps' sums and their total", "scratch[warp_id()] = x;\n  __syncthreads();\n  return warp_sum", "scratch[warp_id()] = x;\n  return warp_sum", "norm rms"),
        ("no barrier between the warps' maxima and theirs", "scratch[warp_id()] = x;\n  __syncthreads();\n  return warp_max", "scratch[warp_id()] = x;\n  return warp_max", "norm rms"),
        ("every second scale of NVFP4", "if (at % kNvfp4Block == 0)", "if (at % (2 * kNvfp4Block) == 0)", "norm rms"),
        ("a code behind the end of a row", "if (at + i < width) codes[at + i]", "if (at + i <= width) codes[at + i]", "entries inputs"),
        ("a channel behind the end of a row is read", "at + i < width ? to_float", "at + i <= width ? to_float", "norm rms"),
        ("the sum over too few warps", "warp_sum(lane_id() < blockDim.x / 32 ?", "warp_sum(lane_id() < blockDim.x / 32 - 1 ?", "norm rms"),
    ),
    *of(
        WARP_ROW,
        ("the rotated channels of an entry overlap", "data + nope + 2 * (at - nope)", "data + nope + (at - nope)", "entries inputs, entries kv"),
        ("padding scales behind the end", "if (pad < scales) scale[pad] = 0;", "if (pad <= scales) scale[pad] = 0;", "entries kv"),
        ("the lanes of the transform's last step", "if (8 * step >= width) break;", "if (16 * step >= width) break;", "compressor 4"),
    ),
    *of(
        QUANTIZE,
        ("FP8: blocks behind the last row", "const bool there = row < p.rows;\n  const int at = int(block", "const bool there = row <= p.rows;\n  const int at = int(block", "quantize blocks"),
        ("MXFP4: the scale of every second block", "if (at % kMxfp4Block == 0)", "if (at % (2 * kMxfp4Block) == 0)", "quantize blocks"),
        ("NVFP4: the first pass leaves channels out", "for (int at = first; at < p.width; at += step) {", "for (int at = first; at < p.width - step; at += step) {", "quantize nvfp4"),
    ),
    *of(
        ROUTER,
        ("no barrier between the slices and the score", "  __syncthreads();\n  const int i = threadIdx.x, of", "  const int i = threadIdx.x, of", "router learned"),
        ("hash: no barrier between the slices and the score", "p.ids[row * p.count + slot] = expert;\n  __syncthreads();", "p.ids[row * p.count + slot] = expert;", "router hash"),
        ("hash: no barrier before the weights are normed", "  __syncthreads();\n  if (i == 0) write_weights", "  if (i == 0) write_weights", "router hash"),
        ("the last slice runs into the next expert", "min((slice + 1) * length, vectors)", "(slice + 1) * length", "router learned"),
        ("scores of a row behind the last", "of < p.experts && row < p.rows)", "of < p.experts && row <= p.rows)", "router learned"),
    ),
    *of(
        INDEXER,
        ("no barrier between the queries and their use", "  __syncthreads();\n\n  for (; base < visible; base += step)", "\n  for (; base < visible; base += step)", "indexer 16"),
        ("no barrier behind the mask of wide tokens", "load_tile(p, b, base, g, j, next);\n  __syncthreads();", "load_tile(p, b, base, g, j, next);", "indexer wide"),
        ("a score behind the last entry", "if (entry < p.entries) p.scores", "if (entry <= p.entries) p.scores", "indexer 16"),
        ("the exponent of another entry", "tile.exponents, 4 * (2 * j + g / 4))", "tile.exponents, 4 * j)", "indexer 16"),
        ("entries behind the end of the cache", "const bool real = base + 4 * g + i < p.entries;", "const bool real = true;", "indexer 16"),
    ),
    *of(
        WGMMA,
        ("no barrier between the queries and their use", "  fence_async();\n  __syncthreads();", "  fence_async();", "indexer_wgmma one"),
        ("no fence between the queries and wgmma", "  fence_async();\n", "", "indexer_wgmma one"),
        ("no barrier behind the mask of wide tokens", "raw);\n  __syncthreads();", "raw);", "indexer_wgmma wide"),
        ("heads swizzled like others", "16 * (w ^ (head & 7))", "16 * (w ^ (head & 3))", "indexer_wgmma one"),
        ("a score behind the last entry", "p.entries - own - 8 * j : 0", "p.entries - own - 8 * j + 1 : 0", "indexer_wgmma one"),
        ("entries behind the end of the cache", "uint32_t(min(entry + 8 * r, last))", "uint32_t(entry + 8 * r)", "indexer_wgmma one"),
        ("the exponent of the other entry", "second ? 0x4442u : 0x4440u", "second ? 0x4440u : 0x4442u", "indexer_wgmma one"),
        ("blocks too far below the largest as integers", "shift & from_low & ~from_high", "from_low & ~from_high", "indexer_wgmma wide"),
        ("the weights of the first token", "weights + (t * 4 + j) * kWeightStride", "weights + j * kWeightStride", "indexer_wgmma many"),
        ("a tile twice", "of.load(base + step + own, raw)", "of.load(base + own, raw)", "indexer_wgmma one"),
        ("sums that have not come", "  products_wait<0>();\n", "", "indexer_wgmma one"),
    ),
    *of(
        INTEGERS,
        ("a negative zero is -1", "of.negative_low, of.high, negated)", "of.low, of.high, negated)", "indexer 16"),
        ("heads of twice their size", "near ? 6 - exponent : 0", "near ? 7 - exponent : 0", "indexer_wgmma one"),
        ("bf16 products of heads behind the last", "second = h + 8 < p.heads", "second = h < p.heads", "indexer_wgmma wide"),
    ),
    *of(SCORES, ("what another sequence sees", "p.visible[b * p.tokens + t]", "p.visible[t]", "indexer_bf16 16")),
    *of(ENTRIES, ("a token that does not count is committed", "if (token < length && position >= 0)", "if (token <= length && position >= 0)", "entries commit")),
]  # fmt: skip
