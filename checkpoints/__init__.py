"""Checkpoints: models on disk, and the names other libraries give to their tensors.

>>> from checkpoints import load, save
>>> save(model, "my-model"); model = load("my-model", recipe="official")
"""

from checkpoints.from_transformers import from_transformers
from checkpoints.names import official_name, official_state
from checkpoints.store import FORMAT_VERSION, load, save

__all__ = ["FORMAT_VERSION", "from_transformers", "load", "official_name", "official_state", "save"]
