"""What a finished group is worth: rewards, outcomes, penalties, and whether the group teaches."""

import math
from collections.abc import Sequence

from train.rl import advantages, outcomes, sample_groups
from train.rl import config as rl_config
from train.rl import sample as sample_lib


class NothingToTrainOn(ValueError):
    """All samples of a batch failed, and the next batch would fail alike."""


def apply_score(sample: sample_lib.Sample, score: sample_lib.RewardScore) -> None:
    """Add a score to an environment's reward. A failed score makes the sample invalid."""
    sample.parts |= score.parts
    if score.value is None:
        sample.valid = False
        sample.error = sample.error or score.error or "its rewards gave no score"
    else:
        sample.reward = (sample.reward or 0.0) + score.value


def score_group(
    group: sample_groups.SampleGroup,
    scores: Sequence[sample_lib.RewardScore] | None,
    config: rl_config.RolloutConfig,
    outcome_reader: outcomes.OutcomeReader,
) -> None:
    """Give a finished group its rewards before penalties, and its samples their outcomes.

    Args:
      group: all of its samples are finished.
      scores: one a sample. None where environments give all rewards.
      config: says which samples count for nothing.
      outcome_reader: reads the outcomes.
    """
    samples = sample_groups.finished_samples(group)
    for i, sample in enumerate(samples):
        environment_reward = sample.reward
        if scores is None:
            sample.outcome = environment_reward
        else:
            apply_score(sample, scores[i])
            sample.outcome = outcome_reader.read(sample, environment_reward)
        _check_sample(sample, outcome_reader)
        sample.valid &= not sample.error
        sample.valid &= not (config.mask_truncated and sample.status == "length")
        sample.valid &= not (config.mask_repetition and sample.status == "repetition")
    # Taken before penalties: what has one reward here teaches nothing (DAPO).
    group.rewards = [s.reward for s in samples if s.valid and s.reward is not None]


def _check_sample(sample: sample_lib.Sample, outcome_reader: outcomes.OutcomeReader) -> None:
    """Note why a sample cannot be trained on, if nobody noted it before."""
    if not sample.error:
        if sample.status == "error":
            sample.error = "the engine could not finish the answer"
        elif not sample.valid or sample.reward is None:
            sample.error = "it got no reward"
        elif sample.outcome is None:
            sample.error = (
                f"got the parts {', '.join(sample.parts) or 'none'}; wanted its outcome "
                f"{outcome_reader.name(sample.task.source)!r} (outcomes)"
            )
    if sample.error:
        sample.outcome = None


def is_worth_training(group: sample_groups.SampleGroup) -> bool:
    """Return whether some of a scored group's answers were better than others.

    The outcomes decide. Shaped sums of equal outcomes may differ, and then say nothing about what
    is right. Sums that are all the same teach nothing either.
    """
    found = [s.outcome for s in sample_groups.finished_samples(group) if s.valid]
    return not (
        advantages.has_zero_variance([value for value in found if value is not None])
        or advantages.has_zero_variance(group.rewards)
    )


def count_passed(group: sample_groups.SampleGroup) -> tuple[int, int]:
    """Return (right answers, judged answers) of a scored group.

    An answer that was cut off is judged, too, whether or not it is trained on: a task is not easy
    because few answers came to an end. Only failures of rewards or the engine are left out.
    """
    found = [s.outcome for s in sample_groups.finished_samples(group) if s.outcome is not None]
    return sum(outcome >= outcomes.PASS_OUTCOME for outcome in found), len(found)


def add_overlong_penalties(
    group: sample_groups.SampleGroup, config: rl_config.RolloutConfig
) -> None:
    """Take the penalty of long answers off the rewards, see `advantages.overlong_penalty`."""
    if not config.overlong_buffer_tokens:
        return
    for sample in sample_groups.finished_samples(group):
        if sample.reward is not None:
            penalty = advantages.overlong_penalty(
                len(sample.tokens), group.window_tokens, config.overlong_buffer_tokens
            )
            sample.parts["overlong"] = penalty
            sample.reward += penalty


def check_failures(
    batch_number: int,
    batch_groups: Sequence[sample_groups.SampleGroup],
    scored_groups: Sequence[sample_groups.SampleGroup],
) -> None:
    """Raise where all samples that a batch was made of failed.

    Args:
      batch_number: number of the batch, from 0.
      batch_groups: groups to train on.
      scored_groups: groups that were scored for it, whether or not they are trained on.

    Raises:
      NothingToTrainOn: there are samples, and each has an error.
    """
    groups = {group.group_id: group for group in (*batch_groups, *scored_groups)}
    samples = [
        sample
        for _, group in sorted(groups.items())
        for sample in sample_groups.finished_samples(group)
    ]
    if samples and all(sample.error for sample in samples):
        raise NothingToTrainOn(
            f"batch {batch_number + 1}: got no reward for any of its {len(samples)} samples; "
            f"wanted some. The first is of task {samples[0].task.id}: {samples[0].error}. Mend "
            "what its reward needs, then start the run again: it goes on with this batch."
        )


def mean_reward(groups: Sequence[sample_groups.SampleGroup]) -> float:
    """Return the mean reward before penalties, which says what the model can do."""
    rewards = [reward for group in groups for reward in group.rewards]
    return sum(rewards) / len(rewards) if rewards else math.nan
