"""What leaves a step early, and what callbacks do: the engine stays exact, or refuses by name."""

import collections
import dataclasses
import functools
import linecache
import pathlib
import random
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from output_support import bits
from tokenizer_support import load_tokenizer

from infer import config as config_lib
from infer import engine as engine_lib
from infer import options as options_lib
from infer import request as request_lib
from infer import suspend
from infer.execution import device as device_lib
from infer.execution import dispatcher
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib

INFER = str(pathlib.Path(engine_lib.__file__).parent)
CONFIG = config_lib.EngineConfig(
    max_length=128,
    max_rows=3,
    num_pages=14,
    chunk_tokens=16,
    prefill_tokens=(32,),
    num_snapshots=3,
    decode_steps=4,
    max_queue=9,
    swap_tokens=20,
    host_bytes=2**22,
)
PROMPT = tuple(range(20, 53))
# Of four requests three run at a time.
OPTIONS = (
    options_lib.Options(seed=1, max_tokens=22, ignore_eos=True, top_logprobs=2),
    options_lib.Options(seed=2, max_tokens=17, ignore_eos=True, repetition_penalty=1.2),
    options_lib.Options(seed=3, max_tokens=19, regex="[a-h]{3,30}"),
    options_lib.Options(seed=4, max_tokens=21, ignore_eos=True, presence_penalty=0.5),
)


@functools.cache
def make_model():
    return model_lib.MiniMaxM1(model_config_lib.ModelConfig.tiny(), nnx.Rngs(0), dtype=jnp.float32)


@functools.cache
def shared_engine():
    # One device for all: it takes longer to make than all tests to run.
    device = shared_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_lib, "Device", lambda *_: device)
        engine = engine_lib.Engine(make_model(), load_tokenizer(), CONFIG)
    engine._core._runner._dispatcher._first_use = dispatcher._DIRTY
    return engine


@functools.cache
def shared_device():
    return device_lib.Device(make_model(), CONFIG)


@pytest.fixture(scope="module", autouse=True)
def drop_engines():
    yield
    shared_engine.cache_clear()
    shared_device.cache_clear()
    make_model.cache_clear()


@pytest.fixture(autouse=True)
def drop_engine():
    """Have the next test make another engine if this one is closed, or has failed."""
    yield
    engine = shared_engine()
    if engine._closed or engine._core.failure or engine._core.own_thread:
        engine.close()
        shared_engine.cache_clear()


@pytest.fixture
def engine():
    return shared_engine()


class Listener:
    """A callback that keeps what it hears."""

    def __init__(self, action=lambda request: None):
        self.tokens, self.text, self.ends, self._action = [], "", 0, action

    def __call__(self, request, token, text):
        if token is not None:
            self.tokens.append(token)
            assert self.tokens == list(request.tokens)
        self.text += text
        assert self.text == request.text
        self.ends += request.finish_reason is not None
        self._action(request)

    def check(self, output):
        """Check that the callback has heard of all of the output, and of its end once."""
        assert (self.tokens, self.text, self.ends) == (list(output.tokens), output.text, 1)


@functools.cache
def undisturbed():
    engine = shared_engine()
    return [engine.generate([PROMPT[i:]], OPTIONS[i])[0] for i in range(len(OPTIONS))]


def submit_all(engine, **actions):
    """Submit all requests. Return (requests, listeners). `actions` are r0=..., by number."""
    listeners = [Listener(actions.get(f"r{i}", lambda _: None)) for i in range(len(OPTIONS))]
    requests = [
        engine.submit(PROMPT[i:], OPTIONS[i], on_token=listeners[i]) for i in range(len(OPTIONS))
    ]
    return requests, listeners


def check_exact(requests, listeners, numbers=(0, 1, 2, 3)):
    for i in numbers:
        output, want = requests[i].output(60), undisturbed()[i]
        assert bits(output) == bits(want)
        assert (output.text, output.finish_reason) == (want.text, want.finish_reason)
        assert output.error is None
        listeners[i].check(output)


