"""What the scheduler plans in single situations; `infer_scheduler_fuzz_test.py` has the rest."""

import dataclasses

import pytest

from infer import scheduler

C = 4
LIMITS = scheduler.Limits(
    num_slots=6,
    num_pages=40,
    chunk_tokens=C,
    max_length=100,
    max_queue=8,
    max_rows=4,
    max_prefill_tokens=16,
    prefill_parts=4,
    decode_steps=4,
    cache_bytes=10_000,
    state_bytes=10,
    swap_tokens=1000,
    row_tokens=2,
)


def make(**changes):
    return scheduler.Scheduler(dataclasses.replace(LIMITS, **changes))


def words(letters):
    """Return a chunk of equal tokens for each letter."""
    return [ord(letter) for letter in letters for _ in range(C)]


def made(count, **more):
    return scheduler.Result(count, new_tokens=(7,) * count, **more)


def answer(plan, finished=()):
    """Return results of a plan in which every row used all its steps."""
    results = {}
    for part in plan.prefill:
        results[part.job_id] = made(int(part.last and not part.resume))
    for row in plan.decode:
        results[row.job_id] = made(plan.steps)
    return {
        job_id: dataclasses.replace(result, finished=job_id in finished)
        for job_id, result in results.items()
    }


def step(sched, finished=()):
    """Plan and report at once."""
    plan = sched.plan()
    if plan is not None:
        sched.report(answer(plan, finished))
    return plan


def spans(plan):
    return {part.job_id: (part.start, part.start + part.count) for part in plan.prefill}


def until(sched, wanted, most=50):
    """Step until a plan is as wanted."""
    for _ in range(most):
        plan = step(sched)
        if plan is not None and wanted(plan):
            return plan
    raise AssertionError("no such plan")


def actions_of(plan, kind):
    return [action for action in plan.actions if isinstance(action, kind)]


def test_nothing_to_do():
    assert make().plan() is None


def test_one_request_from_prompt_to_limit():
    sched = make(cache_bytes=0)
    sched.submit("a", words("abc") + [1], 6)
    plan = step(sched)
    assert plan == scheduler.Plan(
        prefill=(scheduler.Part("a", 1, 0, 13, (1, 2, 3, 4), True, False),)
    )
    plan = step(sched)
    assert plan == scheduler.Plan(decode=(scheduler.Row("a", 1, (1, 2, 3, 4, 5), 19),), steps=4)
    assert step(sched).steps == 1
    assert sched.plan() is None
    stats = sched.stats()
    assert (stats.running, stats.free_pages, stats.free_slots) == (0, 40, 6)


def test_two_plans_are_under_way_at_most_and_stay_within_the_limit():
    sched = make(cache_bytes=0)
    sched.submit("a", [1], 7)
    plans = [sched.plan(), sched.plan()]
    assert plans[1].steps == 4
    assert sched.plan() is None
    sched.report(answer(plans[0]))
    last = sched.plan()
    assert last.steps == 2
    assert len(last.decode[0].pages) == 2  # for 7 tokens; the eighth is never computed
    sched.report(answer(plans[1]))
    assert sched.plan() is None
    sched.report(answer(last))
    assert sched.stats().running == 0


def test_one_token_needs_no_decoding():
    sched = make()
    sched.submit("a", words("a"), 1)
    step(sched)
    assert sched.plan() is None
    assert sched.stats().running == 0


def test_a_long_prompt_is_cut_on_the_grid():
    sched = make(cache_bytes=0, max_prefill_tokens=14)
    sched.submit("a", [1] * 27, 1)
    cuts = [spans(step(sched))["a"] for _ in range(3)]
    assert cuts == [(0, 12), (12, 24), (24, 27)]


def test_parts_are_packed_oldest_first_with_padded_rows():
    sched = make(cache_bytes=0)
    sched.submit("a", [1] * 5, 1)
    sched.submit("b", [2] * 3, 1)
    sched.submit("c", [3] * 20, 1)
    sched.submit("d", [4] * 4, 1)
    assert spans(step(sched)) == {"a": (0, 5), "b": (0, 3), "c": (0, 4)}  # 6 + 4 + 4 of 16
    assert spans(step(sched)) == {"c": (4, 20)}
    assert spans(step(sched)) == {"d": (0, 4)}


def test_prefill_and_decode_take_turns():
    sched = make(cache_bytes=0, max_length=200, num_pages=80)
    sched.submit("a", [1] * 4, 60)
    step(sched)
    sched.submit("b", [1] * 100, 5)
    kinds = [bool(step(sched).prefill) for _ in range(10)]
    assert kinds == [False, True] * 5


