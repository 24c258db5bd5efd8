"""Generation batches: which tasks are sampled, what their groups are worth, which are trained on.

Host code over `rollout.RolloutSampler`, on process 0. A batch is a function of the weights, the
config and the state alone:
  * Groups are used in the order in which they were begun. The order of their ends would favour
    short answers.
  * Samples are cut off by counting tokens, never by a clock.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from train.rl import config as rl_config
from train.rl import cursor as cursor_lib
from train.rl import group_columns, group_scoring, rollout, sample_groups
from train.rl import sample as sample_lib
from train.rl import tasks as tasks_lib
from train.rl.rewards import compose, length_bias

# A user of a collector imports this module alone.
SampleGroup = sample_groups.SampleGroup
GenerationBatch = sample_groups.GenerationBatch
finished_samples = sample_groups.finished_samples
apply_score = group_scoring.apply_score
NothingToTrainOn = group_scoring.NothingToTrainOn
# Begins an episode of a task whose answer may have so many tokens.
EpisodeFactory = Callable[[sample_lib.Task, int], sample_lib.Episode]
_MAX_DRAWS = 1000  # tasks of a source that pass rates may refuse, for one that is drawn


class GroupCollector:
    """Makes one generation batch after another."""

    def __init__(
        self,
        config: rl_config.RlConfig,
        tasks: Mapping[
            str, tasks_lib.FileTasks | tasks_lib.GeneratedTasks | Sequence[sample_lib.Task]
        ],
        make_episode: EpisodeFactory,
        rewards: compose.GroupScorer | None,
        state: Mapping[str, Any] | None = None,
        columns: Mapping[str, np.ndarray] | None = None,
    ):
        """Continue a collector, or begin one.

        Args:
          config: config of the run.
          tasks: tasks by the name of their source.
          make_episode: begins an episode.
          rewards: scores finished groups. None where environments give all rewards.
          state, columns: what `state` returned of the collector that this one continues.
        """
        state = state or {}
        self._config, self._rollout_config = config, config.rollout
        self._tasks, self._make_episode, self._rewards = tasks, make_episode, rewards
        self._cursor = self._open_cursor(state)
        self._outcomes = config.outcome_reader()
        # What happened while the present batch was made, for the log.
        self._events: list[dict[str, Any]] = []
        # Scored groups that wait for a batch, sorted by group_id.
        self._ready_groups: list[SampleGroup] = []
        # Groups with unfinished samples, which the next round goes on with.
        self._open_groups: list[SampleGroup] = []
        if state:
            assert columns is not None, "a state has columns"
            self._ready_groups = group_columns.groups_from_columns(
                state["ready"], columns, "ready", tasks
            )
            self._open_groups = group_columns.groups_from_columns(
                state["open"], columns, "open", tasks
            )

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what continues this collector: a JSON-able part, and what tokens have as arrays.

        The second is a few flat arrays, see `group_columns`. Their number does not depend on the
        number of groups.
        """
        # The text of a group that was scored is read by nobody.
        ready, ready_columns = group_columns.groups_to_columns(
            self._ready_groups, "ready", with_text=False
        )
        unfinished, columns = group_columns.groups_to_columns(
            self._open_groups, "open", with_text=True
        )
        state = self._cursor.state() | {"ready": ready, "open": unfinished}
        return state, ready_columns | columns

    def collect(
        self,
        sampler: rollout.RolloutSampler,
        step: int,
        window_tokens: int,
        should_stop: Callable[[], bool],
    ) -> GenerationBatch:
        """Sample until enough groups teach something, or until no round is left.

        Args:
          step: number of the batch. The weights of the sources may depend on it.
          window_tokens: the most tokens that an answer of a new group may have.
          should_stop: whether to give up. It is called between two steps of the engine.

        Raises:
          rollout.RolloutStopped: `should_stop` returned True. The collector is then as it was
            before this call, so that the next run samples the whole batch again.
          length_bias.LengthBiasPause: rewards follow length, so the judge needs to be looked at.
          NothingToTrainOn: all samples of the batch failed. The collector is then as it was, too.
        """
        cursor_state, ready_groups, open_groups = (
            self._cursor.state(),
            _copy_groups(self._ready_groups),
            _copy_groups(self._open_groups),
        )
        try:
            return self._collect_rounds(sampler, step, window_tokens, should_stop)
        except (rollout.RolloutStopped, NothingToTrainOn, length_bias.LengthBiasPause):
            self._cursor = self._open_cursor(cursor_state)
            self._ready_groups, self._open_groups = ready_groups, open_groups
            raise

    # ---- parts

    def _open_cursor(self, state: Mapping[str, Any]) -> cursor_lib.CollectorCursor:
        num_tasks = {name: len(tasks) for name, tasks in self._tasks.items()}
        return cursor_lib.CollectorCursor(self._config, num_tasks, state)

    def _collect_rounds(
        self,
        sampler: rollout.RolloutSampler,
        step: int,
        window_tokens: int,
        should_stop: Callable[[], bool],
    ) -> GenerationBatch:
        config, began = self._rollout_config, time.perf_counter()
        self._events = []
        num_stale = self._drop_stale_groups(sampler.version)
        scored_groups: list[SampleGroup] = []  # in this call
        rollout_stats, rounds, scoring_secs = rollout.RolloutStats(), 0, 0.0
        while len(self._ready_groups) < config.groups and rounds < config.max_rounds:
            # May be negative: groups of earlier batches still wait or go on.
            num_missing = (
                round(config.groups * config.oversample)
                - len(self._ready_groups)
                - len(self._open_groups)
            )
            self._open_groups += [
                self._draw_group(step, window_tokens) for _ in range(max(num_missing, 0))
            ]
            # Groups that finished in this round, each with the future of its scores.
            pending_scores: list[tuple[SampleGroup, Any]] = []
            round_stats = sampler.run(
                lambda: self._episode_jobs(sampler.version),
                functools.partial(self._on_episode_done, pending_scores),
                should_stop=should_stop,
            )
            rollout_stats += round_stats
            scoring_began = time.perf_counter()
            # Scored in the order of their ids: pass rates and length bias depend on the order.
            for group, future in sorted(pending_scores, key=lambda pair: pair[0].group_id):
                self._score_group(group, future, step)
                scored_groups.append(group)
            scoring_secs += time.perf_counter() - scoring_began
            rounds += 1
        batch_groups = self._ready_groups[: config.groups]
        self._ready_groups = self._ready_groups[config.groups :]
        self._cursor.check_length_bias()
        group_scoring.check_failures(step, batch_groups, scored_groups)
        secs = {
            "sampling_secs": rollout_stats.total_secs - rollout_stats.waiting_secs,
            # The part of scoring that sampling did not hide.
            "scoring_secs": scoring_secs,
            "waiting_secs": rollout_stats.waiting_secs + scoring_secs,
            "collect_secs": time.perf_counter() - began,
        }
        metrics = self._batch_metrics(
            batch_groups, scored_groups, rollout_stats, rounds, sampler.version
        )
        metrics["groups_stale"] = float(num_stale)
        mean_reward = group_scoring.mean_reward(scored_groups)
        return GenerationBatch(batch_groups, secs | metrics, mean_reward, tuple(self._events))

    def _drop_stale_groups(self, version: int) -> int:
        """Drop scored groups with a token older than the bound, and return how many they were.

        Args:
          version: version of the weights that sample now.
        """
        is_fresh = [
            group.oldest_version is None
            or version - group.oldest_version <= self._rollout_config.max_staleness
            for group in self._ready_groups
        ]
        self._ready_groups = list(itertools.compress(self._ready_groups, is_fresh))
        return len(is_fresh) - len(self._ready_groups)

    def _draw_group(self, step: int, window_tokens: int) -> SampleGroup:
        pass_rates = self._cursor.pass_rates
        refused: dict[str, list[str]] = {}  # ids of tasks, by their source
        while True:
            source, index = self._cursor.draws.draw_task(step)
            task = self._tasks[source][index]
            if pass_rates is None or pass_rates.should_draw(task.id, step):
                break
            refused.setdefault(source, []).append(task.id)
            # Twice: so many draws in a row have all tasks of a source, wherever its epochs end.
            if len(refused[source]) >= min(2 * len(self._tasks[source]), _MAX_DRAWS):
                self._readmit_tasks(source, refused.pop(source))
        group_id, size = self._cursor.next_group_id, self._rollout_config.group_size
        self._cursor.next_group_id += 1
        return SampleGroup(
            group_id, source, index, window_tokens, task, [None] * size, [None] * size
        )

    def _readmit_tasks(self, source: str, task_ids: Sequence[str]) -> None:
        """Let tasks of an exhausted source come back before their time."""
        assert self._cursor.pass_rates is not None, "it refused the tasks"
        self._cursor.pass_rates.readmit(task_ids)
        num_tasks = len(set(task_ids))
        text = f"{num_tasks} tasks of {source} in a row are too easy or too hard; they come back"
        logging.warning("pass rates: %s", text)
        self._events.append({"pass_rates": text, "source": source, "readmitted": num_tasks})

    def _episode_jobs(self, version: int) -> Iterable[rollout.EpisodeJob]:
        """Yield an episode for every unfinished sample.

        Args:
          version: version of the weights that sample now.
        """
        config = self._rollout_config
        for group in self._open_groups:
            oldest = version if group.oldest_version is None else group.oldest_version
            # In the next batch, at version + 1, its tokens would be too old: let it finish now.
            is_last_round = version + 1 - oldest > config.max_staleness
            slice_tokens = 0 if is_last_round else config.partial_tokens
            for i, sample in enumerate(group.samples):
                if sample is None:
                    seed = sample_seed(self._config.seed, group.group_id, i)
                    episode = self._make_episode(group.task, group.window_tokens)
                    yield rollout.EpisodeJob(
                        (group.group_id, i), episode, seed, group.partial[i], slice_tokens
                    )

    def _on_episode_done(
        self,
        pending_scores: list[tuple[SampleGroup, Any]],
        key: Any,
        result: sample_lib.Sample | rollout.PausedEpisode,
    ) -> Iterable[rollout.EpisodeJob]:
        """Take what an episode made. A group that is now finished goes to `pending_scores`."""
        group_id, i = key
        group = next(group for group in self._open_groups if group.group_id == group_id)
        if isinstance(result, rollout.PausedEpisode):
            group.partial[i] = result.partial
            return ()
        group.samples[i], group.partial[i] = result, None
        if all(sample is not None for sample in group.samples):
            # Rewards are computed in the background, while other groups are still sampled.
            future = (
                None if self._rewards is None else self._rewards.submit(finished_samples(group))
            )
            pending_scores.append((group, future))
        return ()

    def _score_group(self, group: SampleGroup, future: Any, step: int) -> None:
        """Give a finished group its rewards, and keep the group if it teaches something."""
        config = self._rollout_config
        scores = None if future is None else future.result()
        group_scoring.score_group(group, scores, config, self._outcomes)
        self._cursor.push_lengths(group)
        if self._cursor.pass_rates is not None:
            self._cursor.pass_rates.push(group.task.id, *group_scoring.count_passed(group), step)
        self._open_groups.remove(group)
        if not config.dynamic or group_scoring.is_worth_training(group):
            self._ready_groups.append(group)
            self._ready_groups.sort(key=lambda ready_group: ready_group.group_id)
        group_scoring.add_overlong_penalties(group, config)

    def _batch_metrics(
        self,
        batch_groups: list[SampleGroup],
        scored_groups: list[SampleGroup],
        rollout_stats: rollout.RolloutStats,
        rounds: int,
        version: int,
    ) -> dict[str, float]:
        """Return metrics of a batch. `rollout_stats` are of all that was sampled for it."""
        samples = [sample for group in batch_groups for sample in finished_samples(group)]
        oldest_versions = [group.oldest_version for group in batch_groups]
        metrics = {
            "reward_sampled": group_scoring.mean_reward(scored_groups),
            "rounds": rounds,
            "groups": len(batch_groups),
            "groups_sampled": len(scored_groups),
            "groups_zero_variance": sum(
                not group_scoring.is_worth_training(group) for group in scored_groups
            ),
            # Samples that could not be scored, whatever the reason.
            "samples_failed": sum(
                bool(sample.error) for group in scored_groups for sample in finished_samples(group)
            ),
            "tools_timed_out": rollout_stats.num_tool_timeouts,
            "groups_waiting": len(self._ready_groups),
            "groups_open": len(self._open_groups),
            # Every token that was paid for, and those that are trained on.
            "tokens_sampled": rollout_stats.num_tokens,
            "tokens_trained": sum(sample.num_generated for sample in samples if sample.valid),
            "staleness_max": max(
                (version - v for v in oldest_versions if v is not None), default=0
            ),
        }
        metrics = {name: float(value) for name, value in metrics.items()}
        metrics |= self._cursor.metrics()
        failures = {} if self._rewards is None else self._rewards.failure_counts()
        return metrics | {name: float(count) for name, count in failures.items()}


def sample_seed(seed: int, group: int, index: int) -> int:
    """Return the seed of one sample of a run, in [0, 2^32).

    Neighbours, in their group or their index, have seeds that are far apart.
    """
    # Multipliers are large odd constants of known mixing hashes.
    return (seed * 0xC2B2AE35 + group * 0x9E3779B9 + index * 0x27D4EB2F) % 2**32


def _copy_groups(groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """Return copies that scoring, or going on with, the groups does not change.

    A finished sample's tokens are never written again, so the copies share them.
    """
    return [
        dataclasses.replace(
            group,
            samples=[
                sample if sample is None else dataclasses.replace(sample, parts=dict(sample.parts))
                for sample in group.samples
            ],
            partial=list(group.partial),
        )
        for group in groups
    ]
