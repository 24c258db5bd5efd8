"""The demo's summary says when something failed, and its report has the same results."""

import pathlib
import sys
import types

import demo_modules
import pytest

pytest.importorskip("matplotlib")
DEMO_DIR = pathlib.Path(__file__).resolve().parents[1] / "demo"


@pytest.fixture(scope="module")
def run():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMO_DIR)
        for name in ("finished_steps", "report_page"):
            patch.delitem(sys.modules, name, raising=False)
        yield demo_modules.load_demo_module("run")


def make_results():
    evaluations = [{"step": 8, "loss": 4.0}, {"step": 16, "loss": 3.0}]
    batches = [{"step": 1, "loss": 0.1, "reward_sampled": 0.5, "pearson": 0.9999}]
    return {
        "verify": {"passed": 5, "quantities": 5},
        "exported": {"same_files": 7, "files": 7, "greedy_equal": True},
        "pretrain": {"train": [{"step": 2, "loss": 5.0}], "eval": evaluations},
        "sft": {"train": [{"step": 10, "loss": 1.0}], "eval": []},
        "cispo": {
            "train": batches,
            "eval": [{"step": 0, "reward": 0.5}, {"step": 4, "reward": 0.75}],
        },
        "answers": {"answers": ["Answer: 5", "<b>", "Answer: 4"]},
    }


def test_summary_passes(run):
    lines, passed = run.summarize(make_results())
    assert passed
    assert "held-out loss in pretraining: 4.00 -> 3.00" in lines
    assert "right answers during CISPO: 50% -> 75%" in lines
    assert "2 of 3 answers in the form that was taught" in lines


@pytest.mark.parametrize(
    ("step", "change"),
    [
        ("verify", {"passed": 4}),
        ("exported", {"same_files": 6}),
        ("exported", {"greedy_equal": False}),
        (
            "pretrain",
            {"eval": [{"step": s, "loss": n} for s, n in ((8, 4.0), (16, 3.0), (24, 3.5))]},
        ),
        ("cispo", {"eval": [{"step": 0, "reward": 0.5}, {"step": 4, "reward": 0.5}]}),
        ("answers", {"answers": ["5", "8", "4"]}),
    ],
)
def test_summary_fails(run, step, change):
    results = make_results()
    results[step] |= change
    assert not run.summarize(results)[1]


def test_report_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "OUTPUT_DIR", tmp_path)
    records = {name: {"secs": 1.5, "results": r} for name, r in make_results().items()}
    run.write_report(["a line"], records, {name: f"title of {name}" for name in records})
    page = (tmp_path / "report.html").read_text()
    assert all(f"title of {name}" in page for name in records)
    assert "&lt;b&gt;" in page
    assert (tmp_path / "summary.txt").read_text() == "a line\n"


def test_training_that_a_signal_stopped_stops_the_demo(run, monkeypatch):
    command = types.SimpleNamespace(run=lambda config, workdir: types.SimpleNamespace(stopped_by=2))
    monkeypatch.chdir(DEMO_DIR.parent)
    with pytest.raises(KeyboardInterrupt):
        run.train_model(command, "tiny_cispo_sft", pathlib.Path("/nowhere"), "sft")


def test_training_returns_what_it_logged(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(DEMO_DIR.parent)
    monkeypatch.setattr(run, "OUTPUT_DIR", tmp_path)

    def write_metrics(config, workdir):
        assert config.stages[0].tokens == 60 * run.STEP_TOKENS
        workdir.mkdir()
        lines = ['{"step": 1, "kind": "train", "loss": 2.0, "step_secs": 3.0}']
        lines += ['{"step": 1, "kind": "eval", "loss": 2.5}', '{"step": 1, "kind": "event"}']
        (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return types.SimpleNamespace(stopped_by=None)

    monkeypatch.setattr(run.sft, "run", write_metrics)
    # Times are left out: a demo that was killed must have the same results.
    assert run.tune_model() == {
        "train": [{"step": 1, "loss": 2.0}],
        "eval": [{"step": 1, "loss": 2.5}],
    }
    assert "loss 2.000" in capsys.readouterr().out
