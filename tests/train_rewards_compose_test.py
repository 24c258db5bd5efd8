"""Composition: weights and parts, failures that are counted and never scored, no stalls."""

import asyncio
import concurrent.futures
import sys
import time

import pytest

from train.rl import sample as sample_lib
from train.rl.rewards import catalog, compose

# What an outside reward does, chosen by the sample's text.
_FUNCTIONS = """
import os, pathlib, signal, time

def reward(sample, **options):
    text = sample.text
    if text == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if text == "crash": os._exit(3)
    if text == "raise": raise RuntimeError("no luck")
    if text == "huge": return "x" * 2 ** 21
    odd = {"nan": float("nan"), "inf": float("inf"), "text": "1", "none": None, "list": [1],
           "empty": {}, "part": {"a": None}, "big": 10 ** 400, "invalid": {"valid": False, "a": 1}}
    if text in odd: return odd[text]
    if text.startswith("parts"): return {"a": 1.0, "b": 0.5, "valid": True}
    if text.startswith("once:"):
        mark = pathlib.Path(text[5:])
        if not mark.exists():
            mark.touch()
            time.sleep(1000)
        return 1.0
    time.sleep(options.get("secs", 0) * float(text))
    return float(text)
"""
PATH = (("path", "compose_functions:reward"),)


@pytest.fixture(scope="module", autouse=True)
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "compose_functions.py").write_text(_FUNCTIONS)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def make():
    made = []

    def start(*terms, source="s", **options):
        config = compose.RewardsConfig(sources=((source, terms),), **options)
        made.append(compose.GroupScorer(config))
        return made[-1]

    yield start
    for rewards in made:
        rewards.close()


def _group(*texts, source="s", label="1"):
    task = sample_lib.Task("t", ({"role": "user", "content": "?"},), source, label)
    return [sample_lib.Sample(task, (1,), text=text) for text in texts]


def _scores(rewards, *texts, **options):
    return rewards.submit(_group(*texts, **options)).result(40)


def test_weighted_sum_and_parts(make):
    rewards = make(
        ("exact", 2.0, ()), ("format", 0.5, ()), ("function", (("b", 10.0), ("a", 1.0)), PATH)
    )
    good, bad = _scores(rewards, "parts</think>Answer: 1", "parts Answer: 1")
    parts = {"exact": 1.0, "format": 1.0, "function/a": 1.0, "function/b": 0.5}
    assert good == sample_lib.RewardScore(2 + 0.5 + 10 * 0.5 + 1, parts)
    assert bad == sample_lib.RewardScore(8.0, {**parts, "format": 0.0})
    assert not any(rewards.failure_counts().values())


def test_one_weight_takes_the_sum_of_the_parts(make):
    assert _scores(make(("function", 2.0, PATH)), "parts")[0].value == 3.0


def test_scores_come_in_the_order_of_submission(make):
    slow_first = PATH + (("secs", 0.3),)
    rewards = make(("function", 1.0, slow_first), workers=3)
    texts = ["1.0", "0.5", "0.0", "0.7"]
    futures = [rewards.submit(_group(*order)) for order in (texts, texts[::-1])]
    forward, backward = ([score.value for score in one.result(20)] for one in futures)
    assert forward == backward[::-1] == [1.0, 0.5, 0.0, 0.7]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("raise", "exception"),
        ("crash", "crash"),
        ("huge", "garbage"),
        ("nan", "garbage"),
        ("inf", "garbage"),
        ("big", "garbage"),
        ("text", "garbage"),
        ("list", "garbage"),
        ("empty", "garbage"),
        ("none", "none"),
        ("invalid", "none"),
    ],
)
def test_failure_is_counted_and_never_scored(make, text, kind):
    rewards = make(("exact", 1.0, ()), ("function", 1.0, PATH), retries=0, workers=1)
    bad, good = _scores(rewards, text, "1")
    assert bad.value is None
    assert bad.error.startswith(f"function: {kind}: ")
    assert bad.parts == {"exact": 0.0}
    assert (good.value, good.error) == (1.0, "")
    counts = {name: many for name, many in rewards.failure_counts().items() if many}
    assert counts == {f"reward/error/function/{kind}": 1}


def test_missing_part_is_garbage(make):
    score = _scores(make(("function", (("a", 1.0), ("c", 1.0)), PATH)), "parts")[0]
    assert (score.value, "garbage" in score.error) == (None, True)


