"""Tests of train.rl.episodes: scripted models, so that every token of an episode is known
beforehand.
"""

import concurrent.futures
import pathlib
import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from infer import prompt
from m1_jax import tokenizer as tokenizer_lib
from train.data import chat
from train.rl import episodes
from train.rl import sample as sample_lib
from train.rl.environments import base, lookup

DEMO = pathlib.Path(__file__).parents[1] / "demo" / "data"
WIDE = episodes.EpisodeLimits(max_turns=8, max_tokens=100_000, turn_tokens=10_000)
TOOLS = (base.make_tool_schema("say", "Say it.", text="string"),)
TASK = sample_lib.Task("t", ({"role": "user", "content": "Go."},), "test", tools=TOOLS)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.Tokenizer.load(DEMO / "tokenizer")


class Scripted(base.Environment):
    """Answers turn by turn with what it was given, an exception by raising it."""

    def __init__(self, steps=(), final=1.0, reports_malformed_calls=True, start=None):
        self.steps, self.final, self.fails_at_start = list(steps), final, start
        self.reports_malformed_calls = reports_malformed_calls
        self.calls, self.text, self.closed = [], None, 0

    def start(self, task):
        if self.fails_at_start:
            raise self.fails_at_start

    def step(self, calls):
        self.calls.append(calls)
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def finish(self, text):
        self.text = text
        if isinstance(self.final, Exception):
            raise self.final
        return self.final

    def close(self):
        self.closed += 1


def call(name="say", **arguments):
    message = {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}
    return prompt.normalize_messages([message])[0]["content"][0]["text"]


def drive(episode, tokenizer, turns, ends=True, version=3, status="stop"):
    """Play the model; return the sample and what it was asked. ends: it writes its end token."""
    turns, asked, written = list(turns), [], []
    wanted = None
    while True:
        try:
            if wanted is None:
                wanted = next(episode)
            if isinstance(wanted, sample_lib.RunTool):
                try:
                    result = wanted.function()
                except Exception as error:
                    wanted = episode.throw(error)
                else:
                    wanted = episode.send(result)
                continue
            assert list(wanted.tokens[: len(written)]) == written  # nothing is taken back
            ids = (
                tokenizer.encode(turns.pop(0))
                + [tokenizer.special_token_id(prompt.END_TOKEN)] * ends
            )
            cut = len(ids) > wanted.max_tokens
            ids = ids[: wanted.max_tokens]
            asked.append(wanted)
            written = [*wanted.tokens, *ids]
            logprobs = tuple(-0.5 - i for i in range(len(ids)))
            made = sample_lib.Generation(
                tuple(ids), logprobs, (version,) * len(ids), "length" if cut else status
            )
            wanted = episode.send(made)
        except StopIteration as stop:
            sample = stop.value
            assert [*sample.prompt.tolist(), *sample.tokens.tolist()][: len(written)] == written
            return sample, asked


def test_one_turn(tokenizer):
    sample, asked = drive(
        episodes.single_turn_episode(TASK, tokenizer, 50), tokenizer, ["Well, 4."]
    )
    ids = tokenizer.encode("Well, 4.") + [tokenizer.special_token_id(prompt.END_TOKEN)]
    assert asked == [sample_lib.Generate(tuple(sample.prompt.tolist()), 50)]
    assert list(sample.prompt) == prompt.encode_prompt(tokenizer, TASK.messages, TASK.tools)
    assert (sample.tokens.tolist(), sample.mask.tolist()) == (ids, [1] * len(ids))
    assert (sample.text, sample.status, sample.reward) == ("Well, 4.", "stop", None)
    assert sample.messages == [{"role": "assistant", "content": "Well, 4."}]
    assert sample.versions.tolist() == [3] * len(ids)


def test_an_answer_that_is_cut_off(tokenizer):
    sample, _ = drive(
        episodes.single_turn_episode(TASK, tokenizer, 3), tokenizer, ["Well, so it is 4."]
    )
    assert (sample.status, len(sample.tokens)) == ("length", 3)
    assert sample.text == tokenizer.decode(tokenizer.encode("Well, so it is 4.")[:3])