def test_a_queue_that_is_full():
    sched = make(max_queue=1)
    sched.submit("a", [1], 1)
    with pytest.raises(scheduler.QueueFull, match="while 1 wait; wanted fewer than 1 .*later"):
        sched.submit("b", [1], 1)
    step(sched)
    sched.submit("b", [1], 1)


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "message"),
    [
        ([], 1, "got 0 prompt tokens and max_tokens 1; wanted 1 of each"),
        ([1], 0, "got 1 prompt tokens and max_tokens 0; wanted 1 of each"),
        ([1] * 90, 11, r"101 together; wanted 100 at most \(max_length\): shorten the prompt"),
    ],
)
def test_requests_that_are_refused(tokens, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        make().submit("a", tokens, max_tokens)


def test_requests_that_the_pages_could_never_hold():
    sched = make(num_pages=5)
    with pytest.raises(ValueError, match=r"22 together; wanted 21 at most \(num_pages\)"):
        sched.submit("a", [1] * 20, 2)
    sched.submit("a", [1] * 20, 1)
    assert len(step(sched).prefill[0].pages) == 4


def test_an_id_in_use_is_refused_and_one_that_is_over_is_not():
    sched = make()
    sched.submit("a", [1], 1)
    with pytest.raises(ValueError, match="got job_id 'a', which is in use"):
        sched.submit("a", [1], 1)
    step(sched)
    sched.submit("a", [1], 1)


def test_an_id_used_again_does_not_get_the_results_of_its_forerunner():
    sched = make(cache_bytes=0)
    sched.submit("a", [1], 9)
    plans = [sched.plan(), sched.plan()]
    sched.cancel("a")
    sched.submit("a", [2], 9)
    for plan in plans:
        sched.report(answer(plan))
    assert spans(step(sched)) == {"a": (0, 1)}
    assert step(sched).steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 0}, "got num_slots 0; wanted 1 or more"),
        ({"cache_bytes": -1}, "got cache_bytes -1; wanted 0 or more"),
        ({"row_tokens": 3}, "got chunk_tokens 4, row_tokens 3"),
        ({"snapshot_every_tokens": 6}, "snapshot_every_tokens 6; wanted"),
        ({"max_prefill_tokens": 2}, "got max_prefill_tokens 2; wanted a multiple of 2, at least"),
        ({"max_prefill_tokens": 15}, "got max_prefill_tokens 15; wanted a multiple of 2"),
    ],
)
def test_limits_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_reports_that_no_plan_can_have_had():
    sched = make()
    with pytest.raises(RuntimeError, match="wanted a plan first"):
        sched.report({})
    sched.submit("a", [1], 20)
    sched.plan()
    with pytest.raises(ValueError, match="got 0 tokens .* for job 'a', wanted 1 to 1"):
        sched.report({})
    sched.report({"a": made(1)})
    sched.plan()
    with pytest.raises(ValueError, match="got 5 tokens .* wanted 1 to 4"):
        sched.report({"a": made(5)})
    with pytest.raises(ValueError, match=r"got 2 tokens \(1 values\)"):
        sched.report({"a": scheduler.Result(2, new_tokens=(1,))})
    sched.report({"a": made(3)})
    assert step(sched).steps == 4


def test_a_snapshot_is_copied_before_anything_changes_the_state():
    sched = make()
    sched.submit("a", words("abc") + [1], 9)
    assert spans(step(sched)) == {"a": (0, 12)}
    plan = step(sched)
    assert plan.actions == (scheduler.Copy(1, 2),)
    assert spans(plan) == {"a": (12, 13)}
    assert sched.stats().cache.nodes == 1


def test_a_hit_restores_the_snapshot_and_shares_its_pages():
    sched = make()
    sched.submit("a", words("abc") + [1], 9)
    first = step(sched).prefill[0]
    step(sched)
    sched.submit("b", words("abc") + [2, 2], 9)
    plan = until(sched, lambda plan: "b" in spans(plan))
    assert spans(plan) == {"b": (12, 14)}
    assert actions_of(plan, scheduler.Copy) == [scheduler.Copy(2, plan.prefill[0].slot)]
    assert plan.prefill[0].pages[:3] == first.pages
    assert sched.cached("b") == (12, "")
    assert sched.cached("a") == (0, "empty")


def test_one_token_is_always_computed():
    sched = make()
    for name in "ab":
        sched.submit(name, words("abc"), 1)
        until(sched, lambda plan: plan.prefill and plan.prefill[0].last)
    assert sched.stats().cache.hit_tokens == 8


def test_a_request_that_ends_leaves_its_slot_as_a_snapshot():
    sched = make()
    sched.submit("a", [1, 2], 8)
    step(sched)
    step(sched)
    plan = sched.plan()
    sched.report({"a": made(3, finished=True, length=9)})
    assert plan.decode[0].slot == 1
    stats = sched.stats()
    assert (stats.memory.kept, stats.cache.pages, stats.free_slots) == (1, 2, 5)
    sched.submit("b", [1, 2] + [7] * 10, 1)
    assert spans(step(sched)) == {"b": (8, 12)}