def test_hanging_rewards_stall_nobody(make):
    rewards = make(("function", 1.0, PATH), limit_secs=1.0, retries=0, workers=2)
    start = time.monotonic()
    stuck = rewards.submit(_group("hang", "hang"))
    values = [score.value for score in _scores(rewards, "1", "0", "0.5")]
    assert values == [1.0, 0.0, 0.5]
    assert [score.value for score in stuck.result(20)] == [None, None]
    assert time.monotonic() - start < 10
    assert rewards.failure_counts()["reward/error/function/timeout"] == 2


def test_timeout_is_tried_again(make, tmp_path):
    texts = [f"once:{tmp_path / name}" for name in "ab"]
    tried = make(("function", 1.0, PATH), limit_secs=1.0)
    assert _scores(tried, texts[0])[0].value == 1.0
    assert not any(tried.failure_counts().values())
    once = make(("function", 1.0, PATH), limit_secs=1.0, retries=0)
    assert _scores(once, texts[1])[0].value is None


class _Odd:
    """A reward in the trainer's process that misbehaves."""

    def __init__(self, said):
        self._results = said

    async def reward_group(self, samples):
        if self._results == "sleep":
            await asyncio.sleep(1000)
        if self._results == "raise":
            raise SystemError("broken")
        return self._results


@pytest.mark.parametrize(
    ("said", "kind"),
    [("sleep", "timeout"), ("raise", "exception"), ([1.0], "garbage"), (1.0, "garbage")],
)
def test_reward_of_groups_fails_as_one(make, monkeypatch, said, kind):
    monkeypatch.setitem(catalog.REWARD_FACTORIES, "odd", lambda workers: _Odd(said))
    rewards = make(("odd", 1.0, ()), limit_secs=0.3)
    assert [score.value for score in _scores(rewards, "a", "b")] == [None, None]
    assert rewards.failure_counts()[f"reward/error/odd/{kind}"] == 2


def test_reward_of_groups_scores_each(make, monkeypatch):
    said = [1.0, float("nan"), {"x": 2.0}]
    monkeypatch.setitem(catalog.REWARD_FACTORIES, "odd", lambda workers: _Odd(said))
    values = [score.value for score in _scores(make(("odd", 1.0, ())), "a", "b", "c")]
    assert values == [1.0, None, 2.0]


def test_sources_choose_their_rewards(make):
    any_source = make(("exact", 1.0, ()), source="*")
    assert _scores(any_source, "Answer: 1", source="other")[0].value == 1.0
    named = make(("exact", 1.0, ()), source="s")
    with pytest.raises(ValueError, match="source 'other': got no rewards"):
        named.submit(_group("x", source="other"))
    with pytest.raises(ValueError, match="wanted one"):
        named.submit(_group("x") + _group("x", source="other"))


def test_close_cancels_and_refuses(make):
    rewards = make(("function", 1.0, PATH), workers=1)
    future = rewards.submit(_group("hang"))
    time.sleep(0.2)
    start = time.monotonic()
    rewards.close()
    rewards.close()
    assert time.monotonic() - start < 5
    try:
        assert future.result(1)[0].value is None
    except concurrent.futures.CancelledError:
        assert future.cancelled()
    with pytest.raises(RuntimeError, match=r"after close\(\)"):
        rewards.submit(_group("1"))


def test_unknown_rewards_and_options_are_refused(make):
    with pytest.raises(ValueError, match="reward: got 'exakt'; wanted one of exact"):
        make(("exakt", 1.0, ()))
    with pytest.raises(ValueError, match="reward 'exact': got the options"):
        make(("exact", 1.0, (("no", 1),)))
    with pytest.raises(ValueError, match="wanted 'module:function'"):
        make(("function", 1.0, (("path", "nowhere"),)))


@pytest.mark.parametrize(
    "change",
    [
        {"sources": ()},
        {"sources": (("s", ()),)},
        {"sources": (("s", (("exact", 1.0, ()), ("exact", 1.0, ()))),)},
        {"sources": (("s", (("exact", float("nan"), ()),)),)},
        {"sources": (("s", (("exact", (), ()),)),)},
        {"limit_secs": 0},
        {"retries": -1},
        {"workers": 0},
        {"parallel": 0},
    ],
)
def test_config_is_checked(change):
    with pytest.raises(ValueError, match="wanted"):
        compose.RewardsConfig(**{"sources": (("s", (("exact", 1.0, ()),)),), **change})
