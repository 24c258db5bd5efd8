"""What groups are judged by: outcomes, failures, pass rates, age, and judges that like length."""

import dataclasses
import itertools

import pytest
from groups_support import (
    SIZE,
    TASKS,
    Rewards,
    Sampler,
    collect,
    collector,
    config,
    start,
    text_of,
    varied,
    written,
)

from train.rl import config as rl_config
from train.rl import groups, tasks
from train.rl import sample as sample_lib
from train.rl.rewards import length_bias


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
