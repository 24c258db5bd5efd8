"""Snapshots, hits, preemption and new weights, in single situations of the scheduler."""

import pytest
from scheduler_support import (
    answer,
    chunk_tokens_of,
    make_result,
    make_scheduler,
    spans,
    step,
)

from infer.scheduling import plan as plan_lib


def until(sched, is_wanted, max_plans=50):
    """Step until a plan is as wanted."""
    for _ in range(max_plans):
        plan = step(sched)
        if plan is not None and is_wanted(plan):
            return plan
    raise AssertionError("no such plan")


def actions_of(plan, kind):
    return [action for action in plan.actions if isinstance(action, kind)]


def test_a_snapshot_is_copied_before_anything_changes_the_state():
    sched = make_scheduler()
    sched.submit("a", chunk_tokens_of("abc") + [1], 9)
    assert spans(step(sched)) == {"a": (0, 12)}
    plan = step(sched)
    assert plan.actions == (plan_lib.CopyState(1, 2),)
    assert spans(plan) == {"a": (12, 13)}
    assert sched.stats().cache.num_nodes == 1


def test_a_hit_restores_the_snapshot_and_shares_its_pages():
    sched = make_scheduler()
    sched.submit("a", chunk_tokens_of("abc") + [1], 9)
    first = step(sched).prefill_chunks[0]
    step(sched)
    sched.submit("b", chunk_tokens_of("abc") + [2, 2], 9)
    plan = until(sched, lambda plan: "b" in spans(plan))
    assert spans(plan) == {"b": (12, 14)}
    assert actions_of(plan, plan_lib.CopyState) == [
        plan_lib.CopyState(2, plan.prefill_chunks[0].slot)
    ]
    assert plan.prefill_chunks[0].pages[:3] == first.pages
    assert sched.cached_prompt("b") == (12, "")
    assert sched.cached_prompt("a") == (0, "empty")


def test_one_token_is_always_computed():
    sched = make_scheduler()
    for name in "ab":
        sched.submit(name, chunk_tokens_of("abc"), 1)
        until(sched, lambda plan: plan.prefill_chunks and plan.prefill_chunks[0].is_last)
    assert sched.stats().cache.hit_tokens == 8


def test_a_request_that_ends_leaves_its_slot_as_a_snapshot():
    sched = make_scheduler()
    sched.submit("a", [1, 2], 8)
    step(sched)
    step(sched)
    plan = sched.plan()
    sched.report({"a": make_result(3, is_finished=True, final_length=9)})
    assert plan.decode_rows[0].slot == 1
    stats = sched.stats()
    assert (stats.memory.snapshots_moved, stats.cache.num_pages, stats.free_slots) == (1, 2, 5)
    sched.submit("b", [1, 2] + [7] * 10, 1)
    assert spans(step(sched)) == {"b": (8, 12)}


@pytest.mark.parametrize(("length", "num_moved"), [(None, 0), (6, 1)])
def test_a_state_that_may_have_left_its_chunk_is_no_snapshot(length, num_moved):
    sched = make_scheduler()
    sched.submit("a", [1, 2], 20)
    plans = [step(sched), sched.plan(), sched.plan()]
    assert plans[2].max_steps == 4  # may go on to 10 tokens
    sched.report({"a": make_result(4, is_finished=True, final_length=length)})
    assert sched.stats().memory.snapshots_moved == num_moved
    assert sched.stats().num_running == 0


def test_a_request_that_is_cancelled_leaves_a_snapshot_too():
    sched = make_scheduler(cache_bytes=10_000)
    sched.submit("a", chunk_tokens_of("abcdefgh"), 2)
    step(sched)
    sched.cancel("a")
    sched.cancel("a")
    sched.submit("b", chunk_tokens_of("abcdefgh"), 2)
    assert spans(step(sched)) == {"b": (16, 28)}


def test_requests_that_are_not_cacheable_neither_read_nor_write():
    sched = make_scheduler()
    for name in "ab":
        sched.submit(name, chunk_tokens_of("abc") + [1], 1, is_cacheable=False)
        assert spans(step(sched)) == {name: (0, 13)}
    assert sched.stats().cache.num_nodes == 0


def test_a_prefix_that_several_wait_for_is_computed_once():
    sched = make_scheduler(prefill_tokens=(32,))
    for name, tail in zip("abc", (1, 2, 3), strict=True):
        sched.submit(name, chunk_tokens_of("abcd") + [tail] * 3, 1)
    assert spans(step(sched)) == {"a": (0, 16)}
    assert sched.stats().num_held_back == 2
    plan = step(sched)
    assert spans(plan) == {"a": (16, 19), "b": (16, 19), "c": (16, 19)}
    assert len(plan.actions) == 3


