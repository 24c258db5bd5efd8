"""Chat messages and tools to the model's prompt, without a template engine.

There are two steps. `normalize_messages` turns OpenAI messages into the list form that the
chat template of the release reads. `render_prompt` writes that form as pieces of text and control
tokens. Text is encoded with control tokens off, so nothing that a user types can open or close a
turn.

Profiles (three official formats disagree; nobody says which one M1 was trained on):
  release  what the template in the release's tokenizer_config.json writes, byte for byte.
  vllm     what vLLM's template for M1 writes. Where that template would lose text (next to tool
           calls, later system messages) the text is kept.

Nothing is dropped in silence: what a profile has no place for is a ValueError. The release's own
template drops later parts of a system or user message; here they are joined.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from m1_jax import tokenizer as tokenizer_lib

JsonObjects = Sequence[Any]  # JSON objects; what they hold is checked here
DOCUMENT_TOKEN = "<begin_of_document>"
BEGIN_TOKEN = "<beginning_of_sentence>"
END_TOKEN = "<end_of_sentence>"
_TOOLS_HEAD = "system tool_setting=tools\nYou are provided with these tools:\n<tools>\n"
_TOOLS_TAIL = (
    "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags,"
    " and provide tool-name and json-object of arguments, following the format below:\n"
    "<tool_calls>\n%s\n...\n</tool_calls>"
)


@dataclasses.dataclass(frozen=True)
class PromptPiece:
    """A run of text, or one control token by name."""

    text: str
    special: bool = False


@dataclasses.dataclass(frozen=True)
class _PromptProfile:
    """Where the formats differ; see the module's docstring."""

    assistant: str  # the name that the model answers to
    call_line: str  # how the tools block spells a call
    default_system: str  # where there is no system message
    trim: bool  # text without the white space around it
    wrap_tools: bool  # tools as {"type": "function", "function": ...}
    empty_tools_block: bool  # an empty list of tools still makes a block
    named_results: bool  # results of one round share a turn and carry names


_PROFILES = {
    "release": _PromptProfile(
        assistant="assistant",
        # Jinja drops the quotes that are meant here; the GitHub copy of the file renders them.
        call_line="{name: <tool-name-1>, arguments: <args-json-object-1>}",
        default_system="",
        trim=False,
        wrap_tools=False,
        empty_tools_block=False,
        named_results=True,
    ),
    "vllm": _PromptProfile(
        assistant="MiniMax AI",
        call_line='{"name": <tool-name>, "arguments": <args-json-object>}',
        default_system="You are a helpful assistant created by Minimax based on MiniMax-M1 model.",
        trim=True,
        wrap_tools=True,
        empty_tools_block=True,
        named_results=False,
    ),
}
PROFILES = tuple(_PROFILES)

_KEYS = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", "reasoning", "reasoning_content"),
    "tool": ("tool_call_id", "name"),
}


def render_prompt(
    messages: JsonObjects,
    tools: JsonObjects | None = None,
    add_generation_prompt: bool = True,
    profile: str = "release",
) -> list[PromptPiece]:
    """Return the prompt as alternating text and control tokens; adjacent texts are one piece.

    Args:
      messages: OpenAI chat messages, or the template's list form; see `normalize_messages`.
      tools: OpenAI tools or bare function objects.
      add_generation_prompt: end with the opened turn that the model is to write.
      profile: one of `PROFILES`.

    Raises:
      ValueError: a message, tool or profile that cannot be rendered without loss.
    """
    style = _find_profile(profile)
    messages = normalize_messages(messages, profile)
    pieces = [PromptPiece(DOCUMENT_TOKEN, special=True)]
    system = [m for m in messages if m["role"] == "system"]
    hoisted = "".join(map(_join_parts, system)) if system else style.default_system
    if hoisted:
        _add_turn(pieces, f"system ai_setting={style.assistant}\n{hoisted}")
    if tools or (tools is not None and style.empty_tools_block):
        lines = "".join(_tool_line(i, tool, style) for i, tool in enumerate(tools))
        _add_turn(pieces, _TOOLS_HEAD + lines + _TOOLS_TAIL % style.call_line)
    heads = {"user": "user name=user\n", "assistant": f"ai name={style.assistant}\n"}
    for message in messages:
        if message["role"] == "tool":
            _add_turn(
                pieces, "tool name=tools\n" + "".join(map(_render_result, message["content"]))
            )
        elif message["role"] != "system":
            _add_turn(pieces, heads[message["role"]] + _join_parts(message))
    if add_generation_prompt:
        pieces += [PromptPiece(BEGIN_TOKEN, special=True), PromptPiece(heads["assistant"])]
    return _merge_parts(pieces)


