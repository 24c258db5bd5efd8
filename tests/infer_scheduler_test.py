"""What the scheduler plans and refuses in single situations; the fuzz test has the rest."""

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


def test_nothing_to_do():
    assert make_scheduler().plan() is None


def test_one_request_from_prompt_to_limit():
    sched = make_scheduler(cache_bytes=0)
    sched.submit("a", chunk_tokens_of("abc") + [1], 6)
    plan = step(sched)
    assert plan == plan_lib.StepPlan(
        prefill_chunks=(plan_lib.PrefillChunk("a", 1, 0, 13, (1, 2, 3, 4), True, False),)
    )
    plan = step(sched)
    assert plan == plan_lib.StepPlan(
        decode_rows=(plan_lib.DecodeRow("a", 1, (1, 2, 3, 4, 5), 19),), max_steps=4
    )
    assert step(sched).max_steps == 1
    assert sched.plan() is None
    stats = sched.stats()
    assert (stats.num_running, stats.free_pages, stats.free_slots) == (0, 40, 6)


def test_two_plans_are_under_way_at_most_and_stay_within_the_limit():
    sched = make_scheduler(cache_bytes=0)
    sched.submit("a", [1], 7)
    plans = [sched.plan(), sched.plan()]
    assert plans[1].max_steps == 4
    assert sched.plan() is None
    sched.report(answer(plans[0]))
    last = sched.plan()
    assert last.max_steps == 2
    assert len(last.decode_rows[0].pages) == 2  # for 7 tokens; the eighth is never computed
    sched.report(answer(plans[1]))
    assert sched.plan() is None
    sched.report(answer(last))
    assert sched.stats().num_running == 0


def test_one_token_needs_no_decoding():
    sched = make_scheduler()
    sched.submit("a", chunk_tokens_of("a"), 1)
    step(sched)
    assert sched.plan() is None
    assert sched.stats().num_running == 0


def test_a_long_prompt_is_cut_on_the_grid():
    sched = make_scheduler(cache_bytes=0, prefill_tokens=(14,))
    sched.submit("a", [1] * 27, 1)
    cuts = [spans(step(sched))["a"] for _ in range(3)]
    assert cuts == [(0, 12), (12, 24), (24, 27)]


def test_parts_are_packed_oldest_first_with_padded_rows():
    sched = make_scheduler(cache_bytes=0)
    sched.submit("a", [1] * 5, 1)
    sched.submit("b", [2] * 3, 1)
    sched.submit("c", [3] * 20, 1)
    sched.submit("d", [4] * 4, 1)
    assert spans(step(sched)) == {"a": (0, 5), "b": (0, 3), "c": (0, 4)}  # 6 + 4 + 4 of 16
    assert spans(step(sched)) == {"c": (4, 20)}
    assert spans(step(sched)) == {"d": (0, 4)}


def test_prefill_and_decode_take_turns():
    sched = make_scheduler(cache_bytes=0, max_length=200, num_pages=80)
    sched.submit("a", [1] * 4, 60)
    step(sched)
    sched.submit("b", [1] * 100, 5)
    kinds = [bool(step(sched).prefill_chunks) for _ in range(10)]
    assert kinds == [False, True] * 5


def test_a_queue_that_is_full():
    sched = make_scheduler(max_queue=1)
    sched.submit("a", [1], 1)
    with pytest.raises(plan_lib.QueueFull, match="while 1 wait; wanted fewer than 1 .*later"):
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
        make_scheduler().submit("a", tokens, max_tokens)


def test_requests_that_the_pages_could_never_hold():
    sched = make_scheduler(num_pages=5)
    with pytest.raises(ValueError, match=r"22 together; wanted 21 at most \(num_pages\)"):
        sched.submit("a", [1] * 20, 2)
    sched.submit("a", [1] * 20, 1)
    assert len(step(sched).prefill_chunks[0].pages) == 4


def test_an_id_in_use_is_refused_and_one_that_is_over_is_not():
    sched = make_scheduler()
    sched.submit("a", [1], 1)
    with pytest.raises(ValueError, match="got sequence_id 'a', which is in use"):
        sched.submit("a", [1], 1)
    step(sched)
    sched.submit("a", [1], 1)


