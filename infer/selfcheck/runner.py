"""Runs the checks one after another, within a time, and keeps what was found whatever happens.

A check that raises is a named failure, and the others go on. A part of the checks ends at its share
of the time, so that a slow part leaves room for the next one. A check that does not come back is
ended with the process, by a timer that writes the report first.
"""

import dataclasses
import gc
import pathlib
import re
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import jax

from infer.selfcheck import check
from m1_jax import strict_json

# By part, in order: until when, as a share of all time, its checks may begin.
PART_SHARES = {"kernels": 0.4, "golden": 0.5, "engine": 0.7, "times": 0.95}
# A check that is cut off after so long has failed. One that had less time is not known.
HANG_SECS = 120.0
_MAX_REASON, _MAX_TRACEBACK = 300, 6000  # characters


class CheckRun:
    """One run over all checks.

    Attributes:
      results: of the checks that ended, in their order.
      was_interrupted: whether the user ended the run.
    """

    def __init__(
        self,
        checks: Sequence[check.DeviceCheck],
        setting: check.DeviceSetting,
        limit_secs: float,
        on_result: Callable[[check.CheckResult], None],
        on_start: Callable[[int, check.DeviceCheck], None],
    ):
        """Take what to run.

        Args:
          checks: in the order of `PART_SHARES`.
          limit_secs: time for all of them.
          on_result: called after each check, when `results` has it.
          on_start: called with the number of a check, from 1, before it begins.
        """
        self._checks, self._setting, self._limit_secs = checks, setting, limit_secs
        self._on_result, self._on_start = on_result, on_start
        self._started_secs = time.monotonic()
        self._running: tuple[check.DeviceCheck, float] | None = None
        self._lock = threading.Lock()
        self.results: list[check.CheckResult] = []
        self.was_interrupted = False

    def run(self, on_overrun: Callable[[], None]) -> None:
        """Run all checks.

        Args:
          on_overrun: called by another thread if the time is over and a check has not ended. It
            has a result by then. The function has to end the process.
        """
        timer = threading.Timer(self._limit_secs, self._end_running, (on_overrun,))
        timer.daemon = True
        timer.start()
        try:
            for number, device_check in enumerate(self._checks, 1):
                self._on_start(number, device_check)
                result = self._run_check(device_check)
                with self._lock:
                    self.results.append(result)
                    self._running = None
                    self._on_result(result)
        except KeyboardInterrupt:
            self.was_interrupted = True
        finally:
            timer.cancel()
            with self._lock:
                reason = "interrupted" if self.was_interrupted else "not begun"
                self._skip_remaining(reason)

    def _run_check(self, device_check: check.DeviceCheck) -> check.CheckResult:
        start = time.monotonic()
        deadline = self._started_secs + PART_SHARES[device_check.part] * self._limit_secs
        if start > deadline:
            share = f"{deadline - self._started_secs:.0f} s"
            return _make_result(
                device_check, check.SKIPPED, f"no time left: its part ends after {share}"
            )
        setting = dataclasses.replace(self._setting, deadline=deadline)
        self._running = (device_check, start)
        details = {}
        findings = check.CheckFindings()
        try:
            findings = device_check.run(setting)
            reason = check.describe_failure(findings)
            status = check.FAILED if reason else check.PASSED
        except check.CheckSkipped as skip:
            status, reason = check.SKIPPED, str(skip)
        except (
            Exception
        ) as error:  # a compiler's error, no memory, a fault of ours: all are findings
            status, reason = check.FAILED, describe_error(error)
            details = {"traceback": _shorten_traceback(traceback.format_exc())}
        _free_memory()
        findings = dataclasses.replace(findings, details=findings.details | details)
        return _make_result(device_check, status, reason, findings, time.monotonic() - start)

    def _end_running(self, on_overrun: Callable[[], None]) -> None:
        """Give the check that is running its result, and skip the rest."""
        with self._lock:
            if self._running is not None:
                device_check, start = self._running
                secs = time.monotonic() - start
                status = check.FAILED if secs >= HANG_SECS else check.SKIPPED
                reason = f"did not end within {secs:.0f} s, when the time of the run was over"
                self.results.append(_make_result(device_check, status, reason, secs=secs))
            self._skip_remaining("no time left")
            on_overrun()

    def _skip_remaining(self, reason: str) -> None:
        for device_check in self._checks[len(self.results) :]:
            self.results.append(_make_result(device_check, check.SKIPPED, reason))


def _free_memory() -> None:
    """Drop programs and arrays of a check: they must not take the memory of the next one."""
    jax.clear_caches()
    gc.collect()


def _make_result(
    device_check: check.DeviceCheck,
    status: str,
    reason: str,
    findings: check.CheckFindings = check.CheckFindings(),  # noqa: B008  # frozen
    secs: float = 0.0,
) -> check.CheckResult:
    return check.CheckResult(device_check.name, device_check.part, status, reason, findings, secs)


def describe_error(error: Exception) -> str:
    """Return an exception in one line."""
    text = strict_json.shorten_text(_hide_home(str(error)), _MAX_REASON)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _shorten_traceback(text: str) -> str:
    """Return a traceback's end. A report is made to be sent, so it names no home directory."""
    return _hide_home(text)[-_MAX_TRACEBACK:]


def _hide_home(text: str) -> str:
    return re.sub(re.escape(str(pathlib.Path.home())) + r"(?=/)", "~", text)
