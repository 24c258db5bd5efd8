"""Generation batches of a sampler that ends episodes in any order, without a model."""

import json

import hypothesis
import numpy as np
import pytest
from groups_support import (
    SIZE,
    TASKS,
    Rewards,
    Sampler,
    by_task,
    collect,
    collector,
    config,
    start,
    text_of,
    told,
    varied,
    written,
)
from hypothesis import strategies as st

from train.rl import advantages, groups, rollout, tasks
from train.rl import config as rl_config


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
