"""Tools that hang, fail or take long: the run goes on, and a signal ends it."""

import dataclasses
import threading
import time

import pytest

from train.rl import rollout, tool_pool
from train.rl import sample as sample_lib
from train.rl.config import AgentConfig


class NoEngine:
    """An engine that nobody asks for tokens."""

    def step(self):
        return False

    def cancel(self, request):
        raise AssertionError("no request was made")


@pytest.fixture(name="blocked")
def fixture_blocked():
    """An event that hanging tools wait for. It is set after the test."""
    event = threading.Event()
    yield event
    event.set()


def run(pool, episodes, should_stop=lambda: False):
    """Return (results by key, stats) of episodes over no engine."""
    found = {}

    def take(key, result):
        found[key] = result
        return ()

    loop = rollout._EpisodeLoop(NoEngine(), pool, rollout.RolloutSampling(), take, should_stop)
    jobs = [rollout.EpisodeJob(key, episode, 0) for key, episode in episodes.items()]
    return found, loop.run(jobs)


def call(function):
    """Return an episode of one tool, whose result is what the tool returns, or its error."""
    try:
        return (yield sample_lib.RunTool(function))
    except Exception as error:
        return error


def test_a_tool_that_hangs_ends_its_own_episode_alone(blocked):
    pool = tool_pool.ToolPool(2, limit_secs=0.2)
    # The hanging calls take all workers, until their time is over.
    episodes = {n: call(blocked.wait) for n in range(3)} | {"fine": call(lambda: 4)}
    found, stats = run(pool, episodes)
    assert found["fine"] == 4
    assert stats.num_tool_timeouts == 3
    for n in range(3):
        assert isinstance(found[n], tool_pool.ToolTimeoutError)
        assert str(found[n]) == "the tool ran for more than 0.2 s"


def test_a_signal_ends_a_run_that_waits_for_tools(blocked):
    began, stop = time.monotonic(), threading.Event()
    threading.Timer(0.1, stop.set).start()
    pool = tool_pool.ToolPool(1)
    with pytest.raises(rollout.RolloutStopped):
        run(pool, {n: call(blocked.wait) for n in range(2)}, stop.is_set)
    assert time.monotonic() - began < 5
    # The interpreter does not wait for the thread at its end either.
    assert all(t.daemon for t in threading.enumerate() if t.name == "tool")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_tool_cannot_end_the_run(error):
    def fail():
        raise error

    found, _ = run(tool_pool.ToolPool(), {0: call(fail), 1: call(lambda: "fine")})
    assert type(found[0]) is RuntimeError
    assert type(error).__name__ in str(found[0])
    assert found[1] == "fine"


def test_no_more_tools_at_once_than_workers():
    lock, running, most = threading.Lock(), [0], [0]

    def tool():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return threading.current_thread().daemon

    found, stats = run(tool_pool.ToolPool(3), {n: call(tool) for n in range(12)})
    assert most[0] == 3
    assert list(found.values()) == [True] * 12
    assert 0 < stats.waiting_secs < 10


def test_calls_that_are_dropped_never_begin(blocked):
    pool = tool_pool.ToolPool(1)
    first, second = pool.submit(blocked.wait), pool.submit(blocked.wait)
    pool.drop_waiting_calls()
    assert second.cancelled()
    assert not first.done()


@pytest.mark.parametrize("wrong", [{"num_workers": 0}, {"limit_secs": 0.0}])
def test_pools_of_no_use(wrong):
    with pytest.raises(ValueError, match=r"tools: got .* wanted at least 1 worker, and more"):
        tool_pool.ToolPool(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"tool_workers": 0}, {"tool_limit_secs": 0.0}, {"tool_limit_secs": float("nan")}]
)
def test_limits_of_an_agent(wrong):
    agent = AgentConfig("lookup")
    with pytest.raises(ValueError, match=r"agent\.tool_.*: got .*; wanted"):
        dataclasses.replace(agent, **wrong)
