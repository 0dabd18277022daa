"""Speed of the PTX interpreter on one core, with checks on: `PYTHONPATH=.:tests python tests/sim_speed.py [--only NAME]`.

Warp instructions and multiply-accumulates per second of CPU time, for the loops of sim_kernels/speed.cu: the best of a few
runs, since other processes share the machine. The figures of ffi_kernels/sim/README.md come from here.
"""

import argparse
import json
import os
import time

import numpy as np
import sim_driver as sim

# name: arch, threads, rounds, dynamic shared bytes, multiply-accumulates of a round of the CTA
LOOPS = {
    "arithmetic": ("sm_90a", 128, 4000, 0, 0),
    "shared_memory": ("sm_90a", 256, 2000, 0, 0),
    "global_memory": ("sm_90a", 256, 2000, 0, 0),
    "mma_bf16": ("sm_90a", 128, 2000, 0, 4 * 8 * 16 * 8 * 16),
    "mma_f16": ("sm_90a", 128, 2000, 0, 4 * 8 * 16 * 8 * 16),
    "mma_e4m3": ("sm_90a", 128, 2000, 0, 4 * 8 * 16 * 8 * 32),
    "mma_s8": ("sm_90a", 128, 2000, 0, 4 * 8 * 16 * 8 * 32),
    "wgmma_bf16": ("sm_90a", 128, 300, 24576, 4 * 64 * 128 * 16),
    "wgmma_e4m3": ("sm_90a", 128, 300, 24576, 4 * 64 * 128 * 32),
    "tensor_bf16": ("sm_100a", 128, 400, 16384, 128 * 128 * 16),
    "tensor_e4m3": ("sm_100a", 128, 400, 16384, 128 * 128 * 32),
    "tensor_nvfp4": ("sm_100a", 128, 400, 16384, 128 * 128 * 64),
}
REPEATS = 5


def measure(name: str) -> dict:
    """Million warp instructions and billion multiply-accumulates per second of CPU time of one loop."""
    arch, threads, rounds, shared, macs = LOOPS[name]
    out = np.zeros(max(4 * threads * rounds, threads), np.uint32)
    best = None
    for _ in range(REPEATS):
        began = time.process_time()
        sim.run(sim.ptx("speed", arch), name, [out, rounds], block=threads, shared_bytes=shared)
        took = time.process_time() - began
        best = took if best is None else min(best, took)
    count = sim.library().dsv4_sim_instructions()
    return {"loop": name, "instructions_m_per_s": count / best / 1e6, "gmac_per_s": rounds * macs / best / 1e9, "seconds": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="loops whose name holds this", default="")
    parser.add_argument("--schedule", help="of DSV4_SIM (default: %(default)s)", default="eager")
    args = parser.parse_args()
    os.environ["DSV4_SIM"] = f"schedule={args.schedule}"
    rows = [measure(name) for name in LOOPS if args.only in name]
    for row in rows:
        print(f"{row['loop']:16} {row['instructions_m_per_s']:8.2f} M warp instructions/s {row['gmac_per_s']:8.2f} GMAC/s")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
