"""The report of a run: one JSON file, made to be sent to us, and one line that says what works.

It names versions, the device and what each check found. It holds no path, user or host name.
"""

import datetime
import json
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from infer.selfcheck import check
from m1_jax import durable, measured_choices, memory_check

FORMAT_VERSION = 1
_PACKAGES = ("m1-jax", "jax", "jaxlib", "libtpu", "flax", "numpy", "jax-cuda13-plugin")


class ReportError(ValueError):
    """A report that cannot be written. The message says where, and what to do."""


class SelfCheckReport:
    """The report of one run, which is written anew after each check."""

    def __init__(self, path: pathlib.Path, setting: check.DeviceSetting):
        """Begin a report, and write it once.

        Raises:
          ReportError: the file cannot be written.
        """
        self._path, self._setting = path, setting
        self._head = {
            "format": FORMAT_VERSION,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {
                **{name: measured_choices.package_version(name) for name in _PACKAGES},
                "python": platform.python_version(),
                "kernels": measured_choices.versions_of_kernels()["kernels"],
            },
            "device": _describe_device(setting),
        }
        try:
            self.write([], is_complete=False)
        except OSError as error:
            raise ReportError(
                f"--report: got {path}, which cannot be written ({error.strerror}); wanted a file "
                "in a directory that is there and yours"
            ) from None

    def write(
        self,
        results: Sequence[check.CheckResult],
        *,
        is_complete: bool,
        choices: Mapping[str, measured_choices.MeasuredChoice] | None = None,
        summary: str = "",
    ) -> None:
        """Replace the file by what is known now."""
        counts = {
            status: sum(result.status == status for result in results)
            for status in (check.PASSED, check.FAILED, check.SKIPPED)
        }
        content = {
            **self._head,
            "is_complete": is_complete,
            "summary": summary,
            "counts": counts,
            "choices": {
                use: {"implementation": choice.implementation, "reason": choice.reason}
                for use, choice in (choices or {}).items()
            },
            "checks": [result.to_json() for result in results],
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        durable.write_text_atomically(self._path, text)


def _describe_device(setting: check.DeviceSetting) -> dict[str, Any]:
    device = jax.local_devices()[0]
    return {
        "platform": setting.platform,
        "kind": setting.kind,
        "local_devices": jax.local_device_count(),
        "memory_bytes": memory_check.device_limit_bytes(device),
        # Of TPUs it names libtpu's build, and of GPUs the CUDA version.
        "platform_version": " ".join(device.client.platform_version.split())[:300],
        "checked_in_small": setting.is_small,
    }


def format_summary(
    results: Sequence[check.CheckResult],
    choices: Mapping[str, measured_choices.MeasuredChoice],
    setting: check.DeviceSetting,
) -> str:
    """Return the line that says what works on the device, what does not, and what is not known.

    Checks are named without what stands behind the first comma, such as the dtype. A name stands
    where its worst result belongs.
    """
    by_status: dict[str, dict[str, str]] = {
        status: {} for status in (check.FAILED, check.SKIPPED, check.PASSED)
    }
    for result in results:
        name = result.name.partition(",")[0] if result.status != check.FAILED else result.name
        by_status[result.status].setdefault(name, result.reason)
    failed = [f"{name} ({_first_clause(reason)})" for name, reason in
              by_status[check.FAILED].items()]  # fmt: skip
    failed_names = {name.partition(",")[0] for name in by_status[check.FAILED]}
    skipped = [name for name in by_status[check.SKIPPED] if name not in failed_names]
    works = [
        name
        for name in by_status[check.PASSED]
        if name not in failed_names and name not in by_status[check.SKIPPED]
    ]
    defaults = [f"{use}={choice.implementation}" for use, choice in choices.items()]
    in_small = " (in small, kernels interpreted)" if setting.is_small else ""
    sentences = [
        f"m1-selfcheck on {setting.kind}{in_small}: works: {'; '.join(works) or 'nothing'}",
        f"DOES NOT WORK: {'; '.join(failed)}" if failed else "nothing fails",
        f"not checked: {'; '.join(skipped)}" if skipped else "",
        f"defaults: {', '.join(defaults)}" if defaults else "",
    ]
    return ". ".join(sentence for sentence in sentences if sentence) + "."


def _first_clause(reason: str) -> str:
    """Return the first of the quantities that failed."""
    return re.split(r";\s", reason, maxsplit=1)[0][:200]
