"""The warp-specialised product with tensor copies and wgmma of the interpreter's own tests (sim_kernels/tensor.cu)."""

from mutants import of

FENCE = 'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");\n  }\n  __syncthreads();'
MUTANTS = of(
    "tests/ffi_kernels/sim_kernels/tensor.cu",
    ("waits for the wrong phase of an empty stage", "(count / kStages - 1) & 1)", "(count / kStages) & 1)", "tensor gemm"),
    ("waits for the wrong phase of a full stage", "wait(&full[stage], (count / kStages) & 1)", "wait(&full[stage], (count / kStages + 1) & 1)", "tensor gemm"),
    ("does not wait for an empty stage", "if (count >= kStages && p.defect != 1) wait", "if (count > kStages && p.defect == 1) wait", "tensor gemm"),
    ("expects too few bytes", "expect(&full[stage], 96 * row_bytes);", "expect(&full[stage], 64 * row_bytes);", "tensor gemm"),
    ("expects too many bytes", "expect(&full[stage], 96 * row_bytes);", "expect(&full[stage], 128 * row_bytes);", "tensor gemm"),
    ("another swizzle in the descriptor", "descriptor(a, 16, 8 * row_bytes, p.swizzle)", "descriptor(a, 16, 8 * row_bytes, p.swizzle / 2)", "tensor gemm"),
    ("no fence behind the mbarriers' init", FENCE, "}\n  __syncthreads();", "tensor gemm"),
    ("no barrier behind the mbarriers' init", FENCE, FENCE.removesuffix("\n  __syncthreads();"), "tensor gemm"),
    ("frees a stage while its products run", 'if (p.defect != 5) asm volatile("wgmma.wait_group.sync.aligned 0;"', 'if (p.defect != 5) asm volatile("wgmma.wait_group.sync.aligned 1;"', "tensor gemm"),
    ("no commit of the products", '      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");\n', "", "tensor gemm"),
    ("too few arrivals for the four warps", "init(&empty[i], 4);", "init(&empty[i], 3);", "tensor gemm"),
    ("too many arrivals expected", "init(&empty[i], 4);", "init(&empty[i], 5);", "tensor gemm"),
    ("the first product of every step overwrites the sum", "p.swizzle), k + i > 0);", "p.swizzle), i > 0);", "tensor gemm"),
    ("stages overlap", "load(to + 64 * 128, map_b", "load(to + 63 * 128, map_b", "tensor gemm"),
    ("the stage of the step before", "const uint32_t a = at(s + stage * stage_bytes) + 32 * i", "const uint32_t a = at(s + (stage ^ 1) * stage_bytes) + 32 * i", "tensor gemm"),
    ("one warp does not free its stage", "      if (lane == 0) arrive(&empty[stage]);", "      if (lane == 0 && warp) arrive(&empty[stage]);", "tensor gemm"),
    ("every lane frees the stage", "      if (lane == 0) arrive(&empty[stage]);", "      arrive(&empty[stage]);", "tensor gemm"),
    ("a row behind the end of D", "if (row < p.m && col < p.n)", "if (row <= p.m && col < p.n)", "tensor gemm"),
    ("the rows of a fragment change places", "lane / 4 + 8 * (i / 2 & 1), col", "lane / 4 + 8 * (i & 1), col", "tensor gemm"),
    ("the producer leaves out the last step", "for (int k = 0; k < steps; ++k, ++count) {\n        const int stage = count % kStages;\n        uint8_t", "for (int k = 1; k < steps; ++k, ++count) {\n        const int stage = count % kStages;\n        uint8_t", "tensor gemm"),
    ("the mbarrier of the other stage is signalled", "tile % tiles_n * 32 + (p.defect == 2), &full[stage]);", "tile % tiles_n * 32 + (p.defect == 2), &full[stage ^ 1]);", "tensor gemm"),
    ("no fence of registers before the products", '      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");\n      for (int i = 0; i < row_bytes', "      for (int i = 0; i < row_bytes", "tensor gemm"),
)  # fmt: skip
