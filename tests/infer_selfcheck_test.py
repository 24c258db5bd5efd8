"""m1-selfcheck's run, report, last line and defaults, with checks that do as they are told."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from infer.selfcheck import check, choices, command, predictions, programs, report, runner
from m1_jax import measured_choices

SETTING = check.DeviceSetting("tpu", "TPU v5 lite", is_small=False)
GOOD = check.CheckFindings([check.MeasuredError("o", 1e-6, 1e-5)])
BAD = check.CheckFindings(
    [check.MeasuredError("o", 1e-6, 1e-5), check.MeasuredError("d_q", float("nan"), 1e-5)],
    ["slot 2 was written"],
)


@pytest.fixture(autouse=True)
def nothing_to_free(monkeypatch):
    """It takes half a second, and these checks leave nothing."""
    monkeypatch.setattr(runner, "_free_memory", lambda: None)


def make_check(name, findings=GOOD, part="kernels", secs=0.0):
    def run(setting):
        time.sleep(secs)
        if isinstance(findings, BaseException):
            raise findings
        return findings

    return check.DeviceCheck(name, part, run)


def run_checks(checks, limit_secs=600.0, on_overrun=lambda: None):
    run = runner.CheckRun(checks, SETTING, limit_secs, lambda _: None, lambda *_: None)
    run.run(on_overrun)
    return run


def test_a_check_that_crashes_is_a_named_failure_and_the_others_go_on():
    home = os.path.expanduser("~")
    error = RuntimeError(f"RESOURCE_EXHAUSTED: {home}/x.py\nUsed 21M of 16M")
    checks = [
        make_check("a", error),
        make_check("b", check.CheckSkipped("for a GPU")),
        make_check("c", BAD),
        make_check("d"),
    ]
    results = run_checks(checks).results
    assert [result.status for result in results] == ["failed", "skipped", "failed", "passed"]
    assert results[0].reason == "RuntimeError: RESOURCE_EXHAUSTED: ~/x.py Used 21M of 16M"
    assert home not in json.dumps(results[0].to_json())
    assert "in run" in results[0].to_json()["traceback"]
    assert results[1].reason == "for a GPU"
    assert results[2].reason == "d_q: error nan, wanted at most 1.0e-05; slot 2 was written"


def test_a_part_whose_time_is_over_is_skipped_and_the_next_one_is_not():
    # Kernels may begin until 0.4 s, the engine until 0.7 s.
    checks = [
        make_check("slow", secs=0.5),
        make_check("late"),
        make_check("next", part="engine"),
    ]
    results = run_checks(checks, limit_secs=1.0).results
    assert [result.status for result in results] == ["passed", "skipped", "passed"]
    assert results[1].reason == "no time left: its part ends after 0 s"


def test_an_interrupted_run_keeps_its_results():
    run = run_checks([make_check("a"), make_check("b", KeyboardInterrupt()), make_check("c")])
    assert run.was_interrupted
    assert [result.status for result in run.results] == ["passed", "skipped", "skipped"]
    assert run.results[2].reason == "interrupted"


@pytest.mark.parametrize(("hang_secs", "status"), [(0.1, "failed"), (60, "skipped")])
def test_a_check_that_does_not_end_is_named(monkeypatch, hang_secs, status):
    """It has failed if it had long enough. Otherwise nobody knows."""
    monkeypatch.setattr(runner, "HANG_SECS", hang_secs)
    told = []
    run = runner.CheckRun(
        [make_check("a"), make_check("hangs", secs=1.6), make_check("c")],
        SETTING,
        1.0,
        lambda _: None,
        lambda *_: None,
    )
    # A real one ends the process.
    run.run(lambda: told.extend(run.results))
    assert [(result.name, result.status) for result in told] == [
        ("a", "passed"),
        ("hangs", status),
        ("c", "skipped"),
    ]
    assert told[1].reason.endswith("when the time of the run was over")


# ---- the report, and its last line


def test_the_report_is_json_whatever_was_found(tmp_path):
    path = tmp_path / "report.json"
    results_report = report.SelfCheckReport(path, SETTING)
    assert json.loads(path.read_text())["is_complete"] is False
    results = run_checks([make_check("a", BAD), make_check("b")]).results
    results_report.write(results, is_complete=True, summary="a line")
    content = json.loads(path.read_text())
    assert content["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert content["device"]["kind"] == "TPU v5 lite"
    assert set(content["versions"]) >= {"jax", "libtpu", "m1-jax", "python", "kernels"}
    errors = content["checks"][0]["errors"]
    assert [error["error"] for error in errors] == [1e-6, "nan"]
    assert [error["passed"] for error in errors] == [True, False]


def test_a_report_that_cannot_be_written_is_refused_before_any_check(tmp_path):
    with pytest.raises(report.ReportError, match="--report: got .*missing.*wanted a file"):
        report.SelfCheckReport(tmp_path / "missing" / "report.json", SETTING)


def test_the_last_line_says_what_works_and_what_does_not():
    checks = [
        make_check("splash attention, float32"),
        make_check("splash attention, bfloat16", BAD),
        make_check("experts, training, float32"),
        make_check("lightning attention (GPU kernels), float32", check.CheckSkipped("for GPU")),
    ]
    choice = {"softmax": measured_choices.MeasuredChoice("xla", "")}
    line = report.format_summary(run_checks(checks).results, choice, SETTING)
    assert line == (
        "m1-selfcheck on TPU v5 lite: works: experts. DOES NOT WORK: splash attention, bfloat16 "
        "(d_q: error nan, wanted at most 1.0e-05). not checked: lightning attention (GPU kernels). "
        "defaults: softmax=xla."
    )


# ---- defaults

LIGHTNING = "lightning attention"
CORRECT = [f"{LIGHTNING} (TPU kernels), float32", f"{LIGHTNING} (XLA), float32"]


def make_time(form, secs, use=f"{LIGHTNING}, 4096 tokens, forward and backward"):
    details = {"use": use, "form": form, "measured": {"median_secs": secs}}
    findings = check.CheckFindings(details=details)
    return make_check(f"time of {use}, {form}", findings, part="times")


def choose(checks, platform="tpu"):
    found = choices.choose_defaults(run_checks(checks).results, platform)
    return {use: (choice.implementation, choice.reason) for use, choice in found.items()}


def test_a_kernel_that_is_right_and_faster_is_the_default():
    checks = [make_check(name) for name in CORRECT]
    # The pass with gradients decides, whatever the forward pass takes.
    checks += [make_time("tpu", 9, f"{LIGHTNING}, 4096 tokens, forward")]
    checks += [make_time("chunked", 1, f"{LIGHTNING}, 4096 tokens, forward")]
    checks += [make_time("tpu", 0.001), make_time("chunked", 0.004)]
    assert choose(checks) == {"lightning": ("tpu", "right, 1 ms against 4 ms of chunked")}


def test_a_kernel_that_is_slower_is_not():
    checks = [make_check(name) for name in CORRECT]
    checks += [make_time("tpu", 0.004), make_time("chunked", 0.001)]
    wanted = ("chunked", "tpu is right and slower: 4 ms against 1 ms")
    assert choose(checks) == {"lightning": wanted}
    # If XLA's form is wrong, the slower one is the only one.
    checks[1] = make_check(CORRECT[1], BAD)
    assert choose(checks)["lightning"][0] == "tpu"


@pytest.mark.parametrize("findings", [BAD, RuntimeError("no such product")])
def test_a_kernel_that_is_wrong_is_not_whatever_its_speed(findings):
    checks = [make_check(CORRECT[0], findings), make_check(CORRECT[1])]
    checks += [make_time("tpu", 0.001), make_time("chunked", 0.004)]
    implementation, reason = choose(checks)["lightning"]
    assert implementation == "chunked"
    assert reason.startswith(CORRECT[0])


def test_a_kernel_that_does_not_run_at_full_size_is_not():
    checks = [make_check(name) for name in CORRECT]
    name = make_time("tpu", 1).name
    checks += [make_check(name, RuntimeError("vmem"), "times"), make_time("chunked", 1)]
    assert choose(checks)["lightning"] == ("chunked", f"{name}: RuntimeError: vmem")


def test_without_a_time_or_a_check_nothing_is_chosen():
    checks = [make_check(name) for name in CORRECT]
    assert choose(checks) == {}
    skipped = [make_check(CORRECT[0], check.CheckSkipped("no time left"))]
    times = [make_time("tpu", 1), make_time("chunked", 4)]
    assert choose([*skipped, *times]) == {}
    assert choose([make_check(name) for name in CORRECT] + times, "cpu") == {}


def test_saved_choices_keep_those_of_other_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = {"lightning": measured_choices.MeasuredChoice("chunked", "slower")}
    two = {"lightning": measured_choices.MeasuredChoice("tpu", "faster")}
    path = choices.save_choices(one, "TPU v5 lite")
    choices.save_choices(two, "TPU v6 lite")
    assert measured_choices.read_entries(path) == {
        measured_choices.entry_key("TPU v5 lite"): one,
        measured_choices.entry_key("TPU v6 lite"): two,
    }
    path.write_text("damaged")
    choices.save_choices(one, "TPU v5 lite")
    assert list(measured_choices.read_entries(path).values()) == [one]
    measured_choices.forget_choices()


def test_names_of_checks_are_those_that_defaults_ask_for():
    """A renamed check or program would leave a use without a default, silently."""
    kernel_names = [c.name for c in command.list_kernel_checks()]
    sizes = programs.make_sizes(False, None)
    uses = [program.name for program in programs.list_programs(sizes, "tpu")]
    for platform in ("tpu", "gpu"):
        for pair in choices.list_pairs(platform).values():
            for start in (pair.kernel_check, pair.fallback_check):
                assert any(name.startswith(start) for name in kernel_names), start
            if platform == "tpu":
                for form in (pair.kernel, pair.fallback):
                    assert any(
                        name.startswith(pair.timed_use) and name.endswith(f", {form}")
                        for name in uses
                    ), (pair.timed_use, form)


# ---- predictions


def test_a_device_without_predictions_says_so():
    prediction = predictions.find_prediction("NVIDIA H100 80GB HBM3", "any")
    assert prediction == (None, "none: m1-plan predicts no times for NVIDIA H100 80GB HBM3")
    prediction = predictions.find_prediction("TPU v5 lite", "any")
    assert prediction.secs is None
    assert prediction.note.startswith("none of this program for v5e (jax")


def test_every_program_is_predicted():
    data = predictions.read_predictions()["programs"]
    # Those that are lent chip by chip. Figures of others are shipped in full, or not at all.
    assert {"v5e", "v6e"} <= data.keys()
    hbm_bytes = {"v5e": 16.9e9, "v5p": 102e9, "v6e": 33.5e9, "tpu7x": 101e9}
    for generation, figures in data.items():
        sizes = programs.make_sizes(False, hbm_bytes[generation])
        names = [program.name for program in programs.list_programs(sizes, "tpu")]
        assert list(figures) == names
        assert all(0 < secs["low"] <= secs["high"] < 1 for secs in figures.values())


# ---- the command


def run_command(*flags, **kwargs):
    arguments = [sys.executable, "-m", "infer.selfcheck", *flags]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.slow
def test_one_check_by_the_command(tmp_path):
    path = tmp_path / "report.json"
    done = run_command("--only=experts, serving, int8", f"--report={path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "check 1 of 1, 0 s: experts, serving, int8"
    assert "passed in" in lines[1]
    assert lines[-1].startswith("m1-selfcheck on cpu (in small, kernels interpreted): works: exp")
    content = json.loads(path.read_text())
    assert content["is_complete"]
    assert content["summary"] == lines[-1]
    assert content["choices"] == {}
    refused = run_command("--only=no such check", f"--report={path}")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: --only: got 'no such check'; wanted words of a name")


@pytest.mark.long
def test_a_terminated_command_keeps_its_report(tmp_path):
    path = tmp_path / "report.json"
    command_line = [sys.executable, "-m", "infer.selfcheck", f"--report={path}"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("check 1 of"):
                process.send_signal(signal.SIGTERM)
            last = line
    assert process.returncode == 1
    assert last.startswith("m1-selfcheck on cpu")
    content = json.loads(path.read_text())
    assert not content["is_complete"]
    assert content["counts"]["skipped"] == len(content["checks"]) > 20


@pytest.mark.long
def test_everything_in_small(tmp_path):
    path = tmp_path / "report.json"
    done = run_command(f"--report={path}", "--seconds=3000")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert content["counts"]["failed"] == content["counts"]["skipped"] == 0
    (engine,) = [c for c in content["checks"] if c["part"] == "engine"]
    assert engine["requests_compared"] > 5
    times = [c for c in content["checks"] if c["part"] == "times"]
    assert all(c["measured"]["median_secs"] > 0 for c in times)
