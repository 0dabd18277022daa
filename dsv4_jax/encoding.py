"""Chat format: messages to the prompt text the model was trained on, and back.

Here: the special tokens, `encode_messages`, `parse_completion` and `parse_prompt`.
Not here: token ids and the tokenizer, sampling, running tools; nor the format's task tokens and
maximum-effort preface. A prompt is BOS, the system text, then turns with nothing between them:

    <｜User｜>question<｜Assistant｜></think>answer EOS                     chat mode
    <｜User｜>question<｜Assistant｜><think>reasoning</think>answer EOS     thinking mode

Tool calls are a DSML block at the end of an answer; their results are the next user turn.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, Sequence

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER)
ROLES = ("system", "user", "developer", "assistant", "tool", "latest_reminder")
_ASKING, _INSTRUCTING = ("user", "developer"), ("system", "developer")

# The tokenizer has more tokens of the shape <｜name｜> than the format uses; none of them is text.
_SPECIAL = re.compile(f"<｜[^｜<>]+｜>|{THINK_START}|{THINK_END}|{DSML}")
_TURN = re.compile("|".join((BOS, EOS, USER, ASSISTANT, LATEST_REMINDER)))
# What may end the text behind each token of _TURN; "" is the border of the prompt.
_CLOSED_BY = {"": (USER, LATEST_REMINDER, EOS, ""), EOS: (USER, LATEST_REMINDER, EOS, ""), USER: (ASSISTANT, USER),
              ASSISTANT: (EOS, LATEST_REMINDER, ""), LATEST_REMINDER: (USER, LATEST_REMINDER, "")}

_CALLS, _CALLS_END = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
_INVOKE, _INVOKE_END = re.compile(f'<{DSML}invoke name="([^"\n]+)">\n'), f"</{DSML}invoke>"
_PARAMETER = re.compile(f'<{DSML}parameter name="(.*?)" string="(true|false)">', re.DOTALL)
_PARAMETER_END = f"</{DSML}parameter>"
_RESULT = re.compile(r"<tool_result>(.*?)</tool_result>(\n\n|\Z)", re.DOTALL)

# The wording below belongs to the format (the model was trained on it): every byte counts.
_TOOLS_HEAD = f"""

## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "{_CALLS}" \
block like the following:

{_CALLS}
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{_PARAMETER_END}
...
{_INVOKE_END}
<{DSML}invoke name="$TOOL_NAME2">
...
{_INVOKE_END}
{_CALLS_END}

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside \
{THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_TAIL = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
_FORMAT_HEAD = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def encode_messages(messages: Sequence[dict], *, thinking: bool = False, tools: Sequence[dict] | None = None,
                    drop_reasoning: bool = True, add_bos: bool = True, allow_special: bool = False) -> str:
    """The prompt text of OpenAI-style messages.

    messages: dicts with `role` (one of ROLES) and `content` (a string, or a list of text parts, to be
      joined by blank lines); assistant messages may have `reasoning_content` and `tool_calls`, system
      and developer messages `tools` and `response_format`; tool messages have a `tool_call_id`.
    thinking: the model reasons before it answers; chat mode (False) leaves all reasoning out.
    tools: definitions for the first message, or for an empty system message put in front of it.
    drop_reasoning: in thinking mode, leave out the reasoning and the developer messages that precede
      the last user turn. Without effect when a message defines tools.
    allow_special: take text with special tokens as it is. Otherwise it is refused, for it could end
      its turn and speak for another role.

    Consecutive user and tool messages are one user turn of blocks joined by blank lines, with tool
    results in the order of their calls. After a last user, developer or tool message the prompt ends
    with `<｜Assistant｜>` and `<think>` or `</think>`, ready to generate. Call arguments that are not
    a JSON object become one parameter "arguments". Raises ValueError for what the format cannot say.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages is {_shown(messages)}, but must be a list of at least one message; "
                         'pass for example [{"role": "user", "content": "Hello"}].')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"Message {i} is {_shown(message)}, but must be a dict whose role is one of "
                             f"{', '.join(ROLES)}; rename or remove it.")
    if tools:
        if messages[0]["role"] not in _INSTRUCTING:
            messages = [{"role": "system"}, *messages]
        if messages[0].get("tools"):
            raise ValueError("Tools are given as argument and in message 0, but there is one list; merge them.")
        messages = [{**messages[0], "tools": tools}, *messages[1:]]
    turns = _turns(messages, allow_special)
    last_ask = max((i for i, turn in enumerate(turns) if turn.role in _ASKING), default=0)
    # Tools that parse_prompt left in the content count like tools given as such.
    keep = not drop_reasoning or any(t.role in _INSTRUCTING and _TOOLS_HEAD in t.blocks[0] for t in turns)
    for turn in turns[:last_ask]:
        turn.reasons = keep
    if thinking:
        turns = [turn for turn in turns if turn.reasons or turn.role != "developer"]
    prompt = [BOS] if add_bos else []
    for turn, following in zip(turns, [*turns[1:], None]):
        text, reasons = "\n\n".join(turn.blocks), thinking and turn.reasons
        if turn.role in _ASKING:
            prompt += [USER, text]
            if following is None or following.role in ("assistant", "latest_reminder"):
                prompt += [ASSISTANT, THINK_START if reasons else THINK_END]
        elif turn.role == "assistant":
            prompt += [turn.reasoning + THINK_END if reasons else "", text, EOS]
        else:
            prompt += [LATEST_REMINDER if turn.role == "latest_reminder" else "", text]
    return "".join(prompt)


@dataclasses.dataclass
class _Turn:
    role: str
    blocks: list[str]
    ranks: list[int | None]  # per block, the position of the call it is the result of
    reasoning: str = ""
    reasons: bool = True  # in thinking mode, reasoning is written here


def _turns(messages: Sequence[dict], allow_special: bool) -> list[_Turn]:
    turns, called, order = [], set(), {}  # order: rank of each call in the latest answer that made calls
    for i, message in enumerate(messages):
        role, where, rank = message["role"], f"Message {i} ({message['role']})", None
        foreign = ("task", "content_blocks", "wo_eos") + (() if role in _INSTRUCTING else ("tools", "response_format"))
        if any(message.get(key) for key in foreign):
            raise ValueError(f"{where} has the keys {list(message)}, but {foreign} are not encoded there; remove them.")
        text = _text(message, "content", where, allow_special, optional=role in ("system", "assistant"))
        reasoning = _text(message, "reasoning_content", where, allow_special, optional=True)
        if role == "developer" and not text:
            raise ValueError(f"{where} has the content '', but needs text; remove it or make it a system message.")
        if message.get("tools"):
            for tool in message["tools"]:
                if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
                    raise ValueError(f"{where}: the tool {_shown(tool)} is not in OpenAI format; "
                                     'write it as {"type": "function", "function": {...}}.')
            schemas = "\n".join(_json(tool["function"]) for tool in message["tools"])
            text += _TOOLS_HEAD + _checked(schemas, f"{where}, tools", allow_special) + _TOOLS_TAIL
        if message.get("response_format"):
            schema = _json(message["response_format"])
            text += _FORMAT_HEAD + _checked(schema, f"{where}, response_format", allow_special)
        if role == "assistant" and message.get("tool_calls"):
            text += _encode_calls(message["tool_calls"], where, allow_special)
            order = {call["id"]: k for k, call in enumerate(message["tool_calls"]) if call.get("id")}
            called |= order.keys()
        if role == "tool":
            identity = message.get("tool_call_id")
            if not isinstance(identity, str) or identity not in called:
                raise ValueError(f"{where} has tool_call_id {identity!r}, but the calls before it have the ids "
                                 f"{sorted(called)}; use one of these, or add the message with the call.")
            role, text, rank = "user", f"<tool_result>{text}</tool_result>", order.get(identity, 0)
        if role != "user" or not turns or turns[-1].role != "user":
            turns.append(_Turn(role, [], [], reasoning))
        turns[-1].blocks.append(text)
        turns[-1].ranks.append(rank)
    for turn in turns:
        slots = [i for i, rank in enumerate(turn.ranks) if rank is not None]
        results = [turn.blocks[i] for i in sorted(slots, key=turn.ranks.__getitem__)]
        for slot, result in zip(slots, results):
            turn.blocks[slot] = result
    return turns


def _text(message: dict, key: str, where: str, allow_special: bool, optional: bool) -> str:
    value = message.get(key)
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "\n\n".join(part["text"] for part in value)
    if not isinstance(value, str) and not (optional and value is None):
        raise ValueError(f"{where}: {key} is {_shown(value)}, but must be a string or a list of text parts; "
                         "convert it first, for example with json.dumps.")
    value = value or ""
    own = value.replace(_TOOLS_HEAD, "") if message["role"] in _INSTRUCTING else value
    _checked(own, f"{where}, {key}", allow_special)
    return value


def _checked(text: str, where: str, allow_special: bool) -> str:
    found = None if allow_special else _SPECIAL.search(text)
    if found:
        raise ValueError(f"{where} holds the special token {found[0]!r} at character {found.start()}, which the model "
                         "reads as structure, not as text; remove it, or pass allow_special=True.")
    return text


def _shown(value: Any) -> str:
    return f"{repr(value)[:80]} (type {type(value).__name__})"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encode_calls(calls: Sequence[dict], where: str, allow_special: bool) -> str:
    lines = ["\n", _CALLS]
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = map((function if isinstance(function, dict) else {}).get, ("name", "arguments"))
        if not isinstance(name, str) or not isinstance(arguments, str) or not re.fullmatch('[^"\n]+', name):
            raise ValueError(f"{where}: the tool call {_shown(call)} needs a function with name and arguments, both "
                             "strings, no quote or line break in the name; write the arguments with json.dumps.")
        try:
            values = json.loads(arguments)
        except (ValueError, RecursionError):
            values = None
        parameters = []
        for key, value in (values if isinstance(values, dict) else {"arguments": arguments}).items():
            written, is_string = (value, "true") if isinstance(value, str) else (_json(value), "false")
            head = f'<{DSML}parameter name="{key}" string="{is_string}">'
            if _PARAMETER.match(head)[1] != key:
                raise ValueError(f"{where}: the parameter name {key!r} of {name} contains the end of a DSML tag and "
                                 "could not be read back; rename the parameter.")
            _checked(f"{key} {written}", f"{where}, parameter {key!r} of {name}", allow_special)
            parameters.append(head + written + _PARAMETER_END)
        # Without parameters an empty line stands in their place.
        invoke = f'<{DSML}invoke name="{_checked(name, where, allow_special)}">'
        lines += [invoke, "\n".join(parameters), _INVOKE_END]
    return "\n".join([*lines, _CALLS_END])


def parse_completion(text: str, *, thinking: bool = False) -> dict:
    """The assistant message in what the model generated after the generation prompt.

    text: with or without EOS at its end. thinking: the mode of the prompt; the text then begins
    inside the reasoning and must contain `</think>`. Returns {"role": "assistant",
    "reasoning_content": str, "content": str, "tool_calls": list}, the calls in OpenAI format with
    ids call_0, call_1, ... (unique in this message only) and arguments as a JSON string.
    Raises ValueError, with the character offset, for text that is cut off inside the reasoning or a
    call, for malformed DSML, and for special tokens where text should be.
    """
    end = text.find(EOS)
    if 0 <= end < len(text) - len(EOS):
        raise _malformed(text, end + len(EOS), len(text), f"nothing behind {EOS}")
    return _parse_answer(text, 0, len(text) if end < 0 else end, thinking, first_call=0)


def parse_prompt(text: str) -> list[dict]:
    """The messages of a whole encoded prompt: encoding them with the same `thinking`,
    `drop_reasoning` and `add_bos` gives the same bytes.

    What the text does not say comes back in a plain form: tool definitions and response formats stay
    text of the content (`encode_messages` knows them there), user messages of one turn are one, call
    ids are call_0, call_1, ... through the prompt, and a developer message is a user message, except
    with tools or behind an unanswered user turn. Raises ValueError, with the character offset, for
    text that is no such prompt or that nothing separates (an answer behind a latest_reminder).
    """
    messages, pending, calls = [], [], 0  # pending: ids of the calls whose results may follow
    opened, start = "", len(BOS) if text.startswith(BOS) else 0
    while True:
        mark = _TURN.search(text, start)
        end, closed = (mark.start(), mark[0]) if mark else (len(text), "")
        if closed not in _CLOSED_BY[opened]:
            expected = " or ".join(token or "the end" for token in _CLOSED_BY[opened])
            raise _malformed(text, end, len(text), f"{expected} behind {opened or 'the system text'}")
        thinking = text.find(THINK_END, start, end) >= 0
        if opened == ASSISTANT:
            thinking = text.startswith(THINK_START, start)
            start = _expect(text, start, end, THINK_START if thinking else THINK_END)
        if closed == EOS:
            messages.append(_parse_answer(text, start, end, thinking, calls))
            made = [call["id"] for call in messages[-1]["tool_calls"]]
            pending, calls = made or pending, calls + len(made)
        elif opened == ASSISTANT and start < end:  # more than a generation prompt
            raise _malformed(text, end, len(text), f"{EOS} at the end of the answer")
        elif opened == USER:
            messages += _parse_user(text[start:end], messages, pending)
        elif opened == LATEST_REMINDER or start < end:
            role = "latest_reminder" if opened == LATEST_REMINDER else "system"
            messages.append({"role": role, "content": text[start:end]})
        if not mark:
            return messages or [{"role": "system", "content": ""}]
        opened, start = closed, mark.end()


def _parse_user(body: str, before: Sequence[dict], pending: list[str]) -> list[dict]:
    # Two user messages in a row would be joined; a developer message keeps its own turn.
    if _TOOLS_HEAD in body or (before and before[-1]["role"] in ("user", "tool")):
        return [{"role": "developer", "content": body}]
    messages = []
    while pending and (result := _RESULT.match(body)):
        messages.append({"role": "tool", "tool_call_id": pending.pop(0), "content": result[1]})
        if not result[2]:
            return messages
        body = body[result.end():]
    return [*messages, {"role": "user", "content": body}]


def _parse_answer(text: str, start: int, end: int, thinking: bool, first_call: int) -> dict:
    reasoning = ""
    if thinking:
        reasoning, start = _read_until(text, start, end, THINK_END)
        if start is None:
            raise _malformed(text, end, end, f"{THINK_END} behind the reasoning (was the generation cut off?)")
    content, at = _read_until(text, start, end, "\n\n" + _CALLS)
    calls = [] if at is None else _parse_calls(text, at, end, first_call)
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": calls}


def _read_until(text: str, start: int, end: int, stop: str) -> tuple[str, int | None]:
    """The plain text before `stop`, and the position behind `stop` (None where it is absent)."""
    at = text.find(stop, start, end)
    last = end if at < 0 else at
    special = _SPECIAL.search(text, start, last)
    if special:
        raise _malformed(text, special.start(), last, f"text without special tokens up to {stop!r} or the end")
    return text[start:last], None if at < 0 else at + len(stop)


def _parse_calls(text: str, at: int, end: int, first_call: int) -> list[dict]:
    calls, at = [], _expect(text, at, end, "\n")
    while not calls or not text.startswith(_CALLS_END, at, end):
        invoke = _INVOKE.match(text, at, end)
        if not invoke:
            raise _malformed(text, at, end, f'<{DSML}invoke name="..."> and a new line, or {_CALLS_END} after a call')
        at = invoke.end() + text.startswith("\n" + _INVOKE_END, invoke.end(), end)
        arguments = {}
        while not text.startswith(_INVOKE_END, at, end):
            head = _PARAMETER.match(text, at, end)
            if not head or DSML in head[1] or head[1] in arguments:
                raise _malformed(text, at, end, f'<{DSML}parameter name="..." string="true|false"> or {_INVOKE_END}, '
                                 f"with a name other than {list(arguments)}")
            tag = text.find(DSML, head.end(), end)
            stop = end if tag < 0 else tag - len("</")
            at = _expect(text, stop, end, _PARAMETER_END + "\n")
            value = text[head.end():stop]
            try:
                arguments[head[1]] = value if head[2] == "true" else json.loads(value)
            except (ValueError, RecursionError) as error:
                raise _malformed(text, head.end(), stop, f'JSON, for string is "false" ({error})') from error
        at = _expect(text, at, end, _INVOKE_END + "\n")
        calls.append({"id": f"call_{first_call + len(calls)}", "type": "function",
                      "function": {"name": invoke[1], "arguments": _json(arguments)}})
    if at + len(_CALLS_END) != end:
        raise _malformed(text, at + len(_CALLS_END), end, "nothing between the tool calls and the end of the answer")
    return calls


def _expect(text: str, at: int, end: int, literal: str) -> int:
    if not text.startswith(literal, at, end):
        raise _malformed(text, at, end, repr(literal))
    return at + len(literal)


def _malformed(text: str, at: int, end: int, expected: str) -> ValueError:
    found = repr(text[at:min(end, at + 40)]) if at < end else "the end"
    return ValueError(f"Malformed chat text: found {found} at character {at}, expected {expected}.")
