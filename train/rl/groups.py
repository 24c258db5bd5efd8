"""Generation batches: which tasks are sampled, what their groups are worth, which are trained on.

Plain Python over `rollout.RolloutSampler`, on process 0. What comes out is a function of the
weights, the config and the state: groups are counted in the order in which they were begun, never
in that of their ends, which would favour short answers; and samples are cut off by counting tokens,
not time.
"""

import base64
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from train.rl import advantages, curriculum, rollout
from train.rl import config as rl_config
from train.rl import sample as sample_lib
from train.rl import tasks as tasks_lib
from train.rl.rewards import compose, length_bias

EpisodeFactory = Callable[[sample_lib.Task, int], sample_lib.Episode]  # of a task and a window
_MAX_DRAWS = 1000


@dataclasses.dataclass
class SampleGroup:
    """All samples of one task. number: counts groups. window: of their answers, in tokens.

    samples: None while unfinished; made: what unfinished ones said so far.
    """

    group_id: int
    source: str
    task_index: int
    window_tokens: int
    task: sample_lib.Task
    samples: list[sample_lib.Sample | None]
    partial: list[sample_lib.Generation | None]
    rewards: list[float] = dataclasses.field(default_factory=list)  # before penalties, valid ones

    @property
    def oldest_version(self) -> int | None:
        """Return the first version of the weights that wrote any of it."""
        versions = [
            v for one in (*self.samples, *self.partial) if one for v in one.versions if v >= 0
        ]
        return min(versions, default=None)


@dataclasses.dataclass(frozen=True)
class GenerationBatch:
    """Groups to train on, and what it took to have them, for the log."""

    groups: list[SampleGroup]
    metrics: dict[str, float]


