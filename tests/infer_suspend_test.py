"""Tests of infer.suspend: requests go on in another engine as if nothing had happened."""

import dataclasses
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_support
from flax import nnx

from infer import config, engine, options, suspend
from m1_jax import config as config_lib
from m1_jax import file_lock
from m1_jax import model as model_lib

# Fixtures.
tokenizer = tokenizer_support.tokenizer

SIZES = config.EngineConfig(
    max_length=128,
    max_rows=3,
    chunk_tokens=16,
    prefill_tokens=(32,),
    num_snapshots=3,
    decode_steps=4,
    max_queue=9,
)


@pytest.fixture(scope="module")
def model():
    return model_lib.MiniMaxM1(config_lib.ModelConfig.tiny(), nnx.Rngs(0), dtype=jnp.float32)


@pytest.fixture(scope="module")
def first(model, tokenizer):
    return engine.Engine(model, tokenizer, SIZES)


@pytest.fixture(scope="module")
def second(model, tokenizer):
    # Other sizes that change no number.
    return engine.Engine(model, tokenizer, dataclasses.replace(SIZES, max_rows=4, max_queue=8))


def requests():
    """Prompts and options with all that an output's next token can depend on."""
    rng = np.random.default_rng(0)
    many = [
        {"temperature": 0.0, "top_logprobs": 3},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"regex": r"<think>[a-z ]*\n</think>\n\n[a-z]{3,9}", "thinking_tokens": 20},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 9}},
        {"logit_bias": {5: 3.0, 9: -100.0}, "min_tokens": 12, "stop": ("e", "th")},
        {"top_k": 20, "min_p": 0.01, "stop_token_ids": (17,)},
        {"max_tokens": 70},
        {"max_tokens": 1},
    ]
    cases = []
    for number, changes in enumerate(many):
        prompt = rng.integers(0, 300, 7 * (number + 1)).tolist()
        changes = {"max_tokens": 48, "seed": number, **changes}
        cases.append((prompt, options.Options(**changes)))
    return cases


@pytest.fixture(scope="module")
def undisturbed(first):
    submitted = [first.submit(*arguments) for arguments in requests()]
    first.run()
    return [request.output() for request in submitted]


def same(got, wanted):
    for name in ("tokens", "text", "finish_reason", "reasoning_tokens", "prompt_tokens"):
        assert getattr(got, name) == getattr(wanted, name), name


def test_the_cases_are_what_they_are_meant_to_be(undisturbed):
    assert undisturbed[2].reasoning_tokens > 20
    assert len(undisturbed[3].text) > 9
    assert undisturbed[4].finish_reason == "stop"


@pytest.mark.parametrize("steps", [0, 5, 14, 30])
def test_resumed_outputs_are_bit_exact(first, second, undisturbed, tmp_path, steps):
    path = tmp_path / "requests.json"
    submitted = [first.submit(*arguments) for arguments in requests()]
    for _ in range(steps):
        first.step()
    ended = [request.done.is_set() for request in submitted]
    assert suspend.save_requests(first, path) == ended.count(False) > 0
    first.run()  # what was under way ends
    after = [request.output(timeout_secs=1) for request in submitted]
    assert {output.finish_reason for output, e in zip(after, ended, strict=True) if not e} == {
        "suspended"
    }
    heard = []
    resumed = suspend.resume_requests(second, path, lambda *call: heard.append(call))
    before = sum(len(request.tokens) for request in resumed)
    second.run()
    outputs = iter([request.output(timeout_secs=1) for request in resumed])
    for was_over, wanted, old in zip(ended, undisturbed, after, strict=True):
        same(old if was_over else next(outputs), wanted)
    assert len(heard) == sum(len(request.tokens) for request in resumed) - before
    assert [file.name for file in tmp_path.iterdir()] == ["requests.json"]


def test_twice(first, second, undisturbed, tmp_path):
    path = tmp_path / "requests.json"
    for arguments in requests():
        first.submit(*arguments)
    for _ in range(6):
        first.step()
    suspend.save_requests(first, path)
    suspend.resume_requests(second, path)
    for _ in range(6):
        second.step()
    suspend.save_requests(second, path)
    first.run()
    resumed = suspend.resume_requests(first, path)
    first.run()
    by_seed = {request.options.seed: request.output() for request in resumed}
    assert by_seed
    for seed, output in by_seed.items():
        same(output, undisturbed[seed])


def test_versions_go_on(first, second, model, tmp_path):
    path = tmp_path / "requests.json"
    version = first.swap_weights(model)
    first.submit([1, 2, 3], options.Options(max_tokens=20, ignore_eos=True))
    for _ in range(4):
        first.step()
    suspend.save_requests(first, path)
    first.run()
    (resumed,) = suspend.resume_requests(second, path)
    second.run()
    assert {token.version for token in resumed.output().tokens} == {version}
    assert second.version == version


