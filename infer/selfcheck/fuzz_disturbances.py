"""What disturbs an engine at work, for `engine_fuzz.py`: interrupts, and callers' code."""

import linecache
import pathlib
import sys

from infer import engine as engine_lib
from infer import request

_INFER = str(pathlib.Path(engine_lib.__file__).parent)
_OWN_FOLDER = str(pathlib.Path(__file__).parent)


class InterruptAtLine:
    """Raises KeyboardInterrupt at the `number`th line of the engine's, as a signal may."""

    def __init__(self, number: int):
        self._number = number

    def __enter__(self):
        sys.settrace(self._trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, _):
        code = frame.f_code
        # While a program has the device's memory, the engine could but refuse.
        is_engine = code.co_filename.startswith(_INFER)
        is_own = code.co_filename.startswith(_OWN_FOLDER)
        if not is_engine or is_own or code.co_name == "run_program":
            return None
        line = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
        # A signal does not come between a block's end and the release of its lock. A trace does.
        if event == "line" and not line.startswith("with "):
            self._number -= 1
            if not self._number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


class FuzzCallback:
    """Hears of one request, and does something at one of its tokens.

    Attributes:
      number: tokens after which it acts.
      action: what it does. None: nothing.
      problems: what it should not have heard.
      num_ends: ends that it heard of.
    """

    def __init__(self, number: int, action):
        self.number, self.action = number, action
        self.problems: list[str] = []
        self.num_ends = 0
        self._num_tokens, self._text = 0, ""

    def __call__(self, caller: request.Request, token, text: str) -> None:
        self._num_tokens += token is not None
        self._text += text
        self.num_ends += caller.finish_reason is not None
        if self._num_tokens != len(caller.tokens) or self._text != caller.text:
            self.problems.append(f"request {caller.sequence_id}: heard {self._num_tokens} tokens")
        if self.action and self._num_tokens == self.number and caller.finish_reason is None:
            self.action(caller)
