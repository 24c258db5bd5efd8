"""Where sequences go when rows, slots and pages are split over groups of devices."""

import dataclasses

import pytest
from scheduler_support import answer, chunk_tokens_of, make_scheduler, spans, step

from infer import config as config_lib
from infer.scheduling import id_pool
from infer.scheduling import plan as plan_lib


def make(num_partitions=2, **changes):
    """Return a scheduler of four rows and 40 pages in all, and 3 slots in each partition."""
    sizes = {"num_slots": 3, "num_pages": 40 // num_partitions, "max_rows": 4}
    return make_scheduler(num_partitions=num_partitions, **sizes | changes)


def partitions_of(plan):
    return {entry.sequence_id: entry.partition for entry in plan.entries}


def end(sched, sequence_id):
    """Let a request end at its limit."""
    for _ in range(50):
        if sequence_id not in sched._sequences:
            return
        step(sched)
    raise AssertionError("no end")


@pytest.mark.parametrize(
    ("total", "num_partitions", "share"),
    [
        ((64, 0, 32, 4096), 64, (1, 64, 1)),  # as many pages as one sequence has
        ((64, 1000, 32, 4096), 1, (64, 1000, 32)),
        ((64, 1000, 30, 4096), 4, (16, 250, 8)),
        ((65, 1000, 0, 4096), 8, (9, 125, 0)),
        ((64, 100, 2, 4096), 8, (8, 64, 1)),  # not 13: a sequence of 4,096 tokens must fit
        ((64, 40, 2, 4096), 8, (8, 40, 1)),  # which did not fit before either
    ],
)
def test_shares_of_a_partition(total, num_partitions, share):
    rows, pages, snapshots, length = total
    config = config_lib.EngineConfig(
        max_rows=rows, num_pages=pages, num_snapshots=snapshots, max_length=length
    )
    part = config.split(num_partitions)
    assert (part.max_rows, part.total_pages, part.num_snapshots) == share
    assert (
        dataclasses.replace(part, max_rows=rows, num_pages=pages, num_snapshots=snapshots) == config
    )


def test_ids_of_a_later_partition():
    pool = id_pool.IdPool(3, first=5)
    assert pool.allocate(3) == [5, 6, 7]
    pool.release([6])
    assert pool.num_free == 1
    for stranger in (4, 6, 8):
        with pytest.raises(RuntimeError, match=f"got id {stranger}, which is free"):
            pool.release([stranger])


def test_rows_go_by_length():
    lengths = [40, 1, 33, 9, 2, 40, 15]
    rows = tuple(
        plan_lib.DecodeRow(number, number, tuple(range(length)), 99, partition=number % 2)
        for number, length in enumerate(lengths)
    )
    plan = plan_lib.StepPlan(decode_rows=rows, max_steps=1)
    # Partition 0 has 40, 33, 2, 15 pages, partition 1 has 1, 9, 40. 33 and 40 keep their order.
    assert plan.assign_rows(2, 8) == [2, 8, 3, 9, 0, 10, 1]


def test_rows_of_a_partition_lie_together():
    sched = make(cache_bytes=0)
    for number in range(4):
        sched.submit(number, [number], 9)
    plan = step(sched)
    assert partitions_of(plan) == {0: 0, 1: 1, 2: 0, 3: 1}  # the one with the fewest
    # A partition's slots are 4 ids and its pages 21, of which padding has the first.
    assert [chunk.slot for chunk in plan.prefill_chunks] == [1, 5, 2, 6]
    assert [chunk.pages for chunk in plan.prefill_chunks] == [(1,), (22,), (2,), (23,)]
    assert plan.assign_rows(2, 8) == [0, 8, 1, 9]
    assert plan.count_rows(2) == [2, 2]
    sched.cancel(0)
    sched.submit(4, [4], 9)
    assert partitions_of(step(sched)) == {1: 1, 2: 0, 3: 1}
    assert partitions_of(step(sched)) == {4: 0}


def test_each_partition_has_rows_of_its_own_in_a_prefill():
    sched = make(cache_bytes=0)
    for name in "abc":
        sched.submit(name, chunk_tokens_of(name * 4), 1)
    plan = step(sched)
    assert spans(plan) == {"a": (0, 16), "b": (0, 16)}
    assert partitions_of(plan) == {"a": 0, "b": 1}
    assert spans(step(sched)) == {"c": (0, 16)}


def test_a_request_goes_where_its_prefix_is():
    sched = make()
    sched.submit("a", chunk_tokens_of("xyz"), 1)
    sched.submit("b", chunk_tokens_of("abc") + [1], 1)
    step(sched)
    end(sched, "a")
    end(sched, "b")
    sched.submit("c", chunk_tokens_of("abc") + [2], 9)
    plan = step(sched)
    assert spans(plan) == {"c": (12, 13)}
    assert partitions_of(plan) == {"c": 1}
    assert sched.cached_prompt("c") == (12, "")


def test_a_longer_prefix_wins_over_a_shorter_one():
    sched = make(prefill_tokens=(32,))
    sched.submit("a", chunk_tokens_of("ab") + [1], 1)
    sched.submit("b", chunk_tokens_of("xy") + [1], 1)
    step(sched)
    end(sched, "a")
    end(sched, "b")
    # Both partitions have a prefix once the one of "ab" is full.
    for name in "cd":
        sched.submit(name, chunk_tokens_of("ab") + [1], 20)
    sched.submit("e", chunk_tokens_of("abcd") + [1], 1)
    seen = {}
    for _ in range(6):
        seen |= partitions_of(step(sched))
    assert seen == {"c": 0, "d": 0, "e": 1}
    end(sched, "c")
    end(sched, "d")
    sched.submit("f", chunk_tokens_of("abcd") + [2], 9)
    assert partitions_of(step(sched)) == {"f": 1}
    assert sched.cached_prompt("f") == (16, "")


def test_siblings_wait_for_the_snapshot_and_join_its_partition():
    sched = make(max_rows=6, num_slots=6, prefill_tokens=(32,))
    for name in "abcd":
        sched.submit(name, chunk_tokens_of("wxyz") + [ord(name)], 30)
    # Three rows a partition: two siblings wait for "a", and "d" begins in the other partition.
    plan = step(sched)
    assert spans(plan) == {"a": (0, 16), "d": (0, 16)}
    assert partitions_of(plan) == {"a": 0, "d": 1}
    assert sched.stats().num_held_back == 2
    plan = step(sched)
    # Both partitions have the prefix now, so the one with fewer sequences gets the next one.
    assert partitions_of(plan) == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert spans(plan)["b"] == spans(plan)["c"] == (16, 17)


def test_a_hit_waits_for_rows_and_others_go_on():
    sched = make(prefill_tokens=(16,), max_rows=6, num_slots=6)
    sched.submit("a", chunk_tokens_of("ab") + [1], 1)
    step(sched)
    end(sched, "a")
    sched.submit("b", chunk_tokens_of("abcdefgh"), 9)
    sched.submit("c", chunk_tokens_of("abxyz"), 9)
    sched.submit("d", chunk_tokens_of("mnop") + [1], 9)
    # "b" takes the rows of partition 0, where "c" has its prefix, too.
    plan = step(sched)
    assert spans(plan) == {"b": (8, 24), "d": (0, 16)}
    assert partitions_of(plan) == {"b": 0, "d": 1}
    seen = {}
    while "c" not in seen:
        seen |= partitions_of(step(sched))
    assert seen["c"] == 0
    assert sched.cached_prompt("c") == (8, "")


def test_the_youngest_of_the_partition_makes_room():
    sched = make(num_pages=10, cache_bytes=0, max_length=40)
    for name in "abcd":
        sched.submit(name, [ord(name)] * 4, 30)
    victims = set()
    for _ in range(60):
        before = {name: s.restarts for name, s in sched._sequences.items()}
        if step(sched) is None:
            break
        victims |= {n for n, s in sched._sequences.items() if s.restarts > before.get(n, 0)}
    # "a" and "b" are the oldest of their partitions.
    assert victims == {"c", "d"}
    assert not sched._sequences


def test_a_sequence_comes_back_from_the_host_to_another_partition():
    sched = make(cache_bytes=0, swap_tokens=4, host_bytes=1000)
    for name in "abc":
        sched.submit(name, [ord(name)] * 8, 30)
    step(sched)
    step(sched)
    sched.preempt("a")
    sched.cancel("b")
    plan = step(sched)
    out, back = plan.actions
    assert isinstance(out, plan_lib.SwapOut)
    assert isinstance(back, plan_lib.SwapIn)
    assert (out.slot, back.slot) == (1, 5)
    assert set(back.pages) <= set(range(22, 42))
    assert partitions_of(plan) == {"a": 1, "c": 0}


def test_a_request_must_fit_into_one_partition():
    sched = make(num_pages=5)
    with pytest.raises(ValueError, match=r"22 together; wanted 21 at most \(num_pages\)"):
        sched.submit("a", [1] * 20, 2)


def test_equal_calls_give_equal_plans():
    def run():
        sched = make(3, num_pages=9, swap_tokens=8, host_bytes=60, max_rows=6)
        plans = []
        for number in range(60):
            if number % 3 == 0:
                sched.submit(number, chunk_tokens_of("abcab"[number % 4 :]), 9 + number % 7)
            plans.append(step(sched))
        return plans

    first = run()
    assert first == run()
    assert {e.partition for plan in first if plan for e in plan.entries} == {0, 1, 2}


def test_one_partition_that_ends_does_not_stop_the_others():
    sched = make(cache_bytes=0)
    sched.submit("a", [1], 3)
    sched.submit("b", [2], 30)
    plans = [sched.plan(), sched.plan()]
    assert partitions_of(plans[1]) == {"a": 0, "b": 1}
    for plan in plans:
        sched.report(answer(dataclasses.replace(plan, max_steps=min(plan.max_steps, 2))))
    assert partitions_of(step(sched)) == {"b": 1}
