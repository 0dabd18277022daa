"""python tests/step_compiler.py RECIPE...: the decode step of Flash, all layers, as XLA compiles it for an H200. See `gpu_compiler.py`.

Prints a JSON object in its last line: for each recipe the figures of `dsv4 bench decode` that are read from the program, CPU seconds to
trace and to compile, arrays of the state and how many of them are updated in place.
"""

import json
import re
import sys
import time

import gpu_compiler
import jax
import jax.numpy as jnp

from dsv4_jax import bench_step, params, precision
from dsv4_jax import cache as caches
from dsv4_jax.config import FLASH
from dsv4_jax.model import Model

CONTEXT, EXPERTS = 8192, 64  # the program is the same for all experts


def figures(recipe: precision.Recipe, device) -> dict:
    config = bench_step.trimmed(FLASH, None, EXPERTS)
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    weights = {name: w for name, w in params.abstract(config, recipe).items() if name != "mtp"}
    state = jax.eval_shape(lambda: caches.init(config, recipe, 1, CONTEXT, mtp=False))
    token, steps = jnp.zeros((1,), jnp.int32), jnp.zeros((), jnp.int32)
    began = time.process_time()
    lowered = bench_step._loop.lower(Model(placed(weights), config, recipe), *placed((token, state, steps)))
    traced = time.process_time()
    compiled = lowered.compile()
    ended = time.process_time()
    text = compiled.as_text()
    aliases = text.split("input_output_alias={", 1)[1].split("entry_computation", 1)[0]
    copies = [shape for shape in re.findall(r"= (\S+) copy\(", text) if not shape.startswith("s32[")]
    return {
        **bench_step.program_figures(text, config.num_hidden_layers), "trace_s": traced - began, "compile_s": ended - traced,
        "state_arrays": len(jax.tree.leaves(state)), "in_place": len(re.findall(r"(?:may|must)-alias", aliases)), "copies": copies,
        "targets": sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))),
    }  # fmt: skip


if __name__ == "__main__":
    H200 = gpu_compiler.described(*gpu_compiler.DEVICES["H200"])
    print(json.dumps({name: figures(precision.get(name), H200) for name in sys.argv[1:]}))