@pytest.mark.parametrize("ends", [True, False])
def test_turns_with_a_tool(tokenizer, ends):
    world = Scripted(
        [base.EnvironmentStep(("one",), reward=0.25), base.EnvironmentStep(("two",))], final=0.5
    )
    turns = [call(text="a"), call(text="b") + "\n", "<think>\nHm.\n</think>\nDone."]
    sample, asked = drive(
        episodes.multi_turn_episode(TASK, world, tokenizer, WIDE), tokenizer, turns, ends
    )
    assert [list(map(tuple, calls)) for calls in world.calls] == [
        [("say", {"text": "a"})],
        [("say", {"text": "b"})],
    ]
    assert (world.text, world.closed, len(asked)) == ("Done.", 1, 3)
    first = len(asked[1].tokens) - len(sample.prompt)
    end = tokenizer.special_token_id(prompt.END_TOKEN)
    written = len(tokenizer.encode(turns[0])) + ends
    assert sample.mask[: first + 1].tolist() == [1] * written + [0] * (first - written) + [1]
    assert sample.logprobs[written:first].tolist() == [0.0] * (first - written)
    assert sample.versions[written : first + 1].tolist() == [-1] * (first - written) + [3]
    assert (sample.tokens[written] == end) != ends  # it is there once, whoever wrote it
    assert sample.tokens[:first].tolist().count(end) == 2
    assert sample.turn_rewards == [(written - 1, 0.25)]
    assert (sample.reward, sample.parts) == (0.75, {"final": 0.5, "turns": 0.25})
    assert sample.valid


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
TURN = st.tuples(TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))


@hypothesis.given(st.lists(TURN, max_size=4), TEXT, st.booleans(), st.sampled_from(prompt.PROFILES))
@hypothesis.settings(max_examples=60, deadline=None)
def test_tokens_are_those_of_the_whole_conversation(tokenizer, turns, last, ends, profile):
    """The buffer reads as the conversation rendered at once would."""
    if profile == "vllm":  # which trims what the model wrote
        turns, last = [(text.strip(), calls) for text, calls in turns], last.strip()
    texts = []
    for text, calls in turns:
        entries = [{"name": "say", "arguments": {"text": said}} for said, _ in calls]
        message = {"role": "assistant", "content": text, "tool_calls": entries}
        texts.append(prompt.normalize_messages([message])[0]["content"][0]["text"])
    texts.append(f"So: {last}.")
    hypothesis.assume("<t" not in "".join(text for text, _ in turns) + last)
    world = Scripted([base.EnvironmentStep(tuple(said for _, said in calls)) for _, calls in turns])
    sample, _ = drive(
        episodes.multi_turn_episode(TASK, world, tokenizer, WIDE, profile), tokenizer, texts, ends
    )
    end = "" if ends else prompt.END_TOKEN
    whole = tokenizer.decode([*sample.prompt, *sample.tokens], skip_special=False) + end + "\n"
    messages = [*TASK.messages, *sample.messages]
    assert whole == prompt.render_text(
        messages, TOOLS, add_generation_prompt=False, profile=profile
    )
    assert len(sample.mask) == len(sample.tokens) == len(sample.logprobs) == len(sample.versions)
    masked = [
        (p, v)
        for m, p, v in zip(sample.mask, sample.logprobs, sample.versions, strict=True)
        if not m
    ]
    assert set(masked) <= {(0.0, -1)}


@pytest.mark.parametrize("careless", [0.0, 1.0])
def test_an_episode_is_what_supervised_training_sees(tokenizer, careless):
    encoder = chat.RecordEncoder(tokenizer)
    tasks = lookup.make_tasks(8, 5)
    for task, record in zip(tasks, lookup.make_demonstrations(8, 5, careless), strict=True):
        document = encoder.encode(record)
        turns = [
            prompt.normalize_messages([message])[0]["content"][0]["text"]
            for message in record["messages"]
            if message["role"] == "assistant"
        ]
        run = episodes.multi_turn_episode(task, lookup.LookupEnvironment(), tokenizer, WIDE)
        sample, _ = drive(run, tokenizer, turns)
        tail = len(tokenizer.encode("\n"))  # after the last turn
        assert [*sample.prompt, *sample.tokens] == document.tokens[:-tail].tolist()
        mask = [0] * len(sample.prompt) + sample.mask.tolist()
        assert mask == document.loss_mask[:-tail].astype(int).tolist()
        assert sample.reward == 1.0 - careless
        assert len(document.tokens) < 128


BAD = "<tool_calls>\nsay(it)\n</tool_calls>"


def test_a_malformed_call_is_told(tokenizer):
    world = Scripted()
    run = episodes.multi_turn_episode(TASK, world, tokenizer, WIDE)
    sample, _ = drive(run, tokenizer, [BAD, "Sorry."])
    assert sample.messages[1]["name"] == "tool_calls"
    assert "error: tool calls: got" in sample.messages[1]["content"]
    assert (sample.reward, sample.status, world.text) == (1.0, "stop", "Sorry.")


