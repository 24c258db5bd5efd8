"""Config files: a Python file's `get_config(arg)`, overrides by dotted path, JSON and back.

A config is a frozen dataclass of plain values, tuples and other frozen dataclasses.
"""

import ast
import copy
import dataclasses
import difflib
import runpy
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from m1_jax import local_path


class ConfigFileError(ValueError):
    """A config file or override that cannot be used. The message says which one, and why."""


def load_config(spec: str, overrides: Sequence[str] = ()) -> Any:
    """Return `get_config(arg)` of the spec "file.py:arg", with the overrides applied to it.

    The file is run by its path, so that `configs/` need not be a package. For overrides see
    `apply_overrides`.

    Raises:
      ConfigFileError: no such file, no get_config in it, or an override that does not fit.
      ValueError: the config refuses a value.
    """
    path, _, arg = spec.partition(":")
    file = local_path.resolve_path(path, "config")
    if not file.is_file():
        raise ConfigFileError(f"config: got {path!r}; wanted a file, as in --config=configs/x.py")
    get_config = runpy.run_path(str(file)).get("get_config")
    if get_config is None:
        raise ConfigFileError(f"{path} has no function get_config(arg); wanted one")
    # Without ":arg" get_config takes its default, or has no parameter at all.
    config = get_config(arg) if arg else get_config()
    return apply_overrides(config, overrides)


def apply_overrides(config: Any, overrides: Sequence[str]) -> Any:
    """Return the config with every "path.to.field=value" replaced.

    Values are Python literals. Any other text, such as a plain word, is taken as a string. Items of
    tuples are fields named by their index. The last override of a field counts. Fields are checked
    against each other once, after all overrides, so that their order does not matter.

    Raises:
      ConfigFileError: no such field, or a value of another type than its annotation.
      ValueError: the config refuses a value.
    """
    for override in overrides:
        config = _apply_unchecked(config, override)
    return _construct_again(config) if overrides else config


def apply_override(config: Any, override: str) -> Any:
    """Return the config with one override, see `apply_overrides`."""
    return apply_overrides(config, [override])


def _apply_unchecked(config: Any, override: str) -> Any:
    """Return the config with one override. Its fields may contradict each other."""
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigFileError(f"override: got {override!r}; wanted FIELD=VALUE")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _replace_at_path(config, type(config), path.split("."), value, path)


def check_path(config: Any, path: str) -> None:
    """Refuse the path of a field that the config does not have.

    Raises:
      ConfigFileError: there is no such field.
    """
    node = config
    for name in path.split("."):
        if isinstance(node, tuple):
            if not name.isdigit() or int(name) >= len(node):
                raise ConfigFileError(
                    f"{path}: got item {name}; wanted one of the {len(node)} items, from 0"
                )
            node = node[int(name)]
        elif dataclasses.is_dataclass(node):
            names = [field.name for field in dataclasses.fields(node)]
            if name not in names:
                raise ConfigFileError(f"{path}: {_describe_unknown_field(type(node), name, names)}")
            node = getattr(node, name)
        else:
            raise ConfigFileError(
                f"{path}: got the field {name!r} of {node!r}; wanted the path before it"
            )


def to_json(config: Any) -> Any:
    """Return dicts, tuples and plain values that JSON can hold and `from_json` reads back."""
    return dataclasses.asdict(config)


def from_json(kind: type, value: Any) -> Any:
    """Return a config of class `kind` from the value of `to_json`, checked field by field."""
    return _convert_value(kind, value, kind.__name__)


def list_differences(old_config: Any, new_config: Any, path: str = "") -> list[str]:
    """Return "path: old -> new" for every value in which two configs of one class differ."""
    if dataclasses.is_dataclass(old_config) and type(old_config) is type(new_config):
        pairs = [
            (field.name, getattr(old_config, field.name), getattr(new_config, field.name))
            for field in dataclasses.fields(old_config)
        ]
    elif (
        isinstance(old_config, tuple)
        and isinstance(new_config, tuple)
        and len(old_config) == len(new_config)
    ):
        pairs = [
            (str(i), a, b) for i, (a, b) in enumerate(zip(old_config, new_config, strict=True))
        ]
    else:
        # A leaf, or two values that have no common fields: they are reported as a whole.
        return [] if old_config == new_config else [f"{path}: {old_config!r} -> {new_config!r}"]
    return [
        line
        for name, a, b in pairs
        for line in list_differences(a, b, f"{path}.{name}".lstrip("."))
    ]


def check_field(valid: bool, name: str, value: Any, requirement: str) -> None:
    """Raise ValueError for a field that is not valid, in the words that all configs use."""
    if not valid:
        raise ValueError(f"{name}: got {value!r}; wanted {requirement}")


def suggest_names(name: Any, known_names: Collection[str], otherwise: str, limit: int = 1) -> str:
    """Return "did you mean X?", or the text `otherwise` if no known name is like `name`.

    At most `limit` names are suggested.
    """
    matches = difflib.get_close_matches(str(name), list(known_names), limit)
    return f"did you mean {' or '.join(matches)}?" if matches else otherwise


