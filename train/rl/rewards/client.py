"""Posts JSON to a server over HTTP, with a deadline, a size limit and retries."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

MAX_ANSWER_BYTES = 2**24
_RETRY_STATUS_CODES = (408, 425, 429, 500, 502, 503, 504)


class ServerError(RuntimeError):
    """The server did not answer as wanted."""


def post_json(
    url: str,
    payload: Any,
    *,
    secs: float,
    retries: int = 2,
    backoff_secs: float = 0.5,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Post `payload` and return the answer, both JSON.

    Args:
      secs: for all, retries included.
      retries: after a busy or broken server; with pauses of backoff_secs * 1, 2, 4, ...

    Raises:
      TimeoutError: the time is over.
      ServerError: another answer than JSON, too long a one, or an error of HTTP or of the
        connection after the last try.
    """
    until = time.monotonic() + secs
    request = urllib.request.Request(
        url,
        json.dumps(payload).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )
    for tries in range(retries + 1):
        try:
            return _post_once(request, until)
        except urllib.error.HTTPError as error:
            with error:
                why = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
            if error.code not in _RETRY_STATUS_CODES:
                raise ServerError(f"{url}: got {why}; wanted 200") from None
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise TimeoutError(f"{url}: no answer in {secs} s") from None
            why = str(error) or type(error).__name__
        pause = backoff_secs * 2**tries
        if tries < retries:
            if time.monotonic() + pause > until:
                raise TimeoutError(f"{url}: got {why}, and no time for another try") from None
            time.sleep(pause)
    raise ServerError(f"{url}: got {why} {retries + 1} times; wanted an answer")


def _post_once(request: urllib.request.Request, deadline: float) -> Any:
    with urllib.request.urlopen(request, timeout=_remaining_secs(request, deadline)) as response:
        data = b""
        # Piece by piece: the time limit of a socket starts again with every byte.
        while piece := response.read1(2**16):
            data += piece
            _remaining_secs(request, deadline)
            if len(data) > MAX_ANSWER_BYTES:
                raise ServerError(
                    f"{request.full_url}: got over {MAX_ANSWER_BYTES} bytes; wanted less"
                )
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ServerError(f"{request.full_url}: got {data[:80]!r}; wanted JSON") from None


def _remaining_secs(request: urllib.request.Request, deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{request.full_url}: no whole answer in time")
    return left
