"""What a test holds in place of the program's module, functions, classes and objects.

A test calls them, reads their attributes and iterates over them as if they were there. But they
never compare with a value of the test: an object of the program that calls itself equal to
everything is equal to no number. Only two objects of the program are compared by the program.
"""

import sys
import types
from collections.abc import Callable, Generator
from typing import Any

from train.rl.rewards.judge import connection

_BINARY_OPERATORS = (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__add__", "__sub__", "__mul__", "__truediv__", "__and__", "__or__", "__xor__"),
)


class ProgramClient:
    """The judge's side of the connection."""

    def __init__(self, reader: Any, writer: Any):
        """Take the two pipes to the program's process."""
        self.num_uses = 0  # of the program so far: calls, and values that were read
        self._functions: list[Callable[..., Any]] = []  # the test's own, which the program may call
        self._objects: dict[int, RemoteObject] = {}  # one for each, so that `is` holds
        self._exceptions: dict[str, type[BaseException]] = {}
        self._connection = connection.ProgramConnection(
            reader, writer, self._serve, self._export, self._adopt
        )

    def request(self, operation: str, *arguments: Any) -> Any:
        """Return what the program's process replies.

        Raises:
          ConnectionLost: the process died.
          BaseException: what the program raised.
        """
        self.num_uses += operation not in ("load", "get")
        reply = self._connection.request(operation, *arguments)
        sys.stdout.write(str(reply.get("printed", "")))
        if "raise" in reply:
            raise self._make_exception(reply["raise"])
        if "after" in reply:
            before = arguments[1:]
            after = self._connection.decode(reply["after"])
            _update_arguments(before[0], after[0])
            _update_arguments(list(before[1].values()), list(after[1].values()))
        value = self._connection.decode(reply.get("value"))
        # To name a function is no use yet.
        self.num_uses += operation == "get" and not isinstance(value, RemoteObject | type)
        return value

    def _make_exception(self, encoded: dict[str, Any]) -> BaseException:
        try:
            kind = connection.make_exception_class(encoded["class"], self._exceptions)
            error = kind.__new__(kind)
            error.args = tuple(map(self._connection.decode, encoded["arguments"]))
            for name, value in encoded["attributes"].items():
                if not name.startswith("_"):
                    setattr(error, name, self._connection.decode(value))
            error.is_of_program = True  # pyright: ignore[reportAttributeAccessIssue]
        except (KeyError, TypeError, AttributeError) as wrong:
            raise connection.ConnectionLost(f"it sent a damaged exception: {wrong}") from None
        return error

    def _serve(self, operation: str, arguments: list[Any]) -> dict[str, Any]:
        # The program may do nothing here but call functions that it was given.
        if operation != "call":
            raise TypeError(f"got the request {operation!r}; wanted a call")
        number, values, named = arguments
        return {"value": self._connection.encode(self._functions[number](*values, **named))}

    def _export(self, value: Any) -> dict[str, Any]:
        if isinstance(value, RemoteObject):
            return {"object": object.__getattribute__(value, "_number")}
        if not isinstance(value, types.FunctionType | types.MethodType):
            raise connection.UnsupportedValue(
                f"the tests pass a {type(value).__name__} to the program; wanted plain values, "
                "functions, or objects that the program made"
            )
        self._functions.append(value)
        return {"function": len(self._functions) - 1}

    def _adopt(self, description: dict[str, Any]) -> Any:
        if "exception" in description:
            return connection.make_exception_class(description["exception"], self._exceptions)
        number = description["object"]
        if number not in self._objects:
            self._objects[number] = RemoteObject(self, number)
        return self._objects[number]


class RemoteObject:
    """An object of the program."""

    def __init__(self, client: ProgramClient, number: int):
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return _client_of(self).request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _client_of(self).request("set", self, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _client_of(self).request("call", self, list(arguments), named)

    def __await__(self) -> Generator[Any, Any, Any]:
        return _client_of(self).request("await", self)
        yield  # which makes this a generator

    def __bool__(self) -> bool:
        return bool(_client_of(self).request("truth", self))

    def __hash__(self) -> int:
        return hash(_call_special(self, "__hash__"))

    def __instancecheck__(self, value: Any) -> bool:
        is_remote = isinstance(value, RemoteObject)
        return is_remote and bool(_client_of(self).request("is_instance", value, self))


def _client_of(remote: RemoteObject) -> ProgramClient:
    return object.__getattribute__(remote, "_client")


def _call_special(remote: RemoteObject, name: str, *arguments: Any) -> Any:
    return _client_of(remote).request("special", name, remote, list(arguments))


def _make_special(name: str) -> Callable[..., Any]:
    def special(self: RemoteObject, *arguments: Any) -> Any:
        return _call_special(self, name, *arguments)

    return special


def _make_binary_operator(name: str) -> Callable[[RemoteObject, Any], Any]:
    def operate(self: RemoteObject, other: Any) -> Any:
        # Python then tries the other operand, and at last says that they are not equal.
        return (
            _call_special(self, name, other) if isinstance(other, RemoteObject) else NotImplemented
        )

    return operate


# Python looks special methods up in the class, past `__getattr__`. `__contains__` is left out: by
# iteration, the test itself compares the items.
for _name in ("iter", "next", "len", "getitem", "setitem", "delitem", "str", "repr", "enter"):
    setattr(RemoteObject, f"__{_name}__", _make_special(f"__{_name}__"))
for _name in _BINARY_OPERATORS:
    setattr(RemoteObject, _name, _make_binary_operator(_name))


def _leave_context(self: RemoteObject, *_: Any) -> Any:
    # The exception of a test is not the program's to see.
    return _call_special(self, "__exit__", None, None, None)


setattr(RemoteObject, "__exit__", _leave_context)  # noqa: B010 - beside the others


def _update_arguments(before: list[Any], after: list[Any]) -> None:
    """Change the arguments of a call in place where the program changed its copies of them."""
    for old, new in zip(before, after, strict=False):
        if isinstance(old, list) and old is not new:
            old[:] = new
        elif isinstance(old, dict | set) and type(old) is type(new):
            old.clear()
            old.update(new)
