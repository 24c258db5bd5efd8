"""The engine's features on a tiny model: what ends an output, what is refused, who may cancel."""

import dataclasses
import functools
import itertools
import json
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from output_support import bits, token_ids
from tokenizer_support import load_tokenizer

from infer import config as config_lib
from infer import engine as engine_lib
from infer import options as options_lib
from infer import stepping, stopping
from infer.execution import host_batch
from infer.scheduling import plan as plan_lib
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib

EOS, POISON = 510, 0
CONFIG = config_lib.EngineConfig(
    max_length=256,
    max_rows=4,
    num_pages=40,
    chunk_tokens=16,
    prefill_tokens=(32, 64),
    num_snapshots=6,
    decode_steps=4,
    snapshot_every_tokens=64,
    max_queue=8,
    swap_tokens=40,
    host_bytes=2**22,
)
PROMPT = tuple(range(20, 70))
GREEDY = functools.partial(options_lib.Options, temperature=0)


def make_model(poison=True):
    kinds = (model_config_lib.LIGHTNING, model_config_lib.SOFTMAX, model_config_lib.LIGHTNING)
    config = dataclasses.replace(model_config_lib.ModelConfig.tiny(), layer_types=kinds)
    model = model_lib.MiniMaxM1(config, nnx.Rngs(0), dtype=jnp.float32)
    if poison:
        model.embed.table[...] = model.embed.table[...].at[POISON].set(jnp.nan)
    return model


@functools.cache
def engine_of(decode_steps):
    config = dataclasses.replace(CONFIG, decode_steps=decode_steps)
    return engine_lib.Engine(make_model(), load_tokenizer(), config)


@pytest.fixture(scope="module", autouse=True)
def drop_engines():
    yield
    engine_of.cache_clear()


@pytest.fixture
def engine():
    """Yield the engine, and check that it has all of its memory back afterwards."""
    engine = engine_of(4)
    yield engine
    engine.run()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running) == (0, 0)
    assert stats.free_pages + stats.cache.num_pages == CONFIG.total_pages
    assert stats.free_slots + stats.cache.num_slots == CONFIG.total_slots


def generate_alone(engine, prompt=PROMPT, options=None, **values):
    return engine.generate([prompt], options or options_lib.Options(**values))[0]


# ---- what ends an output


def open_thought(**values):
    """Return options under which `<`, `think`, `>` come in turn, and again."""
    bias = dict(zip(load_tokenizer().encode("<think>"), (100, 98.6, 97.3), strict=True))
    return GREEDY(presence_penalty=2, frequency_penalty=2, logit_bias=bias, **values)


@pytest.mark.parametrize("decode_steps", [1, 4])
@pytest.mark.parametrize("budget", [0, 3, 4, 11, 16, 30])
def test_a_thought_is_closed_at_the_budget(budget, decode_steps):
    closing = list(stopping.encode_closing_tag(load_tokenizer()))
    assert len(closing) == 6
    options = open_thought(thinking_tokens=budget, max_tokens=45)
    output = generate_alone(engine_of(decode_steps), options=options)
    free = token_ids(generate_alone(engine_of(decode_steps), options=open_thought(max_tokens=45)))
    at = max(budget, 3)  # before that it is not open
    assert token_ids(output)[:at] == free[:at]
    assert token_ids(output)[at : at + 6] == closing
    assert free[at : at + 6] != closing
    assert output.reasoning_tokens == at + 4
    assert output.text.startswith("<think>")
    assert "\n</think>\n\n" in output.text
    assert all(np.isfinite(token.logp_raw) for token in output.tokens)
    assert len(output.tokens) == 45
    assert output.finish_reason == "length"


def test_a_thought_in_company_is_closed_at_the_same_place(engine):
    options = open_thought(thinking_tokens=13, max_tokens=40)
    want = bits(generate_alone(engine, options=options))
    company = [
        engine.submit(PROMPT[i:], options_lib.Options(seed=i, max_tokens=60)) for i in range(3)
    ]
    closed = engine.submit(PROMPT, options)
    engine.run()
    assert bits(closed.output()) == want
    assert all(request.output().reasoning_tokens == 0 for request in company)


def test_loops_end_with_a_reason_of_their_own(engine, monkeypatch):
    monkeypatch.setattr(
        stopping, "OutputProgress", functools.partial(stopping.OutputProgress, loop_tokens=10)
    )
    certain = make_model()
    certain.head.kernel[...] = certain.head.kernel[...] * 1000
    assert generate_alone(engine, max_tokens=30, stop_on_loop=True).finish_reason == "length"
    engine.swap_weights(certain)
    output = generate_alone(engine, max_tokens=30, stop_on_loop=True, ignore_eos=True)
    assert output.finish_reason == "loop"
    assert len(output.tokens) < 30
    assert all(np.exp(token.logp_raw) > 0.99 for token in output.tokens[-10:])
    assert generate_alone(engine, max_tokens=30, ignore_eos=True).finish_reason == "length"
    engine.swap_weights(make_model())


