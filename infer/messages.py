"""Chat messages and tools as clients send them, checked and in the form that the prompt renders.

Clients send OpenAI's form. The chat template of the release reads another one, a list of parts with
text in each. Nothing is dropped silently: whatever the prompt has no place for is a ValueError
that names its location, such as `messages[2].content[0]`.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m1_jax import strict_json

JsonObjects = Sequence[Any]  # JSON objects from a client; this module checks what they hold

# The keys of a message by its role, next to "role" and "content".
_KEYS = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", "reasoning", "reasoning_content"),
    "tool": ("tool_call_id", "name"),
}
# The parts of a turn that the model writes around its text, as `infer.tool_calls` reads them.
_THINKING_PATTERN = re.compile(r"\s*<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_CALLS_PATTERN = re.compile(r"<tool_calls>[ \t]*(?=\r?\n|\{)(.*?)</tool_calls>\s*\Z", re.DOTALL)


def to_list_form(
    messages: JsonObjects, strip_text: bool, named_results: bool
) -> list[dict[str, Any]]:
    """Return messages in the list form that `prompt.normalize_messages` describes.

    Args:
      strip_text: strip white space around texts, but not around results of tools.
      named_results: results carry their tool's name, and consecutive ones share a message.

    Raises:
      ValueError: what `prompt.normalize_messages` refuses.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: got {messages!r:.80}; wanted a list with at least one message")
    names: dict[str, str] = {}  # tools' names by the ids of their calls
    normalized: list[dict[str, Any]] = []
    mergeable = False  # whether the last message is a result that another one may join
    for i, message in enumerate(messages):
        location = f"messages[{i}]"
        with _refuse_depth(location):
            role = _check_role(location, message)
            if role != "tool":
                mergeable = False
                text = _turn_text(location, message, strip_text, names)
                normalized.append({"role": role, "content": [{"type": "text", "text": text}]})
                continue
            parts = _tool_parts(location, message, names, strip_text, named_results)
        # A list without an id is in the template's own form, where a turn is a message.
        openai = isinstance(message["content"], str) or bool(message.get("tool_call_id"))
        if mergeable and openai and named_results:
            normalized[-1]["content"] += parts
        else:
            normalized.append({"role": role, "content": parts})
        mergeable = openai
    return normalized


def tool_to_json(location: str, tool: Any, wrap: bool) -> str:
    """Return a tool's function schema as one line of JSON.

    Args:
      tool: an OpenAI tool, {"type": "function", "function": ...}, or the function object alone.
      wrap: write the form with "type" and "function", not the function object alone.

    Raises:
      ValueError: a tool of another form.
    """
    with _refuse_depth(location):
        # A tool without "function" is the function object itself.
        is_wrapped = isinstance(tool, Mapping) and tool.get("function") is not None
        function = tool["function"] if is_wrapped else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{location}: got {tool!r:.80}; wanted a function object with a name")
        if is_wrapped:
            _check_keys(location, tool, ("type", "function"))
            if tool.get("type") not in (None, "function"):
                raise ValueError(f"{location}.type: got {tool['type']!r:.80}; wanted 'function'")
        if wrap and not is_wrapped:
            function = {"type": "function", "function": tool}
        return _to_json(location, tool if wrap and is_wrapped else function) + "\n"


@contextlib.contextmanager
def _refuse_depth(location: str) -> Iterator[None]:
    """Turn a RecursionError, which values of too many levels cause, into a ValueError."""
    try:
        yield
    except RecursionError:
        raise ValueError(
            f"{location}: got too many arrays and objects within each other; wanted some hundreds "
            "at most"
        ) from None


