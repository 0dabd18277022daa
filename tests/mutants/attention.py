"""Decode attention: tiles of entries, the softmax, teams, the merge over a cluster (cuda/attention.cu, include/attention*.cuh)."""

from mutants import of

ATTENTION = "ffi_kernels/native/cuda/attention.cu"
ENTRIES, TILE, MERGE = (f"ffi_kernels/native/include/{name}.cuh" for name in ("attention", "attention_tile", "attention_merge"))
TILES, TEAMS = "attention fp8 tiles", "attention fp8 teams"

MUTANTS = [
    *of(
        ATTENTION,
        ("no barrier between scores and softmax", "decoded, scales);\n      __syncthreads();", "decoded, scales);", "attention fp8 csa"),
        ("no barrier between softmax and the product with V", "tile == 0, keys);\n      __syncthreads();", "tile == 0, keys);", "attention fp8 csa"),
        ("no barrier before the output takes the place of the entries", "    __syncthreads();  // the entries have been read", "    // the entries have been read", TILES),
        ("no barrier of the cluster before the merge", "    cluster_sync();\n    merge", "    __syncthreads();\n    merge", TILES),
        ("the rows of the next tile over those of this one", "(((tile + 1) & 1) * kTileKeys + thread)", "((tile & 1) * kTileKeys + thread)", TILES),
        ("keys of the tile after the next", "load_tile<kFp8>(p, role, tile + 1, keys_of_tile(count, tile + 1), scales);", "load_tile<kFp8>(p, role, tile + 1, keys_of_tile(count, tile + 2), scales);", TILES),
        ("the entries are located before the first pass alone", "      __syncthreads();\n      load_tile<kFp8>(p, role, 0", "      load_tile<kFp8>(p, role, 0", "attention fp8 csa"),
        ("a team has no barrier between scores and softmax", "false, scales);\n    role.sync(p);", "false, scales);", TEAMS),
        ("a team has no barrier between softmax and the product with V", "turn, true, keys);\n    role.sync(p);", "turn, true, keys);", TEAMS),
        ("a team copies over entries that are being read", "    role.sync(p);  // the entries have been read, and", "    // the entries have been read, and", TEAMS),
        ("a team has no barrier before its output takes the place of the entries", "  role.sync(p);  // the entries and", "  // the entries and", TEAMS),
        ("a team locates the next entries where those of this tile are", "(kTileKeys + thread) * sizeof(Entry)) = entry;", "thread * sizeof(Entry)) = entry;", TEAMS),
        ("both parts of a team leave their statistics in one place", "role.base + turn * heads * 4", "role.base", TEAMS),
        ("the second part of a team begins with the output of the first", "out[0][n][i], out[0][n][i] = 0.0f;", "out[0][n][i];", TEAMS),
        ("the second part has the picks of the first", "load_pick(p, Part(p, token, first + 1), row, thread);", "load_pick(p, Part(p, token, first), row, thread);", TEAMS),
        ("the first parts for the teams of all CTAs", "first = 2 * (2 * rank + role.team);", "first = 2 * role.team;", TEAMS),
        ("the totals of a team's parts are not joined", "one = both.largest, sum = both.total", "one = both.largest, both.total", TEAMS),
        ("no barrier of the cluster behind the merge of teams", "  cluster_wait();  // nobody ends", "  // nobody ends", TEAMS),
    ),
    *of(
        TILE,
        ("every tile in the first stage", "(p.stages == 2 ? tile & 1 : 0) * p.stage_bytes", "0 * p.stage_bytes", TILES),
        ("no wait for the copies of a tile", "  copy_async_wait<0>();\n#pragma unroll\n  for (int s = 0; s < 2; ++s) {", "#pragma unroll\n  for (int s = 0; s < 2; ++s) {", "attention fp8 csa"),
        ("no __syncwarp between raw rows and what replaces them", "      __syncwarp();  // every lane", "      // every lane", "attention fp8 csa"),
        ("raw rows of odd keys over those of even ones", "raw = to + 16 * (c + 4 * (g & 1)), low", "raw = to + 16 * c, low", "attention fp8 csa"),
        ("entries are read without the swizzle", "2 * j + lane / 16) ^ (lane % 8))", "2 * j + lane / 16))", "attention fp8 csa"),
        ("the second tile does not rescale the output", "  if (!first) {\n#pragma unroll", "  if (false) {\n#pragma unroll", TILES),
        ("keys of a tile round to groups of 8", "tile * kTileKeys + 15) & ~15)", "tile * kTileKeys + 7) & ~7)", "attention fp8 csa, attention bf16 window"),
        ("scales of the first slices for all", "(entry.scale + first)", "(entry.scale)", "attention fp8 hca 32"),
        ("weights of keys behind the tile", "if (key < kTileKeys) in_shared<uint16_t>", "in_shared<uint16_t>", "attention fp8 csa"),
        ("the total forgets what came before", "total * factor + sum;", "total + sum;", TILES),
        ("both teams in the shared memory of the first", "team = 1, base = p.team_bytes;", "team = 1;", TEAMS),
        ("both teams at one barrier", '"r"(1 + team)', '"r"(1)', TEAMS),
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
        ("all parts are read from the first CTA", "(first + i) / kTeams));", "0));", TILES),
        ("the totals of one CTA for all", "total = load_peer(peer_address(total_at + beside, slot / kTeams));", "total = load_peer(peer_address(total_at + beside, 0));", TILES),
        ("two CTAs store the same heads", "const int end = min((rank + 1) * share", "const int end = min((rank + 2) * share", TILES),
        ("no arrival at the barrier of the cluster behind the merge", "if (local + 4 >= end) cluster_arrive();", "", TILES),
        ("the first pair of a CTA is read for both", "(first + i) % kTeams * p.team_bytes", "0", TEAMS),
        ("factors of a pair change places", "join(x.x, a, y.x, b)", "join(x.x, b, y.x, a)", TILES),
        ("sinks of the first heads for all passes", "(pass * kHeads + local)", "local", "attention fp8 hca 32"),
        ("the rotation turns the wrong channels", "const int turned = channel + i - (p.channels - p.rope);", "const int turned = channel + i - (p.channels - p.rope) + 2;", "attention bf16 window"),
    ),
]  # fmt: skip
