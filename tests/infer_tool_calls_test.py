"""Tests of infer.tool_calls: what is a call, and that neither text nor borders are lost."""

import hypothesis
import pytest
from hypothesis import strategies as st

from infer import prompt, tool_calls

CALL = '{"name": "add", "arguments": {"a": 1}}'


def block(*lines):
    return "<tool_calls>\n" + "".join(line + "\n" for line in lines) + "</tool_calls>"


def events(text, cuts=()):
    """Return (kind, raw, calls, error) of the text pushed in pieces; neighbours are joined."""
    parser = tool_calls.TurnParser()
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    got = []
    for start, end in zip(borders, borders[1:], strict=False):
        got += parser.push(text[start:end])
    joined = []
    for event in [*got, *parser.close()]:
        assert event.kind in tool_calls.EVENT_KINDS
        assert event.raw
        if joined and event.kind in ("text", "thinking") and joined[-1][0] == event.kind:
            joined[-1] = (event.kind, joined[-1][1] + event.raw, (), "")
        else:
            joined.append((event.kind, event.raw, event.calls, event.error))
    return joined


def test_a_whole_turn():
    parsed = tool_calls.parse_turn(f"<think>\nOne.\nTwo.\n</think>\nI add.\n{block(CALL, CALL)}")
    add = tool_calls.ToolCall("add", {"a": 1})
    assert parsed == tool_calls.ParsedTurn("One.\nTwo.", "I add.\n", (add, add))


def test_a_turn_with_line_ends_of_windows():
    """The parts are those of the same turn with "\\n", but for line ends inside thinking."""
    turn = f"<think>\nOne.\nTwo.\n</think>\nI add.\n{block(CALL, CALL)}"
    parsed = tool_calls.parse_turn(turn.replace("\n", "\r\n"))
    add = tool_calls.ToolCall("add", {"a": 1})
    assert parsed == tool_calls.ParsedTurn("One.\r\nTwo.", "I add.\r\n", (add, add))


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", []),
        (" \n", ["text"]),
        ("Hello", ["text"]),
        (" \n<think>a</think>b", ["tag", "thinking", "tag", "text"]),
        ("<think>cut", ["tag", "thinking"]),
        ("<think>", ["tag"]),
        ("<think>\n</think>", ["tag", "tag"]),
        ("a <think>b</think>", ["text"]),
        ("</think>b", ["text"]),
        ("<think>a<think>b</think>c</think>", ["tag", "thinking", "tag", "text"]),
        (f"<think>{block(CALL)}</think>", ["tag", "thinking", "tag"]),
        (f"<think>\n{block(CALL)}", ["tag", "thinking"]),
        (f"{block(CALL)}\nand {block(CALL)}", ["calls", "text", "calls"]),
        (f"<tool_calls> \t{CALL}{CALL}</tool_calls>.", ["calls", "text"]),
        ("Use <tool_calls> to call.", ["text"]),
        ("<tool_calls>", ["text"]),
        ("</tool_calls>", ["text"]),
        (block('{"name": "a", "arguments": {"x": "</tool_calls> }} \\""}}'), ["calls"]),
        (block('{"name": "a", "arguments": {"x": {"y": [{}]}}}'), ["calls"]),
        (block('{"name": "a", "arguments": {"x": "\\\\"}}') + "b", ["calls", "text"]),
        (block("{name: add, arguments: {}}") + "b", ["malformed", "text"]),
        (block('{"name": "a}') + "b", ["malformed", "text"]),
        (block(CALL, CALL).replace("\n", "\r\n") + "\r\nb", ["calls", "text"]),
        (f"<tool_calls>\t\r\n{CALL}</tool_calls>", ["calls"]),
        (f"<tool_calls>\r{CALL}</tool_calls>", ["text"]),
        ("<tool_calls>\r", ["text"]),
        ("<think>\r\na\r\n</think>\r\nb", ["tag", "thinking", "tag", "text"]),
        ("<think>\r\n</think>\r\n", ["tag", "tag"]),
        ("<think>\ra\r</think>\r", ["tag", "thinking", "tag", "text"]),
    ],
)
def test_kinds(text, kinds):
    whole = events(text)
    assert [event[0] for event in whole] == kinds
    assert events(text, range(len(text))) == whole


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        ("", "no call"),
        ("\n \n", "no call"),
        ("add(1)", "Expecting value"),
        (CALL + "}", "Expecting value"),
        (CALL + ",\n" + CALL, "Expecting value"),
        ("{'name': 'add', 'arguments': {}}", "Expecting property name"),
        (f"[{CALL}]", "a call has a name and arguments"),
        ('{"name": "add"}', "a call has a name and arguments"),
        ('{"name": "add", "arguments": {}, "id": 1}', "nothing else"),
        ('{"name": 3, "arguments": {}}', "a name is a string"),
        ('{"name": "", "arguments": {}}', "not empty"),
        ('{"name": "add", "arguments": "{}"}', "arguments are an object"),
        ('{"name": "add", "arguments": {"a": 1, "a": 2}}', "twice"),
        ('{"name": "add", "arguments": {"a": NaN}}', "NaN is not JSON"),
        ('{"name": "add", "arguments": {"a": 1e999}}', "too large"),
        ('{"name": "add", "arguments": {"a": "\\ud800"}}', "surrogates not allowed"),
        ('{"name": "add", "arguments": {"a": "\x01"}}', "control character"),
        ('{"a":' * 100_000, "recursion"),
    ],
)
def test_malformed_calls(inner, why):
    text = f"<tool_calls>\n{inner}</tool_calls>"
    with pytest.raises(ValueError, match=f"(?s)tool calls: got .*{why}.*; wanted <tool_calls>"):
        tool_calls.parse_turn(text)
    assert [event[:2] for event in events(text)] == [("malformed", text)]


