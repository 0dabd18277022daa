"""Messages between CTAs of a cluster: hyper-connections, top entries, the compressor (exchange.cuh and its users)."""

from mutants import of

HYPER, TOPK, COMPRESSOR = (f"ffi_kernels/native/cuda/{name}.cu" for name in ("hyper_connections", "topk", "compressor"))
EXCHANGE, SINKHORN = (f"ffi_kernels/native/include/{name}.cuh" for name in ("exchange", "sinkhorn"))

MUTANTS = [
    *of(
        EXCHANGE,
        ("waits for the wrong parity", "b64 p, [%1], 0;", "b64 p, [%1], 1;", "hyper_connections 1 1"),
        ("an arrival that never comes", "mbarrier.init.shared::cta.b64 [%0], 1;", "mbarrier.init.shared::cta.b64 [%0], 2;", "hyper_connections 1 1"),
        ("signals its own mbarrier for a remote store", '"r"(value), "r"(peer_address(shared_address(barrier), rank))', '"r"(value), "r"(shared_address(barrier))', "hyper_connections 1 1"),
    ),
    *of(
        HYPER,
        ("sends before every CTA has started", "  cluster_wait();  // from here", "  // from here", "hyper_connections 1 1"),
        ("no fence behind the mbarriers' init", '    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");\n  }\n  cluster_arrive_relaxed();', "  }\n  cluster_arrive_relaxed();", "hyper_connections 1 1"),
        ("expects half of the bytes", "rows * cluster * kQuads * 16)", "rows * cluster * kQuads * 8)", "hyper_connections 1 1"),
        ("no wait for post and comb", "      copy_async_wait<0>();\n", "", "hyper_connections 1 1"),
        ("post and comb come from other lanes", "      copy_async_wait<0>();\n      __syncwarp();\n", "      copy_async_wait<0>();\n", "hyper_connections 1 4"),
        ("a warp's post and comb in another one's place", "shared.mixing[block_row][own_block];", "shared.mixing[block_row][0];", "hyper_connections 2 1"),
        ("no barrier behind the streams", "    }\n  }\n  __syncthreads();\n", "    }\n  }\n", "hyper_connections pre 1 4"),
        ("no barrier between the parts and their sum", "  __syncthreads();\n\n  {\n    const int r", "\n  {\n    const int r", "hyper_connections 1 1"),
        ("sums of a group's rows in the places of another's", "[4 * group + value % 4] = total;", "[4 * stream + value % 4] = total;", "hyper_connections 1 4"),
        ("parts of all CTAs in the receiver's own place", "send(&shared.mix[r][rank][quad]", "send(&shared.mix[r][peer][quad]", "hyper_connections 1 1"),
        ("no __syncwarp before Sinkhorn", "      __syncwarp();\n      if (lane < rows && lane", "      if (lane < rows && lane", "hyper_connections 1 1"),
        ("no wait for the mean square", "    barrier_wait(&shared.barrier[1]);\n    const int slots", "    const int slots", "hyper_connections 1 1"),
        ("no wait for the largest magnitude", "      barrier_wait(&shared.barrier[2]);\n", "", "hyper_connections 1 1"),
        ("the mean square signals another mbarrier", "send(&shared.squares[r][slot], &shared.barrier[1]", "send(&shared.squares[r][slot], &shared.barrier[2]", "hyper_connections 1 1"),
        ("every row of a cluster is stored as the first", "const int out_row = first_row + r;", "const int out_row = first_row;", "hyper_connections 1 4"),
        ("the next block of weights in the place of the present one", "fetch(block + kAhead);", "fetch(block + 1);", "hyper_connections 4 1"),
        ("each CTA's slice begins where the one before does", "const int first_channel = rank * kBlocks * 128;", "const int first_channel = rank * kBlocks * 64;", "hyper_connections 1 1"),
        ("rows of the last cluster that do not exist", "min(p.rows_per_cluster, p.rows - first_row)", "p.rows_per_cluster", "hyper_connections 1 4, hyper_connections pre 1 4"),
        ("Sinkhorn of a row by two CTAs", "lane < rows && lane % cluster == rank", "lane < rows && lane % 2 == rank % 2", "hyper_connections 1 4"),
    ),
    *of(
        SINKHORN,
        ("columns are divided twice", "divide_by_sums<4, 1>(c, columns, eps, rows);", "divide_by_sums<1, 4>(c, columns, eps, rows);", "hyper_connections 1 1"),
        ("eps is forgotten where a divisor is renewed", "eps * divisors[i]);", "0.0f * divisors[i]);", "hyper_connections 1 1"),
        ("a softmax over two of four lanes", "warp_sum<4>(exponential)", "warp_sum<2>(exponential)", "hyper_connections 1 1"),
    ),
    *of(
        TOPK,
        ("no barrier before the counts are sent", "  __syncthreads();\n  if (ctas > 1 &&", "  if (ctas > 1 &&", "topk cluster"),
        ("all passes receive in one place", "shared.received[pass % 2][rank]", "shared.received[0][rank]", "topk cluster"),
        ("no barrier between the warps' sums and their use", "  __syncthreads();\n  if (threadIdx.x < kBins) {\n    uint32_t above", "  if (threadIdx.x < kBins) {\n    uint32_t above", "topk f32"),
        ("no barrier before the choice is read", "  __syncthreads();\n  return shared.choice;", "  return shared.choice;", "topk f32"),
        ("one winner too few", "shared.choice = {bin, need - above, own};", "shared.choice = {bin, need - above - 1, own};", "topk f32"),
        ("no barrier before the prefix over warps", "shared.sums[warp] = total;\n  __syncthreads();", "shared.sums[warp] = total;", "topk f32"),
        ("no wait for the other CTAs' totals", "    barrier_wait(&shared.arrived[kMaxPasses]);\n", "", "topk cluster"),
        ("a vector across the end of what is visible", "at + 4 <= visible", "at + 3 <= visible", "topk bf16"),
        ("winners of a CTA among those before it", "int(lane) < rank ? shared.totals[lane]", "int(lane) <= rank ? shared.totals[lane]", "topk cluster"),
        ("mbarriers without a fence behind their init", '      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");\n    }\n    asm volatile("barrier', '    }\n    asm volatile("barrier', "topk cluster"),
        ("sends before every CTA has started", '    cluster_wait();\n  }\n  __syncthreads();', "  }\n  __syncthreads();", "topk cluster"),
    ),
    *of(
        COMPRESSOR,
        ("128: no barrier between the pools and their merge", "  __syncthreads();\n  cluster_wait();\n  if (int(threadIdx.x) < each)", "  cluster_wait();\n  if (int(threadIdx.x) < each)", "compressor 128"),
        ("128: stores to a CTA that may not have started", "  __syncthreads();\n  cluster_wait();\n  if (int(threadIdx.x) < each)", "  __syncthreads();\n  if (int(threadIdx.x) < each)", "compressor 128"),
        ("128: the first CTA does not wait for the others", "  cluster_wait();\n  if (warp_id() == 0) finish.store", "  if (warp_id() == 0) finish.store", "compressor 128"),
        ("128: every CTA keeps its channels", "pooled + rank * each + channel), 0)", "pooled + rank * each + channel), rank)", "compressor 128"),
        ("128: the first CTA's place for all channels", "shared_address(pooled + rank * each + channel)", "shared_address(pooled + channel)", "compressor 128"),
        ("4: no barrier before the entry is read", "__fdividef(total.y, sum.y)};\n  }\n  __syncthreads();", "__fdividef(total.y, sum.y)};\n  }", "compressor 4"),
        ("4: a new token's score lacks its offset", "if (i >= block.phase) score[4 + i].x", "if (i > block.phase) score[4 + i].x", "compressor 4, compressor 4 plain"),
        ("4: the halves of the ring change places", "(4 - half)) * channels + at", "half) * channels + at", "compressor 4"),
        ("the entry of the block before", "shape.capacity + block.index);\n}\n\n// --- ratio 128", "shape.capacity + block.index - 1);\n}\n\n// --- ratio 128", "compressor 4"),
    ),
]  # fmt: skip
