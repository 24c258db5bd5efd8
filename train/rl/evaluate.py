"""Evaluation of an RL run: the mean reward of held-out tasks, by source."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from train.rl import config as rl_config
from train.rl import groups, rollout, rollout_setup
from train.rl import sample as sample_lib
from train.rl.rewards import compose


class HeldOutEvaluator:
    """Samples and scores the same tasks with the same seeds each time, so evaluations compare.

    Args:
      config: config of the run.
      tasks: held-out tasks by source.
      make_episode: begins an episode from a task and its window.
      sampler: sampler of the run, with its newest weights.
      rewards: scores samples, on process 0. None on other processes, and where environments give
        all rewards.
    """

    def __init__(
        self,
        config: rl_config.RlConfig,
        tasks: rollout_setup.TasksBySource,
        make_episode: groups.EpisodeFactory,
        sampler: rollout.RolloutSampler,
        rewards: compose.GroupScorer | None,
    ):
        self._config, self._tasks = config, tasks
        self._make_episode, self._sampler, self._rewards = make_episode, sampler, rewards
        self._sampling = dataclasses.replace(
            rollout_setup.make_rollout_sampling(config.rollout),
            temperature=config.evaluation.temperature,
        )

    def __call__(
        self, window_tokens: int, weight_version: int, should_stop: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Return the metrics of the held-out tasks.

        Every process calls this, because all devices sample.

        Args:
          window_tokens: the most tokens of an answer.
          weight_version: version of the weights that sample.
          should_stop: whether to give up, called between two steps of the engine.

        Returns:
          None on all processes but 0, and where `should_stop` ended the evaluation. Otherwise
            reward/SOURCE: mean reward of a source's samples.
            samples: number of samples with a reward.
            failed: number of samples without one.
            first_error: why the first of these has none, where there is one.
            version: version of the weights.
            reward: mean over all samples with a reward, NaN if there is none.
        """
        # Process 0 runs the episodes, and the others follow its engine until it dismisses them.
        if jax.process_index():
            self._sampler.follow()
            return None
        # (source, sample, future of its score), in the order in which the episodes end.
        finished: list[tuple[str, sample_lib.Sample, Any]] = []

        def on_done(key, sample):
            # A sample is scored while the others are still drawn.
            future = None if self._rewards is None else self._rewards.submit([sample])
            finished.append((key[0], sample, future))
            return ()  # no more episodes than those of `_episode_jobs`

        was_stopped = False
        try:
            self._sampler.run(
                lambda: self._episode_jobs(window_tokens), on_done, self._sampling, should_stop
            )
        except rollout.RolloutStopped:
            was_stopped = True
        # Also after a stop: the other processes go on to save.
        self._sampler.dismiss()
        if was_stopped:
            return None
        return _summarize(finished, weight_version)

    def _episode_jobs(self, window_tokens: int) -> Iterator[rollout.EpisodeJob]:
        for source, tasks in self._tasks.items():
            for task_index in range(len(tasks)):
                for n in range(self._config.evaluation.samples):
                    episode = self._make_episode(tasks[task_index], window_tokens)
                    # Tasks of one index in two sources share a seed, but their prompts differ.
                    seed = groups.sample_seed(self._config.seed, task_index, n)
                    yield rollout.EpisodeJob((source, task_index, n), episode, seed)


def _summarize(
    finished: list[tuple[str, sample_lib.Sample, Any]], weight_version: int
) -> dict[str, Any]:
    """Wait for the scores, and return the metrics of (source, sample, future of its score)."""
    rewards: dict[str, list[float]] = {}
    for source, sample, future in finished:
        if future is not None:
            groups.apply_score(sample, future.result()[0])
        if sample.valid and not sample.error and sample.reward is not None:
            rewards.setdefault(source, []).append(sample.reward)
    num_scored = sum(map(len, rewards.values()))
    metrics: dict[str, Any] = {
        f"reward/{source}": float(np.mean(values)) for source, values in rewards.items()
    }
    metrics |= {
        "samples": num_scored,
        "failed": len(finished) - num_scored,
        "version": weight_version,
    }
    errors = [sample.error for _, sample, _ in finished if sample.error]
    if errors:
        metrics["first_error"] = errors[0]
    # A mean over samples, not over sources: a large source weighs more.
    all_rewards = [reward for values in rewards.values() for reward in values]
    metrics["reward"] = float(np.mean(all_rewards or [math.nan]))
    return metrics
