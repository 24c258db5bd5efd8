"""The process that runs a program, and does what the judge asks of it."""

import contextlib
import importlib
import io
import os
import sys
import types
from typing import Any

from train.rl.rewards.judge import connection

MODULE_NAME = "solution"


class ProgramServer:
    """The program's module and objects, used by the judge through a connection."""

    def __init__(self, read_fd: int, write_fd: int):
        """Connect to the judge, which holds the other ends of the two pipes."""
        self._objects: list[Any] = []  # kept alive, so that an id stays that of its object
        self._numbers: dict[int, int] = {}  # by id
        self._loop: Any = None  # of asyncio
        self._module = types.ModuleType(MODULE_NAME)
        self._connection = connection.ProgramConnection(
            os.fdopen(read_fd, "rb"),
            os.fdopen(write_fd, "wb"),
            self._serve,
            self._export,
            self._adopt,
        )

    def run(self) -> None:
        """Serve the judge until it closes the connection."""
        with contextlib.suppress(connection.ConnectionLost):
            self._connection.serve_forever()

    def _serve(self, operation: str, arguments: list[Any]) -> dict[str, Any]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            reply = getattr(self, f"_{operation}")(*arguments)
        # The judge prints it where the tests can see it.
        return {**reply, "printed": printed.getvalue()}

    def _load(self, text: str) -> dict[str, Any]:
        """Run the program, and return its module and the names that it defines."""
        sys.modules[MODULE_NAME] = self._module
        exec(compile(text, f"{MODULE_NAME}.py", "exec"), vars(self._module))
        return self._value([self._module, list(vars(self._module))])

    def _get(self, target: Any, name: str) -> dict[str, Any]:
        return self._value(getattr(target, name))

    def _set(self, target: Any, name: str, value: Any) -> dict[str, Any]:
        setattr(target, name, value)
        return self._value(None)

    def _call(self, target: Any, arguments: list[Any], named: dict[str, Any]) -> dict[str, Any]:
        reply = self._value(target(*arguments, **named))
        # The call may have changed them in place.
        encode = self._connection.encode
        return reply | {"after": [encode(arguments), encode(named)]}

    def _special(self, name: str, target: Any, arguments: list[Any]) -> dict[str, Any]:
        """Call a special method as Python does: that of the class."""
        method = getattr(type(target), name, None)
        if method is None:
            raise TypeError(f"got an object of {type(target).__name__}, which has no {name}")
        return self._value(method(target, *arguments))

    def _truth(self, target: Any) -> dict[str, Any]:
        return self._value(bool(target))

    def _await(self, target: Any) -> dict[str, Any]:
        asyncio = importlib.import_module("asyncio")  # takes long, and few programs need it
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._value(
            self._loop.run_until_complete(asyncio.ensure_future(target, loop=self._loop))
        )

    def _is_instance(self, value: Any, kind: Any) -> dict[str, Any]:
        return self._value(isinstance(value, kind))

    def _value(self, value: Any) -> dict[str, Any]:
        return {"value": self._connection.encode(value)}

    def _export(self, value: Any) -> dict[str, Any]:
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": connection.describe_exception_class(value)}
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return {"object": self._numbers[id(value)]}

    def _adopt(self, description: dict[str, Any]) -> Any:
        if "object" in description:  # one of the program's own comes back
            return self._objects[description["object"]]
        number = description["function"]

        def call_judge(*arguments: Any, **named: Any) -> Any:
            reply = self._connection.request("call", number, list(arguments), named)
            if "raise" in reply:
                kind = connection.make_exception_class(reply["raise"]["class"], {})
                raise kind(*reply["raise"]["arguments"])
            return self._connection.decode(reply["value"])

        return call_judge


def main() -> None:
    """Serve the judge over the pipes whose descriptors are the last two arguments."""
    ProgramServer(int(sys.argv[-2]), int(sys.argv[-1])).run()
    os._exit(0)  # the program's threads and exit handlers have no say any more
