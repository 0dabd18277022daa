"""The tokenizer that lies beside the weights: `tokenizer.json` in the model's directory.

Not here: the chat format (`encoding.py`), which turns messages into text.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@functools.lru_cache(maxsize=8)
def load_tokenizer(source: str | None) -> Tokenizer:
    """The `tokenizers.Tokenizer` of the model directory `source`, read once. ValueError if there is none."""
    if source is None:
        raise ValueError(
            "this model was not loaded from a directory, so it has no tokenizer; pass token ids, or save the model "
            "with checkpoints.save(model, path, tokenizer_json=...) and load it."
        )
    path = Path(source) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{source} holds no tokenizer.json; copy the model's tokenizer.json there, or pass token ids.")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the bare class
        raise ValueError(f"{path} is not a readable tokenizer ({error}); copy it again from the model's source.") from error


class TextStream:
    """Token ids in, text out as soon as it is certain: bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # tokens whose text is not out yet, and one more for context
        self._shown = 0  # characters of their text that are

    def feed(self, tokens: list[int], last: bool = False) -> str:
        """The text that `tokens` add; `last` also releases what an unfinished character holds back."""
        self._ids += tokens
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if text.endswith("\ufffd") and not last:
            return ""
        new = text[self._shown :]
        self._ids = self._ids[-1:]
        self._shown = len(self._tokenizer.decode(self._ids, skip_special_tokens=False))
        return new
