"""The part of a .cu file that one kernel is made of: a record holds for a kernel as long as this text stays the same."""

import functools
import pathlib
import re

_WORD = re.compile(r"[A-Za-z_]\w*")


def _items(text: str) -> list[str]:
    """Top-level directives, definitions, declarations and macro calls, without comments."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S)
    found, at, depth = [], 0, 0
    start = None
    while at < len(text):
        if start is None:
            if text[at].isspace():
                at += 1
                continue
            start = at
            if text[at] == "#":
                end = re.compile(r"(?:\\\n|[^\n])*").match(text, at).end()
                found.append(text[start:end])
                at, start = end, None
                continue
        c = text[at]
        if c == '"':
            at = re.compile(r'"(?:\\.|[^"\\])*"').match(text, at).end()
            continue
        depth += (c in "({[") - (c in ")}]")
        at += 1
        if depth:
            continue
        called = c == ")" and re.match(r"\w+\s*\(", text[start:at]) is not None  # MACRO(...), which no semicolon ends
        if c == ";" or called or (c == "}" and not re.match(r"\s*[;,=]", text[at:])):
            found.append(text[start:at])
            start = None
    return [*found, text[start:]] if start is not None else found


def _names(item: str, makers: set[str]) -> set[str]:
    """What an item defines; empty if that is not plain, and then every kernel keeps it."""
    if item.startswith("#"):
        macro = re.match(r"#\s*define\s+(\w+)", item)
        return {macro[1]} if macro else set()
    if (call := re.match(r"(\w+)\s*\(\s*(\w+)", item)) is not None:
        return {call[2]} if call[1] in makers else set()
    if (kind := re.match(r"(?:template\s*<[^>]*>\s*)?(?:struct|union|enum(?:\s+class)?)\b[^{;]*?(\w+)\s*[{:;]", item)) is not None:
        return {kind[1]}
    head = item.partition("{")[0]
    if (function := re.search(r"(\w+)\s*\((?!\()", re.sub(r"(__launch_bounds__|__cluster_dims__|__align__)\s*\([^)]*\)", "", head))) is not None:
        return {function[1]}
    value = re.search(r"(\w+)\s*(?:\[[^\]]*\]\s*)*(?:=|;)", item)
    return {value[1]} if value else set()


@functools.cache
def _parts(path: pathlib.Path) -> list[tuple[str, frozenset[str], frozenset[str]]]:
    text = path.read_text()
    for header in re.findall(r'#include\s+"([^"]+)"', text):
        text = (path.parent / header).read_text() + text
    items = _items(text)
    makers = {m[1] for item in items if (m := re.match(r"#\s*define\s+(\w+)\(", item))}
    return [(" ".join(item.split()), frozenset(_names(item, makers)), frozenset(_WORD.findall(item))) for item in items]


def of_kernel(path: pathlib.Path, kernel: str) -> str:
    """The items of the file, in order, that the kernel is made of: itself, what it names, what they name, and so on."""
    parts = _parts(path)
    wanted = {kernel}
    while True:
        kept = [part for part in parts if not part[1] or part[1] & wanted]
        more = wanted.union(*(words for _, _, words in kept))
        if more == wanted:
            return "\n".join(text for text, _, _ in kept)
        wanted = more
