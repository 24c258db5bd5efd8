"""Posts JSON to a server over HTTP, with a deadline, a size limit and retries."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

MAX_ANSWER_BYTES = 2**24  # 16 MiB: a broken server must not fill the memory
# What another try may cure: time-outs, too many requests, and errors of the server.
_RETRY_STATUS_CODES = (408, 425, 429, 500, 502, 503, 504)


class ServerError(RuntimeError):
    """The server sent an error, or an answer of another form than wanted."""


def post_json(
    url: str,
    payload: Any,
    *,
    secs: float,
    retries: int = 2,
    backoff_secs: float = 0.5,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Post `payload` as JSON, and return the server's JSON answer.

    Args:
      secs: time limit of the whole call, retries and pauses included.
      retries: how often to try again after a busy or broken server.
      backoff_secs: the first pause between two tries. Every further pause is twice as long.
      headers: sent beside the content type, such as an authorization.

    Raises:
      TimeoutError: the time limit passed.
      ServerError: the answer is not JSON or is too long, or the last try ended in an error of HTTP
        or of the connection.
    """
    # One deadline for all tries: the caller's limit is one of wall-clock time.
    deadline = time.monotonic() + secs
    request = urllib.request.Request(
        url,
        json.dumps(payload).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )
    for tries in range(retries + 1):
        try:
            return _post_once(request, deadline)
        except urllib.error.HTTPError as error:
            # The error is the response, too: read its text, then close the connection.
            with error:
                why = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
            if error.code not in _RETRY_STATUS_CODES:
                raise ServerError(f"{url}: got {why}; wanted 200") from None
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            # urllib wraps a time-out of the connection in a URLError.
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise TimeoutError(f"{url}: no answer in {secs} s") from None
            why = str(error) or type(error).__name__
        pause = backoff_secs * 2**tries
        if tries < retries:
            if time.monotonic() + pause > deadline:
                raise TimeoutError(f"{url}: got {why}, and no time for another try") from None
            time.sleep(pause)
    raise ServerError(f"{url}: got {why} {retries + 1} times; wanted an answer")


def _post_once(request: urllib.request.Request, deadline: float) -> Any:
    with urllib.request.urlopen(request, timeout=_remaining_secs(request, deadline)) as response:
        data = b""
        # Read in blocks: a socket's time limit starts again with every byte, so a server that
        # sends slowly would never time out.
        while block := response.read1(2**16):
            data += block
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
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError(f"{request.full_url}: no whole answer in time")
    return remaining
