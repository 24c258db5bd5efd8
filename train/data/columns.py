"""Columns of records: the forms that sets of data have, and the conversation that each becomes.

  text                                            a text
  messages [tools]                                OpenAI's form, which the chat template reads
  conversations [system] [tools]                  ShareGPT's: objects of `from` and `value`
  prompt completion [tools]                       TRL's: texts, or lists of messages
  instruction output [input] [system] [history]   Alpaca's

The first form whose columns are there and not null is taken. Lists may be JSON text. Wherever
messages stand, those of ShareGPT are read as well.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from m1_jax import strict_json

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_TEXT_PARTS = ("input_text", "output_text")  # OpenAI's Responses have these in place of "text"
# Columns that may hold a list as JSON text, in any container.
TEXT_OF_JSON = ("messages", "conversations", "tools", "history")
# Keys of an assistant message that say whether the turn is learnt: OpenAI's, slime's and others'.
LOSS_KEYS = ("weight", "loss", "train")


def _take_messages(record: Mapping[str, Any]) -> list[Any]:
    return _convert_messages("messages", record["messages"])


def _take_conversations(record: Mapping[str, Any]) -> list[Any]:
    messages = _convert_messages("conversations", record["conversations"])
    system = _take_text(record, "system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _take_prompt_completion(record: Mapping[str, Any]) -> list[Any]:
    """Return both as one conversation.

    Turns of the assistant in the prompt are not learnt, unless they say so themselves.
    """
    prompt, completion = (
        _take_turns(column, role, record[column])
        for column, role in (("prompt", "user"), ("completion", "assistant"))
    )
    read_only = [
        {"weight": 0, **message}
        if isinstance(message, Mapping)
        and message.get("role") == "assistant"
        and not any(key in message for key in LOSS_KEYS)
        else message
        for message in prompt
    ]
    return read_only + completion


def _take_alpaca(record: Mapping[str, Any]) -> list[Any]:
    """Return system, earlier rounds, instruction with its input, and output."""
    messages = []
    if system := _take_text(record, "system"):
        messages.append({"role": "system", "content": system})
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise ValueError(f"history: got {history!r:.80}; wanted a list of pairs of texts")
    for question, answer in history:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    texts = [_take_text(record, "instruction"), _take_text(record, "input")]
    messages.append({"role": "user", "content": "\n\n".join(filter(None, texts))})
    messages.append({"role": "assistant", "content": _take_text(record, "output")})
    return messages


@dataclasses.dataclass(frozen=True)
class RecordForm:
    """Columns that make a record, and how.

    Attributes:
      required: columns without which a record has another form.
      optional: columns that are read where they are there.
      convert: returns the messages of a record. None for a text.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], list[Any]] | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all columns of the form."""
        return (*self.required, *self.optional)


_TEXT_FORM = RecordForm(("text",), (), None)
_CHAT_FORMS = (
    RecordForm(("messages",), ("tools",), _take_messages),
    RecordForm(("conversations",), ("system", "tools"), _take_conversations),
    RecordForm(("prompt", "completion"), ("tools",), _take_prompt_completion),
    RecordForm(("instruction", "output"), ("input", "system", "history", "tools"), _take_alpaca),
)
_FORMS_BY_KIND = {
    "text": (_TEXT_FORM,),
    "chat": _CHAT_FORMS,
    "auto": (_TEXT_FORM, *_CHAT_FORMS),
}
# All of them, each once.
RECORD_COLUMNS = tuple(
    dict.fromkeys(name for form in _FORMS_BY_KIND["auto"] for name in form.columns)
)


def find_form(record: Mapping[str, Any], kind: str = "auto") -> RecordForm:
    """Return the form of a record.

    Args:
      record: the record. A column that is null counts as absent, because tables have all columns.
      kind: "text", "chat", or "auto" for either.

    Raises:
      ValueError: the record has no form of this kind, or both text and messages.
    """
    present = {name for name in record if record[name] is not None}
    forms = [form for form in _FORMS_BY_KIND[kind] if present.issuperset(form.required)]
    if not forms:
        wanted = [" and ".join(form.required) for form in _FORMS_BY_KIND[kind]]
        raise ValueError(
            f"got the keys {sorted(record)!r:.80}; wanted {', or '.join(wanted)}, not null"
        )
    if kind == "auto" and present.issuperset(("text", "messages")):
        raise ValueError(
            "got text and messages; wanted one of them and not both. Choose by kind='text' or "
            "'chat' of the source, or by --kind of m1-prepare."
        )
    return forms[0]


def to_training_record(record: Mapping[str, Any], kind: str = "auto") -> dict[str, Any]:
    """Return a record with `text` alone, or with `messages` and `tools` where there are any.

    Args:
      record: a record of any form.
      kind: see `find_form`.

    Raises:
      ValueError: a record of no form, or with a column of a wrong type.
    """
    form = find_form(record, kind)
    if form.convert is None:
        text = record["text"]
        if not isinstance(text, str) or not text:
            raise ValueError(f"text: got {text!r:.80}; wanted a string that is not empty")
        return {"text": text}
    messages = form.convert(record)
    tools = record.get("tools") or None
    if not isinstance(tools, list | None):
        raise ValueError(f"tools: got {tools!r:.80}; wanted a list")
    return {"messages": messages} | ({} if tools is None else {"tools": tools})


def describe_columns(record: Mapping[str, Any], kind: str = "auto") -> str:
    """Return which columns of a record are read, and which are not, for a line of the log.

    Raises:
      ValueError: see `find_form`.
    """
    form = find_form(record, kind)
    read = [name for name in form.columns if record.get(name) is not None]
    unread = sorted(name for name in record if name not in read and record[name] is not None)
    return f"reads {', '.join(read)}" + (f" and not {', '.join(unread)!s:.200}" if unread else "")


def _take_text(record: Mapping[str, Any], column: str) -> str:
    """Return a column's text, empty where it is absent or null."""
    value = record.get(column)
    if not isinstance(value, str | None):
        raise ValueError(f"{column}: got {value!r:.80}; wanted a string")
    return value or ""


