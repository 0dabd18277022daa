"""Decode attention: tiles of entries, the softmax, the merge over a cluster (cuda/attention.cu, include/attention*.cuh)."""

from mutants import of

ATTENTION = "ffi_kernels/native/cuda/attention.cu"
ENTRIES, MERGE = (f"ffi_kernels/native/include/{name}.cuh" for name in ("attention", "attention_merge"))
TILES = "attention fp8 tiles"

MUTANTS = [
    *of(
        ATTENTION,
        ("every tile in the first stage", "address_in_shared((p.stages == 2 ? tile & 1 : 0) * p.stage_bytes", "address_in_shared(0 * p.stage_bytes", TILES),
        ("no wait for the copies of a tile", "  copy_async_wait<0>();\n#pragma unroll\n  for (int s = 0; s < 2; ++s) {", "#pragma unroll\n  for (int s = 0; s < 2; ++s) {", "attention fp8 csa"),
        ("no barrier between scores and softmax", "decoded, scales);\n      __syncthreads();", "decoded, scales);", "attention fp8 csa"),
        ("no barrier between softmax and the product with V", "(p, tile, keys);\n      __syncthreads();", "(p, tile, keys);", "attention fp8 csa"),
        ("no barrier before the output takes the place of the entries", "    __syncthreads();  // the entries have been read", "    // the entries have been read", TILES),
        ("no barrier of the cluster before the merge", "    cluster_sync();\n    merge", "    __syncthreads();\n    merge", TILES),
        ("no barrier of the cluster behind the merge", "    cluster_arrive();  // nobody", "    // nobody", TILES),
        ("no __syncwarp between raw rows and what replaces them", "      __syncwarp();  // every lane", "      // every lane", "attention fp8 csa"),
        ("raw rows of odd keys over those of even ones", "raw = to + 16 * (c + 4 * (g & 1)), low", "raw = to + 16 * c, low", "attention fp8 csa"),
        ("entries are read without the swizzle", "2 * j + lane / 16) ^ (lane % 8))", "2 * j + lane / 16))", "attention fp8 csa"),
        ("the second tile does not rescale the output", "  if (tile) {\n#pragma unroll", "  if (tile > 1) {\n#pragma unroll", TILES),
        ("keys of a tile round to groups of 8", "tile * kTileKeys + 15) & ~15)", "tile * kTileKeys + 7) & ~7)", "attention fp8 csa, attention bf16 window"),
        ("the rows of the next tile over those of this one", "(((tile + 1) & 1) * kTileKeys + thread)", "((tile & 1) * kTileKeys + thread)", TILES),
        ("scales of the first slices for all", "(entry.scale + first)", "(entry.scale)", "attention fp8 hca 32"),
        ("keys of the tile after the next", "load_tile<kFp8>(p, role, tile + 1, keys_of_tile(count, tile + 1), scales);", "load_tile<kFp8>(p, role, tile + 1, keys_of_tile(count, tile + 2), scales);", TILES),
        ("the entries are located before the first pass alone", "      __syncthreads();\n      load_tile<kFp8>(p, role, 0", "      load_tile<kFp8>(p, role, 0", "attention fp8 csa"),
        ("weights of keys behind the tile", "if (key < kTileKeys) in_shared<uint16_t>", "in_shared<uint16_t>", "attention fp8 csa"),
        ("the total forgets what came before", "total * factor + sum;", "total + sum;", TILES),
    ),
    *of(
        ENTRIES,
        ("the oldest entry of a young window is left out", "present = age <= part.position;", "present = age < part.position;", "attention fp8 csa, attention bf16 window"),
        ("the query's own entry comes from the ring", "if (age <= part.token) row", "if (age < part.token) row", "attention fp8 csa"),
        ("picks of another token", "p.picked[size_t(row) * p.picks + part.compressed_first + key - part.window_count]", "p.picked[part.compressed_first + key - part.window_count]", "attention fp8 csa"),
        ("an index at the end of the cache is taken", "uint32_t(row) < uint32_t(rows)", "uint32_t(row) <= uint32_t(rows)", "attention fp8 csa"),
        ("closed entries that no part attends to", "(closed + (1 << p.parts_log2) - 1) >> p.parts_log2", "closed >> p.parts_log2", "attention bf16 hca parts"),
        ("every part attends to the first picks", "compressed_first = min(rank * p.pick_share, p.picks);", "compressed_first = 0;", TILES),
    ),
    *of(
        MERGE,
        ("all parts are read from the first CTA", "load_peer4(peer_address(from, i))", "load_peer4(peer_address(from, 0))", TILES),
        ("the totals of one CTA for all", "total = load_peer(peer_address(total_at, peer));", "total = load_peer(peer_address(total_at, 0));", TILES),
        ("two CTAs store the same heads", "local < (rank + 1) * share; local += kSplit", "local < (rank + 2) * share; local += kSplit", TILES),
        ("the rotation turns the wrong channels", "const int turned = channel + i - (p.channels - p.rope);", "const int turned = channel + i - (p.channels - p.rope) + 2;", "attention bf16 window"),
    ),
]  # fmt: skip