def check_memory(engine):
    engine.run()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running) == (0, 0)
    assert stats.free_pages + stats.cache.num_pages == CONFIG.total_pages


def at_token(number, action):
    """Return a callback's action that does something at one token of its request."""

    def act(request):
        if len(request.tokens) == number and request.finish_reason is None:
            action(request)

    return act


def raising(error):
    def action(_):
        raise error

    return action


# ---- exceptions of callbacks


@pytest.mark.parametrize("number", [1, 5, 8])
def test_an_exception_of_a_callback_ends_its_own_request(engine, number):
    want, error = undisturbed(), BrokenPipeError("the client went away")
    requests, listeners = submit_all(engine, r1=at_token(number, raising(error)))
    engine.run()
    output = requests[1].output(0)
    assert (output.finish_reason, output.error) == ("error", error)
    assert requests[1].error is error
    assert bits(output) == bits(want[1])[:number]
    check_exact(requests, listeners, (0, 2, 3))
    check_memory(engine)
    assert bits(engine.generate([PROMPT], OPTIONS[0])[0]) == bits(want[0])


def test_an_exception_at_the_last_token(engine):
    undisturbed()
    last = OPTIONS[0].max_tokens
    error = ValueError("late")

    def act(request):
        if len(request.tokens) == last:
            raise error

    requests, listeners = submit_all(engine, r0=act)
    engine.run()
    output = requests[0].output(0)
    assert (output.finish_reason, output.error) == ("error", error)
    assert len(output.tokens) == last
    check_exact(requests, listeners, (1, 2, 3))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_is_no_exception_leaves_the_step_too(engine, error):
    undisturbed()
    requests, listeners = submit_all(engine, r2=at_token(3, raising(error)))
    with pytest.raises(type(error)):
        engine.run()
    engine.run()
    assert requests[2].output(0).error is error
    check_exact(requests, listeners, (0, 1, 3))
    check_memory(engine)


def test_a_thread_survives_the_exceptions_of_callbacks():
    undisturbed()
    engine = shared_engine()
    errors = [BrokenPipeError("gone"), SystemExit(1)]
    actions = {f"r{i}": at_token(3, raising(error)) for i, error in enumerate(errors)}
    requests, listeners = submit_all(engine, **actions)
    engine.start()
    assert [request.output(60).error for request in requests[:2]] == errors
    check_exact(requests, listeners, (2, 3))
    requests, listeners = submit_all(engine)
    check_exact(requests, listeners)
    engine.close()


# ---- callbacks that call the engine


@pytest.mark.parametrize("victim", [0, 1, 3])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_callback_cancels_any_request(victim, threaded):
    """Older, itself, younger."""
    want, engine = undisturbed(), shared_engine()
    lengths = []

    def cancel(_):
        lengths.append(len(requests[victim].tokens))
        engine.cancel(requests[victim])
        engine.cancel(requests[victim])

    # Under the lock, so that the thread sees all of `requests`.
    with engine._lock:
        if threaded:
            engine.start()
        requests, listeners = submit_all(engine, r1=at_token(5, cancel))
    if not threaded:
        engine.run()
    output = requests[victim].output(60)
    assert output.finish_reason == "cancelled"
    assert bits(output) == bits(want[victim])[: lengths[0]]
    assert want[victim].text.startswith(output.text.rstrip("\ufffd"))
    listeners[victim].check(output)
    check_exact(requests, listeners, {0, 1, 2, 3} - {victim})
    if threaded:
        engine.close()
    else:
        check_memory(engine)


def test_a_callback_submits_and_preempts_and_swaps(engine):
    want, late = undisturbed(), []

    def act(request):
        late.append(engine.submit(PROMPT, OPTIONS[0]))
        engine.preempt(request)
        engine.swap_weights(make_model())

    requests, listeners = submit_all(engine, r1=at_token(4, act))
    engine.run()
    check_exact(requests, listeners)
    assert bits(late[0].output(0)) == bits(want[0])


def test_a_callback_steps_the_engine(engine):
    undisturbed()
    requests, listeners = submit_all(engine, r0=at_token(3, lambda _: engine.step()))
    engine.run()
    check_exact(requests, listeners)


