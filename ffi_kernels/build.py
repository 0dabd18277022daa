"""Build the native library and the kernels in this checkout: `python -m ffi_kernels.build` (see native/CMakeLists.txt).

Not needed after `pip install`, which runs the same build. Safe to kill and to run again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from ffi_kernels.library import BUILT_HERE


def main(argv: list[str] | None = None) -> int:
    """Configure and build; the exit status of the step that failed."""
    parser = argparse.ArgumentParser(prog="python -m ffi_kernels.build", description=__doc__)
    parser.add_argument("--images", default="sm_90a,sm_100a,ptx", help="what to compile the kernels to (default: %(default)s)")
    parser.add_argument("--no-interpreter", action="store_true", help="leave out the PTX interpreter (backend sim)")
    parser.add_argument("--keep-going", action="store_true", help="build what can be built when a kernel fails")
    parser.add_argument("--out", type=Path, default=BUILT_HERE, help="build directory (default: %(default)s)")
    args = parser.parse_args(argv)
    if shutil.which("cmake") is None:
        sys.exit("cmake is not on the PATH; install it (pip install cmake ninja) and run this again.")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        "cmake", "-S", str(Path(__file__).parent / "native"), "-B", str(args.out), *generator,
        f"-DPython3_EXECUTABLE={sys.executable}", f"-DDSV4_IMAGES={args.images.replace(',', ';')}",
        f"-DDSV4_INTERPRETER={'OFF' if args.no_interpreter else 'ON'}",
    ]  # fmt: skip
    build = ["cmake", "--build", str(args.out), "--parallel"]
    if args.keep_going:
        build += ["--", "-k", "0" if generator else "-k"]
    for command in (configure, build):
        if status := subprocess.run(command).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
