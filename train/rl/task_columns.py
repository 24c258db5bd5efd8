"""The columns of a task: which ones of a record are read, and what their values may be.

A value of the wrong type is an error, to which `tasks` adds the file and the line. It is never read
as what it does not say: a list of messages that is JSON text is the messages, and not a user who
types JSON.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from train.data import records
from train.rl.rewards import code_tests

# By field, the keys of files that are tried, in this order. A dot goes into an object.
TASK_KEYS = {
    "prompt": ("prompt", "messages", "input", "question", "problem", "question_content"),
    "label": ("label", "reward_model.ground_truth", "answer", "ground_truth", "solution"),
    "metadata": ("metadata", "extra_info"),
    "tools": ("tools",),
}
# Columns that join the metadata under their own names: what rewards read there.
METADATA_COLUMNS = (*code_tests.TEST_KEYS, "tool_calls")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# A text that means to be a list of messages, in JSON or as Python prints it.
_MESSAGES_PATTERN = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")


def choose_keys(
    source_name: str, record: Mapping[str, Any], explicit_keys: Mapping[str, str]
) -> dict[str, str]:
    """Return the key of each field, from the first record of a source.

    Args:
      explicit_keys: those that the source's config names. An empty key leaves the field out.

    Raises:
      DataError: the record has no such key, or no prompt.
    """
    keys = {field: key for field, key in explicit_keys.items() if key}
    for field, key in keys.items():
        if not has_key(record, key):
            raise records.DataError(
                f"tasks {source_name}: got the keys {sorted(record)}; wanted {key}, which keys= "
                f"names for the {field}"
            )
    for field, candidates in TASK_KEYS.items():
        present = [key for key in candidates if has_key(record, key)]
        # Keys without a value come last, as other records may have one. The sort is stable.
        present.sort(key=lambda key: get_value(record, key) is None)
        if field not in explicit_keys and present:
            keys[field] = present[0]
    if "prompt" not in keys:
        raise records.DataError(
            f"tasks {source_name}: got the keys {sorted(record)}; wanted a prompt in one of "
            f"{', '.join(TASK_KEYS['prompt'])}, or keys=(('prompt', KEY),)"
        )
    return keys


def parse_prompt(prompt: Any, key: str) -> tuple[Mapping[str, Any], ...]:
    """Return the messages of a prompt, which is text, a list of messages, or the JSON of one.

    Raises:
      ValueError: the prompt has another form, or ends with a turn of the assistant.
    """
    if isinstance(prompt, str) and _MESSAGES_PATTERN.match(prompt):
        prompt = _parse_json(prompt, key)
    if isinstance(prompt, str) and prompt:
        return ({"role": "user", "content": prompt},)
    if not (isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) for m in prompt)):
        raise ValueError(f"got the prompt {prompt!r:.80}; wanted a string or a list of messages")
    for message in prompt:
        if message.get("role") not in _ROLES:
            raise ValueError(
                f"got the message {message!r:.80} in {key}; wanted a role of {', '.join(_ROLES)}"
            )
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"got a prompt in {key} that ends with a turn of the assistant, which "
            "would show the model an answer; wanted one that ends before it. Cut that turn off, or "
            "name another column by keys=(('prompt', KEY),)."
        )
    return tuple(prompt)


def parse_metadata(value: Any, key: str, is_explicit: bool) -> dict[str, Any]:
    """Return metadata, which is an object, a list that is named by its key, or the JSON of one.

    Args:
      is_explicit: the config names the key, so that plain text may be the metadata, too.

    Raises:
      ValueError: the value is something else.
    """
    name = key.rpartition(".")[2]
    if value is None or value == "":
        return {}
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = _parse_json(value, key)
    if isinstance(value, Mapping):
        return dict(value)
    # A list, such as the expected tool calls, is named by its key in the file.
    if isinstance(value, list) or is_explicit:
        return {name: value}
    raise ValueError(
        f"got {value!r:.80} in {key}; wanted an object, a list, or the JSON of one. "
        "keys=(('metadata', ''),) leaves it out."
    )


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the schemas of functions, which may be JSON text.

    Raises:
      ValueError: the value is something else.
    """
    # Parquet files often hold nested values as JSON text.
    is_json = isinstance(value, str) and value.lstrip().startswith("[")
    tools = _parse_json(value, "tools") if is_json else value or []
    if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
        return tuple(tools)
    raise ValueError(f"got the tools {value!r:.80}; wanted a list of function schemas, or its JSON")


def parse_data_source(value: Any) -> str | None:
    """Return verl's `data_source` of a record, None where it has none.

    Raises:
      ValueError: the value is no text.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"got the data_source {value!r:.80}; wanted text")
    return value or None


def has_key(record: Any, key: str) -> bool:
    """Tell whether a record has a key, whose dots go into objects."""
    parent, _, name = key.rpartition(".")
    record = get_value(record, parent) if parent else record
    return isinstance(record, Mapping) and name in record


def get_value(record: Any, key: str) -> Any:
    """Return the value of a key, None for a path that does not exist."""
    for part in key.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def _parse_json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {text!r:.80} in {key}: {error}; wanted JSON") from None
