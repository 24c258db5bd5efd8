"""Config files: a Python file's `get_config(arg)`, overrides by dotted path, JSON and back.

A config is a frozen dataclass of plain values, tuples and other frozen dataclasses.
"""

import ast
import dataclasses
import difflib
import pathlib
import runpy
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any


class ConfigFileError(ValueError):
    """A config file or override that cannot be used; the message says which and why."""


def load_config(spec: str, overrides: Sequence[str] = ()) -> Any:
    """Return `get_config(arg)` of "file.py:arg", with "path.to.field=value" replaced in it.

    Raises:
      ConfigFileError: no such file, no get_config in it, or an override that does not fit.
    """
    path, _, arg = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigFileError(f"config: got {path!r}; wanted a file, as in --config=configs/x.py")
    make = runpy.run_path(path).get("get_config")
    if make is None:
        raise ConfigFileError(f"{path} has no function get_config(arg)")
    config = make(arg) if arg else make()
    for override in overrides:
        config = apply_override(config, override)
    return config


def apply_override(config: Any, override: str) -> Any:
    """Return the config with one "path.to.field=value"; items of tuples go by their number.

    Values are Python literals; a plain word is a string.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigFileError(f"override: got {override!r}; wanted FIELD=VALUE")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _replace_at_path(config, type(config), path.split("."), value, path)


def to_json(config: Any) -> Any:
    """Return dicts, lists and plain values that `from_json` reads back."""
    return dataclasses.asdict(config)


def from_json(kind: type, value: Any) -> Any:
    """Return a config of class `kind` from what `to_json` gave, checked field by field."""
    return _convert_value(kind, value, kind.__name__)


def list_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return "path: old -> new" for every value in which two configs of one class differ."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        pairs = [
            (f.name, getattr(old, f.name), getattr(new, f.name)) for f in _dataclass_fields(old)
        ]
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    return [
        line
        for name, a, b in pairs
        for line in list_differences(a, b, f"{path}.{name}".lstrip("."))
    ]


def check_field(valid: bool, name: str, got: Any, wanted: str) -> None:
    """Raise ValueError for a field that is not valid, in the words that all configs use."""
    if not valid:
        raise ValueError(f"{name}: got {got!r}; wanted {wanted}")


def suggest_names(name: Any, known: Collection[str], otherwise: str, limit: int = 1) -> str:
    """Return "did you mean X?", or `otherwise` where no known name is like the one given."""
    near = difflib.get_close_matches(str(name), list(known), limit)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _dataclass_fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind)


def _replace_at_path(node: Any, kind: Any, path: list[str], value: Any, full_path: str) -> Any:
    if not path:
        return _convert_value(kind, value, full_path)
    name, *rest = path
    if isinstance(node, tuple) and name.lstrip("-").isdigit():
        if not -len(node) <= int(name) < len(node):
            raise ConfigFileError(f"{full_path}: got item {name}; there are {len(node)}")
        items = list(node)
        of = typing.get_args(_unwrap_optional(kind, tuple)) or (Any,)
        of = of[0] if of[-1] is Ellipsis else of[int(name)]
        items[int(name)] = _replace_at_path(items[int(name)], of, rest, value, full_path)
        return tuple(items)
    if not dataclasses.is_dataclass(node):
        raise ConfigFileError(f"{full_path}: {name!r} is below {node!r}, which has no fields")
    kinds = typing.get_type_hints(type(node))
    if name not in kinds:
        raise ConfigFileError(f"{full_path}: {_describe_unknown_field(type(node), name, kinds)}")
    new = _replace_at_path(getattr(node, name), kinds[name], rest, value, full_path)
    return dataclasses.replace(typing.cast(Any, node), **{name: new})


def _describe_unknown_field(kind: type, name: str, names) -> str:
    hint = suggest_names(name, names, f"it has {', '.join(names)}")
    return f"{kind.__name__} has no field {name!r}; {hint}"


def _unwrap_optional(kind: Any, origin: type) -> Any:
    """Return the member of `X | None` that has the given origin, or the kind itself."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next((k for k in typing.get_args(kind) if typing.get_origin(k) is origin), kind)
    return kind


def _lists_to_tuples(value: Any) -> Any:
    """Return a value whose lists are tuples, as JSON has no tuples and configs have no lists."""
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list | tuple) else value


def _convert_value(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as a field of type `kind` holds it; a whole number will do for a float."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return _lists_to_tuples(value)
    if isinstance(kind, types.UnionType) or origin is typing.Union:
        for member in typing.get_args(kind):
            try:
                return _convert_value(member, value, path)
            except ConfigFileError:
                continue
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        if isinstance(value, dict):
            kinds = typing.get_type_hints(kind)
            for name in value:
                if name not in kinds:
                    cls = typing.cast(type, kind)
                    raise ConfigFileError(f"{path}: {_describe_unknown_field(cls, name, kinds)}")
            parts = {n: _convert_value(kinds[n], v, f"{path}.{n}") for n, v in value.items()}
            return typing.cast(Any, kind)(**parts)
    elif origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigFileError(f"{path}: got {value!r}; wanted a tuple")
        of = typing.get_args(kind)
        of = (of[0],) * len(value) if of[-1] is Ellipsis else of
        if len(of) == len(value):
            pairs = enumerate(zip(of, value, strict=True))
            return tuple(_convert_value(k, v, f"{path}.{i}") for i, (k, v) in pairs)
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():  # 1e6
        return int(value)
    elif kind is None or kind is types.NoneType:
        if value is None:
            return None
    elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ConfigFileError(f"{path}: got {value!r}; wanted {name}")
