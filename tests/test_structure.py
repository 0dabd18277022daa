"""The shape of the source tree: import direction, file length, no binaries, no dead paths in the README."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("ffi_kernels", "dsv4_jax", "checkpoints")
ABOVE_THE_CORE = {"cli.py", "bench.py", "bench_step.py", "verify.py"}  # of dsv4_jax: they may use checkpoints
MAY_LOAD_LAZILY = {"__init__.py", "model.py"}  # of dsv4_jax: the entry points, inside functions only


def tracked(*patterns):
    """Files that git tracks or would (untracked and not ignored), as paths from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    return sorted({Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()})


def sources(package):
    return [path for path in tracked("*.py") if path.parts[0] == package]


def imports(text, path):
    """(module, whether at module level) of every import in the text of the file `path`; relative ones are made absolute.

    `from a import b` yields a and a.b, since b may be a module. Imports under `if TYPE_CHECKING` never run: left out.
    """
    found = []

    def visit(node, top):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, top)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.parts[: len(path.parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.append((module, top))
            found.extend((f"{module}.{alias.name}", top) for alias in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(ast.parse(text), True)
    return found


def of(module, *packages):
    return any(module == p or module.startswith(p + ".") for p in packages)


def refused(paths, forbidden):
    """'file imports module' for every import that forbidden(path, module, at module level) rejects."""
    found = ((path, m, top) for path in paths for m, top in imports((ROOT / path).read_text(encoding="utf-8"), path))
    return [f"{path} imports {module}" for path, module, top in found if forbidden(path, module, top)]


def test_the_reader_of_imports():
    text = (
        "import torch.nn\nfrom . import c\nfrom .d import e\ntry:\n    import f\nexcept ImportError:\n    pass\n"
        "def g():\n    from h import i\nif TYPE_CHECKING:\n    import j\nclass K:\n    import l\n"
    )
    assert imports(text, Path("a/b.py")) == [
        ("torch.nn", True), ("a", True), ("a.c", True), ("a.d", True), ("a.d.e", True), ("f", True),
        ("h", False), ("h.i", False), ("l", True),
    ]  # fmt: skip


def test_ops_know_no_model():
    assert sources("ffi_kernels")
    above = ("dsv4_jax", "checkpoints", "tests")
    assert not refused(sources("ffi_kernels"), lambda path, m, top: of(m, *above) or (of(m, "torch") and top))
    # torch is at most an interop of its own, never of the ops themselves
    assert not refused(sources("ffi_kernels"), lambda path, m, top: of(m, "torch") and "torch" not in path.stem)


def test_the_core_knows_neither_checkpoints_nor_torch():
    core = [path for path in sources("dsv4_jax") if path.name not in ABOVE_THE_CORE]
    assert core

    def forbidden(path, module, top):
        lazily = not top and path.name in MAY_LOAD_LAZILY
        return of(module, "tests", "notebooks") or (of(module, "torch") and top) or (of(module, "checkpoints") and not lazily)

    assert not refused(core, forbidden)
    above = [f"dsv4_jax.{Path(name).stem}" for name in ABOVE_THE_CORE]
    assert not refused(core, lambda path, module, top: of(module, *above) and top), "the core does not import its commands"


def test_attention_and_moe_do_not_import_each_other():
    for package in ("dsv4_jax", "ffi_kernels"):
        pair = {"attention.py": f"{package}.moe", "moe.py": f"{package}.attention"}
        files = [Path(package, name) for name in pair]
        assert not refused(files, lambda path, module, top: of(module, pair[path.name]))


def test_checkpoints_import_no_commands():
    commands = [f"dsv4_jax.{Path(name).stem}" for name in ABOVE_THE_CORE]
    assert not refused(sources("checkpoints"), lambda path, module, top: of(module, "tests", "notebooks", *commands))


def test_files_fit_in_the_head():
    suffixes = ("*.py", "*.h", "*.hpp", "*.cc", "*.cpp", "*.cu", "*.cuh", "*.cmake", "CMakeLists.txt")
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in tracked(*suffixes)}
    assert not {str(path): n for path, n in lines.items() if n > 400}, "split by topic: 400 lines are the limit"


def test_source_files_say_what_lives_here():
    unexplained = [
        str(path)
        for package in PACKAGES
        for path in sources(package)
        if (text := (ROOT / path).read_text(encoding="utf-8")).strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert not unexplained


def test_no_binaries():
    embedded = Path("checkpoints/tiny")  # the embedded model is the one thing that is meant to be binary
    files = [path for path in tracked() if embedded not in path.parents]
    binary = [str(path) for path in files if b"\0" in (ROOT / path).read_bytes()[: 1 << 16]]
    assert not binary, "built or downloaded files do not belong into git"


def test_readme_paths_exist():
    readme = ROOT / "README.md"
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", readme.read_text(encoding="utf-8"), flags=re.S))
    roots = {path.parts[0] for path in tracked()}
    looks_like_path = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
    paths = [q for q in quoted if looks_like_path.fullmatch(q) and (q.split("/")[0] in roots or "/" in q)]
    assert not [p for p in paths if not (ROOT / p).exists()]