def render_text(
    messages: JsonObjects,
    tools: JsonObjects | None = None,
    add_generation_prompt: bool = True,
    profile: str = "release",
) -> str:
    """Return the prompt as one string; arguments as in `render_prompt`."""
    return "".join(p.text for p in render_prompt(messages, tools, add_generation_prompt, profile))


def encode_prompt(
    tokenizer: tokenizer_lib.Tokenizer,
    messages: JsonObjects,
    tools: JsonObjects | None = None,
    add_generation_prompt: bool = True,
    profile: str = "release",
) -> list[int]:
    """Return the prompt's token ids; only the pieces that are control tokens get control ids.

    Raises:
      ValueError: as `render_prompt`, or a tokenizer without one of the control tokens.
    """
    ids: list[int] = []
    for piece in render_prompt(messages, tools, add_generation_prompt, profile):
        if piece.special:
            ids.append(tokenizer.special_token_id(piece.text))
        else:
            ids += tokenizer.encode(piece.text)
    return ids


def normalize_messages(messages: JsonObjects, profile: str = "release") -> list[dict[str, Any]]:
    """Return messages in the template's list form.

    Every message becomes {"role": system | user | assistant | tool, "content": parts} with parts
    {"type": "text", "text": ...}. `developer` is `system`. The parts of a message are joined.
    `reasoning` (or `reasoning_content`) goes in front as a <think> block, `tool_calls` behind as a
    <tool_calls> block. Under the release profile tool results become parts with the tool's
    "name", found by `tool_call_id`, and consecutive results share one message.

    Raises:
      ValueError: an unknown role or key, a part that is not text, no content, a tool result
        without a name, arguments that are not a JSON object.
    """
    style = _find_profile(profile)
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: got {messages!r:.80}; wanted a list with at least one message")
    names: dict[str, str] = {}
    done: list[dict[str, Any]] = []
    mergeable = False
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = _check_role(where, message)
        if role == "tool":
            parts = _tool_parts(where, message, names, style)
            # A list without an id is in the template's own form, where a turn is a message.
            openai = isinstance(message["content"], str) or bool(message.get("tool_call_id"))
            if mergeable and openai and style.named_results:
                done[-1]["content"] += parts
            else:
                done.append({"role": role, "content": parts})
            mergeable = openai
            continue
        mergeable = False
        parts = _text_parts(where, message, style)
        if role == "assistant":
            parts = _assistant_parts(where, message, parts, names)
        if not parts:
            raise ValueError(
                f"{where}.content: got {message.get('content')!r} for role {role!r}; "
                "wanted text. Leave the message out if it has none."
            )
        joined = "".join(part["text"] for part in parts)
        done.append({"role": role, "content": [{"type": "text", "text": joined}]})
    return done


def _find_profile(profile: str) -> _PromptProfile:
    if profile not in _PROFILES:
        raise ValueError(f"profile: got {profile!r}; wanted one of {', '.join(PROFILES)}")
    return _PROFILES[profile]