def test_stop_strings_over_borders_of_tokens(engine):
    letters = dict.fromkeys(load_tokenizer().encode("abcdefgh"), 60.0)
    values = {"logit_bias": letters, "seed": 3, "max_tokens": 40, "top_p": 1.0}
    free = generate_alone(engine, **values)
    ends = np.cumsum([len(load_tokenizer().decode([token])) for token in token_ids(free)])
    assert ends[-1] == len(free.text)
    assert 40 < ends[-1] < 120
    for start, length in ((5, 3), (11, 5), (37, 3), (0, 2), (20, 1), (1, 1)):
        stop = free.text[start : start + length]
        first = free.text.find(stop)
        seen = []
        request = engine.submit(
            PROMPT,
            options_lib.Options(**values, stop=(stop, "never")),
            on_token=lambda _, token, text, seen=seen: seen.append((token, text)),
        )
        engine.run()
        output = request.output()
        assert output.text == free.text[:first] == "".join(text for _, text in seen)
        assert output.finish_reason == "stop"
        assert bits(output) == bits(free)[: np.searchsorted(ends, first + length) + 1]
        assert [token for token, _ in seen] == list(output.tokens)


def test_stop_tokens_wait_for_min_tokens(engine):
    likely = {EOS: 100.0}
    output = generate_alone(engine, options=GREEDY(logit_bias=likely, max_tokens=20))
    assert (token_ids(output), output.text, output.finish_reason) == ([EOS], "", "stop")
    for least in (1, 5, 8, 19):
        output = generate_alone(
            engine, options=GREEDY(logit_bias=likely, max_tokens=20, min_tokens=least)
        )
        assert len(output.tokens) == least + 1
        assert output.finish_reason == "stop"
        assert EOS not in token_ids(output)[:-1]
    output = generate_alone(engine, options=GREEDY(logit_bias=likely, max_tokens=20, min_tokens=20))
    assert EOS not in token_ids(output)
    assert output.finish_reason == "length"
    output = generate_alone(
        engine, options=GREEDY(logit_bias=likely, max_tokens=9, ignore_eos=True)
    )
    assert token_ids(output) == [EOS] * 9
    assert output.finish_reason == "length"
    output = generate_alone(
        engine, options=GREEDY(logit_bias={77: 100}, stop_token_ids=(77,), max_tokens=9)
    )
    assert token_ids(output) == [77]
    assert output.finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 4, 5, 9])
def test_max_tokens(engine, max_tokens):
    output = generate_alone(engine, max_tokens=max_tokens, ignore_eos=True)
    assert (len(output.tokens), output.finish_reason) == (max_tokens, "length")


def test_top_logprobs(engine):
    output = generate_alone(engine, max_tokens=25, top_logprobs=7, temperature=1.5, seed=2)
    inside = 0
    for token in output.tokens:
        logps = [logp for _, logp in token.top]
        assert len(token.top) == 7 == len(dict(token.top))
        assert logps == sorted(logps, reverse=True)
        assert np.sum(np.exp(logps)) < 1
        if token.id in dict(token.top):
            inside += 1
            assert dict(token.top)[token.id] == pytest.approx(token.logp_raw, abs=1e-6)
        else:
            assert token.logp_raw <= logps[-1]
    greedy = generate_alone(engine, options=GREEDY(max_tokens=10, top_logprobs=1))
    assert [(token.id,) for token in greedy.tokens] == [
        tuple(i for i, _ in token.top) for token in greedy.tokens
    ]
    assert all(not token.top for token in generate_alone(engine, max_tokens=5).tokens)