def _take_turns(column: str, role: str, value: Any) -> list[Any]:
    """Return the messages of a prompt or completion: a text is one message of `role`."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, str):
        messages = _parse_messages(value)
        if messages is None:
            return [{"role": role, "content": value}]
        value = messages
    return _convert_messages(column, value)


def _parse_messages(text: str) -> list[Any] | None:
    """Return the messages that a text holds as JSON, or None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = strict_json.parse_json(text, "messages")
    except strict_json.JsonError:
        return None  # a text that begins with a bracket
    is_messages = bool(value) and all(
        isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value
    )
    return value if is_messages else None


def _convert_messages(column: str, messages: Any) -> list[Any]:
    """Return messages in OpenAI's form. What is no message stays, for the prompt to refuse."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column}: got {messages!r:.80}; wanted a list with at least one message")
    converted = []
    # Names of the calls whose results are to come, as ShareGPT's results name no call.
    called: list[str] = []
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and "from" in message and message.get("role") is None:
            message = _convert_sharegpt(f"{column}[{i}]", message, called)
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            parts = [_convert_part(part) for part in message["content"]]
            message = {**message, "content": parts}
        converted.append(message)
    return converted


def _convert_sharegpt(location: str, message: Mapping[str, Any], called: list[str]) -> dict:
    """Return a message of ShareGPT in OpenAI's form. `called` is kept up to date."""
    sender = message["from"]
    role = _SHAREGPT_ROLES.get(sender.lower()) if isinstance(sender, str) else None
    if role is None:
        raise ValueError(
            f"{location}.from: got {sender!r:.80}; wanted one of {', '.join(_SHAREGPT_ROLES)}"
        )
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    turn = {"role": role, **others}
    if sender.lower() == "function_call":
        turn["tool_calls"] = _parse_calls(f"{location}.value", message.get("value"))
        called[:] = [call["name"] for call in turn["tool_calls"]]
        return turn
    if "value" in message:
        turn["content"] = message["value"]
    if role == "tool" and called and not turn.get("name") and not turn.get("tool_call_id"):
        turn["name"] = called.pop(0)
    return turn


def _parse_calls(location: str, value: Any) -> list[dict[str, Any]]:
    """Return the calls of a `function_call`: an object of name and arguments, or a list of them.

    Either may be JSON text.
    """
    if isinstance(value, str):
        value = strict_json.parse_json(value, location)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        raise ValueError(f"{location}: got {value!r:.80}; wanted an object of name and arguments")
    return calls


def _convert_part(part: Any) -> Any:
    """Return a part of a message's content with OpenAI's type of texts."""
    if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS:
        return {**part, "type": "text"}
    return part


def split_loss(messages: Iterable[Any]) -> tuple[list[Any], list[bool]]:
    """Return messages without `LOSS_KEYS`, and for each assistant turn whether it is learnt.

    A turn is learnt unless one of its keys is 0 or false. Null is absence.

    Raises:
      ValueError: a value that is neither 0 nor 1, keys that contradict each other, or a turn of
        another role that is to be learnt.
    """
    stripped, turns_learnt = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):  # which the prompt refuses
            stripped.append(message)
            continue
        losses = {key: message[key] for key in LOSS_KEYS if message.get(key) is not None}
        for key, value in losses.items():
            # Booleans are numbers, and floats may be whole.
            if not isinstance(value, int | float) or value not in (0, 1):
                raise ValueError(f"messages[{i}].{key}: got {value!r:.80}; wanted 0 or 1")
        if len({bool(value) for value in losses.values()}) > 1:
            raise ValueError(f"messages[{i}]: got {losses}; wanted keys that agree")
        is_learnt = all(losses.values())
        if message.get("role") == "assistant":
            turns_learnt.append(is_learnt)
        elif losses and is_learnt:
            raise ValueError(
                f"messages[{i}]: got {losses} for role {message.get('role')!r:.80}; wanted 0, or "
                "none: only turns of the assistant are learnt"
            )
        stripped.append({key: value for key, value in message.items() if key not in LOSS_KEYS})
    return stripped, turns_learnt