def test_a_snapshot_is_taken_where_a_later_request_parts():
    sched = make_scheduler(prefill_tokens=(4,), num_pages=60)
    sched.submit("a", chunk_tokens_of("abcdefgh"), 1)
    step(sched)
    sched.submit("b", chunk_tokens_of("abxy"), 1)  # shares two chunks, of which one is computed
    cuts = [spans(step(sched)) for _ in range(3)]
    assert cuts == [{"a": (4, 8)}, {"a": (8, 12)}, {"a": (12, 16)}]
    assert sched.stats().cache.num_nodes == 1
    assert until(sched, lambda plan: "b" in spans(plan)).prefill_chunks[0].start == 8


@pytest.mark.parametrize(("letters", "point"), [("abxy", 8), ("ab", 4), ("x", 16)])
def test_a_snapshot_is_taken_where_one_that_waits_can_go_on(letters, point):
    sched = make_scheduler()
    sched.submit("a", chunk_tokens_of("abcdefgh"), 1)
    sched.submit("b", chunk_tokens_of(letters), 1)
    assert spans(step(sched))["a"] == (0, point)


def test_a_snapshot_is_taken_where_the_older_one_just_is():
    sched = make_scheduler(prefill_tokens=(8,))
    sched.submit("a", chunk_tokens_of("abcdefgh"), 1)
    step(sched)
    sched.submit("b", chunk_tokens_of("abxy"), 1)
    plan = step(sched)
    assert plan.actions == (plan_lib.CopyState(1, 2),)
    assert until(sched, lambda plan: "b" in spans(plan)).prefill_chunks[-1].start == 8


def test_a_request_that_is_held_back_keeps_its_place():
    sched = make_scheduler(prefill_tokens=(8,), num_slots=2, max_prefill_chunks=3)
    sched.submit("a", chunk_tokens_of("abcde"), 1)
    step(sched)
    sched.submit("b", chunk_tokens_of("abcdx"), 30)
    sched.submit("c", chunk_tokens_of("k"), 30)
    seen = []
    until(sched, lambda plan: seen.extend(spans(plan)) or "c" in seen)
    assert seen.index("b") < seen.index("c")


def test_a_snapshot_is_taken_where_a_request_leaves_the_tree():
    sched = make_scheduler()
    sched.submit("a", chunk_tokens_of("abcde"), 1)
    until(sched, lambda plan: plan.prefill_chunks and plan.prefill_chunks[0].is_last)
    sched.submit("b", chunk_tokens_of("abxyz"), 1)
    assert spans(step(sched)) == {"b": (0, 8)}
    assert sched.cached_prompt("b") == (0, "no snapshot on the way")
    until(sched, lambda plan: plan.prefill_chunks and plan.prefill_chunks[0].is_last)
    sched.submit("c", chunk_tokens_of("abmno"), 1)
    assert spans(step(sched))["c"][0] == 8


def test_snapshots_inside_long_prompts():
    sched = make_scheduler(snapshot_every_tokens=8, prefill_tokens=(100,))
    sched.submit("a", [1] * 25, 1)
    cuts = [spans(step(sched))["a"] for _ in range(4)]
    assert cuts == [(0, 8), (8, 16), (16, 24), (24, 25)]


def test_the_slot_of_a_snapshot_is_taken_over_when_no_other_is_left():
    sched = make_scheduler(num_slots=1)
    sched.submit("a", chunk_tokens_of("abc"), 1)
    step(sched)
    step(sched)
    sched.submit("b", chunk_tokens_of("abc") + [1], 1)
    plan = step(sched)
    assert plan.actions == ()
    assert spans(plan) == {"b": (8, 13)} or spans(plan) == {"b": (12, 13)}
    assert sched.stats().memory.slots_taken_over == 1


def test_admission_evicts_snapshots():
    sched = make_scheduler(num_slots=2, num_pages=8)
    for name in "abcd":
        sched.submit(name, chunk_tokens_of(name * 6), 1)
        until(sched, lambda plan: plan.prefill_chunks and plan.prefill_chunks[0].is_last)
    assert sched.stats().cache.evicted >= 2


def fill(sched, length=4, tokens=40):
    """Let three requests decode that do not fit together; return the plan with a preemption."""
    for i, name in enumerate("abc"):
        sched.submit(name, [i] * length, tokens)
    start = sched.stats().memory
    seen = []
    for _ in range(60):
        seen.append(step(sched))
        now = sched.stats().memory
        if (now.restarted, now.swapped_out) != (start.restarted, start.swapped_out):
            return seen[-1]
    raise AssertionError("nothing was preempted")


def test_the_youngest_is_computed_again_when_pages_run_out():
    sched = make_scheduler(num_pages=12, cache_bytes=0)
    plan = fill(sched)
    assert [row.sequence_id for row in plan.decode_rows] == ["a", "b"]
    known = len(sched._sequences["c"].tokens)
    again = until(sched, lambda plan: "c" in spans(plan) and plan.prefill_chunks[-1].is_last)
    chunk = again.prefill_chunks[-1]
    assert chunk.is_resumed
    assert chunk.start + chunk.num_tokens == known - 1
    while step(sched):
        pass
    assert sched.stats().free_pages == 12


