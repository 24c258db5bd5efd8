"""Code: runs the program of an answer against the task's tests, whose shapes `code_tests` reads.

The verdict is never computed where the program runs. Of tests that read and print, the output is
compared here. Calls and assertions run in `judge`, a process of its own, which asks the program's
process for values. The program sees neither the tests nor the right values, in a remote sandbox
neither.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import answer, background, code_tests, fences, remote, runner
from train.rl.rewards.judge import comparison

RunProgram = Callable[..., runner.RunResult]
_JUDGE_PACKAGE = "train/rl/rewards/judge"
_JUDGE_COMMAND = (
    "-I",  # imports nothing from the folder but the judge itself
    "-c",
    "import sys; sys.path.insert(0, '.'); from train.rl.rewards.judge import main; main.main()",
)


@functools.cache
def _read_judge_files() -> dict[str, str]:
    """Return the judge's modules by their path, in packages that hold nothing else."""
    parents = pathlib.PurePosixPath(_JUDGE_PACKAGE).parents
    files = {f"{parent}/__init__.py": "" for parent in parents if parent.name}
    folder = pathlib.Path(__file__).with_name("judge")
    return files | {
        f"{_JUDGE_PACKAGE}/{file.name}": file.read_text() for file in folder.glob("*.py")
    }


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
        tolerance: float = 1e-6,
        **limits: Any,
    ):
        """Choose where programs run.

        Args:
          url: URL of a remote sandbox. Without one, programs run on this machine, by `runner`.
          python: the interpreter, 3.10 or newer. Default: the running interpreter, or the sandbox's
            "python3".
          partial: give the share of passed tests. Otherwise 1 if all tests pass, else 0.
          parallel: samples scored at once. More than the number of cores makes programs slower,
            and right programs may then fail by their wall-clock limit.
          allow_network: see `runner.run_program`.
          tolerance: by how much floats of an output may differ, relative or, below 1, absolute.
            Whole numbers are always exact, and assertions have tolerances of their own.
          limits: fields of `runner.RunnerLimits`.

        Raises:
          ValueError: a negative tolerance, or a limit that is not above 0.
        """
        if not tolerance >= 0:
            raise ValueError(f"tolerance: got {tolerance}; wanted at least 0")
        self.parallel = parallel
        self._limits, self._partial = runner.RunnerLimits(**limits), partial
        self._tolerance = tolerance
        self._python = python or ("python3" if url else sys.executable)
        self._run: RunProgram = (
            remote.RemoteSandbox(url).run
            if url
            else functools.partial(runner.run_program, allow_network=allow_network)
        )

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task has no tests, or tests that fail by themselves.
          runner.RunnerUnavailable, client.ServerError, TimeoutError: programs cannot be run.
        """
        try:
            return await self._score_program(sample)
        except ValueError as error:
            raise ValueError(f"task {sample.task.id!r}: {error}") from None

    async def _score_program(self, sample: sample_lib.Sample) -> float:
        tests = code_tests.read_tests(sample.task)
        program = fences.extract_program(answer.final_text(sample))
        if program is None:
            return 0.0
        passed = 0
        for test in tests:
            result, is_right = await self._run_test(program, test)
            passed += is_right and result.exit_code == 0
            # A program that was too slow once would take its full limit on every test. Without
            # partial credit, a failed first test decides.
            if result.reason in ("cpu", "wall") or not (passed or self._partial):
                break
        return passed / len(tests) if self._partial else float(passed == len(tests))

    async def _run_test(
        self, program: str, test: code_tests.CodeTest
    ) -> tuple[runner.RunResult, bool]:
        if isinstance(test, code_tests.StdinTest):
            result = await self._run_with_retry(
                {"main.py": program}, ["main.py"], self._limits, test.stdin
            )
            return result, comparison.is_same_output(result.stdout, test.stdout, self._tolerance)
        request: dict[str, Any] = {"program": program}
        if isinstance(test, code_tests.CallTest):
            request["call"] = {
                "function": test.function,
                "arguments": test.arguments,
                "outputs": test.outputs,
                "tolerance": self._tolerance,
            }
        else:
            request |= {"test_code": test.source, "entry_point": test.entry_point}
        # The judge is a process, too.
        limits = dataclasses.replace(self._limits, processes=self._limits.processes + 1)
        result = await self._run_with_retry(
            _read_judge_files(), _JUDGE_COMMAND, limits, json.dumps(request)
        )
        return result, _read_verdict(result)

    async def _run_with_retry(
        self,
        files: dict[str, str],
        arguments: Sequence[str],
        limits: runner.RunnerLimits,
        stdin: str,
    ) -> runner.RunResult:
        """Run once, and again after a wall-clock time-out: the machine may have been busy."""
        command = [self._python, *arguments]
        call = functools.partial(self._run, files, command, limits, stdin=stdin)
        result = await background.call_in_thread(call)
        return await background.call_in_thread(call) if result.reason == "wall" else result


def _read_verdict(result: runner.RunResult) -> bool:
    """Return whether the judge's output says that the program passed.

    Raises:
      ValueError: the tests failed by themselves, or the judge did not begin.
    """
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    verdict = next((line for line in lines if "started" not in line), None)
    if verdict is not None and "error" in verdict:
        raise ValueError(verdict["error"])
    if verdict is not None:
        return verdict["passed"]
    # Without a verdict, the program killed the judge or used up what both may use.
    if not lines and result.reason == "exit":
        raise ValueError(f"got no verdict; wanted one. The judge said {result.stderr[-500:]!r}")
    return False