class GroupCollector:
    """Makes one batch after another.

    Args:
      config: of the run. tasks: by source. start: begins an episode. rewards: None where the
        environments give them all. state: of an earlier collector, which this one continues.
    """

    def __init__(
        self,
        config: rl_config.RlConfig,
        tasks: Mapping[
            str, tasks_lib.FileTasks | tasks_lib.GeneratedTasks | Sequence[sample_lib.Task]
        ],
        make_episode: EpisodeFactory,
        rewards: compose.GroupScorer | None,
        state: Mapping[str, Any] | None = None,
    ):
        state = state or {}
        self._config, self._rollout_config = config, config.rollout
        self._tasks, self._make_episode, self._rewards = tasks, make_episode, rewards
        self._restore_cursor(state)
        self._ready_groups = [self._group_from_json(one) for one in state.get("ready", [])]
        self._open_groups = [self._group_from_json(one) for one in state.get("open", [])]

    def state(self) -> dict[str, Any]:
        """Return what continues this collector, JSON-able."""
        return self._cursor_state() | {
            "ready": [_group_to_json(group) for group in self._ready_groups],
            "open": [_group_to_json(group) for group in self._open_groups],
        }

    def collect(
        self,
        sampler: rollout.RolloutSampler,
        step: int,
        window_tokens: int,
        should_stop: Callable[[], bool],
    ) -> GenerationBatch:
        """Sample until there are enough groups that teach something, or no more rounds.

        Raises:
          rollout.Stopped: `stopping` said so; it is as if this call had never been, so that its
            batch is sampled again as a whole. length_bias.Paused: the judge wants looking after.
        """
        counts, ready, opened = (
            self._cursor_state(),
            _copy_groups(self._ready_groups),
            _copy_groups(self._open_groups),
        )
        try:
            return self._collect_rounds(sampler, step, window_tokens, should_stop)
        except rollout.RolloutStopped:
            self._restore_cursor(counts)
            self._ready_groups, self._open_groups = ready, opened
            raise

    # ---- parts

    def _cursor_state(self) -> dict[str, Any]:
        return {
            "draws": self._draws.state(),
            "pass_rates": self._pass_rates and self._pass_rates.state(),
            "length_bias": self._length_bias and self._length_bias.state(),
            "number": self._next_group_id,
        }

    def _restore_cursor(self, state: Mapping[str, Any]) -> None:
        """Go on from `_counts`."""
        config = self._config
        sizes = {name: len(some) for name, some in self._tasks.items()}
        self._draws = curriculum.TaskDraws(config.task_curriculum(), sizes, state.get("draws"))
        self._pass_rates = self._length_bias = None
        if config.pass_rates is not None:
            self._pass_rates = curriculum.PassRateTracker(
                config.pass_rates, state.get("pass_rates")
            )
        if config.length_bias is not None:
            self._length_bias = length_bias.LengthBiasMonitor(
                config.length_bias, state.get("length_bias")
            )
        self._next_group_id = state.get("number", 0)

    def _collect_rounds(
        self, sampler: rollout.RolloutSampler, step: int, window: int, stopping: Callable[[], bool]
    ) -> GenerationBatch:
        config, began = self._rollout_config, time.perf_counter()
        self._scored_groups: list[SampleGroup] = []  # finished in this call
        times, rounds, waited = rollout.RolloutStats(), 0, 0.0
        while len(self._ready_groups) < config.groups and rounds < config.max_rounds:
            missing = (
                round(config.groups * config.oversample)
                - len(self._ready_groups)
                - len(self._open_groups)
            )
            self._open_groups += [self._draw_group(step, window) for _ in range(max(missing, 0))]
            self._pending_scores: list[tuple[SampleGroup, Any]] = []
            took = sampler.run(
                lambda: self._episode_jobs(sampler.version),
                self._on_episode_done,
                should_stop=stopping,
            )
            times = times.plus(took)
            since = time.perf_counter()
            for group, future in sorted(self._pending_scores, key=lambda pair: pair[0].group_id):
                self._score_group(group, future)
            waited += time.perf_counter() - since
            rounds += 1
        used = self._ready_groups[: config.groups]
        self._ready_groups = self._ready_groups[config.groups :]
        if self._length_bias is not None:
            self._length_bias.check()
        secs = {
            "sampling_secs": times.total_secs - times.waiting_secs,
            "scoring_secs": waited,
            "waiting_secs": times.waiting_secs + waited,
            "collect_secs": time.perf_counter() - began,
        }
        return GenerationBatch(
            used, secs | self._batch_metrics(used, times.num_tokens, rounds, sampler.version)
        )

    def _draw_group(self, step: int, window: int) -> SampleGroup:
        for _ in range(_MAX_DRAWS):
            source, index = self._draws.draw_task(step)
            task = self._tasks[source][index]
            if self._pass_rates is None or self._pass_rates.should_draw(task.id):
                number, size = self._next_group_id, self._rollout_config.group_size
                self._next_group_id += 1
                return SampleGroup(
                    number, source, index, window, task, [None] * size, [None] * size
                )
        raise ValueError(
            f"pass_rates: got {_MAX_DRAWS} tasks in a row that are too easy or too "
            "hard; wanted some "
            "that still teach. Widen the range, or add tasks."
        )

    def _episode_jobs(self, version: int) -> Iterable[rollout.EpisodeJob]:
        config = self._rollout_config
        for group in self._open_groups:
            oldest = version if group.oldest_version is None else group.oldest_version
            last = version + 1 - oldest > config.max_staleness
            cut = 0 if last else config.partial_tokens
            for i, sample in enumerate(group.samples):
                if sample is None:
                    seed = sample_seed(self._config.seed, group.group_id, i)
                    episode = self._make_episode(group.task, group.window_tokens)
                    yield rollout.EpisodeJob(
                        (group.group_id, i), episode, seed, group.partial[i], cut
                    )

    def _on_episode_done(
        self, key: Any, result: sample_lib.Sample | rollout.PausedEpisode
    ) -> Iterable[rollout.EpisodeJob]:
        number, i = key
        group = next(one for one in self._open_groups if one.group_id == number)
        if isinstance(result, rollout.PausedEpisode):
            group.partial[i] = result.partial
            return ()
        group.samples[i], group.partial[i] = result, None
        if all(sample is not None for sample in group.samples):
            future = (
                None if self._rewards is None else self._rewards.submit(finished_samples(group))
            )
            self._pending_scores.append((group, future))
        return ()

    def _score_group(self, group: SampleGroup, future: Any) -> None:
        """Give a finished group its rewards, and keep it if it teaches something."""
        samples = finished_samples(group)
        if future is not None:
            for sample, score in zip(samples, future.result(), strict=True):
                apply_score(sample, score)
        config = self._rollout_config
        for sample in samples:
            sample.valid &= sample.reward is not None and sample.status != "error"
            sample.valid &= not (config.mask_truncated and sample.status == "length")
            sample.valid &= not (config.mask_repetition and sample.status == "repetition")
        group.rewards = [
            sample.reward for sample in samples if sample.valid and sample.reward is not None
        ]
        if self._length_bias is not None:
            judged = [sample.reward if sample.valid else None for sample in samples]
            self._length_bias.push([len(sample.tokens) for sample in samples], judged)
        if self._pass_rates is not None:
            passed = sum(reward >= 1 for reward in group.rewards)
            self._pass_rates.push(group.task.id, passed, len(group.rewards))
        self._scored_groups.append(group)
        self._open_groups.remove(group)
        # As DAPO: what is the same before penalties teaches nothing.
        if not (config.dynamic and advantages.has_zero_variance(group.rewards)):
            self._ready_groups.append(group)
            self._ready_groups.sort(key=lambda one: one.group_id)
        if config.overlong_buffer_tokens:
            for sample in samples:
                if sample.reward is not None:
                    penalty = advantages.overlong_penalty(
                        len(sample.tokens), group.window_tokens, config.overlong_buffer_tokens
                    )
                    sample.parts["overlong"] = penalty
                    sample.reward += penalty

    def _batch_metrics(self, used: list[SampleGroup], tokens: int, rounds: int, version: int):
        trained = [sample for group in used for sample in finished_samples(group)]
        oldest = [group.oldest_version for group in used]
        every = [reward for group in self._scored_groups for reward in group.rewards]
        found = {
            # Of all that was sampled, before penalties: what the model can do.
            "reward_sampled": sum(every) / len(every) if every else math.nan,
            "rounds": rounds,
            "groups": len(used),
            "groups_sampled": len(self._scored_groups),
            "groups_zero_variance": sum(
                advantages.has_zero_variance(group.rewards) for group in self._scored_groups
            ),
            "groups_waiting": len(self._ready_groups),
            "groups_open": len(self._open_groups),
            # Every token that was paid for, and those that are trained on.
            "tokens_sampled": tokens,
            "tokens_trained": sum(sum(sample.mask) for sample in trained if sample.valid),
            "staleness_max": max((version - v for v in oldest if v is not None), default=0),
        }
        found = {name: float(value) for name, value in found.items()}
        for part in (self._pass_rates, self._length_bias):
            found |= {} if part is None else part.metrics()
        return found | ({} if self._rewards is None else _to_floats(self._rewards.failure_counts()))

    def _group_from_json(self, value: Mapping[str, Any]) -> SampleGroup:
        source, index = value["source"], value["index"]
        task = self._tasks[source][index]
        samples = [
            None if one is None else _sample_from_json(one, task) for one in value["samples"]
        ]
        made = [None if one is None else _generation_from_json(one) for one in value["made"]]
        number, window = value["number"], value["window"]
        return SampleGroup(number, source, index, window, task, samples, made, value["rewards"])


