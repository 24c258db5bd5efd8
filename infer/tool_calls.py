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
KINDS = ("tag", "thinking", "text", "calls", "malformed")
_THINK, _END_THINK = "<think>", "</think>"
_OPEN, _CLOSE = "<tool_calls>", "</tool_calls>"
_BLOCK = re.compile(re.escape(_OPEN) + r"[ \t]*[\n{]")
_BLOCK_SO_FAR = re.compile(re.escape(_OPEN) + r"[ \t]*")
_OUTSIDE = re.compile('"|' + re.escape(_CLOSE))
# JSON strings hold no line ends, so one ends a string whose closing quote is missing.
_INSIDE = re.compile(r'\\.|"|\n')
_SPACE = re.compile(r"\s*")


class Call(NamedTuple):
    """A tool's name and its arguments, a JSON object."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Event:
    """The next part of the text.

    kind: one of `FAILURE_KINDS`. raw: the text as it stands. calls: of a block. error: of a malformed one,
    what was got and wanted.
    """

    kind: str
    raw: str
    calls: tuple[Call, ...] = ()
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A whole turn; thinking and text are without the tags and the line ends that belong to them.

    Put back as a message's reasoning, content and tool calls, `infer.prompt` renders the turn
    again, byte for byte if it was written in that form.
    """

    thinking: str
    text: str
    calls: tuple[Call, ...]


def parse(text: str) -> Parsed:
    """Return the parts of a whole turn.

    Raises:
      ValueError: a block of tool calls that is malformed.
    """
    parser = Parser()
    events = [*parser.push(text), *parser.close()]
    for event in events:
        if event.kind == "malformed":
            raise ValueError(event.error)
    thinking, plain = (
        "".join(event.raw for event in events if event.kind == kind)
        for kind in ("thinking", "text")
    )
    return Parsed(thinking, plain, tuple(call for event in events for call in event.calls))


class Parser:
    """Takes one turn apart while it is written; see the module's docstring.

    Thinking and text come out as soon as they can be nothing else, a block of calls at its end.
    """

    def __init__(self):
        self._part = self._start
        self._held = ""
        self._scanned, self._in_string = 0, False  # of a block

    def push(self, text: str) -> list[Event]:
        """Return the events that this text completes."""
        self._held += text
        return self._advance(final=False)

    def close(self) -> list[Event]:
        """End the text: return what was held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> list[Event]:
        events: list[Event] = []
        while self._held:
            part, size = self._part, len(self._held)
            events += self._part(final)
            if self._part == part and len(self._held) == size:
                break
        return events

    def _take(self, kind: str, size: int) -> list[Event]:
        """Return the next `size` characters as an event, nothing for none."""
        raw, self._held = self._held[:size], self._held[size:]
        return [Event(kind, raw)] if raw else []

    def _start(self, final: bool) -> list[Event]:
        begun = self._held.lstrip()
        size = len(self._held) - len(begun) + len(_THINK)
        if begun.startswith(_THINK):
            if len(self._held) == size and not final:  # a line end would belong to the tag
                return []
            self._part = self._thinking
            return self._take("tag", size + (self._held[size : size + 1] == "\n"))
        if final or not _THINK.startswith(begun):
            self._part = self._text
        return []

    def _thinking(self, final: bool) -> list[Event]:
        place = self._held.find(_END_THINK)
        if place < 0:
            kept = 0 if final else _overlap(self._held, "\n" + _END_THINK)
            kept = max(kept, 0 if final else _overlap(self._held, _END_THINK))
            return self._take("thinking", len(self._held) - kept)
        begin = place - (self._held[place - 1 : place] == "\n")
        events = self._take("thinking", begin)
        size = place - begin + len(_END_THINK)
        if len(self._held) == size and not final:
            return events
        self._part = self._text
        return events + self._take("tag", size + (self._held[size : size + 1] == "\n"))

    def _text(self, final: bool) -> list[Event]:
        found = _BLOCK.search(self._held)
        if found:
            self._part, self._scanned, self._in_string = self._block, len(_OPEN), False
            return self._take("text", found.start())
        last = self._held.rfind("<")
        tail = self._held[last:] if last >= 0 else ""
        waits = tail and (_OPEN.startswith(tail) or _BLOCK_SO_FAR.fullmatch(tail))
        return self._take("text", last if waits and not final else len(self._held))

    def _block(self, final: bool) -> list[Event]:
        ended = self._find_end()
        if not ended and not final:
            return []
        raw = self._held[: self._scanned] if ended else self._held
        self._held, self._part = self._held[len(raw) :], self._text
        try:
            if not ended:
                raise ValueError(f"no {_CLOSE}")
            return [Event("calls", raw, _calls(raw[len(_OPEN) : -len(_CLOSE)]))]
        except (ValueError, RecursionError) as error:
            message = (
                f"tool calls: got {_short(raw)}: {error}; wanted {_OPEN}, then on each line one "
                f'object {{"name": ..., "arguments": {{...}}}}, then {_CLOSE}'
            )
            return [Event("malformed", raw, error=message)]

    def _find_end(self) -> bool:
        """Look through what is new of a block; `_scanned` is then its end, if it has one."""
        while True:
            pattern = _INSIDE if self._in_string else _OUTSIDE
            found = pattern.search(self._held, self._scanned)
            if found is None:
                # What may be the beginning of a match is looked at again.
                again = self._held.endswith("\\") if self._in_string else len(_CLOSE) - 1
                self._scanned = max(self._scanned, len(self._held) - again)
                return False
            self._scanned = found.end()
            if found.group() == _CLOSE:
                return True
            self._in_string = not self._in_string or found.group() not in ('"', "\n")


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest end of `text` that begins `tag` without completing it."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def _short(raw: str) -> str:
    return repr(raw if len(raw) <= 80 else raw[:60] + "..." + raw[-17:])


def _calls(text: str) -> tuple[Call, ...]:
    calls = []
    place = _space_end(text, 0)
    while place < len(text):
        value, place = _DECODER.raw_decode(text, place)
        calls.append(_call(value))
        place = _space_end(text, place)
    if not calls:
        raise ValueError("no call")
    return tuple(calls)


def _space_end(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        raise ValueError("a call has a name and arguments, and nothing else")
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not name:
        raise ValueError("a name is a string that is not empty")
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    return Call(name, arguments)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