def _check_role(location: str, message: Any) -> str:
    """Return the role, "developer" as "system"."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{location}: got {message!r:.80}; wanted an object with role and content")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in _KEYS:
        raise ValueError(f"{location}.role: got {role!r:.80}; wanted developer, {', '.join(_KEYS)}")
    _check_keys(location, message, ("role", "content", *_KEYS[role]))
    return role


def _check_keys(location: str, value: Mapping[str, Any], known_keys: Sequence[str]) -> None:
    """Refuse keys that would be lost, unless their values are empty: clients send many of those."""
    lost = [key for key in value if key not in known_keys and value[key] not in (None, "", [], {})]
    if lost:
        raise ValueError(
            f"{location}: got {lost[0]!r:.80}, which the prompt has no place for; "
            f"wanted {', '.join(known_keys)}. Remove it."
        )


def _check_string(location: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{location}: got {value!r:.80}; wanted a string")
    return value


def _text_parts(
    location: str, message: Mapping[str, Any], strip_text: bool
) -> list[dict[str, str]]:
    """Return the content as text parts, none for no content. A part may be empty on purpose."""
    content = message.get("content")
    if content is None or content == "":
        return []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{location}.content: got {content!r:.80}; wanted a string or a list of parts"
        )
    parts = []
    for i, part in enumerate(content):
        at = f"{location}.content[{i}]"
        if not isinstance(part, Mapping) or part.get("type") not in (None, "text"):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(
                f"{at}: got {kind!r:.80}; wanted a part of type 'text': M1 reads only text"
            )
        _check_keys(at, part, ("type", "text", *(["name"] if message["role"] == "tool" else [])))
        text = _check_string(f"{at}.text", part.get("text"))
        # A tool's result is data: its white space may matter.
        stripped = text.strip() if strip_text and message["role"] != "tool" else text
        name = {"name": _check_string(f"{at}.name", part["name"])} if part.get("name") else {}
        parts.append({**name, "type": "text", "text": stripped})
    return parts


def _tool_parts(
    location: str,
    message: Mapping[str, Any],
    names: Mapping[str, str],
    strip_text: bool,
    named_results: bool,
) -> list[dict[str, str]]:
    """Return the parts of a tool message. An empty result is a result."""
    parts = _text_parts(location, message, strip_text)
    if message.get("content") == "":  # which `_text_parts` takes for no content
        parts = [{"type": "text", "text": ""}]
    if not parts:
        raise ValueError(
            f"{location}.content: got {message.get('content')!r} for role 'tool'; "
            "wanted text, which may be empty"
        )
    # Four forms of names: none, one a part, the message's own, and that of the call's id.
    if not named_results:
        return [{"type": "text", "text": part["text"]} for part in parts]
    if all("name" in part for part in parts):
        return parts
    if not any("name" in part for part in parts):
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    call_id = _check_string(f"{location}.tool_call_id", message.get("tool_call_id") or "")
    name = message.get("name") or names.get(call_id)
    if not name:
        raise ValueError(
            f"{location}: got a result with tool_call_id {call_id!r:.80}, which no earlier "
            "tool call has; wanted the tool's name. Add it as 'name'."
        )
    # A part's own name, where it has one, wins over the message's.
    return [{"name": _check_string(f"{location}.name", name), **part} for part in parts]


def _turn_text(
    location: str, message: Mapping[str, Any], strip_text: bool, names: dict[str, str]
) -> str:
    """Return the text of a turn that is not a tool's result."""
    parts = _text_parts(location, message, strip_text)
    text = "".join(part["text"] for part in parts)
    thinking = calls = ""
    if message["role"] == "assistant":
        thinking = _thinking_block(location, message, text)
        calls = _calls_block(location, message, text, names)
    # A part may be empty on purpose.
    if not (parts or thinking or calls):
        raise ValueError(
            f"{location}.content: got {message.get('content')!r:.80} for role {message['role']!r}; "
            "wanted text. Leave the message out if it has none."
        )
    text = thinking + text
    # The block begins a line: the parser takes a tag elsewhere for prose.
    return text + ("\n" if calls and text and not text.endswith("\n") else "") + calls


def _thinking_block(location: str, message: Mapping[str, Any], text: str) -> str:
    """Return reasoning as the model writes it, empty for none or if the text begins with it."""
    # Clients name reasoning in two ways, and some send both.
    thoughts = [message[key] for key in ("reasoning", "reasoning_content") if message.get(key)]
    if thoughts[1:] and thoughts[0] != thoughts[1]:
        raise ValueError(f"{location}: got different reasoning and reasoning_content; wanted one")
    if not thoughts:
        return ""
    thought = _check_string(f"{location}.reasoning", thoughts[0])
    # Servers answer with the reasoning beside the whole text, too.
    if match := _THINKING_PATTERN.match(text):
        if match.group(1).strip() != thought.strip():
            raise ValueError(
                f"{location}: got reasoning and another <think> block in content; wanted one of "
                "them"
            )
        return ""
    # The tag stands on a line of its own.
    return "<think>\n" + thought + ("</think>\n" if thought.endswith("\n") else "\n</think>\n")


def _calls_block(
    location: str, message: Mapping[str, Any], text: str, names: dict[str, str]
) -> str:
    """Return tool calls as the model writes them, empty for none or if the text ends with them."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{location}.tool_calls: got {calls!r:.80}; wanted a list")
    lines = [_call_line(f"{location}.tool_calls[{i}]", call, names) for i, call in enumerate(calls)]
    if not lines:
        return ""
    thinking = _THINKING_PATTERN.match(text)
    if match := _CALLS_PATTERN.search(text, thinking.end() if thinking else 0):
        if _parse_objects(match.group(1)) != _parse_objects("".join(lines)):
            raise ValueError(
                f"{location}: got tool_calls and another <tool_calls> block in content; wanted one "
                "of them"
            )
        return ""
    return f"<tool_calls>\n{''.join(lines)}</tool_calls>"


def _parse_objects(text: str) -> list[Any] | None:
    """Return the JSON values of a block's lines, None for a block of another form."""
    try:
        return [strict_json.DECODER.decode(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        return None


def _call_line(location: str, call: Any, names: dict[str, str]) -> str:
    """Return one line of a <tool_calls> block, and remember the call's name by its id."""
    function = call
    if isinstance(call, Mapping) and call.get("function") is not None:
        # "index" comes from clients that put streamed calls together.
        _check_keys(location, call, ("id", "type", "function", "index"))
        function = call["function"]
    if not isinstance(function, Mapping) or call.get("type") not in (None, "function"):
        raise ValueError(f"{location}: got {call!r:.80}; wanted a call of type 'function'")
    _check_keys(location, function, ("id", "type", "name", "arguments", "index"))
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{location}.name: got {name!r:.80}; wanted the tool's name")
    if call.get("id"):
        names[_check_string(f"{location}.id", call["id"])] = name
    arguments = _parse_arguments(f"{location}.arguments", function.get("arguments"))
    return _to_json(location, {"name": name, "arguments": arguments}) + "\n"


def _parse_arguments(location: str, value: Any) -> dict[str, Any]:
    """Return arguments as an object. Clients send no arguments as None or an empty string."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = strict_json.DECODER.decode(value)
        except ValueError as error:
            raise ValueError(
                f"{location}: got {value!r:.80}; wanted a JSON object: {error!s:.120}"
            ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{location}: got {value!r:.80}; wanted a JSON object")
    return value


def _to_json(location: str, value: Any) -> str:
    """Serialise as transformers' tojson filter does: order kept, nothing escaped for HTML."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{location}: got a value that JSON cannot hold: {error}") from None