def apply_score(sample: sample_lib.Sample, score: sample_lib.RewardScore) -> None:
    """Add a reward to what an environment gave; a failed one makes the sample invalid."""
    sample.parts |= score.parts
    if score.value is None:
        sample.valid = False
    else:
        sample.reward = (sample.reward or 0.0) + score.value


def finished_samples(group: SampleGroup) -> list[sample_lib.Sample]:
    """Return a finished group's samples."""
    return [sample for sample in group.samples if sample is not None]


def _copy_groups(some: Sequence[SampleGroup]) -> list[SampleGroup]:
    """Return copies that what happens to the groups, and to their samples' scores, leaves alone."""
    return [
        dataclasses.replace(
            group,
            samples=[
                one if one is None else dataclasses.replace(one, parts=dict(one.parts))
                for one in group.samples
            ],
            partial=list(group.partial),
        )
        for group in some
    ]


def sample_seed(seed: int, group: int, index: int) -> int:
    """Return the seed of one sample of a run: of 2^32, neighbours far apart."""
    return (seed * 0xC2B2AE35 + group * 0x9E3779B9 + index * 0x27D4EB2F) % 2**32


# ---- JSON

_COLUMN_DTYPES = {
    "tokens": np.int32,
    "mask": np.int8,
    "logprobs": np.float32,
    "raw": np.float32,
    "versions": np.int32,
}


def _group_to_json(group: SampleGroup) -> dict[str, Any]:
    return {
        "number": group.group_id,
        "source": group.source,
        "index": group.task_index,
        "window": group.window_tokens,
        "rewards": group.rewards,
        "samples": [
            None if one is None else _fields_to_json(one, ("task",)) for one in group.samples
        ],
        "made": [None if one is None else _fields_to_json(one) for one in group.partial],
    }


def _fields_to_json(record: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    value = {
        f.name: getattr(record, f.name)
        for f in dataclasses.fields(record)
        if f.name not in leave_out
    }
    for name, dtype in _COLUMN_DTYPES.items():
        if name in value:
            value[name] = base64.b64encode(np.asarray(value[name], dtype).tobytes()).decode()
    if value["routes"] is not None:
        routes = np.asarray(value["routes"], np.int8)
        value["routes"] = [list(routes.shape), base64.b64encode(routes.tobytes()).decode()]
    return value


def _fields_from_json(value: Mapping[str, Any]) -> dict[str, Any]:
    value = dict(value)
    for name, dtype in _COLUMN_DTYPES.items():
        if name in value:
            value[name] = np.frombuffer(base64.b64decode(value[name]), dtype).tolist()
    if value["routes"] is not None:
        shape, text = value["routes"]
        value["routes"] = np.frombuffer(base64.b64decode(text), np.int8).reshape(shape)
    return value


def _sample_from_json(value: Mapping[str, Any], task: sample_lib.Task) -> sample_lib.Sample:
    fields = _fields_from_json(value)
    fields["prompt"] = tuple(fields["prompt"])
    fields["turn_rewards"] = [(place, reward) for place, reward in fields["turn_rewards"]]
    return sample_lib.Sample(task=task, **fields)


def _generation_from_json(value: Mapping[str, Any]) -> sample_lib.Generation:
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in _fields_from_json(value).items()
    }
    return sample_lib.Generation(**fields)


def _to_floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
