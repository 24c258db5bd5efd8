"""A parser for what the model wrote: thinking, text and tool calls, as they stream.

    <think>
    thinking
    </think>
    text
    <tool_calls>
    {"name": "add", "arguments": {"a": 1}}
    </tool_calls>

Where each part begins and ends:
  * `<think>` counts if nothing but white space precedes it. The next `</think>` ends it. All that
    lies between is thinking, and later tags of either kind are text.
  * `<tool_calls>` counts after thinking, if the line ends there or an object begins. Elsewhere it
    is prose. The next `</tool_calls>` that is not inside a JSON string ends the block.
  * A block is a row of JSON objects with a name and arguments, white space in between. A block that
    is anything else, or that never ends, is malformed as a whole. Nothing is repaired.

The parser is lossless: the `raw` of all events, joined, is the text. The parts depend on the text
alone, never on how it was cut into pushes.
"""

import dataclasses
import json
import re
from typing import Any, NamedTuple

from infer import partial_match
from m1_jax import strict_json

# thinking, text: as their names say. tag: a tag around thinking, with its line end. calls: a
# well-formed block. malformed: a block that is not well-formed.
EVENT_KINDS = ("tag", "thinking", "text", "calls", "malformed")
_THINK_OPENING, _THINK_CLOSING = "<think>", "</think>"
_BLOCK_OPENING, _BLOCK_CLOSING = "<tool_calls>", "</tool_calls>"
_BLOCK_PATTERN = re.compile(re.escape(_BLOCK_OPENING) + r"[ \t]*(\r?\n|\{)")
_PARTIAL_BLOCK_PATTERN = re.compile(re.escape(_BLOCK_OPENING) + r"[ \t]*\r?")
_OUTSIDE_STRING_PATTERN = re.compile('"|' + re.escape(_BLOCK_CLOSING))
# JSON strings hold no line ends, so one ends a string whose closing quote is missing.
_INSIDE_STRING_PATTERN = re.compile(r'\\.|"|\n')
_LINE_ENDS = ("\n", "\r\n")
_SPACE_PATTERN = re.compile(r"\s*")