@pytest.mark.parametrize(("length", "kept"), [(None, 0), (6, 1)])
def test_a_state_that_may_have_left_its_chunk_is_no_snapshot(length, kept):
    sched = make()
    sched.submit("a", [1, 2], 20)
    plans = [step(sched), sched.plan(), sched.plan()]
    assert plans[2].steps == 4  # may go on to 10 tokens
    sched.report({"a": made(4, finished=True, length=length)})
    assert sched.stats().memory.kept == kept
    assert sched.stats().running == 0


def test_a_request_that_is_cancelled_leaves_a_snapshot_too():
    sched = make(cache_bytes=10_000)
    sched.submit("a", words("abcdefgh"), 2)
    step(sched)
    sched.cancel("a")
    sched.cancel("a")
    sched.submit("b", words("abcdefgh"), 2)
    assert spans(step(sched)) == {"b": (16, 28)}


def test_requests_that_are_not_cacheable_neither_read_nor_write():
    sched = make()
    for name in "ab":
        sched.submit(name, words("abc") + [1], 1, cacheable=False)
        assert spans(step(sched)) == {name: (0, 13)}
    assert sched.stats().cache.nodes == 0


def test_a_prefix_that_several_wait_for_is_computed_once():
    sched = make(max_prefill_tokens=32)
    for name, tail in zip("abc", (1, 2, 3), strict=True):
        sched.submit(name, words("abcd") + [tail] * 3, 1)
    assert spans(step(sched)) == {"a": (0, 16)}
    assert sched.stats().held_back == 2
    plan = step(sched)
    assert spans(plan) == {"a": (16, 19), "b": (16, 19), "c": (16, 19)}
    assert len(plan.actions) == 3


def test_a_snapshot_is_taken_where_a_later_request_parts():
    sched = make(max_prefill_tokens=4, num_pages=60)
    sched.submit("a", words("abcdefgh"), 1)
    step(sched)
    sched.submit("b", words("abxy"), 1)  # shares two chunks, of which one is computed
    cuts = [spans(step(sched)) for _ in range(3)]
    assert cuts == [{"a": (4, 8)}, {"a": (8, 12)}, {"a": (12, 16)}]
    assert sched.stats().cache.nodes == 1
    assert until(sched, lambda plan: "b" in spans(plan)).prefill[0].start == 8


def test_a_snapshot_is_taken_where_a_request_leaves_the_tree():
    sched = make()
    sched.submit("a", words("abcde"), 1)
    until(sched, lambda plan: plan.prefill and plan.prefill[0].last)
    sched.submit("b", words("abxyz"), 1)
    assert spans(step(sched)) == {"b": (0, 8)}
    assert sched.cached("b") == (0, "no snapshot on the way")
    until(sched, lambda plan: plan.prefill and plan.prefill[0].last)
    sched.submit("c", words("abmno"), 1)
    assert spans(step(sched))["c"][0] == 8


def test_snapshots_inside_long_prompts():
    sched = make(snapshot_every_tokens=8, max_prefill_tokens=100)
    sched.submit("a", [1] * 25, 1)
    cuts = [spans(step(sched))["a"] for _ in range(4)]
    assert cuts == [(0, 8), (8, 16), (16, 24), (24, 25)]


def test_the_slot_of_a_snapshot_is_taken_over_when_no_other_is_left():
    sched = make(num_slots=1)
    sched.submit("a", words("abc"), 1)
    step(sched)
    step(sched)
    sched.submit("b", words("abc") + [1], 1)
    plan = step(sched)
    assert plan.actions == ()
    assert spans(plan) == {"b": (8, 13)} or spans(plan) == {"b": (12, 13)}
    assert sched.stats().memory.taken_over == 1


def test_admission_evicts_snapshots():
    sched = make(num_slots=2, num_pages=8)
    for name in "abcd":
        sched.submit(name, words(name * 6), 1)
        until(sched, lambda plan: plan.prefill and plan.prefill[0].last)
    assert sched.stats().cache.evicted >= 2


def test_no_more_run_than_there_are_rows():
    sched = make(max_rows=2)
    for name in "abc":
        sched.submit(name, [1], 20)
    assert spans(step(sched)).keys() == {"a", "b"}
    assert len(step(sched).decode) == 2


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
    sched = make(num_pages=12, cache_bytes=0)
    plan = fill(sched)
    assert [row.job_id for row in plan.decode] == ["a", "b"]
    known = len(sched._jobs["c"].tokens)
    again = until(sched, lambda plan: "c" in spans(plan) and plan.prefill[-1].last)
    part = again.prefill[-1]
    assert part.resume
    assert part.start + part.count == known - 1
    while step(sched):
        pass
    assert sched.stats().free_pages == 12


