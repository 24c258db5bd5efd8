"""Generation batches: which tasks are sampled, what their groups are worth, which are trained on.

Plain Python over `rollout.Rollout`, on process 0. What comes out is a function of the weights, the
config and the state: groups are counted in the order in which they were begun, never in that of
their ends, which would favour short answers; and samples are cut off by counting tokens, not time.
"""

import base64
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from train import advantages, rl_config, rollout
from train import sample as sample_lib
from train.rewards import compose, curriculum, length_bias

Start = Callable[[sample_lib.Task, int], sample_lib.Episode]  # of a task and a window
_TRIES = 1000


@dataclasses.dataclass
class Group:
    """All samples of one task. number: counts groups. window: of their answers, in tokens.

    samples: None while unfinished; made: what unfinished ones said so far.
    """

    number: int
    source: str
    index: int
    window: int
    task: sample_lib.Task
    samples: list[sample_lib.Sample | None]
    made: list[sample_lib.Continuation | None]
    rewards: list[float] = dataclasses.field(default_factory=list)  # before penalties, valid ones

    @property
    def oldest(self) -> int | None:
        """Return the first version of the weights that wrote any of it."""
        versions = [v for one in (*self.samples, *self.made) if one for v in one.versions if v >= 0]
        return min(versions, default=None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Groups to train on, and what it took to have them, for the log."""

    groups: list[Group]
    metrics: dict[str, float]


class Collector:
    """Makes one batch after another.

    Args:
      config: of the run. tasks: by source. start: begins an episode. rewards: None where the
        environments give them all. state: of an earlier collector, which this one continues.
    """

    def __init__(
        self,
        config: rl_config.Run,
        tasks: Mapping[str, Sequence[sample_lib.Task]],
        start: Start,
        rewards: compose.Rewards | None,
        state: Mapping[str, Any] | None = None,
    ):
        state = state or {}
        self._config, self._rollout = config, config.rollout
        self._tasks, self._start, self._rewards = tasks, start, rewards
        sizes = {name: len(some) for name, some in tasks.items()}
        self._draws = curriculum.Draws(config.schedule(), sizes, state.get("draws"))
        self._pass_rates = self._bias = None
        if config.pass_rates is not None:
            self._pass_rates = curriculum.PassRates(config.pass_rates, state.get("pass_rates"))
        if config.length_bias is not None:
            self._bias = length_bias.LengthBias(config.length_bias, state.get("length_bias"))
        self._number = state.get("number", 0)
        self._ready = [self._read(one) for one in state.get("ready", [])]
        self._open = [self._read(one) for one in state.get("open", [])]

    def state(self) -> dict[str, Any]:
        """Return what continues this collector, JSON-able."""
        return {
            "draws": self._draws.state(),
            "pass_rates": self._pass_rates and self._pass_rates.state(),
            "length_bias": self._bias and self._bias.state(),
            "number": self._number,
            "ready": [_written(group) for group in self._ready],
            "open": [_written(group) for group in self._open],
        }

    def collect(
        self, sampler: rollout.Rollout, step: int, window: int, stopping: Callable[[], bool]
    ) -> Batch:
        """Sample until there are enough groups that teach something, or no more rounds.

        Raises:
          rollout.Stopped: `stopping` said so. length_bias.Paused: the judge wants looking after.
        """
        config, began = self._rollout, time.perf_counter()
        self._seen: list[Group] = []  # finished in this call
        times, rounds, waited = rollout.Times(), 0, 0.0
        while len(self._ready) < config.groups and rounds < config.max_rounds:
            missing = round(config.groups * config.oversample) - len(self._ready) - len(self._open)
            self._open += [self._draw(step, window) for _ in range(max(missing, 0))]
            self._scoring: list[tuple[Group, Any]] = []
            took = sampler.run(lambda: self._jobs(sampler.version), self._take, stopping=stopping)
            times = times.plus(took)
            since = time.perf_counter()
            for group, future in sorted(self._scoring, key=lambda pair: pair[0].number):
                self._score(group, future)
            waited += time.perf_counter() - since
            rounds += 1
        used = self._ready[: config.groups]
        self._ready = self._ready[config.groups :]
        if self._bias is not None:
            self._bias.check()
        secs = {
            "sampling_secs": times.total_secs - times.waiting_secs,
            "scoring_secs": waited,
            "waiting_secs": times.waiting_secs + waited,
            "collect_secs": time.perf_counter() - began,
        }
        return Batch(used, secs | self._metrics(used, times.tokens, rounds, sampler.version))

    # ---- parts

    def _draw(self, step: int, window: int) -> Group:
        for _ in range(_TRIES):
            source, index = self._draws.next(step)
            task = self._tasks[source][index]
            if self._pass_rates is None or self._pass_rates.keeps(task.id):
                number, size = self._number, self._rollout.group_size
                self._number += 1
                return Group(number, source, index, window, task, [None] * size, [None] * size)
        raise ValueError(
            f"pass_rates: got {_TRIES} tasks in a row that are too easy or too hard; wanted some "
            "that still teach. Widen the range, or add tasks."
        )

    def _jobs(self, version: int) -> Iterable[rollout.Job]:
        config = self._rollout
        for group in self._open:
            oldest = group.oldest
            last = oldest is not None and version + 1 - oldest > config.max_staleness
            cut = 0 if last else config.partial_tokens
            for i, sample in enumerate(group.samples):
                if sample is None:
                    seed = sample_seed(self._config.seed, group.number, i)
                    episode = self._start(group.task, group.window)
                    yield rollout.Job((group.number, i), episode, seed, group.made[i], cut)

    def _take(self, key: Any, result: sample_lib.Sample | rollout.Paused) -> Iterable[rollout.Job]:
        number, i = key
        group = next(one for one in self._open if one.number == number)
        if isinstance(result, rollout.Paused):
            group.made[i] = result.made
            return ()
        group.samples[i], group.made[i] = result, None
        if all(sample is not None for sample in group.samples):
            future = None if self._rewards is None else self._rewards.submit(group.samples)
            self._scoring.append((group, future))
        return ()

    def _score(self, group: Group, future: Any) -> None:
        """Give a finished group its rewards, and keep it if it teaches something."""
        samples = finished(group)
        if future is not None:
            for sample, score in zip(samples, future.result(), strict=True):
                take_score(sample, score)
        config = self._rollout
        for sample in samples:
            sample.valid &= sample.reward is not None and sample.status != "error"
            sample.valid &= not (config.mask_truncated and sample.status == "length")
            sample.valid &= not (config.mask_repetition and sample.status == "repetition")
        group.rewards = [
            sample.reward for sample in samples if sample.valid and sample.reward is not None
        ]
        if self._bias is not None:
            self._bias.push([len(s.tokens) for s in samples], [s.reward for s in samples])
        if self._pass_rates is not None:
            passed = sum(reward >= 1 for reward in group.rewards)
            self._pass_rates.push(group.task.id, passed, len(group.rewards))
        self._seen.append(group)
        self._open.remove(group)
        # As DAPO: what is the same before penalties teaches nothing.
        if not (config.dynamic and advantages.is_flat(group.rewards)):
            self._ready.append(group)
            self._ready.sort(key=lambda one: one.number)
        if config.overlong_buffer_tokens:
            for sample in samples:
                if sample.reward is not None:
                    penalty = advantages.overlong_penalty(
                        len(sample.tokens), group.window, config.overlong_buffer_tokens
                    )
                    sample.parts["overlong"] = penalty
                    sample.reward += penalty

    def _metrics(self, used: list[Group], tokens: int, rounds: int, version: int):
        trained = [sample for group in used for sample in finished(group)]
        oldest = [group.oldest for group in used]
        every = [reward for group in self._seen for reward in group.rewards]
        found = {
            # Of all that was sampled, before penalties: what the model can do.
            "reward_sampled": sum(every) / len(every) if every else math.nan,
            "rounds": rounds,
            "groups": len(used),
            "groups_sampled": len(self._seen),
            "groups_flat": sum(advantages.is_flat(group.rewards) for group in self._seen),
            "groups_waiting": len(self._ready),
            "groups_open": len(self._open),
            # Every token that was paid for, and those that are trained on.
            "tokens_sampled": tokens,
            "tokens_trained": sum(sum(sample.mask) for sample in trained if sample.valid),
            "staleness_max": max((version - v for v in oldest if v is not None), default=0),
        }
        found = {name: float(value) for name, value in found.items()}
        for part in (self._pass_rates, self._bias):
            found |= {} if part is None else part.metrics()
        return found | ({} if self._rewards is None else _floats(self._rewards.counts()))

    def _read(self, value: Mapping[str, Any]) -> Group:
        source, index = value["source"], value["index"]
        task = self._tasks[source][index]
        samples = [None if one is None else _sample(one, task) for one in value["samples"]]
        made = [None if one is None else _continuation(one) for one in value["made"]]
        number, window = value["number"], value["window"]
        return Group(number, source, index, window, task, samples, made, value["rewards"])


def take_score(sample: sample_lib.Sample, score: sample_lib.Score) -> None:
    """Add a reward to what an environment gave; a failed one makes the sample invalid."""
    sample.parts |= score.parts
    if score.value is None:
        sample.valid = False
    else:
        sample.reward = (sample.reward or 0.0) + score.value


def finished(group: Group) -> list[sample_lib.Sample]:
    """Return a finished group's samples."""
    return [sample for sample in group.samples if sample is not None]


def sample_seed(seed: int, group: int, index: int) -> int:
    """Return the seed of one sample of a run: of 2^32, neighbours far apart."""
    return (seed * 0xC2B2AE35 + group * 0x9E3779B9 + index * 0x27D4EB2F) % 2**32


# ---- JSON

_COLUMNS = {
    "tokens": np.int32,
    "mask": np.int8,
    "logprobs": np.float32,
    "raw": np.float32,
    "versions": np.int32,
}


def _written(group: Group) -> dict[str, Any]:
    return {
        "number": group.number,
        "source": group.source,
        "index": group.index,
        "window": group.window,
        "rewards": group.rewards,
        "samples": [None if one is None else _to_json(one, ("task",)) for one in group.samples],
        "made": [None if one is None else _to_json(one) for one in group.made],
    }


def _to_json(one: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    value = {
        f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name not in leave_out
    }
    for name, dtype in _COLUMNS.items():
        if name in value:
            value[name] = base64.b64encode(np.asarray(value[name], dtype).tobytes()).decode()
    if value["routes"] is not None:
        text = base64.b64encode(value["routes"].tobytes()).decode()
        value["routes"] = [list(value["routes"].shape), text]
    return value


def _from_json(value: Mapping[str, Any]) -> dict[str, Any]:
    value = dict(value)
    for name, dtype in _COLUMNS.items():
        if name in value:
            value[name] = np.frombuffer(base64.b64decode(value[name]), dtype).tolist()
    if value["routes"] is not None:
        shape, text = value["routes"]
        value["routes"] = np.frombuffer(base64.b64decode(text), np.int8).reshape(shape)
    return value


def _sample(value: Mapping[str, Any], task: sample_lib.Task) -> sample_lib.Sample:
    fields = _from_json(value)
    fields["prompt"] = tuple(fields["prompt"])
    fields["turn_rewards"] = [(place, reward) for place, reward in fields["turn_rewards"]]
    return sample_lib.Sample(task=task, **fields)


def _continuation(value: Mapping[str, Any]) -> sample_lib.Continuation:
    fields = _from_json(value)
    return sample_lib.Continuation(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    )


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