def test_grammars(engine):
    """All at once: each slot has a mask of its own."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22, 333]}}, "required": ["n"]}
    expression = "[a-f]{3,9}-[0-9]{2}"
    texts = {token: load_tokenizer().decode([token]) for token in range(512)}
    unlikely = {token: -90.0 for token, text in texts.items() if re.search("[0-9]", text)}
    options = [
        options_lib.Options(json_schema=schema, max_tokens=120, seed=1),
        options_lib.Options(regex=expression, max_tokens=60, seed=2),
        options_lib.Options(
            regex="[0-9]+",
            after_thinking=True,
            thinking_tokens=9,
            logit_bias=unlikely,
            max_tokens=99,
        ),
        options_lib.Options(max_tokens=30, seed=4),
    ]
    requests = [engine.submit(PROMPT, each) for each in options]
    engine.run()
    outputs = [each.output() for each in requests]
    assert json.loads(outputs[0].text)["n"] in (1, 22, 333)
    assert re.fullmatch(expression, outputs[1].text)
    assert outputs[2].reasoning_tokens > 0
    assert re.fullmatch(r"\s*<think>.*</think>\s*[0-9]*", outputs[2].text, re.DOTALL)
    assert [output.finish_reason for output in outputs[:2]] == ["stop", "stop"]
    assert [bits(generate_alone(engine, options=each)) for each in options] == [
        bits(o) for o in outputs
    ]


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(engine, monkeypatch):
    want = generate_alone(engine, seed=1, max_tokens=20)
    good = engine.submit(PROMPT, options_lib.Options(seed=1, max_tokens=20))
    for name in ("mask", "accept"):
        bad = engine.submit(PROMPT, options_lib.Options(regex="[a-z]{50}", max_tokens=60))
        work, calls = getattr(bad.matcher, name), itertools.count()

        def fail(*arguments, work=work, calls=calls):
            if next(calls) == 3:
                raise ValueError("the grammar grew too large")
            return work(*arguments)

        monkeypatch.setattr(bad.matcher, name, fail)
        engine.run()
        assert bad.output().finish_reason == "error"
        assert 3 <= len(bad.output().tokens) <= 4
    assert bits(good.output()) == bits(want)


# ---- logits that are not finite


def test_nan_ends_its_request_alone(engine):
    options = options_lib.Options(seed=5, max_tokens=30, ignore_eos=True)
    want = bits(generate_alone(engine, options=options))
    poisoned = (*PROMPT[:30], POISON, *PROMPT[30:])
    for _ in range(2):
        bad = [
            engine.submit(poisoned, options),
            engine.submit(PROMPT[:20], GREEDY(logit_bias={POISON: 100}, max_tokens=30)),
        ]
        good = engine.submit(PROMPT, options)
        engine.run()
        assert bits(good.output()) == want
        assert [len(each.output().tokens) for each in bad] == [0, 1]
        assert {each.output().finish_reason for each in bad} == {"error"}


def test_slots_and_pages_poisoned_with_nan_are_as_good_as_new(engine):
    all_options = [options_lib.Options(seed=i, max_tokens=20, ignore_eos=True) for i in range(8)]
    prompts = [tuple(range(100 + 7 * i, 160 + 7 * i)) for i in range(8)]
    want = [
        bits(output)
        for output in map(functools.partial(generate_alone, engine), prompts, all_options)
    ]
    for i in range(12):  # every slot and page
        engine.submit((POISON, *range(200 + i, 290 + i)), all_options[0]) if i < 8 else None
    engine.run()
    engine.swap_weights(make_model())  # an empty cache: its memory is used again
    together = [engine.submit(*each) for each in zip(prompts, all_options, strict=True)]
    engine.run()
    assert [bits(each.output()) for each in together] == want


# ---- cancelling


def test_cancel_in_every_state(engine):
    options = options_lib.Options(seed=2, max_tokens=60, ignore_eos=True)
    want = bits(generate_alone(engine, options=options))
    assert len(want) == 60

    def state_of(request):
        sequence = engine._scheduler._sequences[request.sequence_id]
        if sequence.swapped_pages:
            return "swapped"
        return (
            "waiting" if not sequence.slot else "decoding" if sequence.is_decoding else "prefilling"
        )

    long = tuple(range(1, 190))
    for wanted in ("waiting", "prefilling", "decoding", "swapped", "restarted"):
        victim = engine.submit(long[::-1], options)
        bystander = engine.submit(PROMPT, options)
        if wanted in ("decoding", "swapped", "restarted"):
            while len(victim.tokens) < 6:
                engine.step()
        elif wanted == "prefilling":
            engine.step()
        if wanted == "swapped":
            engine.preempt(victim)
        if wanted == "restarted":
            engine.swap_weights(make_model(), keep_running=False)
        assert state_of(victim) == ("waiting" if wanted == "restarted" else wanted)
        engine.cancel(victim)
        engine.cancel(victim)
        before = victim.output(0)
        assert before.finish_reason == "cancelled"
        engine.run()
        assert victim.output() == before
        assert bits(bystander.output()) == want


def test_cancel_from_the_callback(engine):
    options = options_lib.Options(seed=2, max_tokens=60, ignore_eos=True)
    want = bits(generate_alone(engine, options=options))
    assert len(want) == 60

    def stop_at(number):
        def on_token(request, *_):
            if len(request.tokens) == number:
                engine.cancel(request)

        return on_token

    requests = [engine.submit(PROMPT, options, on_token=stop_at(n)) for n in (1, 2, 7, 99)]
    engine.run()
    outputs = [each.output() for each in requests]
    assert [bits(output) for output in outputs] == [want[:1], want[:2], want[:7], want]
    assert [output.finish_reason for output in outputs] == ["cancelled"] * 3 + ["length"]


def test_cancelling_what_is_over_changes_nothing(engine):
    request = engine.submit(PROMPT, options_lib.Options(max_tokens=3, ignore_eos=True))
    engine.run()
    before = request.output()
    engine.cancel(request)
    engine.preempt(request)
    assert request.output() == before


# ---- refusals


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ((), {}, "0 prompt tokens"),
        ((1, 512), {}, "token id 512; wanted 0 to 511"),
        ((-1, 2), {}, "token id -1; wanted 0 to 511"),
        ((1, 2.5), {}, "token id 2.5; wanted"),
        (range(1, 250), {"max_tokens": 8}, "249 prompt tokens and max_tokens 8"),
        ((1,), {"stop_token_ids": (600,)}, "stop_token_ids"),
        ((1,), {"logit_bias": {512: 1.0}}, "logit_bias"),
        ((1,), {"regex": "(unclosed"}, "regex"),
    ],
)
def test_refusals(engine, prompt, values, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, options_lib.Options(**{"max_tokens": 4} | values))


def test_a_full_queue(engine):
    requests = [engine.submit(PROMPT, options_lib.Options(max_tokens=2)) for _ in range(8)]
    with pytest.raises(plan_lib.QueueFull, match="8"):
        engine.submit(PROMPT, options_lib.Options(max_tokens=2))
    engine.run()
    assert all(each.output().finish_reason for each in requests)
    generate_alone(engine, max_tokens=2)


def test_the_model_limits_the_length():
    with pytest.raises(ValueError, match="max_length: got 8192; the model allows 4096"):
        engine_lib.Engine(make_model(), load_tokenizer(), config_lib.EngineConfig(max_length=8192))


# ---- threads


def test_threads(engine):
    options = [options_lib.Options(seed=i, max_tokens=12, ignore_eos=True) for i in range(12)]
    want = [bits(generate_alone(engine, options=each)) for each in options]
    got: list = [None] * len(options)

    def client(first):
        for i in range(first, len(options), 4):
            request = engine.submit(PROMPT, options[i])
            got[i] = bits(request.output(60))

    engine.start()
    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert got == want
    request = engine.submit(PROMPT, options_lib.Options(max_tokens=150, ignore_eos=True))
    with pytest.raises(TimeoutError, match=f"request {request.sequence_id}: not finished"):
        request.output(0)
    engine.close()
    assert request.output(0).finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(PROMPT, options[0])
    engine_of.cache_clear()


def test_a_thread_outlives_a_callback_that_raises():
    """See `infer_interrupts_test.py` for all that a callback may do."""

    def fail(*_):
        raise RuntimeError("a callback with a bug")

    engine = engine_of(1)
    options = options_lib.Options(max_tokens=50, ignore_eos=True)
    requests = [engine.submit(PROMPT, options), engine.submit(PROMPT, options, on_token=fail)]
    engine.start()
    assert [each.output(60).finish_reason for each in requests] == ["length", "error"]
    assert str(requests[1].output().error) == "a callback with a bug"
    assert len(engine.submit(PROMPT, options).output(60).tokens) == 50
    engine.close()
    engine_of.cache_clear()


@pytest.mark.parametrize(
    ("logp", "logp_raw"), [(np.nan, -1.0), (-1.0, np.nan), (-1.0, np.inf), (np.nan, np.nan)]
)
def test_what_is_not_finite_is_an_error(engine, logp, logp_raw):
    request = engine.prepare_request(PROMPT, options_lib.Options(max_tokens=4))
    stepping._take_token(request, host_batch.SampledToken(5, logp, logp_raw, ()), 0)
    request.show_next()
    assert (request.finish_reason, len(request.tokens)) == ("error", 0)
    assert isinstance(request.error, FloatingPointError)


def test_forced_tokens_may_be_impossible(engine):
    request = engine.prepare_request(PROMPT, options_lib.Options(max_tokens=4))
    stepping._take_token(request, host_batch.SampledToken(5, -np.inf, -1.0, ()), 0)
    request.show_next()
    assert [token.id for token in request.tokens] == [5]


def test_more_end_tokens_than_the_device_knows(engine):
    free = token_ids(generate_alone(engine, seed=5, max_tokens=30, ignore_eos=True))
    ends = [token for token in range(1, 500) if token not in free[:12]][:40]
    ids = (*ends, free[12])
    output = generate_alone(engine, seed=5, max_tokens=30, ignore_eos=True, stop_token_ids=ids)
    assert token_ids(output) == free[:13]
    assert output.finish_reason == "stop"
    early = generate_alone(
        engine, seed=5, max_tokens=30, ignore_eos=True, stop_token_ids=ids, min_tokens=20
    )
    assert not set(token_ids(early)[:20]) & set(ids)
    assert token_ids(early)[:12] == free[:12]