def test_a_long_one_goes_to_the_host_and_comes_back():
    sched = make(num_pages=12, cache_bytes=0, swap_tokens=8, host_bytes=30)
    plan = fill(sched)
    (out,) = actions_of(plan, scheduler.SwapOut)
    assert out.job_id == "c"

    def came_back(plan):
        return [one for one in actions_of(plan, scheduler.SwapIn) if one.job_id == "c"]

    back = until(sched, came_back)
    assert len(came_back(back)[0].pages) == len(out.pages)
    assert not back.prefill
    assert "c" in [row.job_id for row in back.decode]
    while step(sched):
        pass
    assert sched.stats().memory.restarted == 0


def test_without_room_at_the_host_it_is_computed_again():
    sched = make(num_pages=12, cache_bytes=0, swap_tokens=8, host_bytes=10)
    fill(sched)
    assert sched.stats().memory.swapped_out == 0


def test_a_host_copy_is_dropped_when_its_request_is_cancelled():
    sched = make(swap_tokens=4, host_bytes=100)
    sched.submit("a", [1] * 8, 40)
    step(sched)
    step(sched)
    sched.preempt("a")
    sched.preempt("a")
    sched.cancel("a")
    plan = sched.plan()
    assert [type(action) for action in plan.actions][-2:] == [scheduler.SwapOut, scheduler.Drop]
    assert (plan.prefill, plan.decode) == ((), ())
    sched.report({})
    assert sched.plan() is None


def test_a_preempted_request_waits_until_its_tokens_are_known():
    sched = make(cache_bytes=0)
    sched.submit("a", [1, 2], 40)
    plans = [step(sched), sched.plan()]
    sched.preempt("a")
    assert sched.plan() is None
    sched.report(answer(plans[1]))
    assert spans(step(sched)) == {"a": (0, 6)}


def test_single_steps():
    sched = make()
    sched.submit("a", [1], 9, single_step=True)
    sched.submit("b", [1], 9)
    first = sched.plan()
    second = sched.plan()
    assert [row.job_id for row in second.decode] == ["b"]  # the token of a must be seen first
    assert second.steps == 1
    sched.report(answer(first))
    third = sched.plan()
    assert [row.job_id for row in third.decode] == ["a", "b"]
    assert third.steps == 1


def test_new_weights_with_requests_that_go_on():
    sched = make()
    sched.submit("a", words("abc") + [1], 30)
    step(sched)
    step(sched)
    assert sched.stats().cache.nodes == 1
    sched.set_key((1, ""), keep_running=True)
    assert sched.stats().cache.nodes == 0
    assert len(step(sched).decode) == 1
    sched.cancel("a")
    assert sched.stats().cache.nodes == 0
    sched.submit("b", words("abc") + [1], 30)
    assert spans(step(sched)) == {"b": (0, 12)}


def test_new_weights_with_requests_that_begin_again():
    sched = make(swap_tokens=4, host_bytes=100)
    sched.submit("a", words("abc") + [1], 30)
    sched.submit("b", words("xyz") + [1], 30)
    until(sched, lambda plan: len(plan.decode) == 2)
    sched.preempt("b")
    sched.set_key((1, ""), keep_running=False)
    plan = step(sched)
    assert [type(action) for action in plan.actions][-1] == scheduler.Drop
    assert spans(plan)["a"][0] == 0
    sched.set_key((1, ""), keep_running=False)  # the same: nothing to do
    assert sched.stats().running > 0


@pytest.mark.parametrize("cacheable", [True, False])
def test_nobody_waits_for_what_arrives_later(cacheable):
    sched = make(num_pages=20, max_rows=2, num_slots=3)
    count = 0

    def flood():
        nonlocal count
        while sched.stats().waiting < 8:
            count += 1
            prompt = words("ab"[: 1 + count % 2]) * (1 + count % 4)
            sched.submit(count, prompt, 1 + count % 20, cacheable=cacheable)

    flood()
    born, worst = {}, 0
    for now in range(600):
        for job_id in sched._jobs:
            born.setdefault(job_id, now)
        step(sched)
        for job_id in born.keys() - sched._jobs.keys():
            worst = max(worst, now - born.pop(job_id))
        flood()
    assert count > 100
    assert worst < 50


def test_equal_calls_give_equal_plans():
    def run():
        sched = make(num_pages=14, swap_tokens=8, host_bytes=60)
        plans = []
        for number in range(40):
            if number % 3 == 0:
                sched.submit(number, words("abcab"[number % 4 :]), 9 + number % 7)
            plans.append(step(sched))
        return plans

    assert run() == run()
