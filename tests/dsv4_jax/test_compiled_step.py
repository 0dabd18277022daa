"""The decode step of Flash, all 43 layers, as XLA compiles it for an H200: what is launched, and that nothing is copied.

Also prints the CPU seconds to trace and to compile it. XLA's CUDA compiler needs no GPU (`gpu_compiler.py`). What runs is seen on a
device: `dsv4 bench decode --model flash`.
"""

import functools

import gpu_compiler
import pytest

from ffi_kernels import library

RECIPES = ("bf16", "official", "nvfp4")


@functools.cache
def compiled():
    return gpu_compiler.answer("step_compiler.py", *RECIPES, backend="sm_90a")


@pytest.fixture(params=RECIPES)
def figures(request, record_property):
    for sentence in (gpu_compiler.missing(), library.why_not("sm_90a")):
        if sentence is not None:
            pytest.skip(sentence)
    found = compiled()[request.param]
    for name in ("native_launches_per_layer", "kernels_per_layer", "trace_s", "compile_s"):
        record_property(name, found[name])
        print(f"{request.param}: {name} {found[name]:.4g}")
    return found


def test_at_most_18_kernels_per_layer_and_no_product_is_left_to_xla(figures):
    assert 43 * 12 < figures["native_launches"] and figures["kernels_per_layer"] <= 18
    assert figures["xla_products"] == 0 and all(target.startswith("dsv4.") and target.endswith(".sm_90a") for target in figures["targets"])


def test_caches_are_updated_in_place(figures):
    """Every array of the state is its own output, and nothing larger than the positions is copied inside."""
    assert figures["in_place"] >= figures["state_arrays"] > 43
    assert not figures["copies"]
