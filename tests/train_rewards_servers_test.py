"""What asks servers: the client, the remote sandbox, the judges; and the watch over the judges."""

import asyncio
import dataclasses
import http.server
import json
import math
import random
import threading
import time

import pytest

from train.rl import sample as sample_lib
from train.rl.rewards import client, coding, compose, generative, length_bias, remote, runner


class _Server:
    """Answers posts on this machine with `answer(body)`: JSON, (status, text), or None: hang up."""

    def __init__(self):
        self.bodies, self.headers = [], []
        self.answer = lambda body: body
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(dict(self.headers))
                said = outer.answer(body)
                if said in ("drip", "drip head"):
                    self.drip(said == "drip")
                elif said is not None:
                    status, text = said if isinstance(said, tuple) else (200, json.dumps(said))
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())

            def drip(self, body):
                self.send_response(200)
                if body:
                    self.end_headers()
                else:
                    self.flush_headers()
                try:
                    for _ in range(200):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.02)
                except OSError:
                    return

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    made = _Server()
    yield made
    made.close()


def _turns(*said):
    """Return an answer function that says one after the other, the last one again and again."""
    left = list(said)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def _post(server, **options):
    return client.post_json(server.url, {"x": 1}, **{"secs": 5, "backoff_secs": 0.01, **options})


def test_post_returns_the_answer(server):
    assert _post(server, headers={"X-Key": "k"}) == {"x": 1}
    assert server.headers[0]["X-Key"] == "k"
    assert server.headers[0]["Content-Type"] == "application/json"


@pytest.mark.parametrize("first", [(503, "busy"), (429, "slow down"), None])
def test_busy_server_is_asked_again(server, first):
    server.answer = _turns(first, first, {"ok": True})
    assert _post(server) == {"ok": True}
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("said", "times", "says"),
    [
        ((503, "busy"), 3, "HTTP 503: busy 3 times"),
        ((400, "bad key"), 1, "HTTP 400: bad key"),
        (None, 3, "3 times"),
        ((200, "not json"), 1, "wanted JSON"),
        ((200, "[" * 100_000), 1, "wanted JSON"),
    ],
)
def test_server_that_fails(server, said, times, says):
    server.answer = lambda body: said
    with pytest.raises(client.ServerError, match=says):
        _post(server)
    assert len(server.bodies) == times


def test_too_long_an_answer_is_refused(server, monkeypatch):
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 100)
    server.answer = lambda body: "x" * 200
    with pytest.raises(client.ServerError, match="over 100 bytes"):
        _post(server)


@pytest.mark.parametrize("how", ["sleep", "drip", "busy"])
def test_deadline_holds(server, how):
    def answer(body):
        if how == "sleep":
            time.sleep(1)
        return "drip" if how == "drip" else (503, "busy") if how == "busy" else {}

    server.answer = answer
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        _post(server, secs=0.3, retries=100, backoff_secs=0.05)
    assert time.monotonic() - start < 0.9


def test_nobody_listens(server):
    url = server.url
    server.close()
    with pytest.raises(client.ServerError, match="refused"):
        client.post_json(url, {}, secs=5, retries=1, backoff_secs=0.01)


RESULT = {"stdout": "3", "stderr": "", "exit_code": 0, "reason": "exit"}


def test_remote_sandbox(server):
    server.answer = lambda body: RESULT
    limits = runner.RunnerLimits(cpu_secs=2)
    result = remote.RemoteSandbox(server.url).run({"a": "b"}, ["python3", "a"], limits, stdin="i")
    assert result == runner.RunResult("3", "", 0, "exit")
    body = server.bodies[0]
    assert (body["files"], body["command"], body["stdin"]) == ({"a": "b"}, ["python3", "a"], "i")
    assert runner.RunnerLimits(**body["limits"]) == limits


@pytest.mark.parametrize(
    "change", [{"stdout": 1}, {"stderr": None}, {"exit_code": "0"}, {"reason": "magic"}]
)
def test_remote_garbage_is_refused(server, change):
    server.answer = lambda body: {**RESULT, **change}
    with pytest.raises(client.ServerError, match="wanted stdout"):
        remote.RemoteSandbox(server.url).run({}, ["true"], runner.RunnerLimits())


