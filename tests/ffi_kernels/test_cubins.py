"""What ptxas makes of the sm_100a kernels, read from this project's own cubins: registers, no spills, the opcodes of tcgen05.

`nvdisasm` and `cuobjdump` come from PyPI (extra `test`) or lie beside nvcc.
"""

import collections
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from ffi_kernels import library

KERNELS = {f"nvfp4_matmul_{group}_{dtype}" for group in ("one", "pair") for dtype in ("fp32", "bf16")}


def tool(name: str) -> str:
    """Path of a CUDA tool, or a skip."""
    beside_nvcc = [str(Path(nvcc).resolve().parent) for nvcc in [shutil.which("nvcc")] if nvcc]
    from_pypi = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    for where in [*from_pypi, None, *beside_nvcc]:
        if found := shutil.which(name, path=where):
            return found
    pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}, or a CUDA toolkit that has it")


@pytest.fixture(scope="module")
def cubin() -> Path:
    if (missing := library.why_not("sm_100a")) is not None:
        pytest.skip(missing)
    return library.directory() / "matmul.sm_100a.cubin"


def output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_registers_and_spills(cubin):
    """A spill would lie on the stack. The kernels took 73 to 96 registers with nvcc 13.0; 192 threads leave each 255."""
    usage = dict(re.findall(r"Function (\w+):\s+(.*)", output(tool("cuobjdump"), "-res-usage", cubin)))
    assert usage.keys() == KERNELS
    for name, line in usage.items():
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 128, (name, line)


def test_opcodes(cubin):
    """FP4 products, copies of scales, tensor loads and stores, all of pairs in their 2CTA forms; no other product, no local memory."""
    functions = re.split(r"\.section\s+\.text\.(\w+)", output(tool("nvdisasm"), cubin))[1:]
    code = dict(zip(functions[::2], functions[1::2], strict=True))
    assert code.keys() == KERNELS
    for name, text in code.items():
        ops = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)
        kinds = collections.Counter(op.split(".")[0] for op in ops)
        assert {"UTCOMMA", "UTCCP", "UTMALDG", "UTMASTG", "UTCBAR", "LDTM"} <= kinds.keys(), name
        assert not {"LDL", "STL", "HMMA", "QMMA", "OMMA", "UTCQMMA", "UTCHMMA", "HGMMA"} & kinds.keys(), name
        for op in ops:
            if op.split(".")[0] in ("UTCOMMA", "UTCCP", "UTCBAR", "UTMALDG"):
                assert ("2CTA" in op) == ("pair" in name), (name, op)
        assert all(op.endswith("4X") for op in ops if op.startswith("UTCOMMA")), "one scale for each 16 of K"
