"""Lines of OpenAI's batch API, as `infer.offline` reads them.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": ...}}

A field of the body that would have an effect which we do not have is refused by its name.
"""

from collections.abc import Mapping
from typing import Any

from infer import jsonl, options

_URL = "/v1/chat/completions"
_LINE_FIELDS = ("custom_id", "method", "url", "body")
# These change no token of an answer.
_FIELDS_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "stream_options")
# Fields with one value that is what we do, and are refused with any other.
_FIXED_FIELDS = {
    "n": 1,
    "stream": False,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}
_RENAMED_FIELDS = {"max_completion_tokens": "max_tokens"}


def is_batch_line(value: Mapping[str, Any]) -> bool:
    """Return whether a line is one of OpenAI's batch API, which has its request in "body"."""
    return isinstance(value.get("body"), Mapping)


def translate_line(value: Mapping[str, Any], writes_tokens: bool) -> dict[str, Any]:
    """Return a line's request with the fields of our own lines, and its custom_id.

    The options that it lacks are ours, and not OpenAI's.

    Args:
      value: the line.
      writes_tokens: whether tokens are written with their log-probabilities.

    Raises:
      ValueError: another method or URL, or a field that cannot be followed.
    """
    options.check_names("field", value, _LINE_FIELDS)
    if value.get("method", "POST") != "POST" or value.get("url", _URL) != _URL:
        raise ValueError(
            f"got {value.get('method')!r:.20} {value.get('url')!r:.60}; wanted POST {_URL}"
        )
    request = jsonl.drop_nulls(value["body"])
    for name in _FIELDS_WITHOUT_EFFECT:
        request.pop(name, None)
    for name, wanted in _FIXED_FIELDS.items():
        got = request.pop(name, wanted)
        # By type too: Python takes true for 1.
        if got != wanted or type(got) is not type(wanted):
            raise ValueError(f"body: {name}: got {got!r:.80}; wanted {wanted!r}")
    if request.pop("logprobs", False) and not writes_tokens:
        raise ValueError("body: got logprobs; wanted them for all lines at once, by --tokens")
    for name, own_name in _RENAMED_FIELDS.items():
        if name in request and request.setdefault(own_name, request[name]) != request.pop(name):
            raise ValueError(f"body: got {name} and another {own_name}; wanted one of them")
    request |= _translate_format(request.pop("response_format", {"type": "text"}))
    if "custom_id" in request:
        raise ValueError("body: got custom_id; wanted it beside the body")
    return request | ({"custom_id": value["custom_id"]} if "custom_id" in value else {})


def _translate_format(response_format: Any) -> dict[str, Any]:
    """Return the constraint of a response format, which holds after the thinking."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}, "after_thinking": True}
    if kind == "json_schema" and isinstance(response_format.get(kind), Mapping):
        return {"json_schema": dict(response_format[kind]), "after_thinking": True}
    raise ValueError(
        f"body: response_format: got {response_format!r:.80}; wanted one of the types text, "
        "json_object and json_schema"
    )
