"""Code: runs the program of an answer against the task's tests.

The task's metadata has one of two forms:

  * {"tests": [{"stdin": text, "stdout": text}, ...]}: the program reads its input and prints.
  * {"test_code": text}: Python that imports `solution` and asserts. This file lies beside the
    program, which could read it. Run programs that may cheat in a remote sandbox, on tests of the
    first form.
"""

import functools
import re
import secrets
import sys
from collections.abc import Callable
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import answer, background, remote, runner

_CODE_BLOCK_PATTERN = re.compile(
    r"^```(?:python|py)?[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE
)
RunProgram = Callable[..., runner.RunResult]


def extract_program(text: str) -> str | None:
    """Return the last block of Python code after the thinking, or None."""
    blocks = _CODE_BLOCK_PATTERN.findall(answer.strip_thinking(text))
    return blocks[-1] if blocks else None


class CodeReward:
    """The share of the tests that pass, or all or nothing. An answer without a program scores 0.

    After a test that ran out of time, the remaining tests are not run and count as failed.
    """

    limit_secs = None  # every program has its own limits

    def __init__(
        self,
        url: str = "",
        python: str = "",
        partial: bool = True,
        parallel: int = 2,
        allow_network: bool = False,
        **limits: Any,
    ):
        """Choose where programs run.

        Args:
          url: URL of a remote sandbox. Without one, programs run on this machine, by `runner`.
          python: the interpreter. Default: the running interpreter, or the sandbox's "python3".
          partial: give the share of passed tests. Otherwise 1 if all tests pass, else 0.
          parallel: samples scored at once. More than the number of cores makes programs slower,
            and right programs may then fail by their wall-clock limit.
          allow_network: see `runner.run_program`.
          limits: fields of `runner.RunnerLimits`.
        """
        self.parallel = parallel
        self._limits, self._partial = runner.RunnerLimits(**limits), partial
        self._python = python or ("python3" if url else sys.executable)
        self._run: RunProgram = (
            remote.RemoteSandbox(url).run
            if url
            else functools.partial(runner.run_program, allow_network=allow_network)
        )

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task has no tests.
          runner.RunnerUnavailable, client.ServerError, TimeoutError: programs cannot be run.
        """
        metadata = sample.task.metadata
        tests = metadata.get("tests") or ([None] if metadata.get("test_code") else None)
        if not tests:
            raise ValueError(
                f"task {sample.task.id!r}: got no tests; wanted tests or test_code in the metadata"
            )
        program = extract_program(sample.text)
        if program is None:
            return 0.0
        passed = 0
        for test in tests:
            if test is None:  # test_code is one test
                result, is_right = await self._run_test_code(program, metadata["test_code"])
            else:
                result, is_right = await self._run_stdin_test(
                    program, test["stdin"], test["stdout"]
                )
            passed += is_right and result.exit_code == 0
            # A program that was too slow once would take its full limit on every test. Without
            # partial credit, a failed first test decides.
            if result.reason in ("cpu", "wall") or not (passed or self._partial):
                break
        return passed / len(tests) if self._partial else float(passed == len(tests))

    async def _run_stdin_test(
        self, program: str, stdin: str, expected_stdout: str
    ) -> tuple[runner.RunResult, bool]:
        result = await self._run_with_retry({"main.py": program}, "main.py", stdin)
        return result, _stripped_lines(result.stdout) == _stripped_lines(expected_stdout)

    async def _run_test_code(self, program: str, tests: str) -> tuple[runner.RunResult, bool]:
        # A program that calls exit(0) on import would look like one that passed. Only a process
        # that reached the last line prints this token, which the program cannot guess.
        end_token = secrets.token_hex(16)
        files = {"solution.py": program, "test.py": f"{tests}\nprint({end_token!r})\n"}
        result = await self._run_with_retry(files, "test.py", "")
        return result, result.stdout.rstrip().endswith(end_token)

    async def _run_with_retry(
        self, files: dict[str, str], main: str, stdin: str
    ) -> runner.RunResult:
        """Run once, and again after a wall-clock time-out: the machine may have been busy."""
        call = functools.partial(self._run, files, [self._python, main], self._limits, stdin=stdin)
        result = await background.call_in_thread(call)
        return await background.call_in_thread(call) if result.reason == "wall" else result


def _stripped_lines(text: str) -> list[str]:
    """Return the lines without trailing white space, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
