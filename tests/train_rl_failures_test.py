"""What a run does when no batch can be made, and what is left of its log when it is killed."""

import json
import types
from typing import Any, ClassVar

import pytest

from train import metrics
from train.rl import batch_metrics, batch_transfer, evaluate, groups, rollout
from train.rl import loop as rl_loop
from train.rl import sample as sample_lib
from train.rl.rewards import length_bias


class Sampler:
    """Counts how often the other processes were let go."""

    def __init__(self):
        self.dismissed = 0

    def dismiss(self):
        self.dismissed += 1


class Collector:
    """Raises an error in place of a batch."""

    def __init__(self, error):
        self.error = error

    def collect(self, *_):
        raise self.error


FAILURES = [
    groups.NothingToTrainOn("batch 4: got no reward"),
    length_bias.LengthBiasPause("judge of s: got"),
]


def sample_batch(error):
    sampler: Any = Sampler()
    collector: Any = Collector(error)
    made = batch_transfer.sample_batch(collector, sampler, 3, 20, lambda: False)
    assert sampler.dismissed == 1  # whatever happened
    return made


@pytest.mark.parametrize("error", FAILURES)
def test_all_processes_hear_why_there_is_no_batch(error):
    assert sample_batch(error) == (None, error)
    assert sample_batch(rollout.RolloutStopped()) == (None, None)


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("last_saved", [2, 3])
def test_batches_made_so_far_are_saved_before_a_failure_ends_the_run(error, last_saved):
    saved = []
    session: Any = types.SimpleNamespace(
        collector=Collector(error), sampler=Sampler(), batch_number=3, last_saved_batch=last_saved,
        length_stage=types.SimpleNamespace(window_tokens=20),
        stop_request=types.SimpleNamespace(is_requested=lambda: False),
        store=types.SimpleNamespace(wait=lambda: saved.append("waited")),
        _save_checkpoint=lambda: saved.append("saved"),
    )  # fmt: skip
    with pytest.raises(type(error), match=str(error)):
        rl_loop.RlSession._sample_batch(session)
    assert saved == (["saved"] if last_saved == 2 else []) + ["waited"]


def test_lines_are_in_the_file_as_soon_as_they_are_written(tmp_path):
    """A run that is killed closes nothing."""
    writer = metrics.MetricsWriter(tmp_path, 0, 5)
    for step in (1, 2):
        writer.write(step, "train", {"loss": 0.5})
        writer.write_samples(step, [["a"]])
        for name in (metrics.METRICS_FILE, metrics.SAMPLES_FILE):
            lines = (tmp_path / name).read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    writer.__exit__()


def test_an_evaluation_tells_why_samples_have_no_reward():
    task = sample_lib.Task("t/0", (), "t")
    samples = [sample_lib.Sample(task, (1,), reward=reward) for reward in (1.0, None, 0.0)]
    samples[1].valid, samples[1].error = False, "the environment failed: no disk"
    values = evaluate._summarize([("t", sample, None) for sample in samples], 3)
    assert values == {
        "reward/t": 0.5, "samples": 2, "failed": 1, "version": 3, "reward": 0.5,
        "first_error": "the environment failed: no disk",
    }  # fmt: skip
    assert "first_error" not in evaluate._summarize([("t", samples[0], None)], 3)


@pytest.mark.parametrize("updates", [0.0, 2.0])
def test_weights_that_no_update_changed_keep_their_version(updates):
    """Else tokens of the very weights that are trained would count as old."""
    report = batch_metrics.BatchReport({"updates": updates}, 0.0, 0.0)
    synced = []
    session: Any = types.SimpleNamespace(
        state=types.SimpleNamespace(model={}), updater=lambda state, *_: (state, report),
        weight_version=3, batch_number=5, length_stage=types.SimpleNamespace(push=lambda *_: False),
        sampler=types.SimpleNamespace(update_weights=lambda _, version: synced.append(version)),
        weight_sync=WeightSync(), _log_batch=lambda *_: None, _watch_updates=lambda *_: None,
    )  # fmt: skip
    rl_loop.RlSession._train_on_batch(session, groups.GenerationBatch([], {}, 0.0), 0.0)
    assert (session.batch_number, session.weight_version) == (6, 3 + bool(updates))
    assert synced == ([4] if updates else [])
    assert report.metrics["resharding_secs"] >= 0
    assert report.metrics["handover_share"] == 1.0


class WeightSync:
    """Hands the model itself over."""

    metrics: ClassVar = {"handover_share": 1.0}

    def __call__(self, model):
        return model
