"""dsv4_jax.encoding: byte equality with the published vectors, round trips, refusals.

Here: text only. Not here: token ids (they need tokenizer.json).
"""

import json
import random
from pathlib import Path

import pytest

from dsv4_jax.encoding import (ASSISTANT, BOS, DSML, EOS, LATEST_REMINDER, SPECIAL_TOKENS, THINK_END, THINK_START,
                               USER, encode_messages, parse_completion, parse_prompt)

DATA = Path(__file__).parents[1] / "data"
TOOL = {"type": "function", "function": {"name": "f", "description": "ein Wärmemesser", "parameters": {}}}
NASTY = ['"', "'", "\\", "\n", "\n\n", "<", ">", "</", "/>", "é", "北京", "🙂", "\u2028", "\t", "\r\n", "{", "}",
         "[1]", "null", "true", '{"a": "b"}', "</invoke>", "<tool_result>", "</tool_result>", "｜", '" string="', "\x00", " ",
         '">', "&lt;", "%s", "{0}", "\\u0041", "-0.0"]


def system(content="S", **more):
    return {"role": "system", "content": content, **more}


def user(content):
    return {"role": "user", "content": content}


def assistant(content="", reasoning="", calls=()):
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": list(calls)}


def call(identity, name="f", arguments="{}"):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(identity, content):
    return {"role": "tool", "tool_call_id": identity, "content": content}


def nasty_text(rng, most=6):
    return "".join(rng.choice(NASTY + ["a", "bc"]) for _ in range(rng.randrange(most + 1)))