def test_a_block_without_end_is_malformed():
    with pytest.raises(ValueError, match="no </tool_calls>; wanted"):
        tool_calls.parse_turn(f"Well.\n<tool_calls>\n{CALL}\n")
    assert events(f"a<tool_calls>\n{CALL}")[-1][:2] == ("malformed", f"<tool_calls>\n{CALL}")


PARTS = (
    *("<think>", "</think>", "\n</think>\n", "<tool_calls>", "<tool_calls>\n", "</tool_calls>"),
    *(block(CALL), CALL, block('{"name": "a", "arguments": {"s": "\\"</tool_calls>"}}')),
    *("<", "<t", "</", "{", "}", '"', "\\", "\n", "\r", "\r\n", " ", "a", "é\U0001f600"),
    *("<think>\r\n", "\r\n</think>\r\n", "<tool_calls>\r\n"),
)
TEXT = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@hypothesis.given(TEXT, st.lists(st.integers(0, 1000), max_size=12))
@hypothesis.settings(max_examples=400)
def test_borders_change_nothing_and_nothing_is_lost(text, cuts):
    whole = events(text)
    assert "".join(event[1] for event in whole) == text
    assert events(text, cuts) == whole
    assert events(text, range(len(text))) == whole


@hypothesis.given(TEXT, TEXT)
def test_what_came_out_stands_whatever_follows(text, more):
    parser = tool_calls.TurnParser()
    early = [event for char in text for event in parser.push(char)]
    late = [*early, *parser.push(more), *parser.close()]
    joined = "".join(event.raw for event in late if event.kind == "text")
    assert joined == "".join(event[1] for event in events(text + more) if event[0] == "text")


def test_text_and_thinking_are_not_held_back():
    parser = tool_calls.TurnParser()
    assert [e.raw for e in parser.push("<think>\nSo")] == ["<think>\n", "So"]
    assert [e.raw for e in parser.push("me\n</thin")] == ["me"]
    assert [e.raw for e in parser.push("gs")] == ["\n</things"]
    assert [e.raw for e in parser.push("</think>\nText <tool_")] == ["</think>\n", "Text "]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
PLAIN = st.text(st.sampled_from("ab .\n"), max_size=10)


@hypothesis.given(
    PLAIN.map(str.strip),
    PLAIN,
    st.lists(st.tuples(st.text(min_size=1), st.dictionaries(st.text(), JSON)), max_size=3),
)
def test_reads_what_the_prompt_writes(thinking, text, calls):
    message = {
        "role": "assistant",
        "reasoning": thinking,
        "content": text,
        "tool_calls": [{"name": name, "arguments": arguments} for name, arguments in calls],
    }
    hypothesis.assume(thinking or text or calls)
    written = prompt.normalize_messages([message])[0]["content"][0]["text"]
    hypothesis.assume(not text[:1].isspace() or thinking)
    parsed = tool_calls.parse_turn(written)
    assert parsed.thinking == thinking
    assert [(name, arguments) for name, arguments in parsed.calls] == calls
    gap = "\n" if calls and text and not text.endswith("\n") else ""
    assert parsed.text == text + gap