def _sample(text, label="ref", **metadata):
    messages = (
        {"role": "system", "content": "be good"},
        {"role": "user", "content": [{"type": "text", "text": "why {x}?"}]},
    )
    task = sample_lib.Task("t", messages, "s", label, metadata)
    return sample_lib.Sample(task, (), text=text)


def _score(reward, *arguments, **options):
    return asyncio.run(reward.reward(_sample(*arguments, **options)))


def test_code_in_a_remote_sandbox(server):
    server.answer = _turns(RESULT, {**RESULT, "stdout": "4"})
    tests = [{"stdin": "", "stdout": "3"}] * 2
    reward = coding.CodeReward(url=server.url)
    assert _score(reward, "```python\nprint(3)\n```", tests=tests) == 0.5
    assert server.bodies[0]["command"] == ["python3", "main.py"]


def _says(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def _judge(server, **options):
    return {"url": server.url + "/v1/", "model": "m", "backoff_secs": 0.01, **options}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("fine\nGrade: 5", 1.0),
        ("Grade: 5?\n**Grade: 2**", 0.25),
        ("<think>Grade: 5</think>\nGrade: 1", 0.0),
        ("Grade: 6", None),
        ("Grade: 3.5", None),
        ("five", None),
        (None, None),
    ],
)
def test_grades(server, text, value):
    server.answer = lambda body: _says(text)
    assert _score(generative.GradedReward(**_judge(server)), "<think>t</think>my {answer}") == value
    body = server.bodies[0]
    prompt = body["messages"][0]["content"]
    assert all(part in prompt for part in ("be good", "why {x}?", "ref", "my {answer}"))
    assert "<think>" not in prompt
    assert (body["model"], body["temperature"]) == ("m", 0.0)


def test_verdicts_are_remembered(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.answer = _turns(_says("?"), _says("Grade: 4"))
    reward = generative.GradedReward(**_judge(server, key_variable="JUDGE_KEY", remembered=1))
    assert [_score(reward, "a") for _ in range(3)] == [None, 0.75, 0.75]
    assert len(server.bodies) == 2
    assert server.headers[0]["Authorization"] == "Bearer secret"
    _score(reward, "b")
    _score(reward, "a")
    assert len(server.bodies) == 4


def _prefers(wanted):
    """Return a judge of pairs; wanted: the better text, or "A": the first one, always."""

    def answer(body):
        first = body["messages"][0]["content"].split("Answer A:\n")[1].split("\n")[0]
        better = wanted if wanted in ("A", "tie") else "A" if first == wanted else "B"
        return _says(f"Better: {better}")

    return answer


@pytest.mark.parametrize(("wanted", "value"), [("mine", 1), ("ref", -1), ("A", 0), ("tie", 0)])
def test_pairs_are_asked_both_ways(server, wanted, value):
    server.answer = _prefers(wanted)
    reward = generative.PairwiseReward(**_judge(server))
    assert _score(reward, "mine") == value
    assert _score(reward, "mine", "other", reference="ref") == value
    assert len(server.bodies) == 2


def test_pair_with_one_verdict_is_no_score(server):
    server.answer = _turns(_says("Better: A"), _says("hm"))
    assert _score(generative.PairwiseReward(**_judge(server)), "mine") is None


def test_judge_errors(server, monkeypatch):
    server.answer = lambda body: {"error": "no model"}
    with pytest.raises(client.ServerError, match="wanted choices"):
        _score(generative.GradedReward(**_judge(server)), "a")
    for reward in (generative.GradedReward, generative.PairwiseReward):
        with pytest.raises(ValueError, match="wanted"):
            _score(reward(**_judge(server)), "a", None)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="got no environment variable JUDGE_KEY"):
        generative.GradedReward(**_judge(server, key_variable="JUDGE_KEY"))


