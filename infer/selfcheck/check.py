"""What a check is: a name, a function that compares or measures, and what came of it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class CheckSkipped(Exception):
    """A check that cannot be made on this device. The message says why."""


@dataclasses.dataclass(frozen=True)
class DeviceSetting:
    """What the checks run on.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      kind: JAX's `device_kind`.
      is_small: whether checks are made in small, and kernels in Pallas interpret mode, as on CPU.
      deadline: `time.monotonic()` at which the check's part is to end.
    """

    platform: str
    kind: str
    is_small: bool
    deadline: float = math.inf

    @classmethod
    def of_device(cls, device: Any) -> "DeviceSetting":
        return cls(device.platform, device.device_kind, device.platform == "cpu")

    def interpret_kernel(self, platform: str) -> bool:
        """Return whether a kernel for `platform` runs in interpret mode here.

        Raises:
          CheckSkipped: it runs here in no way.
        """
        if self.platform == platform:
            return False
        if self.platform == "cpu":
            return True
        raise CheckSkipped(f"the kernel is for {platform.upper()}, and this is {self.kind}")


@dataclasses.dataclass(frozen=True)
class MeasuredError:
    """How far one quantity is from the oracle.

    Attributes:
      quantity: such as "d_qkv, packed".
      error: in the unit of its check. NaN fails.
      tolerance: the largest error that passes.
    """

    quantity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)


@dataclasses.dataclass(frozen=True)
class CheckFindings:
    """What a check found.

    Attributes:
      errors: compared quantities. One that does not pass fails the check.
      problems: what else is wrong, a line each. Any fails the check.
      details: figures for the report, as JSON holds them, such as times.
    """

    errors: Sequence[MeasuredError] = ()
    problems: Sequence[str] = ()
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DeviceCheck:
    """One check.

    Attributes:
      name: unique, as the report and the last line say it.
      part: a key of `runner.PART_SHARES`.
      run: makes the check. Any exception fails it.
    """

    name: str
    part: str
    run: Callable[[DeviceSetting], CheckFindings]


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
      status: `PASSED`, `FAILED` or `SKIPPED`.
      reason: why it failed or was skipped, in one line.
      findings: what was found before it ended.
      secs: time by the clock, compilation included.
    """

    name: str
    part: str
    status: str
    reason: str
    findings: CheckFindings
    secs: float

    def to_json(self) -> dict[str, Any]:
        """Return what the report holds. NaN and infinity, which JSON has not, are text."""
        errors = [
            {
                "quantity": error.quantity,
                "error": _as_json_number(error.error),
                "tolerance": error.tolerance,
                "passed": error.passed,
            }
            for error in self.findings.errors
        ]
        return {
            "name": self.name,
            "part": self.part,
            "status": self.status,
            "reason": self.reason,
            "secs": round(self.secs, 2),
            "errors": errors,
            "problems": list(self.findings.problems),
            **self.findings.details,
        }


def _as_json_number(value: float) -> float | str:
    return value if abs(value) < math.inf else str(value)


def describe_failure(findings: CheckFindings) -> str:
    """Return what fails a check, in one line. Empty: nothing does."""
    wrong = [
        f"{error.quantity}: error {error.error:.1e}, wanted at most {error.tolerance:.1e}"
        for error in findings.errors
        if not error.passed
    ]
    return "; ".join([*wrong, *findings.problems])


def compute_in_float32(dtype: jax.typing.DTypeLike):
    """Return a context in which products of float32 are float32: on TPU they are not by default."""
    is_float32 = jax.numpy.dtype(dtype) == jax.numpy.float32
    return jax.default_matmul_precision("highest" if is_float32 else "default")
