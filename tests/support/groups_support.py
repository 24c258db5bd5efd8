"""Collectors over a sampler that ends episodes in any order, without a model."""

import concurrent.futures
import json
import random

import numpy as np

from train.rl import config as rl_config
from train.rl import groups, length_schedule, rollout, tasks
from train.rl import sample as sample_lib

SIZE = 3
TASKS = [sample_lib.Task(f"t{i}", ({"role": "user", "content": str(i)},), "s") for i in range(8)]


class Sampler:
    """Answers like `rollout.RolloutSampler`: every token is a function of seed, place and version.

    order: of the ends of what runs side by side, as `random.Random.shuffle` of this seed; None is
    that of the beginnings. length: of an answer, by its seed. slow: answers are the longer.
    """

    def __init__(self, order=None, length=lambda seed: 1 + seed % 7, status=None, version=0):
        self.version, self.runs, self.calls = version, [], 0
        self._source_indices = None if order is None else random.Random(order)
        self._length, self._status = length, status or (lambda seed: "stop")

    def run(self, make, on_done, sampling=None, should_stop=lambda: False):
        self.calls += 1
        waiting, times = list(make()), rollout.RolloutStats()
        self.runs.append([job.key for job in waiting])
        while waiting:
            if should_stop():
                raise rollout.RolloutStopped
            if self._source_indices is not None:
                self._source_indices.shuffle(waiting)
            job = waiting.pop(0)
            result, tokens = self._answer(job)
            times.num_tokens += tokens
            waiting += on_done(job.key, result)
        return times

    def _answer(self, job):
        asked = next(job.episode)
        made, length = job.partial, min(self._length(job.seed), asked.max_tokens)
        first = len(made.tokens) if made else 0
        last = min(first + job.slice_tokens, length) if job.slice_tokens else length
        ids = [(job.seed + 31 * i) % 997 for i in range(first, last)]
        logprobs = [float(np.float32(-1 / (1 + i))) for i in ids]
        full = last == asked.max_tokens and self._length(job.seed) > last
        status = "length" if last < length or full else self._status(job.seed)
        routes = np.arange((len(asked.tokens) + last - 1) * 4).reshape(-1, 2, 2).astype(np.int8)
        columns = {
            "tokens": (*(made.tokens if made else ()), *ids),
            "logprobs": (*(made.logprobs if made else ()), *logprobs),
            "versions": (*(made.versions if made else ()), *[self.version] * len(ids)),
            "raw": (*(made.raw if made else ()), *logprobs),
        }
        if last < length:
            job.episode.close()
            paused = sample_lib.Generation(**columns, status=status)
            return rollout.PausedEpisode(paused), len(ids)
        whole = sample_lib.Generation(**columns, status=status, routes=routes)
        try:
            job.episode.send(whole)
        except StopIteration as stop:
            return stop.value, len(ids)
        raise AssertionError("one turn")


class Rewards:
    """Scores at once: what `value` makes of a sample, or a failure where that is None.

    A mapping that it makes has the parts, which are summed up.
    """

    def __init__(self, value):
        self.value, self.order = value, []

    def submit(self, samples):
        self.order.append(samples[0].task.id)
        scores = [
            sample_lib.RewardScore(sum(value.values()), value)
            if isinstance(value, dict)
            else sample_lib.RewardScore(
                value, {"exact": value or 0.0}, "" if value is not None else "broken"
            )
            for value in map(self.value, samples)
        ]
        future = concurrent.futures.Future()
        future.set_result(scores)
        return future

    def failure_counts(self):
        return {"reward/error/exact/crash": 0}


def start(task, window):
    sample = sample_lib.Sample(task, (1, 2, int(task.id[1:])))
    made = yield sample_lib.Generate(sample.prompt, window)
    sample.append_generated(made)
    return sample


def varied(sample):
    """Return rewards that differ within every group."""
    return float(sample.tokens.sum() % 101) / 100


def by_task(flat):
    """Return rewards that are the same for the tasks of these ids."""
    return lambda sample: 0.5 if sample.task.id in flat else varied(sample)


def config(number=2, **changes):
    fields = ("pass_rates", "curriculum", "length_bias", "outcomes")
    more = {k: changes.pop(k) for k in fields if k in changes}
    terms = changes.pop("terms", (("exact", 1.0, ()),))
    limits = length_schedule.LengthSchedule((changes.pop("window", 20),))
    fields = {"group_size": SIZE, **changes}
    return rl_config.RlConfig(
        checkpoint="c", batches=9, sources=(tasks.TaskSource("s", "s.jsonl"),),
        rollout=rl_config.RolloutConfig(number, limits, 8, **fields),
        update=rl_config.UpdateConfig(1e-3, minibatches=1),
        rewards=rl_config.RewardsConfig(sources=(("s", terms),)), **more,
    )  # fmt: skip


def collector(value=varied, state=None, some=None, **changes):
    given = config(**changes)
    return groups.GroupCollector(
        given, some or {"s": TASKS}, start, Rewards(value), *(state or (None, None))
    )


def written(one):
    """Return a collector's state as a checkpoint keeps it: JSON, and arrays by name."""
    table, columns = one.state()
    return json.loads(json.dumps(table)), columns


def text_of(one):
    """Return a collector's state as one text, to compare."""
    table, columns = one.state()
    arrays = {name: (str(x.dtype), x.tolist()) for name, x in sorted(columns.items())}
    return json.dumps([table, arrays], sort_keys=True)


def collect(one, sampler, step=0, stopping=lambda: False, window=20):
    return one.collect(sampler, step, window, stopping)


COLUMNS = ("prompt", "tokens", "mask", "logprobs", "versions", "routes")


def told(batch):
    """Return all of a batch that training sees."""
    return [
        (group.group_id, group.task.id, group.rewards, [
            (*(getattr(s, name).tolist() for name in COLUMNS), s.status, s.reward, s.parts, s.valid)
            for s in groups.finished_samples(group)
        ])
        for group in batch.groups
    ]  # fmt: skip
