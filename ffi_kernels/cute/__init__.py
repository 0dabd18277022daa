"""Kernels written in NVIDIA's CuTe DSL, for sm_100a, called from JAX through `cutlass.jax.cutlass_call`. Extra: `blackwell`.

`gemm.py` is the dense NVFP4 product (contract, checks, choice of the tile); `operator.py` is the only file that imports `cutlass`,
and is imported when a kernel is first traced. nvidia-cutlass-dsl compiles on the host, without a GPU, while JAX lowers the call;
it is proprietary: what it generates is neither disassembled nor given to the interpreter, and none of it is in this repository.
"""
