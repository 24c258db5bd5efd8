"""Generation batches of a sampler that ends episodes in any order, without a model."""

import concurrent.futures
import dataclasses
import itertools
import json
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from train.rl import advantages, groups, length_schedule, rollout, tasks
from train.rl import config as rl_config
from train.rl import sample as sample_lib
from train.rl.rewards import length_bias

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


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    order=st.integers(0, 10**6),
    flat=st.sets(st.sampled_from([task.id for task in TASKS]), max_size=6),
    oversample=st.sampled_from([1.0, 1.5, 2.0]),
    slices=st.sampled_from([0, 2, 3]),
)
def test_the_order_of_ends_decides_nothing(order, flat, oversample, slices):
    made = []
    for given_order in (None, order):
        one = collector(by_task(flat), oversample=oversample, partial_tokens=slices)
        sampler, batches = Sampler(given_order), []
        for step in range(3):
            batch = collect(one, sampler, step)
            secs = [name for name in batch.metrics if name.endswith("_secs")]
            assert len(secs) == 4
            counted = {k: v for k, v in batch.metrics.items() if k not in secs}
            batches.append((told(batch), json.dumps(counted, sort_keys=True)))
            sampler.version += 1
        made.append((batches, text_of(one)))
    assert made[0] == made[1]


def test_short_answers_do_not_go_first():
    # Later groups answer shorter and shorter, and the shortest ends first.
    one = collector(oversample=2.0)
    batch = collect(one, Sampler(order=3, length=lambda seed: 15 - seed % 13))
    assert [group.group_id for group in batch.groups] == [0, 1]
    assert batch.metrics["groups_waiting"] == 2
    again = collect(one, Sampler(), 1)
    assert [group.group_id for group in again.groups] == [2, 3]
    assert again.metrics["rounds"] == 0
    assert again.metrics["tokens_sampled"] == 0


def test_flat_groups_are_replaced_and_paid_for():
    ids = [group.task.id for group in collect(collector(number=4), Sampler()).groups]
    one, sampler = collector(by_task(ids[:2])), Sampler()
    batch = collect(one, sampler)
    assert [group.task.id for group in batch.groups] == ids[2:]
    assert [group.group_id for group in batch.groups] == [2, 3]
    metrics = batch.metrics
    assert (metrics["rounds"], metrics["groups_sampled"], metrics["groups_zero_variance"]) == (
        2,
        4,
        2,
    )
    trained = sum(len(s.tokens) for g in batch.groups for s in groups.finished_samples(g))
    assert metrics["tokens_trained"] == trained
    kept = [reward for group in batch.groups for reward in group.rewards]
    wanted = np.mean([0.5] * 2 * SIZE + kept)
    np.testing.assert_allclose(metrics["reward_sampled"], wanted)
    assert batch.mean_reward == metrics["reward_sampled"]
    everything = collect(collector(number=4), Sampler())
    assert metrics["tokens_sampled"] == everything.metrics["tokens_trained"] > trained


def test_refilling_ends_at_max_rounds():
    one, sampler = collector(lambda sample: 1.0, max_rounds=3), Sampler()
    batch = collect(one, sampler)
    assert (batch.groups, sampler.calls) == ([], 3)
    assert (batch.metrics["groups_sampled"], batch.metrics["groups"]) == (6, 0)
    assert batch.metrics["tokens_trained"] == 0
    assert len(collect(collector(lambda sample: 1.0, dynamic=False), Sampler()).groups) == 2


