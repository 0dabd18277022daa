"""XLA's CUDA compiler on a machine without a GPU: what becomes of the implementations of `vendor.py` when XLA is done with them.

JAX compiles for a device that is only described ("compile-only", jax.experimental.topologies) where it finds its CUDA plugin, which
needs ptxas for that, and neither a driver nor NVIDIA's libraries. `answer` runs a program in a process of its own, because JAX looks
for plugins once, and the suite should not have this one. Nothing is executed. The decode step: `step_compiler.py`.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "build" / "cuda-plugin"  # where .ci/run puts it
INSTALL = f"pip install --no-deps --target build/cuda-plugin jax-cuda13-pjrt=={jax.__version__} jax-cuda13-plugin=={jax.__version__}"
DEVICES = {"B200": (10, 10), "B200 with cuDNN 9.9": (10, 9), "H200": (9, 10)}  # compute capability, minor version of cuDNN 9
SHAPE = (256, 512, 1024)  # M, N, K: whole tiles
RAGGED = (100, 160, 352)


def missing() -> str | None:
    """None if the plugin and ptxas are here, else a sentence."""
    places = [PLUGIN, *map(Path, sys.path)]
    if not (shutil.which("ptxas") or Path("/usr/local/cuda/bin/ptxas").exists() or any(any(p.glob("nvidia/*/bin/ptxas")) for p in places)):
        return "needs ptxas, which XLA's CUDA compiler calls; install the CUDA toolkit (no GPU needed)."
    if any(any(place.glob("jax_plugins/xla_cuda1*")) for place in places):
        return None
    return f"needs XLA's CUDA compiler, which comes with the CUDA plugin of jax; {INSTALL} (no GPU needed)."


def answer(program: str, *arguments: str, backend: str) -> dict:
    """What a program of tests/ prints as JSON in its last line, run where XLA's CUDA compiler is found, for a native backend."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(PLUGIN), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / program), *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "DSV4_BACKEND": backend},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def compiled(implementation: str) -> dict:
    """{device: {"refusal": sentence or None, "whole": optimized HLO, "ragged": optimized HLO}} of 'cute' or 'cudnn'."""
    return answer("gpu_compiler.py", implementation, backend="sm_100a")


def described(capability: int, cudnn: int):
    """A compile-only CUDA device; what XLA wants to know of it is roughly a B200, or an H200."""
    from jax.experimental import topologies

    description = f"""
        gpu_device_info {{
          name: "described" threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 core_count: {148 if capability == 10 else 132}
          fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.9
          shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
          memory_bandwidth: 8000000000000 l2_cache_size: 132644864 device_memory_size: 191514411008 device_address_bits: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          cuda_compute_capability {{ major: {capability} }} driver_version: "13.0.0" runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0" dnn_version: "9.{cudnn}.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: {cudnn} }} device_description_str: "described"
    """
    return topologies.get_topology_desc("1x1x1", platform="cuda", topology="1x1x1", target_config=description).devices[0]


def optimized(function, device, shape) -> str:
    """Optimized HLO of function(x, w) for operands in the layout 'tcgen05', without the machine code embedded in it."""
    import re

    import matmul_operands

    sharding = jax.sharding.SingleDeviceSharding(device)
    x, w = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), matmul_operands.shapes_of(*shape))
    return re.sub(r", backend_config=.*", "", jax.jit(function).lower(x, w).compile().as_text())


def main(implementation: str) -> None:
    from ffi_kernels import cudnn, vendor

    function = vendor.implementations()[implementation].function
    out = {}
    for name, description in DEVICES.items():
        device = described(*description)
        out[name] = {"refusal": cudnn.why_not_on(device, *SHAPE) if implementation == "cudnn" else None}
        if name == "B200":
            out[name] |= {"whole": optimized(function, device, SHAPE), "ragged": optimized(function, device, RAGGED)}
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])