def _join_parts(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"])


def _render_result(part: Mapping[str, str]) -> str:
    name = f"tool name: {part['name']}\n" if "name" in part else ""
    return f"{name}tool result: {part['text']}\n\n"


def _add_turn(pieces: list[PromptPiece], content: str) -> None:
    pieces += [
        PromptPiece(BEGIN_TOKEN, True),
        PromptPiece(content),
        PromptPiece(END_TOKEN, True),
        PromptPiece("\n"),
    ]


def _merge_parts(pieces: Sequence[PromptPiece]) -> list[PromptPiece]:
    """Join adjacent texts: the tokenizer must see each run whole, as it was in training."""
    merged: list[PromptPiece] = []
    for piece in pieces:
        if merged and not piece.special and not merged[-1].special:
            merged[-1] = PromptPiece(merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return merged


def _check_role(where: str, message: Any) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: got {message!r:.80}; wanted an object with role and content")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in _KEYS:
        raise ValueError(f"{where}.role: got {role!r}; wanted developer, {', '.join(_KEYS)}")
    _check_keys(where, message, ("role", "content", *_KEYS[role]))
    return role


def _check_keys(where: str, value: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that would be lost; clients send many that are empty, which lose nothing."""
    lost = [key for key in value if key not in known and value[key] not in (None, "", [], {})]
    if lost:
        raise ValueError(
            f"{where}: got {lost[0]!r}, which the prompt has no place for; "
            f"wanted {', '.join(known)}. Remove it."
        )


def _text_parts(
    where: str, message: Mapping[str, Any], style: _PromptProfile
) -> list[dict[str, str]]:
    """Return the content as text parts, none for no content; a part may be empty on purpose."""
    content = message.get("content")
    if content is None or content == "":
        return []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{where}.content: got {content!r:.80}; wanted a string or a list of parts"
        )
    parts = []
    for i, part in enumerate(content):
        at = f"{where}.content[{i}]"
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(
                f"{at}: got {kind!r:.80}; wanted a part of type 'text': M1 reads only text"
            )
        _check_keys(at, part, ("type", "text", *(["name"] if message["role"] == "tool" else [])))
        value = _check_string(f"{at}.text", part.get("text"))
        trimmed = value.strip() if style.trim and message["role"] != "tool" else value
        named = {"name": _check_string(f"{at}.name", part["name"])} if part.get("name") else {}
        parts.append({**named, "type": "text", "text": trimmed})
    return parts


def _check_string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: got {value!r:.80}; wanted a string")
    return value


def _tool_parts(
    where: str, message: Mapping[str, Any], names: Mapping[str, str], style: _PromptProfile
) -> list[dict[str, str]]:
    """Return the parts of a tool message; an empty result is a result."""
    parts = _text_parts(where, message, style)
    if message.get("content") == "":
        parts = [{"type": "text", "text": ""}]
    if not parts:
        raise ValueError(
            f"{where}.content: got {message.get('content')!r} for role 'tool'; "
            "wanted text, which may be empty"
        )
    if not style.named_results:
        return [{"type": "text", "text": part["text"]} for part in parts]
    if all("name" in part for part in parts):
        return parts
    if not any("name" in part for part in parts):
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    name = message.get("name") or names.get(message.get("tool_call_id") or "")
    if not name:
        raise ValueError(
            f"{where}: got a result with tool_call_id {message.get('tool_call_id')!r}, which no "
            "earlier tool call has; wanted the tool's name. Add it as 'name'."
        )
    return [{"name": _check_string(f"{where}.name", name), **part} for part in parts]


def _assistant_parts(
    where: str, message: Mapping[str, Any], parts: list[dict[str, str]], names: dict[str, str]
) -> list[dict[str, str]]:
    """Put reasoning in front of the text and tool calls behind it, as the model writes them."""
    thoughts = [message[key] for key in ("reasoning", "reasoning_content") if message.get(key)]
    if thoughts[1:] and thoughts[0] != thoughts[1]:
        raise ValueError(f"{where}: got different reasoning and reasoning_content; wanted one")
    front = []
    if thoughts:
        thought = _check_string(f"{where}.reasoning", thoughts[0])
        close = "</think>\n" if thought.endswith("\n") else "\n</think>\n"
        front = [{"type": "text", "text": "<think>\n" + thought + close}]
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where}.tool_calls: got {calls!r:.80}; wanted a list")
    lines = [_call_line(f"{where}.tool_calls[{i}]", call, names) for i, call in enumerate(calls)]
    parts = front + parts
    if not lines:
        return parts
    before = "".join(part["text"] for part in parts)
    gap = "\n" if before and not before.endswith("\n") else ""
    block = f"{gap}<tool_calls>\n{''.join(lines)}</tool_calls>"
    return [*parts, {"type": "text", "text": block}]


def _call_line(where: str, call: Any, names: dict[str, str]) -> str:
    """Return one line of a <tool_calls> block and remember the call's name by its id."""
    function = call
    if isinstance(call, Mapping) and "function" in call:
        _check_keys(where, call, ("id", "type", "function", "index"))
        function = call["function"]
    if not isinstance(function, Mapping) or call.get("type") not in (None, "function"):
        raise ValueError(f"{where}: got {call!r:.80}; wanted a call of type 'function'")
    _check_keys(where, function, ("id", "type", "name", "arguments", "index"))
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name: got {name!r}; wanted the tool's name")
    if call.get("id"):
        names[call["id"]] = name
    arguments = _parse_arguments(f"{where}.arguments", function.get("arguments"))
    return _to_json(where, {"name": name, "arguments": arguments}) + "\n"


def _parse_arguments(where: str, value: Any) -> dict[str, Any]:
    """Return arguments as an object; clients send none at all as None or an empty string."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(
                value, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
            )
        except ValueError as error:
            raise ValueError(f"{where}: got {value!r:.80}; wanted a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {value!r:.80}; wanted a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _tool_line(i: int, tool: Any, style: _PromptProfile) -> str:
    where = f"tools[{i}]"
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: got {tool!r:.80}; wanted a function object with a name")
    wrapped = function is not tool
    if wrapped:
        _check_keys(where, tool, ("type", "function"))
        if tool.get("type", "function") != "function":
            raise ValueError(f"{where}.type: got {tool['type']!r}; wanted 'function'")
    if style.wrap_tools:
        return _to_json(where, tool if wrapped else {"type": "function", "function": tool}) + "\n"
    return _to_json(where, function) + "\n"


def _to_json(where: str, value: Any) -> str:
    """Serialise as transformers' tojson filter does: order kept, nothing escaped for HTML."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{where}: got a value that JSON cannot hold: {error}") from None