def test_hanging_judge_stalls_no_step(server):
    """More requests hang than are let in at once; not even the client's own deadline helps."""

    def answer(body):
        return "drip head" if "slow" in body["messages"][0]["content"] else _says("Grade: 5")

    server.answer = answer
    options = tuple(_judge(server, secs=0.5).items())
    config = compose.RewardsConfig((("s", (("graded", 1.0, options),)),), retries=0, parallel=2)
    rewards = compose.GroupScorer(config)
    try:
        start = time.monotonic()
        texts = ["slow 1", "slow 2", "slow 3", "good", "slow 4", "fine"]
        scores = rewards.submit([_sample(text) for text in texts]).result(20)
        assert [score.value for score in scores] == [None, None, None, 1.0, None, 1.0]
        assert time.monotonic() - start < 6
        assert rewards.failure_counts()["reward/error/graded/timeout"] == 4
    finally:
        rewards.close()


def _groups(taste, many=40, seed=0):
    """Yield (lengths, rewards); taste: how much of a reward is length."""
    rng = random.Random(seed)
    for _ in range(many):
        lengths = [rng.randrange(10, 1000) for _ in range(6)]
        rewards = [taste * length / 500 + (1 - taste) * rng.random() for length in lengths]
        yield lengths, rewards


WATCH = length_bias.LengthBiasConfig(window=30, least=10, pause=True)


def _watched(config, groups):
    watch = length_bias.LengthBiasMonitor(config)
    for lengths, rewards in groups:
        watch.push(lengths, rewards)
    return watch


def test_fair_judge_raises_no_alarm():
    watch = _watched(WATCH, _groups(0.0))
    watch.check()
    metrics = watch.metrics()
    assert abs(metrics["reward/length/correlation"]) < 0.2
    assert abs(metrics["reward/length/win_rate"] - 0.5) < 0.1
    assert (metrics["reward/length/groups"], metrics["reward/length/alarm"]) == (30.0, 0.0)


def test_biased_judge_raises_an_alarm_and_pauses_until_recalibrated(caplog):
    watch = _watched(WATCH, _groups(0.9))
    assert "rewards length" in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(length_bias.LengthBiasPause, match="--set=length_bias.recalibrated=1"):
        watch.check()
    again = length_bias.LengthBiasMonitor(WATCH, json.loads(json.dumps(watch.state())))
    assert again.metrics() == watch.metrics()
    for lengths, rewards in _groups(0.0):  # a pause does not pass by itself
        again.push(lengths, rewards)
    assert not again.has_alarm
    with pytest.raises(length_bias.LengthBiasPause):
        again.check()
    mended = dataclasses.replace(WATCH, recalibrated=1)
    again = length_bias.LengthBiasMonitor(mended, again.state())
    again.check()
    assert math.isnan(again.metrics()["reward/length/win_rate"])


def test_alarm_alone_does_not_stop():
    config = length_bias.LengthBiasConfig(window=30, least=10)
    watch = _watched(config, _groups(0.9))
    watch.check()
    assert watch.metrics()["reward/length/alarm"] == 1.0
    assert not _watched(config, _groups(0.9, many=9)).has_alarm


def test_numbers_of_one_group():
    watch = length_bias.LengthBiasMonitor(length_bias.LengthBiasConfig(window=2, least=1))
    watch.push([1, 2, 3, 9], [1.0, 3.0, 2.0, None])
    metrics = watch.metrics()
    assert metrics["reward/length/correlation"] == pytest.approx(0.5)
    assert metrics["reward/length/win_rate"] == pytest.approx(2 / 3)
    watch.push([1, 2], [1.0, 1.0])  # says nothing
    watch.push([2, 2], [1.0, 0.0])
    assert watch.metrics()["reward/length/groups"] == 1.0
    with pytest.raises(ValueError, match="wanted as many"):
        watch.push([1], [1.0, 2.0])


@pytest.mark.parametrize("change", [{"least": 0}, {"least": 9, "window": 8}, {"win_rate": 1.1}])
def test_watch_config_is_checked(change):
    with pytest.raises(ValueError, match="wanted"):
        length_bias.LengthBiasConfig(**change)