def test_a_failed_reward_is_not_a_reward_of_0():
    fails = []

    def value(sample):
        fails.append(sample)
        return None if len(fails) % SIZE == 1 else len(fails) / 10

    batch = collect(collector(value), Sampler())
    for group in batch.groups:
        first, *others = groups.finished_samples(group)
        assert (first.valid, first.reward) == (False, None)
        assert all(one.valid and one.reward > 0 for one in others)
        assert len(group.rewards) == SIZE - 1
    assert batch.metrics["tokens_trained"] == sum(
        len(s.tokens) for g in batch.groups for s in groups.finished_samples(g) if s.valid
    )
    assert batch.metrics["reward/error/exact/crash"] == 0
    # One failure leaves two answers of the same worth: nothing is learnt from them.
    calls = []
    one = collector(lambda s: calls.append(s) or (None if len(calls) % SIZE == 1 else 1.0))
    assert collect(one, Sampler()).groups == []


@pytest.mark.parametrize(
    ("option", "status"), [("mask_truncated", "length"), ("mask_repetition", "repetition")]
)
def test_masked_ends_count_for_nothing(option, status):
    def ends(seed):
        return status if seed % 3 == 0 else "stop"

    made = {}
    for on in (False, True):
        # Truncated are those that the window cuts off.
        sampler = Sampler(length=lambda seed: 99 if ends(seed) == "length" else 5, status=ends)
        made[on] = collect(collector(number=6, **{option: on}), sampler)
        found = [s for g in made[on].groups for s in groups.finished_samples(g)]
        masked = [s for s in found if s.status == status]
        assert masked
        assert all(s.valid == (not (on and s.status == status)) for s in found)
        assert all(s.reward is not None for s in masked)
        for group in made[on].groups:
            assert len(group.rewards) == sum(s.valid for s in groups.finished_samples(group))


def test_an_error_of_the_sampler_is_never_trained_on():
    sampler = Sampler(status=lambda seed: "error" if seed % 2 else "stop")
    found = [s for g in collect(collector(), sampler).groups for s in groups.finished_samples(g)]
    assert {(s.status, s.valid) for s in found} == {("error", False), ("stop", True)}


def test_penalties_of_length_do_not_make_a_group_teach():
    lengths = {"length": lambda seed: 11 + seed % 10}
    batch = collect(collector(lambda s: 1.0, overlong_buffer_tokens=10), Sampler(**lengths))
    assert batch.groups == []
    batch = collect(collector(overlong_buffer_tokens=10), Sampler(**lengths))
    seen = set()
    for group in batch.groups:
        for sample, before in zip(groups.finished_samples(group), group.rewards, strict=True):
            penalty = advantages.overlong_penalty(len(sample.tokens), 20, 10)
            assert sample.parts == {"exact": before, "overlong": penalty}
            assert sample.reward == before + penalty
            seen.add(penalty)
    assert len(seen) > 2