def test_refused_files(first, tmp_path):
    path = tmp_path / "requests.json"
    first.submit([1, 2, 3], options.Options(max_tokens=20))
    first.step()
    suspend.save_requests(first, path)
    first.run()
    good = json.loads(path.read_text())

    def expect_refusal(message, **changes):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(ValueError, match=message):
            suspend.resume_requests(first, path)

    made_by = good["made_by"]
    for name in ("model", "weights", "tokenizer", "recipe"):
        expect_refusal(f"requests of another {name}: 'x'", made_by={**made_by, name: "x"})
    expect_refusal("got no 'm1_jax suspended requests, version 1'", format="other")
    (entry,) = good["requests"]
    expect_refusal(
        "request 0: ValueError.*option: got 'x'", requests=[{**entry, "options": {"x": 1}}]
    )
    expect_refusal(
        "max_tokens 500; wanted 128 at most", requests=[{**entry, "options": {"max_tokens": 500}}]
    )
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        suspend.resume_requests(first, path)
    with pytest.raises(FileNotFoundError):
        suspend.resume_requests(first, tmp_path / "none")
    assert not first.step()


def test_nothing_is_lost_where_nothing_can_be_written(first, tmp_path):
    going = first.submit([1, 2, 3], options.Options(max_tokens=5, ignore_eos=True))
    with pytest.raises(OSError, match="No such file"):
        suspend.save_requests(first, tmp_path / "none" / "requests.json")
    first.run()
    assert len(going.output(timeout_secs=1).tokens) == 5


def test_all_or_none_of_a_file(first, monkeypatch, tmp_path):
    """The second request needs more pages than the engine has: the first must not begin."""
    path = tmp_path / "requests.json"
    for max_tokens in (20, 90):
        first.submit([1, 2, 3], options.Options(max_tokens=max_tokens))
    first.step()
    suspend.save_requests(first, path)
    first.run()
    value = json.loads(path.read_text())
    monkeypatch.setattr(first, "config", dataclasses.replace(first.config, num_pages=4))
    # The first file is too large, and the others are damaged in their second request.
    damages = {
        "request 1: got 3 prompt tokens and max_tokens 90; wanted 65 at most .num_pages": {},
        "request 1: prompt: got token id 'x'": {"prompt": ["x"]},
        "request 1: prior_tokens: got token id 512": {"tokens": [[512, -1, -1, 0, []]]},
        "request 1: TypeError.*the file is damaged": {"tokens": [[1.5, -1, -1, 0, []]]},
        "request 1: KeyError.*the file is damaged": {"cached": None, "prompt": None},
        "request 1: prior_tokens: got a finished output": {"tokens": [[510, -1, -1, 0, []]]},
    }
    for message, damage in damages.items():
        second_entry = {**value["requests"][1], **damage}
        if damage:
            second_entry["options"] = {"max_tokens": 5}
        if "KeyError" in message:
            second_entry = {}
        path.write_text(json.dumps({**value, "requests": [value["requests"][0], second_entry]}))
        with pytest.raises(ValueError, match=message):
            suspend.resume_requests(first, path)
        assert first.stats().num_waiting == 0
    assert not first.step()


def test_files_without_their_parts(first, tmp_path):
    path = tmp_path / "requests.json"
    first.submit([1, 2, 3], options.Options(max_tokens=20))
    suspend.save_requests(first, path)
    good = json.loads(path.read_text())
    for name, kind in {"made_by": "dict", "version": "int", "requests": "list"}.items():
        path.write_text(json.dumps({key: good[key] for key in good if key != name}))
        with pytest.raises(ValueError, match=f"{name}: got None; wanted a {kind}"):
            suspend.resume_requests(first, path)
    path.write_text(json.dumps({**good, "made_by": {}}))
    with pytest.raises(ValueError, match="requests of another model: None"):
        suspend.resume_requests(first, path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not JSON"):
        suspend.resume_requests(first, path)


def test_two_writers(first, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    going = first.submit([1, 2, 3], options.Options(max_tokens=5, ignore_eos=True))
    path = tmp_path / "requests.json"
    with (
        file_lock.hold_lock(path, "writes suspended requests to"),
        pytest.raises(file_lock.LockError, match="process .* writes suspended requests to"),
    ):
        suspend.save_requests(first, "~/requests.json")
    assert not path.exists()
    assert suspend.save_requests(first, "~/requests.json") == 1
    assert path.exists()
    assert going.output(0).finish_reason == "suspended"


def test_while_a_thread_works(first, second, undisturbed, tmp_path):
    path = tmp_path / "requests.json"
    second.start()
    submitted = [second.submit(*arguments) for arguments in requests()]
    while not any(len(request.tokens) > 9 for request in submitted):
        time.sleep(0.001)
    suspend.save_requests(second, path)
    outputs = {r.options.seed: r.output(timeout_secs=60) for r in submitted}
    second.close()
    for request in suspend.resume_requests(first, path):
        assert outputs[request.options.seed].finish_reason == "suspended"
        first.run()
        outputs[request.options.seed] = request.output()
    for seed, output in outputs.items():
        same(dataclasses.replace(output, tokens=versionless(output.tokens)), undisturbed[seed])


def versionless(tokens):
    """Return the tokens as of version 0: a test before swapped the same weights in."""
    return tuple(dataclasses.replace(token, version=0) for token in tokens)


def test_digest_tells_weights_apart():
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    digests = {
        suspend.digest_arrays([x]),
        suspend.digest_arrays([x.at[1, 2].set(6.0000005)]),
        suspend.digest_arrays([x.T]),
        suspend.digest_arrays([x[::-1]]),
        suspend.digest_arrays([x.astype(jnp.bfloat16)]),
        suspend.digest_arrays([x, x]),
    }
    assert len(digests) == 6
    assert suspend.digest_arrays([x]) == suspend.digest_arrays([x + 0])
