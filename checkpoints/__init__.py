"""Checkpoints: models on disk, and the names other libraries give to their tensors.

>>> from checkpoints import convert, load, save
>>> convert("DeepSeek-V4-Flash", "flash", recipe="official"); model = load("flash", recipe=None)
"""

import importlib

_HOME = {
    "FORMAT_VERSION": "store", "load": "restore", "load_with_report": "restore", "save": "store", "from_transformers": "from_transformers",
    "official_name": "names", "official_state": "state", "convert": "conversion", "open_source": "reader",
    "inspect": "inspecting", "export_hf": "exporting",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str):
    # Lazily, so that planning a conversion does not wait for libraries it never uses.
    if name not in _HOME:
        raise AttributeError(f"module 'checkpoints' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"checkpoints.{_HOME[name]}"), name)
    globals()[name] = value
    return value
