"""`dsv4 chat`: a conversation in the terminal, streamed. The chat format itself is `encoding.py`."""

from __future__ import annotations

import sys

from dsv4_jax.encoding import encode_messages, parse_completion
from dsv4_jax.generate import generate
from dsv4_jax.model import Model
from dsv4_jax.sampling import Greedy, Sample


def answer(model: Model, messages: list[dict], sampler: Greedy | Sample, max_new_tokens: int, thinking: bool, drafts: int = 0):
    """Yield the pieces of text that the model writes as the next assistant turn of `messages`."""
    prompt = model.tokenizer.encode(encode_messages(messages, thinking=thinking), add_special_tokens=False).ids
    from dsv4_jax.tokenizer import TextStream

    stream = TextStream(model.tokenizer)
    for chunk in generate(model, [prompt], max_new_tokens, sampler, draft_tokens=drafts):
        yield stream.feed(chunk.tokens[0], last=chunk.finished[0] is not None)


def chat(model: Model, sampler, max_new_tokens: int, *, thinking: bool, system: str | None, drafts: int = 0) -> int:
    """Read user turns from standard input until it ends or /exit; /clear forgets the conversation. Returns 0."""
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        print("Write a message; /clear starts over, /exit or Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return 0
        if line.strip() == "/exit":
            return 0
        if line.strip() == "/clear":
            messages = list(start)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        text = ""
        try:
            for piece in answer(model, messages, sampler, max_new_tokens, thinking, drafts):
                text += piece
                print(piece, end="", flush=True)
            print()
            messages.append(parse_completion(text, thinking=thinking))
        except ValueError as error:  # a model may write a malformed turn, and a user may paste a special token
            print(f"\n[this turn is dropped: {error}]", file=sys.stderr)
            messages.pop()