def test_a_malformed_call_ends(tokenizer):
    world = Scripted(final=0.0, reports_malformed_calls=False)
    sample, asked = drive(
        episodes.multi_turn_episode(TASK, world, tokenizer, WIDE), tokenizer, [BAD]
    )
    assert (sample.reward, sample.status, world.text, len(asked)) == (0.0, "stop", "", 1)
    assert sample.valid


def test_the_environment_ends_it(tokenizer):
    world = Scripted([base.EnvironmentStep(("",), reward=2.0, done=True)])
    turns = ["Last.\n" + call(text="a")]
    sample, _ = drive(episodes.multi_turn_episode(TASK, world, tokenizer, WIDE), tokenizer, turns)
    assert (sample.reward, world.text, sample.mask[-1]) == (3.0, "Last.\n", 1)
    assert sample.turn_rewards == [(len(sample.tokens) - 1, 2.0)]


def test_no_more_turns(tokenizer):
    world = Scripted([base.EnvironmentStep(("one",)), base.EnvironmentStep(("two",), reward=1.0)])
    limits = episodes.EpisodeLimits(2, 100_000, 1000)
    turns = [call(text="a"), call(text="b")]
    sample, _ = drive(episodes.multi_turn_episode(TASK, world, tokenizer, limits), tokenizer, turns)
    assert (sample.status, world.text, len(world.calls)) == ("length", "", 2)
    assert (sample.mask[-1], sample.reward) == (1, 2.0)  # nobody would read the results


@hypothesis.given(st.integers(1, 500), st.integers(1, 60))
@hypothesis.settings(max_examples=60, deadline=None)
def test_never_longer_than_the_context(tokenizer, room, turn_tokens):
    size = len(prompt.encode_prompt(tokenizer, TASK.messages, TOOLS))
    limits = episodes.EpisodeLimits(5, size + room, turn_tokens)
    world = Scripted([base.EnvironmentStep(("a longer result " * 3,))] * 3)
    turns = [call(text="a")] * 3 + ["Done."]
    sample, asked = drive(
        episodes.multi_turn_episode(TASK, world, tokenizer, limits), tokenizer, turns
    )
    assert len(sample.prompt) + len(sample.tokens) <= limits.max_tokens
    assert all(1 <= one.max_tokens <= turn_tokens for one in asked)
    assert all(len(one.tokens) + one.max_tokens <= limits.max_tokens for one in asked)
    assert sample.status == ("stop" if world.text == "Done." else "length")
    assert world.text in ("Done.", "")
    assert sample.valid


def test_no_room_after_what_it_is_told(tokenizer):
    for spare, turns in ((0, 1), (1, 2)):
        steps = [base.EnvironmentStep(("a result",))]
        run = episodes.multi_turn_episode(TASK, Scripted(steps), tokenizer, WIDE)
        _, asked = drive(run, tokenizer, [call(text="a"), "Done."])
        limits = episodes.EpisodeLimits(5, len(asked[1].tokens) + spare, 1000)
        run = episodes.multi_turn_episode(TASK, Scripted(steps), tokenizer, limits)
        sample, asked = drive(run, tokenizer, [call(text="a"), "Done."])
        assert (sample.status, len(asked)) == ("length", turns)
        assert len(sample.prompt) + len(sample.tokens) == (
            limits.max_tokens if spare else len(asked[0].tokens) + sum(sample.mask)
        )


def test_cut_off_in_a_turn(tokenizer):
    world = Scripted()
    run = episodes.multi_turn_episode(TASK, world, tokenizer, episodes.EpisodeLimits(5, 10_000, 4))
    sample, _ = drive(run, tokenizer, ["Done, and it is 4."])
    assert (sample.status, world.text) == ("length", "")
    world = Scripted()
    run = episodes.multi_turn_episode(TASK, world, tokenizer, WIDE)
    sample, _ = drive(run, tokenizer, [call(text="a")], ends=False, status="repetition")
    assert (sample.status, world.calls, sample.valid) == ("repetition", [], True)


