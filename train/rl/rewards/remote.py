"""Runs programs in a sandbox on another machine, by the signature of `runner.run_program`.

    POST <url>   {"files": {path: text}, "command": [...], "stdin": text,
                  "limits": {"cpu_secs", "wall_secs", "memory_bytes", "output_bytes", "processes",
                             "file_bytes"}}
    200          {"stdout": text, "stderr": text, "exit_code": int or null, "reason": text}

with the reasons of `runner.RunResult`. What isolates the program is the server's matter.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from train.rl.rewards import client, runner

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
        """spare_secs: that the server may take beyond a program's wall_secs. Others: `client`."""
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
          TimeoutError, client.ServerError: no result, or none that is one.
        """
        payload = {
            "files": dict(files),
            "command": list(command),
            "stdin": stdin,
            "limits": dataclasses.asdict(limits),
        }
        secs = limits.wall_secs + self._spare_secs
        answer = client.post_json(self._url, payload, secs=secs, **self._options)
        good = (
            isinstance(answer, dict)
            and isinstance(answer.get("stdout"), str)
            and isinstance(answer.get("stderr"), str)
            and isinstance(answer.get("exit_code", ""), int | None)
            and answer.get("reason") in END_REASONS
        )
        if not good:
            raise client.ServerError(
                f"{self._url}: got {answer!r:.200}; wanted stdout, stderr, exit_code and a reason "
                f"of {', '.join(END_REASONS)}"
            )
        return runner.RunResult(
            answer["stdout"], answer["stderr"], answer["exit_code"], answer["reason"]
        )