class ToolCall(NamedTuple):
    """A tool's name and its arguments, a JSON object."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParserEvent:
    """The next part of the text.

    Attributes:
      kind: one of `EVENT_KINDS`.
      raw: the text as it stands.
      calls: the calls of a well-formed block, else empty.
      error: what is wrong with a malformed block, else empty.
    """

    kind: str
    raw: str
    calls: tuple[ToolCall, ...] = ()
    error: str = ""


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """A whole turn. Thinking and text exclude the tags, and the line ends that belong to these.

    `infer.prompt` renders the turn again from a message with this reasoning, content and tool
    calls, byte for byte if it was written in that form.
    """

    thinking: str
    text: str
    calls: tuple[ToolCall, ...]


def parse_turn(text: str) -> ParsedTurn:
    """Return the parts of a whole turn.

    Raises:
      ValueError: a block of tool calls that is malformed.
    """
    parser = TurnParser()
    events = [*parser.push(text), *parser.close()]
    for event in events:
        if event.kind == "malformed":
            raise ValueError(event.error)
    thinking, plain = (
        "".join(event.raw for event in events if event.kind == kind)
        for kind in ("thinking", "text")
    )
    return ParsedTurn(thinking, plain, tuple(call for event in events for call in event.calls))


class TurnParser:
    """Parses one turn while it is written, by the rules of the module's docstring.

    Thinking and text come out as soon as they can be nothing else. A block of calls comes out at
    its end.
    """

    def __init__(self):
        # The method that parses the part under way. A method that ends its part sets the next one.
        self._parse_part = self._parse_start
        self._held_text = ""  # pushed, but not in an event yet
        # Of a block: how many characters were searched for its end, and whether a string is open.
        self._scanned_chars, self._in_string = 0, False

    def push(self, text: str) -> list[ParserEvent]:
        """Return the events that this text completes."""
        self._held_text += text
        return self._advance(final=False)

    def close(self) -> list[ParserEvent]:
        """End the text, and return the events of what was held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> list[ParserEvent]:
        events: list[ParserEvent] = []
        while self._held_text:
            part, size = self._parse_part, len(self._held_text)
            events += self._parse_part(final)
            # No progress: this part needs more text.
            if self._parse_part == part and len(self._held_text) == size:
                break
        return events

    def _emit(self, kind: str, size: int) -> list[ParserEvent]:
        """Return the next `size` characters as one event, or no event for none."""
        raw, self._held_text = self._held_text[:size], self._held_text[size:]
        return [ParserEvent(kind, raw)] if raw else []

    def _parse_start(self, final: bool) -> list[ParserEvent]:
        stripped = self._held_text.lstrip()
        size = len(self._held_text) - len(stripped) + len(_THINK_OPENING)
        if stripped.startswith(_THINK_OPENING):
            line_end = self._line_end_length(size, final)
            if line_end is None:
                return []
            self._parse_part = self._parse_thinking
            return self._emit("tag", size + line_end)
        if final or not _THINK_OPENING.startswith(stripped):
            self._parse_part = self._parse_text
        return []

    def _parse_thinking(self, final: bool) -> list[ParserEvent]:
        tag_start = self._held_text.find(_THINK_CLOSING)
        if tag_start < 0:
            # Hold back what may begin the tag, with or without the line end that belongs to it.
            endings = (line_end + _THINK_CLOSING for line_end in ("", *_LINE_ENDS))
            overlaps = (partial_match.overlap_length(self._held_text, ending) for ending in endings)
            return self._emit("thinking", len(self._held_text) - (0 if final else max(overlaps)))
        # The line end before the tag, if there is one, belongs to the tag.
        thinking = self._held_text[:tag_start]
        begin = tag_start - max(len(end) for end in ("", *_LINE_ENDS) if thinking.endswith(end))
        events = self._emit("thinking", begin)
        size = tag_start - begin + len(_THINK_CLOSING)
        line_end = self._line_end_length(size, final)
        if line_end is None:
            return events
        self._parse_part = self._parse_text
        return events + self._emit("tag", size + line_end)

    def _line_end_length(self, position: int, final: bool) -> int | None:
        """Return the length of the line end at a position, None if more text is to tell."""
        text = self._held_text[position : position + 2]
        if not final and text in ("", "\r"):
            return None
        return next((len(end) for end in _LINE_ENDS if text.startswith(end)), 0)

    def _parse_text(self, final: bool) -> list[ParserEvent]:
        match = _BLOCK_PATTERN.search(self._held_text)
        if match:
            self._parse_part, self._scanned_chars, self._in_string = (
                self._parse_block,
                len(_BLOCK_OPENING),
                False,
            )
            return self._emit("text", match.start())
        # Only the last "<" may begin a block of which not enough is there yet.
        last = self._held_text.rfind("<")
        tail = self._held_text[last:] if last >= 0 else ""
        may_open = tail and (
            _BLOCK_OPENING.startswith(tail) or _PARTIAL_BLOCK_PATTERN.fullmatch(tail)
        )
        return self._emit("text", last if may_open and not final else len(self._held_text))

    def _parse_block(self, final: bool) -> list[ParserEvent]:
        has_end = self._find_end()
        if not has_end and not final:
            return []
        raw = self._held_text[: self._scanned_chars] if has_end else self._held_text
        self._held_text, self._parse_part = self._held_text[len(raw) :], self._parse_text
        try:
            if not has_end:
                raise ValueError(f"no {_BLOCK_CLOSING}")
            return [
                ParserEvent(
                    "calls", raw, _parse_calls(raw[len(_BLOCK_OPENING) : -len(_BLOCK_CLOSING)])
                )
            ]
        except (ValueError, RecursionError) as error:  # deep nesting ends Python's stack
            message = (
                f"tool calls: got {_shorten_text(raw)}: {error}; wanted {_BLOCK_OPENING}, then on "
                f'each line one object {{"name": ..., "arguments": {{...}}}}, then {_BLOCK_CLOSING}'
            )
            return [ParserEvent("malformed", raw, error=message)]

    def _find_end(self) -> bool:
        """Return whether the block's end is there. `_scanned_chars` is then its length.

        Only what was not searched before is searched, so the cost is linear in the block.
        """
        while True:
            pattern = _INSIDE_STRING_PATTERN if self._in_string else _OUTSIDE_STRING_PATTERN
            match = pattern.search(self._held_text, self._scanned_chars)
            if match is None:
                # An end that may begin a match is searched again with the next push.
                overlap = (
                    self._held_text.endswith("\\") if self._in_string else len(_BLOCK_CLOSING) - 1
                )
                self._scanned_chars = max(self._scanned_chars, len(self._held_text) - overlap)
                return False
            self._scanned_chars = match.end()
            if match.group() == _BLOCK_CLOSING:
                return True
            # A quote outside opens a string. Inside, an escape leaves it open.
            self._in_string = not self._in_string or match.group() not in ('"', "\n")


def _shorten_text(raw: str) -> str:
    return repr(raw if len(raw) <= 80 else raw[:60] + "..." + raw[-17:])


def _parse_calls(text: str) -> tuple[ToolCall, ...]:
    calls = []
    position = _skip_space(text, 0)
    while position < len(text):
        value, position = strict_json.DECODER.raw_decode(text, position)
        calls.append(_check_call(value))
        position = _skip_space(text, position)
    if not calls:
        raise ValueError("no call in the block")
    return tuple(calls)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE_PATTERN.match(text, position)
    return match.end() if match else position


def _check_call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        raise ValueError("a call has a name and arguments, and nothing else")
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not name:
        raise ValueError("a name is a string that is not empty")
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    # Raises for a lone surrogate, which JSON can escape and UTF-8 cannot encode.
    json.dumps(value, ensure_ascii=False).encode()
    return ToolCall(name, arguments)
