"""Runs programs in a sandbox on another machine, through the signature of `runner.run_program`.

The protocol is one request a program:

    POST <url>   {"files": {path: text}, "command": [...], "stdin": text,
                  "limits": {"cpu_secs", "wall_secs", "memory_bytes", "output_bytes", "processes",
                             "file_bytes"}}
    200          {"stdout": text, "stderr": text, "exit_code": int or null, "reason": text}

The reasons are those of `runner.RunResult`. The server is responsible for isolation.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from train.rl.rewards import client, runner

# The reasons of `runner.RunResult`. An answer with another reason is refused.
END_REASONS = ("exit", "cpu", "wall", "memory", "output", "processes")


class RemoteSandbox:
    """A client of one server."""

    def __init__(
        self,
        url: str,
        retries: int = 2,
        backoff_secs: float = 0.5,
        spare_secs: float = 10.0,
        headers: Mapping[str, str] | None = None,
    ):
        """Choose the server.

        Args:
          url: the server's URL.
          retries: see `client.post_json`.
          backoff_secs: see `client.post_json`.
          spare_secs: time that the server may take beyond a program's wall_secs.
          headers: see `client.post_json`.
        """
        self._url, self._spare_secs = url, spare_secs
        self._options = {"retries": retries, "backoff_secs": backoff_secs, "headers": headers}

    def run(
        self,
        files: Mapping[str, str],
        command: Sequence[str],
        limits: runner.RunnerLimits,
        *,
        stdin: str = "",
    ) -> runner.RunResult:
        """Run `command` in a fresh folder that holds `files`.

        Raises:
          TimeoutError: the server did not answer in time.
          client.ServerError: the server sent an error, or no result.
        """
        payload = {
            "files": dict(files),
            "command": list(command),
            "stdin": stdin,
            "limits": dataclasses.asdict(limits),
        }
        # The server enforces wall_secs itself. This limit is for a server that hangs.
        secs = limits.wall_secs + self._spare_secs
        answer = client.post_json(self._url, payload, secs=secs, **self._options)
        is_result = (
            isinstance(answer, dict)
            and isinstance(answer.get("stdout"), str)
            and isinstance(answer.get("stderr"), str)
            # The default is no int, so that a missing exit_code is refused and null is not.
            and isinstance(answer.get("exit_code", ""), int | None)
            and answer.get("reason") in END_REASONS
        )
        if not is_result:
            raise client.ServerError(
                f"{self._url}: got {answer!r:.200}; wanted stdout, stderr, exit_code and a reason "
                f"of {', '.join(END_REASONS)}"
            )
        return runner.RunResult(
            answer["stdout"], answer["stderr"], answer["exit_code"], answer["reason"]
        )
