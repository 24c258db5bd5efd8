"""Command: check on the device at hand what nobody has checked there, in at most ten minutes.

    python -m infer.selfcheck [--report=m1-selfcheck.json] [--seconds=600] [--only=WORDS]

On one TPU or GPU it compares every kernel with its definition in float64 (forward and backward,
packed documents too), a checkpoint with the release's own numbers, and the engine with itself. Then
it times the kernels and one layer of full width, beside what m1-plan predicts. On a CPU it does the
same in small, with kernels in Pallas interpret mode.

What it found goes to one JSON file, which is made to be sent to the authors: versions, device, and
for each check the error, the tolerance and the times. Which implementations are right and fastest
goes to a file that models and commands read (`m1_jax/measured_choices.py`); --lightning and configs
go before it. The last line says what works and what does not. The exit status is 1 if any check
failed, or was interrupted.
"""

import dataclasses
import os
import signal
import sys
import time
from typing import Any

import jax
from absl import flags, logging

from infer.selfcheck import (
    check,
    choices,
    expert_checks,
    lightning_checks,
    model_checks,
    report,
    runner,
    serving_checks,
    softmax_checks,
    timing,
)
from m1_jax import command_help, local_path, measured_choices


@dataclasses.dataclass(frozen=True)
class SelfCheckConfig:
    """What a run checks, and where it writes.

    Attributes:
      report: file of the report.
      seconds: time of the whole run, more than 0.
      only: checks whose name contains this are made. Empty: all.
      choices: whether the measured defaults are kept for models and commands.

    Raises:
      ValueError: a value that is out of range.
    """

    report: str = "m1-selfcheck.json"
    seconds: float = 600.0
    only: str = ""
    choices: bool = True

    def __post_init__(self):
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds: got {self.seconds}; wanted more than 0")


def list_checks(setting: check.DeviceSetting) -> list[check.DeviceCheck]:
    """Return all checks, the heaviest last."""
    return [*list_kernel_checks(), *model_checks.list_checks(), *timing.list_checks(setting)]


def list_kernel_checks() -> list[check.DeviceCheck]:
    """Return the checks of single kernels, and of what runs where there is none."""
    return [
        *lightning_checks.list_checks(),
        *serving_checks.list_checks(),
        *softmax_checks.list_checks(),
        *expert_checks.list_checks(),
    ]


def run(config: SelfCheckConfig) -> int:
    """Run the checks and print what they find. Return the exit status.

    Raises:
      ValueError: a report that cannot be written, or words that are in no check's name.
    """
    setting = check.DeviceSetting.of_device(jax.local_devices()[0])
    checks = [one_check for one_check in list_checks(setting) if config.only in one_check.name]
    if not checks:
        names = ", ".join(one_check.name for one_check in list_checks(setting))
        raise ValueError(f"--only: got {config.only!r}; wanted words of a name: {names}")
    path = local_path.resolve_path(config.report, "--report")
    results_report = report.SelfCheckReport(path, setting)
    start = time.monotonic()

    def announce(number: int, device_check: check.DeviceCheck) -> None:
        elapsed = time.monotonic() - start
        print(f"check {number} of {len(checks)}, {elapsed:.0f} s: {device_check.name}", flush=True)

    def keep_result(result: check.CheckResult) -> None:
        print(f"    {_describe_result(result)}", flush=True)
        results_report.write(checks_run.results, is_complete=False)

    def finish() -> int:
        defaults = choices.choose_defaults(checks_run.results, setting.platform)
        if config.choices and defaults:
            _keep_defaults(defaults, setting)
        summary = report.format_summary(checks_run.results, defaults, setting)
        results_report.write(
            checks_run.results,
            is_complete=not checks_run.was_interrupted,
            choices=defaults,
            summary=summary,
        )
        print(f"report: {config.report}")
        print(summary, flush=True)
        failed = any(result.status == check.FAILED for result in checks_run.results)
        return int(failed or checks_run.was_interrupted)

    def end_process() -> None:
        status = finish()
        os._exit(status)

    checks_run = runner.CheckRun(checks, setting, config.seconds, keep_result, announce)
    checks_run.run(end_process)
    return finish()


def _describe_result(result: check.CheckResult) -> str:
    """Return what a check found, in one line: its worst error, or its time."""
    line = f"{result.status} in {result.secs:.1f} s"
    if result.reason:
        return f"{line}: {result.reason}"
    details = result.findings.details
    if "measured" in details:
        line += f": {details['measured']['median_secs'] * 1e3:.3g} ms"
        if details["predicted_secs"]:
            low, high = (details["predicted_secs"][model] * 1e3 for model in ("low", "high"))
            line += f", predicted {low:.3g} - {high:.3g} ms"
    elif result.findings.errors:
        worst = max(
            result.findings.errors, key=lambda error: error.error / max(error.tolerance, 1e-300)
        )
        line += f": worst is {worst.quantity}, error {worst.error:.1e} of {worst.tolerance:.1e}"
    return line


def _keep_defaults(
    defaults: dict[str, measured_choices.MeasuredChoice], setting: check.DeviceSetting
) -> None:
    try:
        path = choices.save_choices(defaults, setting.kind)
    except OSError as error:
        print(f"defaults were not kept: {error}", file=sys.stderr)
        return
    print(f"defaults of {setting.kind} are kept in {path}:")
    for use, choice in defaults.items():
        print(f"    {use}: {choice.implementation} ({choice.reason})")


def main(argv: Any) -> None:
    del argv  # refused already
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # JAX and XLA log much; the user may ask for it
    # As Ctrl-C: the report so far is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    values = {
        field.name: getattr(flags.FLAGS, field.name)
        for field in dataclasses.fields(SelfCheckConfig)
    }
    try:
        status = run(SelfCheckConfig(**values))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


def _define_flags() -> None:
    with command_help.flag_group("What to check"):
        flags.DEFINE_string("only", "", "Make the checks whose name contains this. Default: all.")
        flags.DEFINE_float("seconds", 600.0, "Time of the whole run, in seconds.")
    with command_help.flag_group("What to write"):
        flags.DEFINE_string("report", "m1-selfcheck.json", "File to write the report to.")
        flags.DEFINE_bool("choices", True, "Keep the measured defaults for models and commands.")


def cli() -> None:
    _define_flags()
    command_help.run_command(__doc__, main)