def test_partial_answers_go_on_under_new_weights_up_to_a_bound():
    one = collector(partial_tokens=2, max_staleness=1, max_rounds=1, dynamic=False)
    sampler = Sampler(length=lambda seed: 7, version=5)
    first = collect(one, sampler)
    assert first.groups == []
    assert first.metrics["groups_open"] == 2
    assert first.metrics["tokens_sampled"] == 2 * 2 * SIZE
    sampler.version = 6
    second = collect(one, sampler, 1)
    assert second.metrics["tokens_sampled"] == 2 * 5 * SIZE  # only what is new
    assert second.metrics["tokens_trained"] == 2 * 7 * SIZE
    assert second.metrics["staleness_max"] == 1
    for group in second.groups:
        for sample in groups.finished_samples(group):
            assert sample.versions.tolist() == [5, 5, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("bound", [0, 1, 2, 3])
def test_nothing_trained_on_is_staler_than_the_bound(bound):
    one = collector(partial_tokens=1, max_staleness=bound, max_rounds=1, dynamic=False)
    sampler, ages = Sampler(length=lambda seed: 6, version=3), []
    for step in range(6):
        batch = collect(one, sampler, step)
        assert batch.metrics["staleness_max"] <= bound
        ages += [sampler.version - group.oldest_version for group in batch.groups]
        sampler.version += 1
    assert set(ages) == {bound}


def test_a_collector_goes_on_from_its_state():
    def value(sample):
        return float(len(sample.tokens) > 3 and int(sample.tokens[-1]) % 2)

    given = {
        "partial_tokens": 3,
        "oversample": 4.0,
        "max_rounds": 2,
        "max_staleness": 3,
        "pass_rates": rl_config.PassRateConfig(least=3),
        "length_bias": rl_config.LengthBiasConfig(),
    }
    length = {"length": lambda seed: 1 + seed % 14}
    one, sampler = collector(value, **given), Sampler(4, **length)
    waiting = opened = finished = 0
    for step in range(6):
        batch = collect(one, sampler, step)
        waiting += batch.metrics["groups_waiting"]
        text, state = text_of(one), written(one)
        opened += sum(len(group["begun"]) for group in state[0]["open"]["groups"])
        finished += sum(len(group["finished"]) for group in state[0]["open"]["groups"])
        other = collector(value, state=state, **given)
        assert text_of(other) == text
        sampler.version += 1
        # The copy runs first, on another machine that ends answers in another order.
        twin = Sampler(9, **length, version=sampler.version)
        expected = told(collect(other, twin, step + 1))
        state_after = text_of(other)
        fresh = collector(value, state=state, **given)
        same = Sampler(None, **length, version=sampler.version)
        assert told(collect(fresh, same, step + 1)) == expected
        assert text_of(fresh) == state_after
    assert min(waiting, opened, finished) > 0  # all kinds of what is kept were there


def test_a_batch_that_was_stopped_leaves_nothing_behind():
    changes = {
        "number": 3,
        "partial_tokens": 3,
        "overlong_buffer_tokens": 20,
        "pass_rates": rl_config.PassRateConfig(least=3),
    }
    ids = [group.task.id for group in collect(collector(number=6), Sampler()).groups]
    one, sampler = collector(by_task(ids[1:5]), **changes), Sampler(1)
    collect(one, sampler)
    before, state = text_of(one), written(one)
    assert state[0]["ready"]["groups"] or state[0]["open"]["groups"]
    asked = []
    twin = collector(by_task(ids[1:5]), state=state, **changes)
    collect(twin, Sampler(version=1), 1, lambda: asked.append(1))
    assert len(asked) > 10
    for calls in range(0, len(asked), 3):
        left = iter([False] * calls)
        with pytest.raises(rollout.RolloutStopped):
            collect(one, Sampler(calls, version=1), 1, lambda left=left: next(left, True))
        assert text_of(one) == before
    twin = collector(by_task(ids[1:5]), state=state, **changes)
    batches = [told(collect(c, Sampler(version=1), 1)) for c in (one, twin)]
    assert batches[0] == batches[1]


def test_tasks_that_are_too_easy_or_too_hard_are_left_out():
    easy, hard = TASKS[0].id, TASKS[1].id
    rewards = {easy: 1.0, hard: 0.0}

    def value(sample):
        return rewards.get(sample.task.id, float(sample.tokens[0] % 2))

    limits = rl_config.PassRateConfig(low=0.0, high=0.9, least=SIZE)
    one, seen = collector(value, number=8, max_rounds=1, pass_rates=limits, dynamic=False), []
    for step in range(3):
        batch = collect(one, Sampler(), step)
        seen.append([group.task.id for group in batch.groups])
    assert {easy, hard} < set(seen[0])
    assert not {easy, hard} & {*seen[1], *seen[2]}
    assert batch.metrics["curriculum/tasks_dropped"] >= 2


def test_a_task_that_was_too_hard_comes_back():
    hard = TASKS[1].id

    def value(sample):
        return 0.0 if sample.task.id == hard and step < 4 else float(sample.tokens[0] % 2)

    limits = rl_config.PassRateConfig(low=0.0, high=2.0, least=SIZE, retry_batches=4)
    one, seen = collector(value, number=8, max_rounds=1, pass_rates=limits, dynamic=False), []
    for step in range(6):
        batch = collect(one, Sampler(), step)
        seen.append(hard in [group.task.id for group in batch.groups])
        one = collector(
            value, state=written(one), number=8, max_rounds=1, pass_rates=limits, dynamic=False
        )
    assert seen[:5] == [True, False, False, False, True]


def test_an_exhausted_source_is_an_event():
    limits = rl_config.PassRateConfig(low=0.0, high=0.9, least=SIZE)
    one = collector(lambda s: 1.0, number=8, max_rounds=1, pass_rates=limits)
    assert collect(one, Sampler()).events == ()
    second = collect(one, Sampler(), 1)
    assert second.metrics["groups_sampled"] == 8  # all tasks came back
    (event,) = second.events
    assert (event["source"], event["readmitted"]) == ("s", 8)
    assert "8 tasks of s in a row are too easy or too hard; they come back" in event["pass_rates"]
    assert collect(one, Sampler(), 2).events  # each batch tells of itself alone


@pytest.mark.parametrize(
    ("answers", "counts"),
    [
        # Right before the window's end, and the rest cut off: not an easy task.
        ([1.0, 0.0, 0.0], [1, 3]),
        ([1.0, 1.0, 1.0], [3, 3]),
        ([0.0, 0.0, 0.0], [0, 3]),
        ([1.0, None, 0.0], [1, 2]),  # a failure of the reward says nothing of the answer
    ],
)
def test_answers_that_were_cut_off_are_judged(answers, counts):
    """The first answer is whole, and the window cuts the others off."""
    seeds = [groups.sample_seed(0, 0, i) for i in range(SIZE)]
    sampler = Sampler(length=lambda seed: 5 if seed == seeds[0] else 99)
    numbers = itertools.count()
    one = collector(
        lambda sample: answers[next(numbers)], number=1, max_rounds=1, mask_truncated=True,
        pass_rates=rl_config.PassRateConfig(),
    )  # fmt: skip
    collect(one, sampler)
    ((passed, total, _),) = one.state()[0]["pass_rates"].values()
    assert [passed, total] == counts


EXACT, REPETITION = ("exact", 1.0, ()), ("repetition", 0.1, ())


@pytest.mark.parametrize(
    ("terms", "parts", "named"),
    [
        ((EXACT, REPETITION), ("exact", "repetition"), ()),
        ((("format", 0.1, ()), EXACT), ("exact", "format"), ()),
        ((("exact", 0.5, ()), REPETITION), ("exact", "repetition"), ()),
        ((("graded", 1.0, ()), EXACT), ("exact", "graded"), (("s", "exact"),)),
        (
            (("verl", (("acc", 1.0), ("style", 0.1)), ()),),
            ("verl/acc", "verl/style"),
            (),
        ),
        ((("verl", 1.0, ()),), ("verl/acc", "verl/style"), (("*", "verl/acc"),)),
    ],
)
def test_outcomes_decide_and_not_the_shaped_sum(terms, parts, named):
    """The first of the parts says whether an answer is right, the second shapes the sum."""
    outcome, shaping = parts
    shapes = itertools.cycle([0.0, -0.03, -0.02])

    def value(right):
        return lambda sample: {outcome: float(right(sample)), shaping: next(shapes)}

    changes = {"terms": terms, "outcomes": named, "pass_rates": rl_config.PassRateConfig()}
    # All are right, and nothing is to be learnt, whatever the sums are.
    one = collector(value(lambda sample: True), max_rounds=1, **changes)
    batch = collect(one, Sampler())
    assert batch.groups == []
    assert batch.metrics["groups_zero_variance"] == 2
    assert [counts[:2] for counts in one.state()[0]["pass_rates"].values()] == [[3, 3]] * 2
    # One of three is right.
    numbers = itertools.count()
    one = collector(value(lambda sample: next(numbers) % 3 == 0), max_rounds=1, **changes)
    batch = collect(one, Sampler())
    assert [group.group_id for group in batch.groups] == [0, 1]
    assert [counts[:2] for counts in one.state()[0]["pass_rates"].values()] == [[1, 3]] * 2
    for group in batch.groups:
        samples = groups.finished_samples(group)
        assert [sample.outcome for sample in samples] == [1, 0, 0]
        assert group.rewards == [sum(sample.parts.values()) for sample in samples]


def test_an_environments_reward_is_the_outcome_of_an_agent():
    def act(task, window):
        sample = sample_lib.Sample(task, (1, 2))
        sample.append_generated((yield sample_lib.Generate(sample.prompt, window)))
        sample.reward = float(sample.tokens[0] % 2)
        sample.parts = {"final": sample.reward}
        return sample

    given = dataclasses.replace(
        config(number=8, terms=(("format", 1.0, ()),), dynamic=False),
        agent=rl_config.AgentConfig("lookup"),
    )
    score = iter(range(100))
    rewards = Rewards(lambda sample: {"format": 0.1 * next(score)})
    batch = collect(groups.GroupCollector(given, {"s": TASKS}, act, rewards), Sampler())
    for group in batch.groups:
        for sample in groups.finished_samples(group):
            assert sample.outcome == sample.tokens[0] % 2
            assert sample.reward == sample.outcome + sample.parts["format"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ((("s", "exakt"),), "source 's': got 'exakt'; wanted one of exact, repetition"),
        ((("s", "final"),), "source 's': got 'final'; wanted one of exact, repetition"),
        ((("t", "exact"),), r"got the source 't'; wanted some of \['s'\]"),
    ],
)
def test_outcomes_that_no_sample_has(named, message):
    with pytest.raises(ValueError, match=message):
        config(terms=(EXACT, REPETITION), outcomes=named)