def test_an_id_used_again_does_not_get_the_results_of_its_forerunner():
    sched = make_scheduler(cache_bytes=0)
    sched.submit("a", [1], 9)
    plans = [sched.plan(), sched.plan()]
    sched.cancel("a")
    sched.submit("a", [2], 9)
    for plan in plans:
        sched.report(answer(plan))
    assert spans(step(sched)) == {"a": (0, 1)}
    assert step(sched).max_steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 0}, "got num_slots 0; wanted 1 or more"),
        ({"cache_bytes": -1}, "got cache_bytes -1; wanted 0 or more"),
        ({"swap_tokens": -1}, "swap_tokens: got -1; wanted 0 or more"),
        ({"attention_tile": 3}, "attention_tile: got 3; wanted a divisor of chunk_tokens 4"),
        ({"snapshot_every_tokens": 6}, "snapshot_every_tokens: got 6; wanted a multiple of"),
        ({"prefill_tokens": (2,)}, "wanted ascending sizes, the last at least chunk_tokens 4"),
        ({"prefill_tokens": (15,)}, "got 15; wanted multiples of 2"),
    ],
)
def test_limits_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(**changes)


def test_reports_that_no_plan_can_have_had():
    sched = make_scheduler()
    with pytest.raises(RuntimeError, match="wanted a plan first"):
        sched.report({})
    sched.submit("a", [1], 20)
    sched.plan()
    with pytest.raises(ValueError, match="got 0 tokens .* for sequence 'a', wanted 1 to 1"):
        sched.report({})
    sched.report({"a": make_result(1)})
    sched.plan()
    with pytest.raises(ValueError, match="got 5 tokens .* wanted 1 to 4"):
        sched.report({"a": make_result(5)})
    with pytest.raises(ValueError, match=r"got 2 tokens \(1 values\)"):
        sched.report({"a": plan_lib.StepResult(2, new_tokens=(1,))})
    sched.report({"a": make_result(3)})
    assert step(sched).max_steps == 4


def test_no_more_run_than_there_are_rows():
    sched = make_scheduler(max_rows=2)
    for name in "abc":
        sched.submit(name, [1], 20)
    assert spans(step(sched)).keys() == {"a", "b"}
    assert len(step(sched).decode_rows) == 2


def test_single_steps():
    sched = make_scheduler()
    sched.submit("a", [1], 9, single_step=True)
    sched.submit("b", [1], 9)
    first = sched.plan()
    second = sched.plan()
    assert [row.sequence_id for row in second.decode_rows] == [
        "b"
    ]  # the token of a must be seen first
    assert second.max_steps == 1
    sched.report(answer(first))
    third = sched.plan()
    assert [row.sequence_id for row in third.decode_rows] == ["a", "b"]
    assert third.max_steps == 1


@pytest.mark.parametrize("cacheable", [True, False])
def test_nobody_waits_for_what_arrives_later(cacheable):
    sched = make_scheduler(num_pages=20, max_rows=2, num_slots=3)
    count = 0

    def flood():
        nonlocal count
        while sched.stats().num_waiting < 8:
            count += 1
            prompt = chunk_tokens_of("ab"[: 1 + count % 2]) * (1 + count % 4)
            sched.submit(count, prompt, 1 + count % 20, is_cacheable=cacheable)

    flood()
    born, worst = {}, 0
    for now in range(600):
        for sequence_id in sched._sequences:
            born.setdefault(sequence_id, now)
        step(sched)
        for sequence_id in born.keys() - sched._sequences.keys():
            worst = max(worst, now - born.pop(sequence_id))
        flood()
    assert count > 100
    assert worst < 50


def test_equal_calls_give_equal_plans():
    def run():
        sched = make_scheduler(num_pages=14, swap_tokens=8, host_bytes=60)
        plans = []
        for number in range(40):
            if number % 3 == 0:
                sched.submit(number, chunk_tokens_of("abcab"[number % 4 :]), 9 + number % 7)
            plans.append(step(sched))
        return plans

    assert run() == run()