def _replace_at_path(
    node: Any, annotation: Any, path: list[str], value: Any, full_path: str
) -> Any:
    """Return a copy of `node` with `value` at `path` below it.

    `full_path` is the path from the root, for error messages.
    """
    if not path:
        return _convert_value(annotation, value, full_path)
    name, *remaining_path = path
    # Negative indices count from the end, as in Python.
    if isinstance(node, tuple) and name.lstrip("-").isdigit():
        if not -len(node) <= int(name) < len(node):
            raise ConfigFileError(
                f"{full_path}: got item {name}; wanted one of the {len(node)} items, from 0"
            )
        items = list(node)
        item_annotations = typing.get_args(_unwrap_optional(annotation, tuple)) or (Any,)
        # tuple[X, ...] has one annotation for all items, tuple[X, Y] one for each.
        is_homogeneous = item_annotations[-1] is Ellipsis
        item_annotation = item_annotations[0 if is_homogeneous else int(name)]
        items[int(name)] = _replace_at_path(
            items[int(name)], item_annotation, remaining_path, value, full_path
        )
        return tuple(items)
    if not dataclasses.is_dataclass(node):
        raise ConfigFileError(
            f"{full_path}: got the field {name!r} of {node!r}, which has no fields; wanted the "
            "whole value at once, as in --set=\"lora={'rank': 16}\""
        )
    # Not `field.type`, which is text in a module that postpones its annotations.
    annotations = typing.get_type_hints(type(node))
    if name not in annotations:
        raise ConfigFileError(
            f"{full_path}: {_describe_unknown_field(type(node), name, annotations)}"
        )
    new_value = _replace_at_path(
        getattr(node, name), annotations[name], remaining_path, value, full_path
    )
    # Not through `replace`: __post_init__ would check the value against fields that a later
    # override changes.
    changed_node = copy.copy(node)
    object.__setattr__(changed_node, name, new_value)  # the class is frozen
    return changed_node


def _construct_again(value: Any) -> Any:
    """Return the value with every dataclass in it made anew, which checks its fields."""
    if isinstance(value, tuple):
        return tuple(map(_construct_again, value))
    if not dataclasses.is_dataclass(value):
        return value
    fields = {
        field.name: _construct_again(getattr(value, field.name))
        for field in dataclasses.fields(value)
    }
    return type(value)(**fields)


def _describe_unknown_field(kind: type, name: str, names: Collection[str]) -> str:
    hint = suggest_names(name, names, f"it has {', '.join(names)}")
    return f"{kind.__name__} has no field {name!r}; {hint}"


def _unwrap_optional(annotation: Any, origin: type) -> Any:
    """Return the member of `X | None` that has the given origin, or the annotation itself."""
    if _is_union(annotation):
        members = typing.get_args(annotation)
        return next((m for m in members if typing.get_origin(m) is origin), annotation)
    return annotation


def _is_union(annotation: Any) -> bool:
    # `X | None` and `Optional[X]` are of different types before Python 3.14.
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union


def _lists_to_tuples(value: Any) -> Any:
    """Return the value with every list in it as a tuple: JSON has no tuples, configs no lists."""
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list | tuple) else value


def _convert_value(annotation: Any, value: Any, path: str) -> Any:
    """Return `value` as a field of this annotation holds it.

    Values come from JSON and from the command line. So lists become tuples, dicts become
    dataclasses, and a whole number becomes a float where the annotation says so.

    Raises:
      ConfigFileError: a value that does not fit.
    """
    if annotation is Any:
        return _lists_to_tuples(value)
    if _is_union(annotation):
        # The first member that fits, in the order of the annotation.
        for member in typing.get_args(annotation):
            try:
                return _convert_value(member, value, path)
            except ConfigFileError:
                continue
    elif dataclasses.is_dataclass(annotation):
        if isinstance(value, typing.cast(type, annotation)):
            return value
        if isinstance(value, dict):
            return _convert_dict(typing.cast(type, annotation), value, path)
    elif typing.get_origin(annotation) is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigFileError(f"{path}: got {value!r}; wanted a tuple")
        item_annotations = typing.get_args(annotation)
        if item_annotations[-1] is Ellipsis:
            item_annotations = (item_annotations[0],) * len(value)
        if len(item_annotations) == len(value):
            pairs = enumerate(zip(item_annotations, value, strict=True))
            return tuple(_convert_value(item, v, f"{path}.{i}") for i, (item, v) in pairs)
    elif annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif annotation is int and isinstance(value, float) and value.is_integer():  # such as 1e6
        return int(value)
    elif annotation is None or annotation is types.NoneType:
        if value is None:
            return None
    # A bool is an int in Python, but not a number that a config means.
    elif isinstance(value, annotation) and not (isinstance(value, bool) and annotation is not bool):
        return value
    # Every branch that did not return ends here. A generic such as tuple[int, ...] is written out:
    # its __name__ is that of the bare class.
    is_class = typing.get_origin(annotation) is None
    type_name = getattr(annotation, "__name__", str(annotation)) if is_class else str(annotation)
    raise ConfigFileError(f"{path}: got {value!r}; wanted {type_name}")


def _convert_dict(kind: type, value: dict[str, Any], path: str) -> Any:
    """Return a dataclass from its fields by name. Fields that are left out take their defaults."""
    annotations = typing.get_type_hints(kind)
    for name in value:
        if name not in annotations:
            raise ConfigFileError(f"{path}: {_describe_unknown_field(kind, name, annotations)}")
    fields = {n: _convert_value(annotations[n], v, f"{path}.{n}") for n, v in value.items()}
    return kind(**fields)
