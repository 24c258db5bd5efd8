"""What the model wrote, taken apart as it streams: thinking, text and tool calls.

    <think>
    thinking
    </think>
    text
    <tool_calls>
    {"name": "add", "arguments": {"a": 1}}
    </tool_calls>

Where each part begins and ends:
  * `<think>` counts if nothing but white space precedes it; the next `</think>` ends it. All that
    lies between is thinking, and later tags of either kind are text.
  * `<tool_calls>` counts after thinking, if the line ends there or an object begins; elsewhere it
    is prose. The next `</tool_calls>` that is not inside a JSON string ends the block.
  * A block is a row of JSON objects with a name and arguments, white space in between. One that
    is anything else, or that never ends, is malformed as a whole. Nothing is repaired.

Lossless: the `raw` of all events, joined, is the text. And parts depend on the text alone,
never on how it was cut into pushes.
"""

import dataclasses
import json
import math
import re
from typing import Any, NamedTuple

# thinking and text; tag: what surrounds thinking; calls: a block; malformed: a block that fails.
EVENT_KINDS = ("tag", "thinking", "text", "calls", "malformed")
_THINK_OPENING, _THINK_CLOSING = "<think>", "</think>"
_BLOCK_OPENING, _BLOCK_CLOSING = "<tool_calls>", "</tool_calls>"
_BLOCK_PATTERN = re.compile(re.escape(_BLOCK_OPENING) + r"[ \t]*[\n{]")
_PARTIAL_BLOCK_PATTERN = re.compile(re.escape(_BLOCK_OPENING) + r"[ \t]*")
_OUTSIDE_STRING_PATTERN = re.compile('"|' + re.escape(_BLOCK_CLOSING))
# JSON strings hold no line ends, so one ends a string whose closing quote is missing.
_INSIDE_STRING_PATTERN = re.compile(r'\\.|"|\n')
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
      calls: the calls of a well-formed block.
      error: of a malformed block, what was got and wanted.
    """

    kind: str
    raw: str
    calls: tuple[ToolCall, ...] = ()
    error: str = ""


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """A whole turn; thinking and text are without the tags and the line ends that belong to them.

    Put back as a message's reasoning, content and tool calls, `infer.prompt` renders the turn
    again, byte for byte if it was written in that form.
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
    """Takes one turn apart while it is written; see the module's docstring.

    Thinking and text come out as soon as they can be nothing else, a block of calls at its end.
    """

    def __init__(self):
        self._parse_part = self._parse_start
        self._held_text = ""
        self._scanned_chars, self._in_string = 0, False  # of a block

    def push(self, text: str) -> list[ParserEvent]:
        """Return the events that this text completes."""
        self._held_text += text
        return self._advance(final=False)

    def close(self) -> list[ParserEvent]:
        """End the text: return what was held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> list[ParserEvent]:
        events: list[ParserEvent] = []
        while self._held_text:
            part, size = self._parse_part, len(self._held_text)
            events += self._parse_part(final)
            if self._parse_part == part and len(self._held_text) == size:
                break
        return events

    def _emit(self, kind: str, size: int) -> list[ParserEvent]:
        """Return the next `size` characters as an event, nothing for none."""
        raw, self._held_text = self._held_text[:size], self._held_text[size:]
        return [ParserEvent(kind, raw)] if raw else []

    def _parse_start(self, final: bool) -> list[ParserEvent]:
        begun = self._held_text.lstrip()
        size = len(self._held_text) - len(begun) + len(_THINK_OPENING)
        if begun.startswith(_THINK_OPENING):
            if len(self._held_text) == size and not final:  # a line end would belong to the tag
                return []
            self._parse_part = self._parse_thinking
            return self._emit("tag", size + (self._held_text[size : size + 1] == "\n"))
        if final or not _THINK_OPENING.startswith(begun):
            self._parse_part = self._parse_text
        return []

    def _parse_thinking(self, final: bool) -> list[ParserEvent]:
        place = self._held_text.find(_THINK_CLOSING)
        if place < 0:
            kept = 0 if final else _overlap_length(self._held_text, "\n" + _THINK_CLOSING)
            kept = max(kept, 0 if final else _overlap_length(self._held_text, _THINK_CLOSING))
            return self._emit("thinking", len(self._held_text) - kept)
        begin = place - (self._held_text[place - 1 : place] == "\n")
        events = self._emit("thinking", begin)
        size = place - begin + len(_THINK_CLOSING)
        if len(self._held_text) == size and not final:
            return events
        self._parse_part = self._parse_text
        return events + self._emit("tag", size + (self._held_text[size : size + 1] == "\n"))

    def _parse_text(self, final: bool) -> list[ParserEvent]:
        found = _BLOCK_PATTERN.search(self._held_text)
        if found:
            self._parse_part, self._scanned_chars, self._in_string = (
                self._parse_block,
                len(_BLOCK_OPENING),
                False,
            )
            return self._emit("text", found.start())
        last = self._held_text.rfind("<")
        tail = self._held_text[last:] if last >= 0 else ""
        waits = tail and (_BLOCK_OPENING.startswith(tail) or _PARTIAL_BLOCK_PATTERN.fullmatch(tail))
        return self._emit("text", last if waits and not final else len(self._held_text))

    def _parse_block(self, final: bool) -> list[ParserEvent]:
        ended = self._find_end()
        if not ended and not final:
            return []
        raw = self._held_text[: self._scanned_chars] if ended else self._held_text
        self._held_text, self._parse_part = self._held_text[len(raw) :], self._parse_text
        try:
            if not ended:
                raise ValueError(f"no {_BLOCK_CLOSING}")
            return [
                ParserEvent(
                    "calls", raw, _parse_calls(raw[len(_BLOCK_OPENING) : -len(_BLOCK_CLOSING)])
                )
            ]
        except (ValueError, RecursionError) as error:
            message = (
                f"tool calls: got {_shorten_text(raw)}: {error}; wanted {_BLOCK_OPENING}, then on "
                f'each line one object {{"name": ..., "arguments": {{...}}}}, then {_BLOCK_CLOSING}'
            )
            return [ParserEvent("malformed", raw, error=message)]

    def _find_end(self) -> bool:
        """Look through what is new of a block; `_scanned` is then its end, if it has one."""
        while True:
            pattern = _INSIDE_STRING_PATTERN if self._in_string else _OUTSIDE_STRING_PATTERN
            found = pattern.search(self._held_text, self._scanned_chars)
            if found is None:
                # What may be the beginning of a match is looked at again.
                again = (
                    self._held_text.endswith("\\") if self._in_string else len(_BLOCK_CLOSING) - 1
                )
                self._scanned_chars = max(self._scanned_chars, len(self._held_text) - again)
                return False
            self._scanned_chars = found.end()
            if found.group() == _BLOCK_CLOSING:
                return True
            self._in_string = not self._in_string or found.group() not in ('"', "\n")


def _overlap_length(text: str, tag: str) -> int:
    """Return the length of the longest end of `text` that begins `tag` without completing it."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def _shorten_text(raw: str) -> str:
    return repr(raw if len(raw) <= 80 else raw[:60] + "..." + raw[-17:])


def _parse_calls(text: str) -> tuple[ToolCall, ...]:
    calls = []
    place = _skip_space(text, 0)
    while place < len(text):
        value, place = _DECODER.raw_decode(text, place)
        calls.append(_check_call(value))
        place = _skip_space(text, place)
    if not calls:
        raise ValueError("no call")
    return tuple(calls)


def _skip_space(text: str, place: int) -> int:
    found = _SPACE_PATTERN.match(text, place)
    return found.end() if found else place


def _check_call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        raise ValueError("a call has a name and arguments, and nothing else")
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not name:
        raise ValueError("a name is a string that is not empty")
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    return ToolCall(name, arguments)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _parse_finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_parse_finite
)
