"""Calls between the judge and the program, as lines of JSON over two pipes.

Values of Python's own types are copied. Any other object stays where it is: the other side gets a
number, and sends that number back to use the object. Nothing is pickled, so the program's bytes
cannot run code in the judge. While one side waits for a result, it serves the calls of the other
side, because a program may call a function that it was given.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

_MAX_MESSAGE_BYTES = 2**24
# Values that become what the function makes of them, and come back by the type's name.
_TEXT_TYPES: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, repr, complex),
    "Decimal": (decimal.Decimal, str, decimal.Decimal),
    "Fraction": (fractions.Fraction, str, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    # Both sides see the same files. The class is that of the machine's own paths.
    "Path": (type(pathlib.Path()), str, pathlib.Path),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
}
_ITEM_TYPES: dict[str, type] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
_PAIR_TYPES: dict[str, type] = {
    "dict": dict,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
}
# Exceptions of these modules are raised as themselves. Any other one becomes a class of the judge
# with the same name and bases, so that a program cannot raise what a test runner understands.
_EXCEPTION_MODULES = ("builtins", "decimal", "json.decoder", "struct", "statistics")


class ConnectionLost(Exception):
    """The other side died, or sent something else than a message."""


class UnsupportedValue(BaseException):
    """The tests pass an object that a program cannot be given. No test may catch this."""


class ProgramConnection:
    """One side of the connection.

    Args:
      reader, writer: the pipes.
      serve: carries out a request of the other side, and returns a value to encode.
      export: returns the number of an object that stays here, or raises UnsupportedValue.
      adopt: returns what stands for an object of the other side, from its description.
    """

    def __init__(
        self,
        reader: BinaryIO,
        writer: BinaryIO,
        serve: Callable[[str, list[Any]], Any],
        export: Callable[[Any], dict[str, Any]],
        adopt: Callable[[dict[str, Any]], Any],
    ):
        self._reader, self._writer = reader, writer
        self._serve, self._export, self._adopt = serve, export, adopt
        if hasattr(sys, "set_int_max_str_digits"):  # not in every release of Python 3.10
            sys.set_int_max_str_digits(0)  # a value may be any whole number

    def request(self, operation: str, *arguments: Any) -> dict[str, Any]:
        """Return the other side's reply, whose values are encoded.

        Raises:
          ConnectionLost: there is no reply.
        """
        self._send({"request": operation, "arguments": [self.encode(item) for item in arguments]})
        while "request" in (message := self._receive()):
            self._reply(message)
        return message

    def serve_forever(self) -> None:
        """Serve the other side's requests until it closes the connection."""
        while True:
            self._reply(self._receive())

    def _reply(self, message: dict[str, Any]) -> None:
        try:
            arguments = [self.decode(item) for item in message["arguments"]]
            reply = self._serve(message["request"], arguments)
        except ConnectionLost:
            raise
        except BaseException as error:  # also an exit, which ends the call alone
            reply = {"raise": encode_exception(error, self.encode)}
        self._send(reply)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            self._writer.flush()
        except OSError as error:
            raise ConnectionLost(str(error)) from None

    def _receive(self) -> dict[str, Any]:
        line = self._reader.readline(_MAX_MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionLost("it ended, or sent too much")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ConnectionLost("it sent no message")
        return message

    def encode(self, value: Any) -> Any:
        """Return a value as JSON, see the module.

        Raises:
          UnsupportedValue: an object that the other side must not use.
        """
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind is list:
            return [self.encode(item) for item in value]
        for name, item_type in _ITEM_TYPES.items():
            if kind is item_type:
                return {"items": name, "value": [self.encode(item) for item in value]}
        for name, pair_type in _PAIR_TYPES.items():
            # A default factory is the program's own, and equality does not see it.
            if kind is pair_type or (name == "dict" and kind is collections.defaultdict):
                pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
                return {"pairs": name, "value": pairs}
        for name, (text_type, write, _) in _TEXT_TYPES.items():
            if kind is text_type:
                return {"text": name, "value": write(value)}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if kind is datetime.timedelta:
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
        fields = getattr(kind, "_fields", None)
        if issubclass(kind, tuple) and fields is not None:
            items = [self.encode(item) for item in value]
            return {"named": [kind.__name__, list(fields)], "value": items}
        if kind.__module__ == "numpy" and hasattr(kind, "tolist"):
            return {"array": str(value.dtype), "value": self.encode(value.tolist())}
        # The name of another object may be anything, even code of the program.
        is_named = isinstance(value, type | types.BuiltinFunctionType)
        if is_named and getattr(builtins, value.__name__, None) is value:
            return {"builtin": value.__name__}
        return self._export(value)

    def decode(self, value: Any) -> Any:
        """Return the value that `encode` wrote on the other side.

        Raises:
          ConnectionLost: the value has another form.
        """
        try:
            return self._decode(value)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ConnectionLost(f"it sent a damaged value: {error}") from None
        except RecursionError:
            raise ConnectionLost("it sent a value that nests too deep") from None

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "items" in value:
            return _ITEM_TYPES[value["items"]](map(self._decode, value["value"]))
        if "pairs" in value:
            pairs = {self._decode(key): self._decode(item) for key, item in value["value"]}
            return _PAIR_TYPES[value["pairs"]](pairs)
        if "text" in value:
            return _TEXT_TYPES[value["text"]][2](value["value"])
        if "range" in value:
            return range(*value["range"])
        if "timedelta" in value:
            return datetime.timedelta(*value["timedelta"])
        if "named" in value:
            name, fields = value["named"]
            kind: Any = collections.namedtuple(name, fields)
            return kind(*map(self._decode, value["value"]))
        if "array" in value:
            numpy = importlib.import_module("numpy")
            return numpy.array(self._decode(value["value"]), value["array"])[()]
        if "builtin" in value:
            return getattr(builtins, value["builtin"])
        return self._adopt(value)


def describe_exception_class(kind: type[BaseException]) -> dict[str, Any]:
    """Return the name of an exception's class, its module, and the same of its bases."""
    described: dict[str, Any] = {"name": kind.__name__, "module": kind.__module__}
    if kind.__module__ not in _EXCEPTION_MODULES:
        bases = [base for base in kind.__bases__ if issubclass(base, BaseException)]
        described["bases"] = [describe_exception_class(base) for base in bases]
    return described


def encode_exception(error: BaseException, encode: Callable[[Any], Any]) -> dict[str, Any]:
    """Return an exception as JSON: its class, arguments and attributes."""
    try:
        arguments = [encode(item) for item in error.args]
        attributes = {name: encode(item) for name, item in vars(error).items()}
    except (TypeError, RecursionError):
        arguments, attributes = [str(error)], {}
    described = describe_exception_class(type(error))
    return {"class": described, "arguments": arguments, "attributes": attributes}


def make_exception_class(
    described: dict[str, Any], known: dict[str, type[BaseException]]
) -> type[BaseException]:
    """Return the class that stands for an exception's class of the other side.

    Args:
      known: the classes made so far, by name. It is extended.
    """
    name, module = described["name"], described["module"]
    if module in _EXCEPTION_MODULES:
        kind = getattr(importlib.import_module(module), name)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(f"{name} is no exception")
        return kind
    key = f"{module}.{name}"
    if key not in known:
        bases = tuple(make_exception_class(base, known) for base in described["bases"])
        known[key] = type(name, bases or (Exception,), {"__module__": module})
    return known[key]