def nasty_value(rng, depth=0):
    kind = rng.randrange(5 if depth > 2 else 7)
    if kind == 5:
        return [nasty_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {nasty_text(rng): nasty_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return [nasty_text(rng), rng.randrange(-10**20, 10**20), rng.random() * 10**rng.randrange(-9, 9),
            rng.choice([True, False]), None][kind]


def nasty_arguments(rng):
    keys = (nasty_text(rng).replace('" string="', "'") for _ in range(rng.randrange(4)))
    return {key: nasty_value(rng) for key in keys}


@pytest.mark.parametrize("number", [1, 2])
def test_published_vector(number):
    given = json.loads((DATA / f"encoding_test_input_{number}.json").read_text("utf-8"))
    expected = (DATA / f"encoding_test_output_{number}.txt").read_bytes()
    messages, tools = (given["messages"], given["tools"]) if isinstance(given, dict) else (given, None)
    prompt = encode_messages(messages, tools=tools, thinking=True)
    assert prompt.encode() == expected
    assert encode_messages(parse_prompt(prompt), thinking=True) == prompt


def test_special_tokens():
    assert SPECIAL_TOKENS == (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER)
    assert BOS == "<｜begin▁of▁sentence｜>" and EOS == "<｜end▁of▁sentence｜>" and DSML == "｜DSML｜"


@pytest.mark.parametrize("last", [user("u"), {"role": "developer", "content": "u"}])
def test_generation_prompt(last):
    assert encode_messages([system(), last]) == f"{BOS}S{USER}u{ASSISTANT}{THINK_END}"
    assert encode_messages([last], thinking=True, add_bos=False) == f"{USER}u{ASSISTANT}{THINK_START}"


def test_generation_prompt_behind_tool_result():
    prompt = encode_messages([user("u"), assistant(calls=[call("1")]), result("1", "r")])
    assert prompt.endswith(f"{EOS}{USER}<tool_result>r</tool_result>{ASSISTANT}{THINK_END}")


def test_no_generation_prompt_behind_an_answer():
    assert encode_messages([user("u"), assistant("a", "r")]) == f"{BOS}{USER}u{ASSISTANT}{THINK_END}a{EOS}"


CHAT = [system(), user("u1"), assistant("a1", "r1"), user("u2"), assistant("a2", "r2")]


def test_reasoning_is_dropped_before_the_last_user_turn():
    dropped = encode_messages(CHAT, thinking=True)
    assert dropped == (f"{BOS}S{USER}u1{ASSISTANT}{THINK_END}a1{EOS}"
                       f"{USER}u2{ASSISTANT}{THINK_START}r2{THINK_END}a2{EOS}")
    kept = encode_messages(CHAT, thinking=True, drop_reasoning=False)
    assert kept == (f"{BOS}S{USER}u1{ASSISTANT}{THINK_START}r1{THINK_END}a1{EOS}"
                    f"{USER}u2{ASSISTANT}{THINK_START}r2{THINK_END}a2{EOS}")
    assert "r1" not in encode_messages(CHAT) and "r2" not in encode_messages(CHAT)


def test_tools_keep_reasoning():
    assert "r1" in encode_messages(CHAT, thinking=True, tools=[TOOL])
    assert "r1" in encode_messages([system(tools=[TOOL]), *CHAT[1:]], thinking=True)


def test_tool_results_without_definitions_count_as_user_turn():
    prompt = encode_messages([user("u"), assistant("", "r", [call("1")]), result("1", "x")], thinking=True)
    assert "r" + THINK_END not in prompt and prompt.endswith(THINK_START)


def test_developer_is_dropped_with_the_reasoning():
    messages = [{"role": "developer", "content": "d"}, user("u")]
    assert encode_messages(messages) == f"{BOS}{USER}d{USER}u{ASSISTANT}{THINK_END}"
    assert encode_messages(messages, thinking=True) == f"{BOS}{USER}u{ASSISTANT}{THINK_START}"
    between = [user("u"), {"role": "developer", "content": "d"}, assistant("a"), user("v")]
    assert encode_messages(between, thinking=True).startswith(f"{BOS}{USER}u{ASSISTANT}{THINK_END}a{EOS}")


def test_tools_without_a_system_message():
    given = encode_messages([user("u")], tools=[TOOL])
    assert given == encode_messages([system(""), user("u")], tools=[TOOL])
    assert given.startswith(f"{BOS}\n\n## Tools\n\n") and "Wärmemesser" in given


def test_tools_and_response_format_of_a_developer_message():
    prompt = encode_messages([{"role": "developer", "content": "d", "tools": [TOOL], "response_format": {"a": 1}}])
    assert prompt.startswith(f"{BOS}{USER}d\n\n## Tools\n\n")
    assert prompt.endswith('reply:\n{"a": 1}' + ASSISTANT + THINK_END)


def test_tool_results_take_the_order_of_the_calls():
    calls = assistant(calls=[call("x"), call("y"), call("z")])
    prompt = encode_messages([user("u"), calls, result("z", "3"), user("by the way"), result("x", "1"),
                              result("y", "2"), user("go on")])
    blocks = ["<tool_result>1</tool_result>", "by the way", "<tool_result>2</tool_result>",
              "<tool_result>3</tool_result>", "go on"]
    assert f"{USER}{chr(10).join(blocks).replace(chr(10), chr(10) * 2)}{ASSISTANT}" in prompt


def test_consecutive_user_messages_and_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode_messages([user(parts), user("c")]) == f"{BOS}{USER}a\n\nb\n\nc{ASSISTANT}{THINK_END}"


def test_call_without_arguments():
    text = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n\n</{DSML}invoke>\n</{DSML}tool_calls>'
    assert text + EOS in encode_messages([user("u"), assistant(calls=[call("1")])])
    assert parse_completion(text)["tool_calls"] == [call("call_0")]
    without_empty_line = text.replace(">\n\n</", ">\n</")
    assert parse_completion(without_empty_line)["tool_calls"] == [call("call_0")]


@pytest.mark.parametrize("arguments", ["no json", "[1, 2]", "5", "", "null", '"s"', '{"a": 1'])
def test_arguments_that_are_no_object_become_one_parameter(arguments):
    prompt = encode_messages([user("u"), assistant(calls=[call("1", arguments=arguments)])])
    assert f'<{DSML}parameter name="arguments" string="true">{arguments}</{DSML}parameter>' in prompt
    assert encode_messages(parse_prompt(prompt)) == prompt


def test_parse_completion_chat_and_thinking():
    for end in ("", EOS):
        assert parse_completion("a" + end) == assistant("a")
        assert parse_completion(f"r{THINK_END}a{end}", thinking=True) == assistant("a", "r")
        assert parse_completion(THINK_END + end, thinking=True) == assistant()


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("thinking", [False, True])
def test_nasty_calls_survive(seed, thinking):
    rng = random.Random(seed)
    wanted = [(f"f{i}", nasty_arguments(rng)) for i in range(rng.randrange(1, 4))]
    calls = [call(f"call_{i}", name, json.dumps(a, ensure_ascii=False)) for i, (name, a) in enumerate(wanted)]
    answer = assistant(nasty_text(rng), nasty_text(rng) if thinking else "", calls)
    prompt = encode_messages([user("u"), answer], thinking=thinking)
    opening = USER + "u" + ASSISTANT + (THINK_START if thinking else THINK_END)
    assert parse_completion(prompt.removeprefix(BOS + opening), thinking=thinking) == answer


@pytest.mark.parametrize("seed", range(100))
def test_random_chats_round_trip(seed):
    rng = random.Random(seed)
    messages, known = [system(nasty_text(rng))] if rng.random() < 0.7 else [], []
    for turn in range(rng.randrange(1, 5)):
        if known and rng.random() < 0.8:
            rng.shuffle(known)
            messages += [result(identity, nasty_text(rng)) for identity in known]
        if not known or rng.random() < 0.3:
            messages.append(user(nasty_text(rng)))
        known = [f"id{turn}_{i}" for i in range(rng.randrange(3))]
        messages.append(assistant(nasty_text(rng), nasty_text(rng), [
            call(identity, arguments=json.dumps(nasty_arguments(rng))) for identity in known]))
    if rng.random() < 0.5:
        messages.append(user(nasty_text(rng)))
    tools = [TOOL, TOOL] if rng.random() < 0.5 else None
    for thinking in (False, True):
        for drop in (False, True):
            for bos in (False, True):
                how = dict(thinking=thinking, drop_reasoning=drop, add_bos=bos)
                prompt = encode_messages(messages, tools=tools, **how)
                assert encode_messages(parse_prompt(prompt), **how) == prompt


@pytest.mark.parametrize("messages", [
    [system("")],
    [system("S")],
    [system("S"), assistant("a", "r")],
    [user("u"), assistant("a", "r"), assistant("b", "q"), user("v")],
    [user("u"), assistant("a"), system("S"), user("v")],
    [{"role": "developer", "content": "d"}, user("u"), assistant("a")],
    [user("u"), {"role": "developer", "content": "d"}],
    [{"role": "developer", "content": "d", "tools": [TOOL]}, user("u"), assistant("a", "r"), user("v")],
    [system("S", response_format={"x": [1, None]}), user("u")],
    [system("S", tools=[TOOL], response_format={"x": 1}), user("u"), assistant("a", "r"), user("v")],
    [user("u"), assistant("", "r", [call("1"), call("2")]), result("2", "y"), user("")],
    [user("u"), {"role": "latest_reminder", "content": "now"}, user("v")],
    [{"role": "latest_reminder", "content": "now"}, user("v"), assistant("a", "r")],
])
@pytest.mark.parametrize("thinking", [False, True])
def test_unusual_orders_round_trip(messages, thinking):
    prompt = encode_messages(messages, thinking=thinking)
    assert encode_messages(parse_prompt(prompt), thinking=thinking) == prompt


def test_parse_prompt_gives_messages():
    calls = [call("call_0", arguments='{"a": 1}'), call("call_1", "g")]
    messages = [system(), user("u"), assistant("a", "r", calls), result("call_0", "x"), result("call_1", "y"),
                assistant("b", "q", [call("call_2")]), result("call_2", "z"), user("v")]
    assert parse_prompt(encode_messages(messages, thinking=True, drop_reasoning=False)) == messages


OPEN = f"\n\n<{DSML}tool_calls>"
HEAD = f'{OPEN}\n<{DSML}invoke name="f">\n'
PARAMETER = f'<{DSML}parameter name="a" string="false">1</{DSML}parameter>\n'
TAIL = f"</{DSML}invoke>\n</{DSML}tool_calls>"


@pytest.mark.parametrize("text, thinking, found, at", [
    ("reasoning cut", True, "the end", 13),
    (f"a{EOS}b", False, "'b'", 1 + len(EOS)),
    (f"a{THINK_START}b", False, "'<think>b'", 1),
    (f"r{THINK_START}b{THINK_END}", True, "'<think>b'", 1),
    (f"\n<{DSML}tool_calls>", False, f"'{DSML}tool_calls>'", 2),
    (OPEN, False, "the end", len(OPEN)),
    (f"{OPEN}\n</{DSML}tool_calls>", False, f"'</{DSML}tool_calls>'", len(OPEN) + 1),
    (HEAD, False, "the end", len(HEAD)),
    (HEAD + PARAMETER, False, "the end", len(HEAD + PARAMETER)),
    (HEAD + PARAMETER[:-20], False, "", len(HEAD)),
    (HEAD + PARAMETER + PARAMETER + TAIL, False, f"'<{DSML}parameter", len(HEAD + PARAMETER)),
    (HEAD + PARAMETER.replace("1<", "one<") + TAIL, False, "'one'", len(HEAD) + PARAMETER.index("1<")),
    (HEAD + PARAMETER.replace('"false"', '"no"') + TAIL, False, f"'<{DSML}parameter", len(HEAD)),
    (HEAD + PARAMETER + "x" + TAIL, False, "'x</", len(HEAD + PARAMETER)),
    (HEAD + PARAMETER + TAIL + "x", False, "'x'", len(HEAD + PARAMETER + TAIL)),
    (HEAD.replace('"f"', "f") + TAIL, False, f"'<{DSML}invoke", len(OPEN) + 1),
    (HEAD + PARAMETER + TAIL[:-1], False, f"'</{DSML}tool_calls'", len(HEAD + PARAMETER) + TAIL.index("\n") + 1),
])
def test_malformed_completions(text, thinking, found, at):
    with pytest.raises(ValueError, match="found .* at character .*, expected .*") as error:
        parse_completion(text, thinking=thinking)
    assert f"found {found}" in str(error.value)
    if found:
        assert f" at character {at}, " in str(error.value)


@pytest.mark.parametrize("seed", range(50))
def test_any_damage_is_refused_or_read_never_a_crash(seed):
    rng = random.Random(seed)
    whole = f"r{THINK_END}a{HEAD}{PARAMETER}{TAIL}{EOS}"
    for _ in range(100):
        at, drop = rng.randrange(len(whole)), rng.randrange(4)
        text = whole[:at] + rng.choice(["", "\n", DSML, THINK_END, EOS, '"']) + whole[at + drop:]
        for parse in (lambda: parse_completion(text, thinking=True), lambda: parse_completion(text),
                      lambda: parse_prompt(f"{USER}u{ASSISTANT}{THINK_START}{text}")):
            try:
                parse()
            except ValueError as error:
                assert "expected" in str(error)


@pytest.mark.parametrize("text", [
    f"{BOS}{BOS}",
    f"{USER}u",
    f"{USER}u{EOS}",
    f"{USER}u{ASSISTANT}a{EOS}",
    f"{USER}u{ASSISTANT}{THINK_START}r",
    f"{USER}u{ASSISTANT}{THINK_START}r{EOS}",
    f"{USER}u{ASSISTANT}{THINK_END}a{USER}v",
    f"S{ASSISTANT}{THINK_END}",
    f"{LATEST_REMINDER}r{EOS}",
    f"{USER}u{ASSISTANT}{THINK_END}{HEAD}{EOS}",
])
def test_malformed_prompts(text):
    with pytest.raises(ValueError, match="found .* at character .*, expected .*"):
        parse_prompt(text)


@pytest.mark.parametrize("messages, said", [
    ([], "at least one message"),
    ("hello", "at least one message"),
    (["hello"], "Message 0 is 'hello'"),
    ([user("u"), {"role": "robot", "content": ""}], "Message 1 .*robot.*latest_reminder"),
    ([user(3)], "content is 3 .type int.*json.dumps"),
    ([user(None)], "content is None"),
    ([user([{"type": "image_url"}])], "image_url"),
    ([{"role": "developer", "content": ""}], "needs text"),
    ([user("u"), result("1", "r")], "tool_call_id '1'.*ids \\[\\]"),
    ([user("u"), assistant(calls=[call("1")]), result("2", "r")], "tool_call_id '2'.*\\['1'\\]"),
    ([user("u"), assistant(calls=[call("1", arguments={})])], "json.dumps"),
    ([user("u"), assistant(calls=[call("1", name='f"')])], "no quote"),
    ([user("u"), assistant(calls=["f"])], "needs a function"),
    ([user("u"), assistant(calls=[call("1", arguments=json.dumps({'a" string="true">': 1}))])], "rename"),
    ([{**user("u"), "tools": [TOOL]}], "'tools'"),
    ([{**user("u"), "task": "title"}], "'task'"),
    ([system(tools=[{"name": "f"}])], "OpenAI format"),
])
def test_bad_messages(messages, said):
    with pytest.raises(ValueError, match=said):
        encode_messages(messages)


def test_tools_given_twice():
    with pytest.raises(ValueError, match="one list"):
        encode_messages([system(tools=[TOOL])], tools=[TOOL])


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<｜place▁holder▁no▁0｜>"])
@pytest.mark.parametrize("place", ["user", "system", "reasoning", "answer", "argument", "escaped", "result", "schema"])
def test_special_tokens_in_text_are_refused(token, place):
    text = {p: f"x{token}y" if p == place else "t" for p in (
        "user", "system", "reasoning", "answer", "argument", "escaped", "result", "schema")}
    arguments = json.dumps({"a": [text["argument"]], "b": text["escaped"]}, ensure_ascii=place == "escaped")
    tool = {"type": "function", "function": {"name": "f", "description": text["schema"]}}
    messages = [system(text["system"], tools=[tool]), user(text["user"]),
                assistant(text["answer"], text["reasoning"], [call("1", arguments=arguments)]),
                result("1", text["result"])]
    with pytest.raises(ValueError, match="special token.*allow_special"):
        encode_messages(messages)
    assert token in encode_messages(messages, thinking=True, allow_special=True)