def test_a_callback_suspends(engine, tmp_path):
    path = tmp_path / "requests.json"
    want = undisturbed()
    requests, listeners = submit_all(
        engine, r1=at_token(5, lambda _: suspend.save_requests(engine, path))
    )
    engine.run()
    for request, listener in zip(requests, listeners, strict=True):
        assert request.output(0).finish_reason == "suspended"
        listener.check(request.output(0))
    resumed = suspend.resume_requests(engine, path)
    engine.run()
    assert [bits(request.output(0)) for request in resumed] == list(map(bits, want))
    check_memory(engine)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_callback_closes(threaded):
    want, engine = undisturbed(), shared_engine()
    if threaded:
        engine.start()
    requests, listeners = submit_all(engine, r1=at_token(2, lambda _: engine.close()))
    if not threaded:
        engine.run()
    for request, listener, expected in zip(requests, listeners, want, strict=True):
        output = request.output(60)
        assert output.finish_reason == "cancelled"
        assert bits(output) == bits(expected)[: len(output.tokens)]
        listener.check(output)
    engine.close()
    assert not engine.step()
    with pytest.raises(RuntimeError, match="submit: the engine is closed"):
        engine.submit(PROMPT, OPTIONS[0])


def test_ends_without_a_token_are_told(engine):
    """With the text that was held back for a stop string."""
    options = options_lib.Options(
        max_tokens=40,
        temperature=0,
        stop=("aab",),
        logit_bias={load_tokenizer().encode("a")[0]: 100},
    )
    listener = Listener(at_token(6, lambda request: engine.cancel(request)))
    request = engine.submit(PROMPT, options, on_token=listener)
    engine.run()
    assert request.output(0).text == "aaaaaa"
    listener.check(request.output(0))
    bad = make_model()
    table = bad.embed.table[...]
    listener = Listener()
    bad.embed.table[...] = table.at[:].set(jnp.nan)
    engine.swap_weights(bad)
    request = engine.submit(PROMPT, OPTIONS[0], on_token=listener)
    engine.run()
    bad.embed.table[...] = table
    engine.swap_weights(bad)
    assert isinstance(request.output(0).error, FloatingPointError)
    listener.check(request.output(0))


# ---- interruptions


class LineInterrupt:
    """Raises an exception at a line of the engine, the `number`th that is run."""

    def __init__(self, number, error=KeyboardInterrupt, skipped=()):
        self.number, self._error, self._skipped = number, error, skipped

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(INFER) or code.co_name in self._skipped:
            return None
        # A signal does not come between a block's end and the release of its lock. A trace does.
        line = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not line.startswith("with "):
            self.number -= 1
            if not self.number:
                sys.settrace(None)
                raise self._error
        return self._trace


def count_lines(engine):
    with LineInterrupt(10**9) as lines:
        submit_all(engine)
        engine.run()
    return 10**9 - lines.number