@pytest.mark.parametrize(
    "world",
    [
        Scripted(start=KeyError("no such task")),
        Scripted([OSError("disk is full")]),
        Scripted([base.EnvironmentStep(())]),
        Scripted([base.EnvironmentStep(("\ud800",))]),
        Scripted([base.EnvironmentStep(("one",), reward=float("nan"))]),
        Scripted([base.EnvironmentStep(("one",))], final=float("inf")),
        Scripted([base.EnvironmentStep(("one",))], final=RuntimeError("no runner")),
    ],
)
def test_a_failure_makes_no_reward(tokenizer, world, caplog):
    run = episodes.multi_turn_episode(TASK, world, tokenizer, WIDE)
    sample, _ = drive(run, tokenizer, [call(text="a"), "Done."])
    assert (sample.valid, sample.reward, sample.status) == (False, None, "error")
    assert sample.parts == {"error": 1.0}
    assert sample.error.startswith("the environment failed: ")
    assert world.closed == 1
    assert "task t: the environment failed" in caplog.text


def test_an_engine_that_fails(tokenizer):
    world = Scripted()
    run = episodes.multi_turn_episode(TASK, world, tokenizer, WIDE)
    sample, _ = drive(run, tokenizer, ["Do"], ends=False, status="error")
    assert (sample.valid, sample.reward, sample.status) == (False, None, "error")
    assert (world.text, world.closed) == (None, 1)
    sample, _ = drive(
        episodes.single_turn_episode(TASK, tokenizer, 9), tokenizer, ["Do"], status="error"
    )
    assert not sample.valid


def test_a_prompt_that_does_not_fit(tokenizer, caplog):
    world = Scripted()
    run = episodes.multi_turn_episode(TASK, world, tokenizer, episodes.EpisodeLimits(5, 20, 4))
    sample, asked = drive(run, tokenizer, [])
    assert (sample.valid, len(sample.tokens), asked) == (False, 0, [])
    assert "wanted fewer than max_tokens, 20" in caplog.text


def test_closed_when_given_up(tokenizer):
    world = Scripted()
    run = episodes.multi_turn_episode(TASK, world, tokenizer, WIDE)
    next(run)
    run.close()
    assert world.closed == 1


class Stubborn(Scripted):
    """Fails, or hangs, when it is closed."""

    def __init__(self, close):
        super().__init__()
        self.close = close


def test_an_environment_that_cannot_be_closed(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(episodes, "_CLOSE_SECS", 0.05)
    blocked, broken = threading.Event(), iter(())
    for close, text in (
        (lambda: blocked.wait(), "its environment did not close in 0.05 s; going on"),
        (lambda: next(broken), "its environment did not close"),
    ):
        run = episodes.multi_turn_episode(TASK, Stubborn(close), tokenizer, WIDE)
        sample, _ = drive(run, tokenizer, ["Done."])
        assert (sample.valid, sample.reward) == (True, 1.0)
        assert text in caplog.text
        caplog.clear()
    blocked.set()


def test_bad_limits():
    with pytest.raises(ValueError, match="max_turns: got 0; wanted at least 1"):
        episodes.EpisodeLimits(0, 1, 1)


def test_a_task_that_cannot_be_rendered(tokenizer):
    task = sample_lib.Task("t", (), "test")
    with pytest.raises(ValueError, match="at least one message"):
        next(episodes.multi_turn_episode(task, Scripted(), tokenizer, WIDE))


def test_environments_side_by_side(tokenizer):
    """Episodes that take turns, their environments in other threads, do not mix."""
    tasks = lookup.make_tasks(12, 1)
    runs = [
        episodes.multi_turn_episode(task, lookup.LookupEnvironment(), tokenizer, WIDE)
        for task in tasks
    ]
    waiting = {run: next(run) for run in runs}
    samples = {}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        while waiting:
            started = {
                run: pool.submit(wanted.function)
                for run, wanted in waiting.items()
                if isinstance(wanted, sample_lib.RunTool)
            }
            for run, wanted in list(waiting.items()):
                result = started[run].result() if run in started else oracle(tokenizer, wanted)
                try:
                    waiting[run] = run.send(result)
                except StopIteration as stop:
                    samples[run] = stop.value
                    del waiting[run]
    assert [samples[run].task for run in runs] == tasks
    assert all(sample.reward == 1.0 for sample in samples.values())


def oracle(tokenizer, wanted):
    """Do what the conversation so far asks for."""
    text = tokenizer.decode(wanted.tokens)
    said = text.rpartition("tool result: ")[2].split("\n")[0] if "tool result" in text else ""
    key = text.partition("Get ")[2][:1]
    ids = tokenizer.encode(said or call("get", key=key)) + [
        tokenizer.special_token_id(prompt.END_TOKEN)
    ]
    return sample_lib.Generation(tuple(ids), (-1.0,) * len(ids), (0,) * len(ids), "stop")
