"""The metrics of one generation batch: its samples, sampler against trainer, and its updates.

`train/rl/metrics.py` measures. This module says which samples and steps are measured together.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.rl import metrics as rl_metrics
from train.rl import mismatch, outcomes
from train.rl import sample as sample_lib

# Rounding of adapters to bfloat16 moves the share by far less.
_HANDOVER_TOLERANCE = 0.01
_NO_AGE = np.iinfo(np.int32).min  # of what the model did not write


class UpdateMetrics(NamedTuple):
    """What one optimizer step measured, on the devices.

    Attributes:
      loss: sums over the step's tokens, see `metrics.loss_metrics`.
      step: metrics of the gradients and the optimizer, see `step.apply_update`.
    """

    loss: rl_metrics.MetricSums
    step: dict[str, Any]


@dataclasses.dataclass
class BatchReport:
    """What a generation batch measured. Its fields beside `metrics` steer the run.

    Attributes:
      metrics: all metrics by name, as they are logged.
      length_p99: 99th percentile of the answers' lengths, tokens, 0 without a sample.
      nll: mean negative log-probability of the generated tokens by the sampler, nats, 0 without
        a token.
      pearson: correlation of sampler and trainer, see `mismatch.measure_mismatch`. None before it
        is measured, and where no token is of the present weights.
    """

    metrics: dict[str, Any]
    length_p99: float
    nll: float
    pearson: float | None = None


def measure_samples(samples: Sequence[sample_lib.Sample], group_ids: Sequence[int]) -> BatchReport:
    """Return the report of a batch before any forward pass.

    Its metrics are `metrics.summarize_groups`, and
      nll: mean negative log-probability of the generated tokens by the sampler, nats.
      reward/PART: mean of a part of the rewards, over the samples that have it.
    """
    lengths = [sample.num_generated for sample in samples]
    metrics = rl_metrics.summarize_groups(
        [math.nan if sample.reward is None else sample.reward for sample in samples],
        group_ids,
        [sample.valid for sample in samples],
        lengths,
        [sample.status for sample in samples],
        outcomes=[sample.outcome for sample in samples],
        pass_outcome=outcomes.PASS_OUTCOME,
    )
    logprob_sum = sum(
        float(np.sum(sample.logprobs, dtype=np.float64, where=sample.mask > 0))
        for sample in samples
    )
    # Convergence of this number begins the next window, see `length_schedule`.
    metrics["nll"] = -logprob_sum / sum(lengths) if any(lengths) else 0.0
    for name in sorted({name for sample in samples for name in sample.parts}):
        values = [sample.parts[name] for sample in samples if name in sample.parts]
        metrics[f"reward/{name}"] = float(np.mean(values))
    length_p99 = metrics["length_p99"] if samples else 0.0
    return BatchReport(metrics, length_p99, metrics["nll"])


def measure_batch_mismatch(
    samples: Sequence[sample_lib.Sample], logp_old: Sequence[np.ndarray], weight_version: int
) -> dict[str, float]:
    """Return `mismatch.measure_mismatch` of a batch's tokens, apart by the age of their weights.

    Tokens of the present weights have the plain names, absent without such a token. Those of
    weights that are N versions old have "age_N/NAME": there the policy has moved, too, and it is
    the weight that r and the correction have to make up for. Besides there are
      stale_tokens: share of the tokens that older weights sampled.
      age_N/tokens: number of tokens of that age.

    Args:
      samples: the valid samples of the batch.
      logp_old: the trainer's log-probabilities of each sample's answer, [tokens].
      weight_version: version of the present weights.
    """
    ages = [np.where(s.mask > 0, weight_version - s.versions, _NO_AGE) for s in samples]
    counts: collections.Counter[int] = collections.Counter()
    for of_sample in ages:
        values, numbers = np.unique(of_sample[of_sample != _NO_AGE], return_counts=True)
        counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    metrics: dict[str, float] = {}
    for age in sorted(counts):
        measured = mismatch.measure_mismatch(
            (sample.logprobs[of_sample == age], trainer_logp[of_sample == age])
            for sample, trainer_logp, of_sample in zip(samples, logp_old, ages, strict=True)
        )
        prefix = f"age_{age}/" if age else ""
        metrics |= {f"{prefix}{name}": value for name, value in measured.items()}
        if age:
            metrics[f"{prefix}tokens"] = float(counts[age])
    num_tokens = counts.total()
    metrics["stale_tokens"] = (num_tokens - counts[0]) / num_tokens if num_tokens else 0.0
    return metrics


def list_alarms(report: BatchReport, pearson_min: float) -> list[dict[str, Any]]:
    """Return the events of a batch whose samples may not come from the policy that is trained.

    No number and NaN are alarms: they hide a disagreement as well as they hide agreement.

    Args:
      report: of the whole batch, weight sync included.
      pearson_min: least correlation of the sampler's and the trainer's probabilities.
    """
    alarms = []
    pearson = report.pearson
    if not report.metrics["updates"]:
        alarms.append({"alarm": "the batch had no valid sample, and trained nothing"})
    elif pearson is None:
        text = "no token is of the present weights, so sampler and trainer were not compared"
        alarms.append({"alarm": text})
    elif not pearson >= pearson_min:  # NaN is below any bound
        alarms.append({"alarm": "sampler and trainer disagree", "pearson": pearson})
    share = report.metrics.get("handover_share", 1.0)
    if not abs(share - 1) <= _HANDOVER_TOLERANCE:
        text = "the sampler does not have what the adapters learnt"
        alarms.append({"alarm": text, "handover_share": share})
    return alarms


def merge_update_metrics(updates: Sequence[UpdateMetrics]) -> dict[str, Any]:
    """Return the metrics of all updates of a batch together.

    Most are means over the updates. ratio_min, ratio_max and ratio_p99 are extremes. Besides those
    of an update there are
      most_dropped, most_clipped: token ids, see `metrics.rank_dropped_tokens`.
      gradient/decade_X, gradient/below_1e-14: see `metrics.gradient_histogram`, of the last update.
      updates: number of optimizer steps.
      skipped: number of steps without a finite gradient, which left the weights as they were.
      no_signal: number of steps without a token to learn from, which did so, too.
    """
    # Here the host waits for the devices, for the first time since the updates began.
    reports = [rl_metrics.summarize_metrics(jax.device_get(update.loss)) for update in updates]
    metrics: dict[str, Any] = {}
    reducers: dict[str, Callable] = {"ratio_min": min, "ratio_max": max, "ratio_p99": max}
    for name in reports[0]:
        reduce = reducers.get(name, np.mean)
        metrics[name] = float(reduce([report[name] for report in reports]))
    drop_counts = [update.loss.drops for update in updates if update.loss.drops is not None]
    drops = np.sum([counts.ppo_dropped for counts in drop_counts], axis=0)
    clips = np.sum([counts.clipped for counts in drop_counts], axis=0)
    metrics["most_dropped"] = rl_metrics.rank_dropped_tokens(drops)
    # Ids that were never clipped count too, so that a reader can tell how often clipping is.
    metrics["most_clipped"] = rl_metrics.rank_dropped_tokens(clips, num=32, min_dropped=0)
    steps = jax.device_get([update.step for update in updates])
    last_step = steps[-1]
    # Magnitudes of gradients are logged of the last step alone: one histogram a batch is enough.
    shares = {
        name.removeprefix("gradient/"): value
        for name, value in last_step.items()
        if name.startswith("gradient/")
    }
    histogram = rl_metrics.gradient_histogram(shares)
    metrics |= {f"gradient/decade_{name}": value for name, value in histogram.items()}
    metrics["gradient/below_1e-14"] = float(shares["below_1e-14"])
    for name in last_step:
        if not name.startswith("gradient/"):
            metrics[name] = float(np.mean([step[name] for step in steps]))
    for name in ("skipped", "no_signal"):
        metrics[name] = float(sum(step[name] for step in steps))
    metrics["updates"] = float(len(updates))
    return metrics
