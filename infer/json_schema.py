"""JSON schemas as users have them: an object, its text, or one within OpenAI's `json_schema`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from m1_jax import configlib, strict_json

# Keys of OpenAI's wrappers that do not constrain. `strict: false` would ask for less than we give.
_WRAPPER_LABELS = frozenset({"name", "description", "strict"})
# Keywords that llguidance applies, or of which it refuses the values that it cannot apply.
_APPLIED_KEYWORDS = frozenset(
    [
        "type",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "properties",
        "patternProperties",
        "additionalProperties",
        "required",
        "minProperties",
        "maxProperties",
        "items",
        "prefixItems",
        "additionalItems",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "x-guidance",
    ]
)
# Keywords that describe, and constrain nothing.
_ANNOTATIONS = frozenset(
    [
        "$schema",
        "$id",
        "id",
        "$anchor",
        "$comment",
        "$defs",
        "definitions",
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "externalDocs",
    ]
)
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("additionalProperties", "items", "additionalItems")


def plain_schema(schema: str | Mapping) -> str:
    """Return the text of a schema, out of the wrapper that it may come in.

    Args:
      schema: the schema, `{"name": ..., "strict": ..., "schema": {...}}` around it, `{"type":
        "json_schema", ...}` around one of them, or `{"type": "json_object"}`.

    Raises:
      ValueError: no JSON, no object, or values too deep within each other.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema: not JSON: {error}. Correct it or leave it out.") from None
    try:
        value = strict_json.parse_json(text, "json_schema")
    except strict_json.JsonError as error:
        reason = str(error).partition("(")[2].rpartition(")")[0]
        raise ValueError(f"json_schema: not JSON: {reason}. Correct it or leave it out.") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"json_schema: got a JSON {kind}; wanted an object")
    return json.dumps(_unwrap_schema(value))


def _unwrap_schema(value: dict[str, Any]) -> dict[str, Any]:
    """Return the schema within OpenAI's wrappers."""
    kind, keys = value.get("type"), value.keys() - _WRAPPER_LABELS
    if kind == "json_object" and keys == {"type"}:
        return {"type": "object"}
    if kind == "json_schema":
        keys -= {"type"}
    for name in ("json_schema", "schema"):
        if keys == {name} and isinstance(value[name], dict):
            return _unwrap_schema(value[name])
    return value


def check_keywords(text: str) -> None:
    """Check that nothing in a schema is left out of account. llguidance skips what it never met.

    Raises:
      ValueError: an unknown keyword. The message names it and where it stands.
    """
    for path, schema in _iterate_schemas("", json.loads(text)):
        known = _APPLIED_KEYWORDS | _ANNOTATIONS
        for keyword in schema:
            if keyword not in known and not keyword.startswith("x-"):
                hint = configlib.suggest_names(keyword, known, "leave it out")
                raise ValueError(
                    f"json_schema: got the keyword {keyword!r:.80} in {path or 'the schema'}, "
                    f"which would not be applied; {hint}"
                )
        kinds = schema.get("type", "string")
        if "format" in schema and "string" not in (kinds if isinstance(kinds, list) else [kinds]):
            raise ValueError(
                f"json_schema: got the format {schema['format']!r:.80} of a {kinds} in "
                f"{path or 'the schema'}; wanted formats of strings alone: leave it out"
            )


def _iterate_schemas(path: str, schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a schema and all within it, each with where it stands. True and False are no dicts."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    parts: list[tuple[str, Any]] = [(name, schema.get(name)) for name in _SCHEMAS]
    for name in _SCHEMA_MAPS:
        members = schema.get(name)
        if isinstance(members, dict):
            parts += [(f"{name}/{key}", inner) for key, inner in members.items()]
    for name in (*_SCHEMA_LISTS, "items"):
        members = schema.get(name)
        if isinstance(members, list):
            parts += [(f"{name}/{index}", inner) for index, inner in enumerate(members)]
    for name, inner in parts:
        yield from _iterate_schemas(f"{path}/{name}", inner)