def test_a_long_one_goes_to_the_host_and_comes_back():
    sched = make_scheduler(num_pages=12, cache_bytes=0, swap_tokens=8, host_bytes=30)
    plan = fill(sched)
    (out,) = actions_of(plan, plan_lib.SwapOut)
    assert out.sequence_id == "c"

    def came_back(plan):
        return [a for a in actions_of(plan, plan_lib.SwapIn) if a.sequence_id == "c"]

    back = until(sched, came_back)
    assert len(came_back(back)[0].pages) == len(out.pages)
    assert not back.prefill_chunks
    assert "c" in [row.sequence_id for row in back.decode_rows]
    while step(sched):
        pass
    assert sched.stats().memory.restarted == 0


def test_without_room_at_the_host_it_is_computed_again():
    sched = make_scheduler(num_pages=12, cache_bytes=0, swap_tokens=8, host_bytes=10)
    fill(sched)
    assert sched.stats().memory.swapped_out == 0


def test_a_host_copy_is_dropped_when_its_request_is_cancelled():
    sched = make_scheduler(swap_tokens=4, host_bytes=100)
    sched.submit("a", [1] * 8, 40)
    step(sched)
    step(sched)
    sched.preempt("a")
    sched.preempt("a")
    sched.cancel("a")
    plan = sched.plan()
    assert [type(action) for action in plan.actions][-2:] == [
        plan_lib.SwapOut,
        plan_lib.DropHostCopy,
    ]
    assert (plan.prefill_chunks, plan.decode_rows) == ((), ())
    sched.report({})
    assert sched.plan() is None


def test_a_preempted_request_waits_until_its_tokens_are_known():
    sched = make_scheduler(cache_bytes=0)
    sched.submit("a", [1, 2], 40)
    plans = [step(sched), sched.plan()]
    sched.preempt("a")
    assert sched.plan() is None
    sched.report(answer(plans[1]))
    assert spans(step(sched)) == {"a": (0, 6)}


@pytest.mark.parametrize("swap_tokens", [4, 1000])
def test_a_planned_snapshot_is_taken_before_its_request_is_preempted(swap_tokens):
    sched = make_scheduler(swap_tokens=swap_tokens, host_bytes=100)
    sched.submit("a", chunk_tokens_of("abc") + [1], 40)
    step(sched)
    sched.preempt("a")
    assert sched.stats().cache.num_nodes == 1
    plan = step(sched)
    assert plan.actions[0] == plan_lib.CopyState(1, 2)
    assert spans(plan) == {"a": (12, 13)}


def test_an_older_one_that_was_preempted_goes_before_a_younger_prefill():
    sched = make_scheduler(cache_bytes=0)
    sched.submit("a", [1] * 12, 40)
    sched.submit("b", [2] * 40, 40)
    assert list(spans(step(sched))) == ["a", "b"]
    sched.preempt("a")
    until(sched, lambda plan: plan.prefill_chunks)
    sched.preempt("a")
    sched.submit("c", [2] * 40, 40)
    assert list(spans(until(sched, lambda plan: plan.prefill_chunks)))[0] == "a"


def test_one_that_was_preempted_waits_for_some_room():
    sched = make_scheduler(num_pages=12, cache_bytes=0)
    fill(sched)
    while step(sched):
        pass
    assert sched.stats().memory.restarted == 3


def test_new_weights_with_requests_that_go_on():
    sched = make_scheduler()
    sched.submit("a", chunk_tokens_of("abc") + [1], 30)
    step(sched)
    step(sched)
    assert sched.stats().cache.num_nodes == 1
    sched.set_cache_key((1, ""), keep_running=True)
    assert sched.stats().cache.num_nodes == 0
    assert len(step(sched).decode_rows) == 1
    sched.cancel("a")
    assert sched.stats().cache.num_nodes == 0
    sched.submit("b", chunk_tokens_of("abc") + [1], 30)
    assert spans(step(sched)) == {"b": (0, 12)}


def test_new_weights_with_requests_that_begin_again():
    sched = make_scheduler(swap_tokens=4, host_bytes=100)
    sched.submit("a", chunk_tokens_of("abc") + [1], 30)
    sched.submit("b", chunk_tokens_of("xyz") + [1], 30)
    until(sched, lambda plan: len(plan.decode_rows) == 2)
    sched.preempt("b")
    sched.set_cache_key((1, ""), keep_running=False)
    plan = step(sched)
    assert [type(action) for action in plan.actions][-1] == plan_lib.DropHostCopy
    assert spans(plan)["a"][0] == 0
    until(sched, lambda plan: "a" in spans(plan) and plan.prefill_chunks[0].is_last)
    assert sched.stats().cache.num_nodes > 0
    sched.set_cache_key((1, ""), keep_running=False)  # the same: nothing to do
    assert sched.stats().num_running > 0
