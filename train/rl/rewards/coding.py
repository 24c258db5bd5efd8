"""Code: runs the program in an answer against the task's tests.

The task's metadata says how:
  * {"tests": [{"stdin": text, "stdout": text}, ...]}: the program reads and prints;
  * {"test_code": text}: Python that imports `solution` and asserts. It lies beside the program,
    which could read it: programs that want to cheat belong in a remote sandbox, with other tests.
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
    """Return the last block of Python after the thinking, or None."""
    blocks = _CODE_BLOCK_PATTERN.findall(answer.strip_thinking(text))
    return blocks[-1] if blocks else None


class CodeReward:
    """The share of the tests that pass, or all or nothing; 0 where there is no program.

    After a test that ran out of time the others are not run: they count as failed.
    """

    limit_secs = None  # each program has its own

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
          url: of a remote sandbox; otherwise here, by `runner`.
          python: the interpreter; by default the one that runs this, or "python3" of the sandbox.
          partial: the share; otherwise 1 only where all tests pass.
          parallel: samples at once; more than the machine has cores makes programs slow.
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
          runner.Unavailable, client.ServerError, TimeoutError: programs cannot be run.
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
            if test is None:
                result, good = await self._run_test_code(program, metadata["test_code"])
            else:
                result, good = await self._run_stdin_test(program, test["stdin"], test["stdout"])
            passed += good and result.exit_code == 0
            if result.reason in ("cpu", "wall") or not (passed or self._partial):
                break
        return passed / len(tests) if self._partial else float(passed == len(tests))

    async def _run_stdin_test(
        self, program: str, stdin: str, wanted: str
    ) -> tuple[runner.RunResult, bool]:
        result = await self._run_with_retry({"main.py": program}, "main.py", stdin)
        return result, _stripped_lines(result.stdout) == _stripped_lines(wanted)

    async def _run_test_code(self, program: str, tests: str) -> tuple[runner.RunResult, bool]:
        done = secrets.token_hex(16)  # so that a program that ends the process early has not passed
        files = {"solution.py": program, "test.py": f"{tests}\nprint({done!r})\n"}
        result = await self._run_with_retry(files, "test.py", "")
        return result, result.stdout.rstrip().endswith(done)

    async def _run_with_retry(
        self, files: dict[str, str], main: str, stdin: str
    ) -> runner.RunResult:
        """Run once, or twice if the clock on the wall ended it: the machine may have been busy."""
        call = functools.partial(self._run, files, [self._python, main], self._limits, stdin=stdin)
        result = await background.call_in_thread(call)
        return await background.call_in_thread(call) if result.reason == "wall" else result


def _stripped_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
