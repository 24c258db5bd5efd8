"""Awaits blocking calls, each in a daemon thread of its own.

An executor does not serve here. Its number of threads is fixed, so calls that hang would block all
later calls, and the interpreter waits for its threads at exit.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


async def call_in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, called in a new thread.

    A caller that is cancelled leaves the thread behind: threads cannot be stopped from outside.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()
    # From here on the future cannot be cancelled, so `set_result` below never raises.
    future.set_running_or_notify_cancel()

    def set_outcome() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=set_outcome, daemon=True).start()
    return await asyncio.wrap_future(future)
