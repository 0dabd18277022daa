"""linear and experts: tiles of a CTA, teams, groups of tokens (cuda/linear.cu, cuda/experts.cu, include/expert_groups.cuh)."""

from mutants import of

LINEAR, EXPERTS = (f"ffi_kernels/native/cuda/{name}.cu" for name in ("linear", "experts"))
WALKS, GROUPS = "ffi_kernels/native/include/expert_walks.cuh", "ffi_kernels/native/include/expert_groups.cuh"

MUTANTS = [
    *of(
        LINEAR,
        ("no barrier of the team before its sums are added", "    team.sync();  // the next tile", "    // the next tile", "linear nvfp4"),
        ("sums of all tiles in one place", "    parity ^= 1;\n", "", "linear nvfp4 turns"),
        ("no barrier before other teams take the place of the sums", "if (product >= 0) before.sync();  // some", "// some", "linear many turns"),
        ("no barrier between the inputs and their use", "  __syncthreads();\n\n  Team before{0};", "\n  Team before{0};", "linear bf16"),
        ("teams begin at the wrong tile", "tile = begin + team.index() - teams;", "tile = begin + team.index() - teams + 1;", "linear bf16"),
        ("rows of another group", "row = (local - group * of.tiles) * kTileRows;", "row = local * kTileRows;", "linear grouped"),
        ("a row behind the end of the output", "row >= s.rows.rows) continue;", "row > s.rows.rows) continue;", "linear ragged bf16"),
        ("groups of the output overlap", "* of.groups + walk.group) * of.n + walk.row + row", "* of.groups) * of.n + walk.row + row", "linear grouped"),
        ("the scale of another token", "space.factor[column], global)", "space.factor[0], global)", "linear nvfp4"),
        ("the tile of the next CTA as well", "end(p.begin[part + 1])", "end(p.begin[part + 1] + 1)", "linear bf16"),
    ),
    *of(
        EXPERTS,
        ("up: no barrier of the team", "\n    team.sync();  // the next tile", "\n    // the next tile", "experts nvfp4"),
        ("down: no barrier of the team", "\n  team.sync();  // the next tile", "\n  // the next tile", "experts nvfp4, experts token nvfp4"),
        ("no barrier before the inputs are replaced", "      __syncthreads();  // the columns before were read\n", "", "experts bf16, experts plain batches"),
        ("inputs of the group before stay where as many come", "same = row_of(staged, i) == row_of(group, i);", "same = true;", "experts many, experts nvfp4"),
        ("no barrier between the inputs and their use", "      }\n      __syncthreads();\n    }\n    const Team team", "      }\n    }\n    const Team team", "experts nvfp4"),
        ("one token: no barrier before the sum over slots", "  __syncthreads();\n\n  for (int i = threadIdx.x; i < walk.tiles", "\n  for (int i = threadIdx.x; i < walk.tiles", "experts token nvfp4"),
        ("the shared expert is weighted, the routed ones are not", "if (kind == 0) h *=", "if (kind == 1) h *=", "experts bf16"),
        ("the shared expert in the place of the last slot", "member * (slots + 1) + slots :", "member * (slots + 1) + slots - 1 :", "experts bf16"),
        ("products of a token's slots begin a place early", "member / slots * (slots + 1) + member % slots", "member / slots * slots + member % slots", "experts bf16"),
        ("a sum of slots of weight zero as well", "x < slots ? weights[x] != 0.0f", "x < slots ? true", "experts ragged, experts token zero"),
        ("a sum without the shared expert", ": x == slots && shared", ": false", "experts bf16"),
        ("a sum of the first eight products", "first <= slots; first += ahead", "first < ahead; first += ahead", "experts eight"),
        ("rows behind the end of the output", "if (whole || row < s.rows.rows) static", "static", "experts ragged bf16"),
        ("one token: rows behind the end of the output", "    if (d >= p.hidden) continue;\n", "", "experts token plain"),
        ("one token: the picks are not waited for", "asm volatile(\"bar.sync 1, %0;\" ::\"r\"(32 * p.routed_warps) : \"memory\");", "", "experts token nvfp4"),
        ("one token: the first copies are of the first matrix", "ring.move(bytes, groups.matrix[walk.group]);", "", "experts token nvfp4"),
        ("one token: places as if all slots counted", "if (groups.all - 1 != p.slots) {", "if (false) {", "experts token zero"),
        ("one token: the consumer stays where all slots would count", "        walk.place(groups.all - 1);\n", "", "experts token zero"),
        ("one token: no barrier between the inputs and their use", "    stage.write(1, at, form, amax);\n    __syncthreads();", "    stage.write(1, at, form, amax);", "experts token nvfp4"),
        ("up of gate, gate of up", "float gate = finished(sum_partials(of_team, row", "float gate = finished(sum_partials(of_team + kTileWarps * kPartial, row", "experts bf16"),
    ),
    *of(
        WALKS,
        ("one token: tiles and groups change places", "tile = left > 0 ? job / count : 0;", "tile = left > 0 ? job % count : 0;", "experts token nvfp4"),
        ("a CTA goes on with the next group's tiles", "min(end, first_tile() + p.tiles_of(kind));", "end;", "experts nvfp4, experts bf16"),
        ("one token: routed tiles are counted from the shared expert's group on", "group += kind ? 0 : 1;", "", "experts token official"),
        ("one token: a matrix ends a tile late", "for (; row >= p.tiles[kind] * kTileRows; ++group)", "for (; row > p.tiles[kind] * kTileRows; ++group)", "experts token nvfp4"),
        ("one token: a tile is left out", "row += teams * kTileRows;", "row += (teams + 1) * kTileRows;", "experts token nvfp4, experts token official"),
        ("one token: jobs of the next tile with the first group", "group >= !kind + count; ++tile) group -= count;", "group >= !kind + count; ++tile) group = !kind;", "experts token nvfp4, experts token official"),
        ("a warp for both kinds", "int(warp_id()) >= routed_warps", "int(warp_id()) > routed_warps", "experts token nvfp4"),
    ),
    *of(
        GROUPS,
        ("no barrier between the experts of the slots and their count", "  __syncthreads();\n  int repeats", "  int repeats", "experts many"),
        ("no barrier before the keys are read", "g.key[t] = expert + repeats * experts;\n  __syncthreads();", "g.key[t] = expert + repeats * experts;", "experts many"),
        ("no barrier at the end", "g.all = of_shared + routed;\n  __syncthreads();", "g.all = of_shared + routed;", "experts many"),
        ("a group takes one token too many", "g.member[group][rank % columns] = uint8_t(t);", "g.member[group][rank % (columns + 1)] = uint8_t(t);", "experts many"),
        ("slots of weight zero count", "expert = g.weight[t] != 0.0f ? min", "expert = g.weight[t] >= 0.0f ? min", "experts many"),
        ("one token: slots of weight zero count", "__ballot_sync(0xFFFFFFFFu, weight != 0.0f)", "__ballot_sync(0xFFFFFFFFu, lane < slots)", "experts token zero"),
        ("few slots: those of weight zero count", "expert = weight != 0.0f ? min", "expert = weight >= 0.0f ? min", "experts ragged"),
        ("few slots: tokens of one expert in one place", "const int rank = __popc(same & before);", "const int rank = 0;", "experts batches"),
        ("few slots: no barrier at the end", "    if (token % columns == 0) g.matrix[group] = 0;\n  }\n  __syncthreads();", "    if (token % columns == 0) g.matrix[group] = 0;\n  }", "experts bf16"),
    ),
]  # fmt: skip