@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=pytest.mark.long)])
def test_an_interruption_at_any_line(engine, rounds):
    undisturbed()
    engine.swap_weights(make_model())
    num_lines = count_lines(engine)
    assert num_lines > 5000
    rng, interrupted = random.Random(0), collections.Counter()
    for _ in range(rounds):
        engine.swap_weights(make_model())
        # Where a program has the device's memory is another test's affair.
        interrupt = LineInterrupt(rng.randrange(1, num_lines), skipped=("run_program",))
        requests, listeners = submit_all(engine)
        try:
            with interrupt:
                engine.run()
        except KeyboardInterrupt:
            interrupted[engine._core._section.unfinished] += 1
        engine.run()
        # An interrupted callback is its request's own exception.
        exact = [i for i in range(4) if requests[i].error is None]
        assert len(exact) >= 3
        check_exact(requests, listeners, exact)
        check_memory(engine)
    assert sum(interrupted.values()) > rounds // 2
    # Which lines a seed hits changes with every change of the engine's code.
    assert interrupted["a step's plan"] >= max(2, rounds // 16)


def test_other_calls_are_interrupted(engine, tmp_path):
    want = undisturbed()
    calls = {
        "cancel": lambda requests: engine.cancel(requests[3]),
        "swap": lambda _: engine.swap_weights(make_model()),
        "preempt": lambda requests: engine.preempt(requests[0]),
        "suspend": lambda _: suspend.save_requests(engine, tmp_path / "requests.json"),
        "submit": lambda _: engine.submit(PROMPT, OPTIONS[1]),
    }
    rng = random.Random(1)
    for name, call in calls.items():
        for _ in range(2):
            requests, _ = submit_all(engine)
            for _ in range(6):
                engine.step()
            try:
                with LineInterrupt(rng.randrange(1, 120)):
                    call(requests)
            except KeyboardInterrupt:
                pass
            engine.run()
            for request, expected in zip(requests, want, strict=True):
                output = request.output(0)
                assert bits(output) == bits(expected)[: len(output.tokens)]
                is_ended = name in ("cancel", "suspend")
                assert is_ended or len(output.tokens) == len(expected.tokens)
            check_memory(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError, MemoryError])
def test_a_wait_that_is_interrupted_changes_nothing(engine, monkeypatch, error):
    undisturbed()
    requests, listeners = submit_all(engine)
    calls = iter(range(100))
    wait = dispatcher.DispatchedPlan.wait_for_tokens

    def interrupted_wait(plan):
        if next(calls) == 3:
            raise error
        return wait(plan)

    monkeypatch.setattr(dispatcher.DispatchedPlan, "wait_for_tokens", interrupted_wait)
    before = engine._core._runner
    with pytest.raises(error):
        engine.run()
    engine.run()
    assert engine._core._runner is before
    check_exact(requests, listeners)


@pytest.mark.parametrize("place", ["plan", "report", "set_single_step"])
def test_an_exception_in_the_middle_of_a_step(engine, monkeypatch, place):
    undisturbed()
    requests, listeners = submit_all(engine)
    for _ in range(4):
        engine.step()
    monkeypatch.setattr(engine._scheduler, place, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run()
    engine.run()
    check_exact(requests, listeners)
    check_memory(engine)


def test_a_signal_s_handler_that_calls_the_engine_is_told(engine, monkeypatch):
    undisturbed()
    requests, listeners = submit_all(engine)
    plan = engine._scheduler.plan

    def plan_with_signal():
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR1)
        return plan()

    before = signal.signal(signal.SIGUSR1, lambda *_: engine.cancel(requests[0]))
    monkeypatch.setattr(engine._scheduler, "plan", plan_with_signal)
    with pytest.raises(RuntimeError, match="cancel: got a call from a signal's handler within a"):
        engine.run()
    signal.signal(signal.SIGUSR1, before)
    engine.run()
    check_exact(requests, listeners)


def test_nobody_waits_for_a_thread_that_failed(monkeypatch):
    engine = shared_engine()
    monkeypatch.setattr(dispatcher.DispatchedPlan, "wait_for_tokens", lambda _: 1 / 0)
    requests, listeners = submit_all(engine)
    engine.start()
    for request, listener in zip(requests, listeners, strict=True):
        output = request.output(60)
        assert output.finish_reason == "error"
        assert isinstance(output.error.__cause__, ZeroDivisionError)
        listener.check(output)
    with pytest.raises(request_lib.EngineFailedError, match="submit: .*ZeroDivisionError"):
        engine.submit(PROMPT, OPTIONS[0])
    engine.close()


def test_generate_that_is_interrupted_leaves_nothing(engine, monkeypatch):
    monkeypatch.setattr(dispatcher.DispatchedPlan, "wait_for_tokens", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT] * 4, OPTIONS[0])
    monkeypatch.undo()
    assert engine.stats().num_waiting == engine.stats().num_running == 0
    check_memory(engine)


