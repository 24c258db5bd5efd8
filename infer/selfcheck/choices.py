"""Which implementation is the default on this kind of device, given what the checks found.

A kernel is the default where all of its checks passed and it was measured to be faster than XLA's
form. One that is wrong, or slower, is not. Where nothing was measured, nothing is chosen, and the
default stays what it was.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from infer.selfcheck import check
from m1_jax import durable, measured_choices


@dataclasses.dataclass(frozen=True)
class FormPair:
    """The two forms of one use.

    Attributes:
      kernel, fallback: values of `measured_choices.USES` of the use.
      kernel_check, fallback_check: what the names of the checks of each begin with.
      timed_use: what `use` of the timed programs begins with. Of several the last one decides.
    """

    kernel: str
    fallback: str
    kernel_check: str
    fallback_check: str
    timed_use: str


def list_pairs(platform: str) -> dict[str, FormPair]:
    """Return the forms by use, of the kernels that a platform has."""
    title = "lightning attention ({} kernels)".format
    lightning = FormPair(
        platform, "chunked", title(platform.upper()), "lightning attention (XLA)",
        "lightning attention",
    )  # fmt: skip
    if platform == "gpu":
        return {"lightning": lightning}
    if platform != "tpu":
        return {}
    serving = {
        f"serving_{kind}": FormPair(
            "tpu", "xla", f"serving {kind} attention (TPU kernel)",
            f"serving {kind} attention (XLA)", f"serving {kind} attention",
        )
        for kind in ("lightning", "softmax")
    }  # fmt: skip
    softmax = FormPair(
        "splash", "xla", "splash attention", "softmax attention (XLA)", "softmax attention"
    )
    return {"lightning": lightning, "softmax": softmax, **serving}


def choose_defaults(
    results: Sequence[check.CheckResult], platform: str
) -> dict[str, measured_choices.MeasuredChoice]:
    """Return the defaults by use, each with its reason. A use without findings has none."""
    choices = {}
    for use, pair in list_pairs(platform).items():
        choice = _choose_form(results, pair)
        if choice is not None:
            choices[use] = choice
    return choices


def _choose_form(
    results: Sequence[check.CheckResult], pair: FormPair
) -> measured_choices.MeasuredChoice | None:
    kernel_results = _find_results(results, pair.kernel_check)
    fallback_results = _find_results(results, pair.fallback_check)
    # A kernel that does not compile or fit at full size is no default either.
    timed = _find_results(results, f"time of {pair.timed_use}")
    timed_kernels = [result for result in timed if result.name.endswith(f", {pair.kernel}")]
    wrong = [result for result in kernel_results + timed_kernels if result.status == check.FAILED]
    if wrong:
        return measured_choices.MeasuredChoice(pair.fallback, f"{wrong[0].name}: {wrong[0].reason}")
    all_passed = all(result.status == check.PASSED for result in kernel_results)
    if not kernel_results or not all_passed:
        return None
    secs = _find_times(results, pair)
    if not secs:
        return None
    kernel_ms, fallback_ms = secs[pair.kernel] * 1e3, secs[pair.fallback] * 1e3
    is_faster = kernel_ms < fallback_ms
    fallback_is_wrong = any(result.status == check.FAILED for result in fallback_results)
    reason = f"right, {kernel_ms:.3g} ms against {fallback_ms:.3g} ms of {pair.fallback}"
    if is_faster or fallback_is_wrong:
        return measured_choices.MeasuredChoice(pair.kernel, reason)
    return measured_choices.MeasuredChoice(
        pair.fallback, f"{pair.kernel} is right and slower: {kernel_ms:.3g} ms against "
        f"{fallback_ms:.3g} ms"
    )  # fmt: skip


def _find_results(results: Sequence[check.CheckResult], start: str) -> list[check.CheckResult]:
    return [result for result in results if result.name.startswith(start)]


def _find_times(results: Sequence[check.CheckResult], pair: FormPair) -> dict[str, float]:
    """Return the median seconds of each form, of the last program that has both."""
    by_use: dict[str, dict[str, float]] = {}
    for result in results:
        details = result.findings.details
        if result.status == check.PASSED and details.get("use", "").startswith(pair.timed_use):
            secs = details["measured"]["median_secs"]
            by_use.setdefault(details["use"], {})[details["form"]] = secs
    complete = [secs for secs in by_use.values() if pair.kernel in secs and pair.fallback in secs]
    return complete[-1] if complete else {}


def save_choices(
    choices: dict[str, measured_choices.MeasuredChoice], device_kind: str
) -> pathlib.Path:
    """Write the choices for a kind of device with this process's versions. Return the file.

    Entries of other devices and versions stay. A file that cannot be read is replaced.

    Raises:
      OSError: the directory cannot be written.
    """
    path = measured_choices.choices_path()
    try:
        entries = measured_choices.read_entries(path)
    except measured_choices.ChoiceFileError:
        entries = {}
    entries[measured_choices.entry_key(device_kind)] = choices
    path.parent.mkdir(parents=True, exist_ok=True)
    content = measured_choices.format_entries(entries)
    durable.write_text_atomically(path, json.dumps(content, indent=1) + "\n")
    measured_choices.forget_choices()
    return path
