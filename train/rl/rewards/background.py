"""Awaits blocking calls, each in a daemon thread of its own.

An executor has a fixed number of threads, so calls that hang would stop all others, and it is
waited for when the program ends.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


async def call_in_thread(function: Callable, *arguments: Any) -> Any:
    """Return `function(*arguments)`, called in a thread; who gives up waiting leaves it behind."""
    future: concurrent.futures.Future = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