def test_threads_that_submit_while_a_callback_works(engine):
    """One callback at a time, and nobody's tokens are lost."""
    undisturbed()
    busy, outputs = threading.Lock(), []

    def on_token(*_):
        assert busy.acquire(blocking=False)
        busy.release()

    def client():
        request = engine.submit(PROMPT, OPTIONS[0], on_token=on_token)
        outputs.append(request.output(60))

    engine.start()
    clients = [threading.Thread(target=client) for _ in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert all(bits(output) == bits(undisturbed()[0]) for output in outputs)
    assert len(outputs) == 6
    engine.close()


# ---- arrays and samples


def test_prompts_of_other_libraries(engine):
    want = bits(undisturbed()[0])
    for prompt in (
        list(PROMPT),
        np.array(PROMPT),
        jnp.array(PROMPT),
        [np.int16(i) for i in PROMPT],
    ):
        (output,) = engine.generate([prompt], OPTIONS[0])
        assert bits(output) == want
    # The prefix cache knows the tokens, whatever they came in.
    assert output.cached_tokens > 0
    for prompt in (np.array([1.0, 2.0]), np.array([[1, 2]]), [True], "12", 5, jnp.array(3)):
        with pytest.raises(ValueError, match="prompt: got "):
            engine.submit(prompt, OPTIONS[0])


def test_samples_have_seeds_of_their_own(engine):
    options = options_lib.Options(seed=2**32 - 1, max_tokens=9, ignore_eos=True)
    outputs = engine.generate([PROMPT, PROMPT[3:]], options, samples=3)
    alone = [
        engine.generate([prompt], options_lib.Options(seed=seed, max_tokens=9, ignore_eos=True))[0]
        for prompt in (PROMPT, PROMPT[3:])
        for seed in (2**32 - 1, 0, 1)
    ]
    assert list(map(bits, outputs)) == list(map(bits, alone))
    assert len(set(map(str, map(bits, outputs)))) == 6
    with pytest.raises(ValueError, match="samples: got 0; wanted a whole number, 1 or more"):
        engine.generate([PROMPT], options, samples=0)


def test_generate_takes_more_prompts_than_the_queue_does(engine):
    outputs = engine.generate([PROMPT] * 25, options_lib.Options(max_tokens=2, ignore_eos=True))
    assert len(outputs) == 25
    with pytest.raises(ValueError, match="token id 600"):
        engine.generate([PROMPT, (600,)], OPTIONS[0])
    assert engine.stats().num_waiting == 0


def test_drafts_are_proposed_only_where_they_are_asked_for(engine, monkeypatch):
    """A table of all tokens takes 200 bytes a token."""
    request = engine.submit(PROMPT, OPTIONS[0])
    engine.run()
    assert request.prompt_lookup is None
    monkeypatch.setattr(engine, "config", dataclasses.replace(CONFIG, draft_tokens=3))
    # Made before the engine's lock is taken, and not where penalties forbid guesses.
    made = [engine.prepare_request(PROMPT, options).prompt_lookup for options in OPTIONS]
    assert [lookup is not None for lookup in made] == [True, False, False, False]
    request = engine.submit(PROMPT, OPTIONS[0])
    engine.run()
    assert bits(request.output(0)) == bits(undisturbed()[0])
    assert request.prompt_lookup is None


# Last, as it costs the device.


def test_a_device_that_lost_its_memory_is_refused_by_name():
    want, engine = undisturbed(), shared_engine()
    requests, listeners = submit_all(engine)
    for _ in range(5):
        engine.step()
    for leaf in jax.tree.leaves(engine._device._buffers["state"]):
        leaf.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        engine.run()
    for call in (engine.step, lambda: engine.submit(PROMPT, OPTIONS[0]), engine.run):
        with pytest.raises(request_lib.EngineFailedError, match="the engine failed in a step's"):
            call()
    for request, listener, expected in zip(requests, listeners, want, strict=True):
        output = request.output(0)
        assert output.finish_reason == "error"
        assert isinstance(output.error, request_lib.EngineFailedError)
        assert "deleted" in str(output.error.__cause__)
        assert bits(output) == bits(expected)[: len(output.tokens)]
        listener.check(output)
    engine.close()
    shared_device.cache_clear()
