"""The launch layer's tensor maps: one description for the driver and the interpreter, and what each encoder makes of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ffi_kernels as ops
from ffi_kernels import layout, library
from ffi_kernels.launch import TensorMap, launch

SHAPE = (300, 136, 96)  # M, N, K: a pair of CTAs works on a tile, on 4 CTAs as on 148


@pytest.fixture
def built():
    for backend in ("sim", "sm_100a"):
        if (missing := library.why_not(backend)) is not None:
            pytest.skip(missing)


def operands():
    m, n, k = SHAPE
    rng = np.random.default_rng(0)
    make = lambda rows, shape: layout.pack_tcgen05(ops.NVFP4Tensor(  # noqa: E731
        jnp.asarray(rng.integers(0, 256, (rows, k // 2), np.uint8)), jnp.ones((rows, k // 16), jnp.float8_e4m3fn), jnp.ones(shape)
    ))  # fmt: skip
    return make(m, (m, 1)), make(n, ())


def attributes(text: str, target: str) -> dict[str, str]:
    """The backend_config of the one custom call to `target`, name -> text of the value."""
    (call,) = re.findall(rf"custom_call @{re.escape(target)}\(.*?backend_config = {{(.*?)}}, operand_layouts", text)
    return dict(re.findall(r"(\w+) = (\".*?\"|dense<.*?> : tensor<.*?>|-?\d+ : i64)", call))


def lowered(backend: str, platform: str) -> dict[str, str]:
    """nvfp4_matmul lowered for a platform that need not be here."""
    target = f"dsv4.nvfp4_matmul.{backend}"
    with ops.backend(backend):
        run = jax.jit(lambda x, w: ops.nvfp4_matmul(x, w))
        allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
        exported = jax.export.export(run, platforms=[platform], disabled_checks=allowed)(*operands())
    return attributes(exported.mlir_module(), target)


def test_both_machines_get_the_same_description(built):
    sim, gpu = lowered("sim", "cpu"), lowered("sm_100a", "cuda")
    differ = {name for name in sim if sim[name] != gpu[name]}
    assert sim.keys() == gpu.keys() and differ == {"arch", "grid"}
    m, n, k = SHAPE
    numbers = np.asarray(json.loads(re.search(r"\[.*\]", gpu["tensor_maps"])[0])).reshape(-1, 18)
    np.testing.assert_array_equal(numbers, [
        # buffer, type, swizzle, rank | sizes | strides in bytes | box
        [0, 0, 3, 2, k // 2, m, 0, 0, 0, k // 2, 0, 0, 0, 128, 128, 0, 0, 0],
        [1, 2, 0, 3, 128, 2, 3, 0, 0, 512, 1024, 0, 0, 128, 4, 1, 0, 0],
        [3, 0, 3, 2, k // 2, n, 0, 0, 0, k // 2, 0, 0, 0, 128, 64, 0, 0, 0],
        [4, 2, 0, 3, 128, 2, 2, 0, 0, 512, 1024, 0, 0, 128, 4, 1, 0, 0],
        [6, 9, 3, 2, n, m, 0, 0, 0, 2 * n, 0, 0, 0, 64, 32, 0, 0, 0],
    ])  # fmt: skip


DRIVER = r"""
#include <cstdint>
#include <cstdio>
#define STUB(name) extern "C" int name() { return 0; }
STUB(cuInit) STUB(cuCtxGetDevice) STUB(cuDeviceGetAttribute) STUB(cuLibraryLoadFromFile) STUB(cuLibraryGetKernel)
STUB(cuKernelSetAttribute) STUB(cuKernelGetParamInfo) STUB(cuLaunchKernelEx)
extern "C" int cuGetErrorString(int, const char** text) { return *text = "invalid argument", 0; }
extern "C" int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                                      const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
  if (reinterpret_cast<uintptr_t>(map) % 64 || rank > 5) return 1;
  std::printf("%d %u %p |", type, rank, address);
  for (uint32_t i = 0; i < rank; ++i) std::printf(" %llu", (unsigned long long)dims[i]);
  for (uint32_t i = 0; i + 1 < rank; ++i) std::printf(" / %llu", (unsigned long long)strides[i]);
  for (uint32_t i = 0; i < rank; ++i) std::printf(" [%u by %u]", box[i], steps[i]);
  std::printf(" | %d %d %d %d\n", interleave, swizzle, promotion, fill);
  static_cast<uint64_t*>(map)[15] = 7;
  return 0;
}
"""
PROGRAM = r"""
#include <cstdio>
#include "launch.h"
int main() {
  dsv4::TensorMapArguments tensor{9, 3, 3, reinterpret_cast<void*>(0x5000), {136, 300, 2}, {272, 81600}, {64, 32, 1}};
  alignas(64) uint64_t map[16] = {};
  const std::string error = dsv4::driver_encode(tensor, map);
  std::printf("'%s' %d\n", error.c_str(), int(map[15]));
  tensor.rank = 6;
  std::printf("'%s'\n", dsv4::driver_encode(tensor, map).c_str());
}
"""


def test_the_driver_gets_what_was_described(built, tmp_path):
    """Against a stand-in for libcuda that prints the arguments."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile a stand-in for libcuda")
    (tmp_path / "driver.cpp").write_text(DRIVER)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    where = library.directory()
    include = Path(library.__file__).parent / "native" / "include"
    for command in (
        ["g++", "-shared", "-fPIC", "driver.cpp", "-o", "libcuda.so.1"],
        ["g++", "-std=c++17", f"-I{include}", "program.cpp", "-o", "program", f"-L{where}", f"-Wl,-rpath,{where}", "-l:libdsv4.so"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "program"], env={"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "9 3 0x5000 | 136 300 2 / 272 / 81600 [64 by 1] [32 by 1] [1 by 1] | 0 3 3 0", "'' 7",
        "'cuTensorMapEncodeTiled failed: invalid argument (1)'",
    ]  # fmt: skip


def mapped(tensor_map: TensorMap):
    """A launch (which would fail otherwise) of a kernel with one input of [6, 64] bytes under `tensor_map`."""
    return launch(
        "nvfp4_matmul", "matmul", "nvfp4_matmul_one_fp32", grid=(1,), block=192, inputs=[jnp.zeros((6, 64), jnp.uint8)],
        outputs=[jax.ShapeDtypeStruct((1,), jnp.float32)], tensor_maps=[tensor_map],
    )  # fmt: skip


def test_a_map_does_not_exceed_its_buffer(built):
    with ops.backend("sim"):
        for wide in (TensorMap(0, "uint8", (7, 64), (1, 64)), TensorMap(0, "float32", (6, 17), (1, 4)), TensorMap(1, "uint8", (8,), (8,))):
            with pytest.raises(ValueError, match=r"maps \w+ \(.*\) onto a buffer of (uint8|float32) \(.*\), which is smaller"):
                mapped(wide)


@pytest.mark.parametrize("tensor_map, words", [
    (TensorMap(0, "uint8", (6, 24), (1, 16)), "stride 24 of dimension 1 is not a multiple of 16"),
    (TensorMap(0, "uint8", (6, 64), (1, 8)), "inner dimension has 8 bytes, which is not a multiple of 16"),
    (TensorMap(0, "uint8", (6, 64), (300, 16)), "the box has 300 elements in dimension 1; the limit is 256"),
    (TensorMap(0, "uint8", (6, 64), (1, 64), swizzle=32), "inner dimension has 64 bytes, more than the swizzle's 32"),
    (TensorMap(0, "uint8", (6, 64), (1, 64)), "gives 256 bytes of parameters; the kernel declares 768"),
])  # fmt: skip
def test_the_encoder_refuses_in_sentences(built, tensor_map, words):
    """The last one is sound; what the launch lacks then is the rest of the kernel's parameters."""
    with ops.backend("sim"), pytest.raises(jax.errors.JaxRuntimeError, match=words):
        jax.block_until_ready(mapped(tensor_map))


def test_types_are_those_of_the_arrays():
    for name in TensorMap.DTYPES:
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        array = TensorMap(0, name, (3, 16), (1, 16))
        assert array.nbytes == 48 * dtype.itemsize
        assert array.numbers(4) == [4, TensorMap.DTYPES[name], 0, 2, 16, 3, 0, 0, 0, 16 * dtype.itemsize, 0, 0, 0, 16, 1, 0, 0, 0]