def test_a_batch_whose_rewards_all_failed_ends_the_run():
    one = collector(lambda sample: None, max_rounds=2)
    before = text_of(one)
    with pytest.raises(groups.NothingToTrainOn) as caught:
        collect(one, Sampler())
    samples = 2 * 2 * SIZE
    first = one.state()[0]["number"]
    assert str(caught.value).startswith(
        f"batch 1: got no reward for any of its {samples} samples; wanted some. The first is of "
        "task t"
    )
    assert "broken" in str(caught.value)
    # The collector is as it was: the next start samples the batch again.
    assert (text_of(one), first) == (before, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_other_failures_of_a_whole_batch_end_the_run(dynamic):
    changes = {"max_rounds": 1, "dynamic": dynamic}
    with pytest.raises(groups.NothingToTrainOn, match="the engine could not finish the answer"):
        collect(collector(**changes), Sampler(status=lambda seed: "error"))
    with pytest.raises(groups.NothingToTrainOn, match="got the parts other; wanted its outcome"):
        collect(collector(lambda sample: {"other": 1.0}, **changes), Sampler())
    # One score is enough to go on: the others may have failed by accident.
    numbers = itertools.count()
    batch = collect(collector(lambda s: None if next(numbers) else 1.0, **changes), Sampler())
    assert batch.metrics["samples_failed"] == 2 * SIZE - 1
    # What counts for nothing by the config is no failure.
    assert collect(collector(mask_truncated=True, **changes), Sampler(length=lambda seed: 99))


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize("changes", [{"partial_tokens": 2}, {"oversample": 3.0}])
def test_groups_that_waited_too_long_are_dropped_and_counted(bound, changes):
    given = {"oversample": 3.0, "max_rounds": 1, "dynamic": False, **changes}
    one = collector(max_staleness=bound, **given)
    sampler, dropped, ages = Sampler(length=lambda seed: 6), 0, []
    for step in range(8):
        batch = collect(one, sampler, step)
        assert batch.metrics["staleness_max"] <= bound
        dropped += batch.metrics["groups_stale"]
        ages += [sampler.version - group.oldest_version for group in batch.groups]
        sampler.version += 1
    assert max(ages) == bound
    # Six groups are made at a time, and two are used in each batch.
    assert (dropped > 0) == (bound < 2 or "partial_tokens" in changes)


def test_the_curriculum_chooses_by_the_batchs_number():
    some = {"s": TASKS[:4], "late": TASKS[4:]}
    plan = rl_config.CurriculumConfig(((0, (("s", 1.0),)), (10, (("late", 1.0),))))
    given = config(number=6)
    given = rl_config.RlConfig(
        **vars(given)
        | {
            "sources": (*given.sources, tasks.TaskSource("late", "l.jsonl")),
            "curriculum": plan,
            "rewards": rl_config.RewardsConfig(sources=(("*", (("exact", 1.0, ()),)),)),
        }
    )
    one = groups.GroupCollector(given, some, start, Rewards(varied))
    assert {group.source for group in collect(one, Sampler(), 0).groups} == {"s"}
    assert {group.source for group in collect(one, Sampler(), 5).groups} == {"s", "late"}
    assert {group.source for group in collect(one, Sampler(), 10).groups} == {"late"}


def longer_is_better(name):
    """Return rewards of this name that rise with length, and a form that never varies."""
    return lambda sample: {name: float(len(sample.tokens)), "format": 0.1}


PAUSE = rl_config.LengthBiasConfig(window=4, least=2, pause=True)
UNEVEN = {"length": lambda seed: 1 + seed % 11}


@pytest.mark.parametrize("judge", ["graded", "pairwise"])
def test_a_judge_that_likes_length_pauses_the_run(judge):
    terms = ((judge, 1.0, ()), ("format", 0.1, ()))
    one = collector(longer_is_better(judge), terms=terms, length_bias=PAUSE)
    before = text_of(one)
    with pytest.raises(length_bias.LengthBiasPause, match=r"judge of s: .* Recalibrate the judge"):
        collect(one, Sampler(**UNEVEN))
    assert text_of(one) == before


@pytest.mark.parametrize("name", ["exact", "mathematics", "logic", "code"])
def test_right_answers_may_be_longer_where_rules_judge(name):
    terms = ((name, 1.0, ()), ("format", 0.1, ()))
    one = collector(longer_is_better(name), terms=terms, length_bias=PAUSE)
    for step in range(4):
        batch = collect(one, Sampler(**UNEVEN), step)
        assert not any(name.startswith("reward/length/") for name in batch.metrics)


def test_each_judge_has_a_monitor_of_its_own():
    some = {"rules": TASKS[:3], "liked": TASKS[3:6], "fair": TASKS[6:]}
    tasks_by_source = {
        name: [dataclasses.replace(task, source=name) for task in of_source]
        for name, of_source in some.items()
    }
    sources = tuple(tasks.TaskSource(name, f"{name}.jsonl") for name in some)
    rewards = (("rules", (EXACT,)), ("*", (("function", 1.0, (("path", "m:f"),)), REPETITION)))
    given = dataclasses.replace(
        config(number=8, max_rounds=1), sources=sources,
        rewards=rl_config.RewardsConfig(sources=rewards),
        length_bias=dataclasses.replace(PAUSE, pause=False, judges=("function",)),
    )  # fmt: skip

    def value(sample):
        name = "exact" if sample.task.source == "rules" else "function"
        return {name: varied(sample) if sample.task.source == "fair" else len(sample.tokens)}

    one = groups.GroupCollector(given, tasks_by_source, start, Rewards(value))
    for step in range(4):
        batch = collect(one, Sampler(**UNEVEN), step)
    assert batch.metrics["reward/length/liked/alarm"] == 1
    assert batch.metrics["reward/length/liked/win_rate"] == 1
    assert batch.metrics["reward/length/fair/win_rate"] < 1
    assert "reward/length/rules/win_rate" not in batch.metrics
    again = groups.GroupCollector(given, tasks_by_source, start, Rewards(value), *written(one))
    assert text_of(again) == text_of(one)
