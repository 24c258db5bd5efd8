"""Chat messages and tools to the model's prompt, without a template engine.

There are two steps. `normalize_messages` turns OpenAI messages into the list form that the chat
template of the release reads (`infer.messages`). `render_prompt` writes that form as pieces of text
and control tokens. Text is encoded with control tokens off, so nothing that a user types can open
or close a turn.

Profiles (the official formats disagree, and no source says which one M1 was trained on):
  release  what the template in the release's tokenizer_config.json writes, byte for byte.
  vllm     what vLLM's template for M1 writes. Where that template would lose text (next to tool
           calls, later system messages) the text is kept.

Nothing is dropped silently: what a profile has no place for is a ValueError. The release's own
template drops later parts of a system or user message. Here they are joined.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from infer import messages as messages_lib
from m1_jax import tokenizer as tokenizer_lib

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
    """One of the formats that the module's docstring lists."""

    assistant: str  # the name that the model answers to
    call_line: str  # how the tools block spells a call
    default_system: str  # text of the system turn where no message is one; empty: no turn
    trim: bool  # strip white space around text
    wrap_tools: bool  # write tools as {"type": "function", "function": ...}
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


def render_prompt(
    messages: messages_lib.JsonObjects,
    tools: messages_lib.JsonObjects | None = None,
    add_generation_prompt: bool = True,
    profile: str = "release",
) -> list[PromptPiece]:
    """Return the prompt as text and control tokens, adjacent texts joined to one piece.

    Args:
      messages: OpenAI chat messages, or the template's list form (`normalize_messages`).
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
    # The formats have one system turn, the first: later system messages are joined to it.
    system_text = "".join(map(_join_parts, system)) if system else style.default_system
    if system_text:
        _add_turn(pieces, f"system ai_setting={style.assistant}\n{system_text}")
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
        raise ValueError(f"tools: got {tools!r:.80}; wanted a list")
    if tools or (tools is not None and style.empty_tools_block):
        lines = "".join(
            messages_lib.tool_to_json(f"tools[{i}]", tool, style.wrap_tools)
            for i, tool in enumerate(tools)
        )
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
    messages: messages_lib.JsonObjects,
    tools: messages_lib.JsonObjects | None = None,
    add_generation_prompt: bool = True,
    profile: str = "release",
) -> str:
    """Return the prompt as one string. Arguments are those of `render_prompt`."""
    return "".join(p.text for p in render_prompt(messages, tools, add_generation_prompt, profile))


def encode_prompt(
    tokenizer: tokenizer_lib.Tokenizer,
    messages: messages_lib.JsonObjects,
    tools: messages_lib.JsonObjects | None = None,
    add_generation_prompt: bool = True,
    profile: str = "release",
) -> list[int]:
    """Return the prompt's token ids. Further arguments are those of `render_prompt`.

    Only pieces that are control tokens get control ids.

    Raises:
      ValueError: what `render_prompt` refuses, or a tokenizer without one of the control tokens.
    """
    ids: list[int] = []
    for prompt_piece in render_prompt(messages, tools, add_generation_prompt, profile):
        if prompt_piece.special:
            ids.append(tokenizer.special_token_id(prompt_piece.text))
        else:
            ids += tokenizer.encode(prompt_piece.text)
    return ids


def normalize_messages(
    messages: messages_lib.JsonObjects, profile: str = "release"
) -> list[dict[str, Any]]:
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
    return messages_lib.to_list_form(messages, style.trim, style.named_results)


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
    """Join adjacent texts: the tokenizer must see each run as a whole, as it was in training."""
    merged: list[PromptPiece] = []
    for prompt_piece in pieces:
        if merged and not prompt_piece.special and not merged[-1].special:
            merged[-1] = PromptPiece(merged[-1].text + prompt_piece.text)
        else:
            merged.append(prompt_piece)
    return merged
