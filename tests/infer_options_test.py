"""Tests of infer.options: what is refused, presets, and copies of the caller's values."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from infer import options as options_lib


def test_defaults_are_the_release_s_recommendation():
    options = options_lib.Options()
    assert (options.temperature, options.top_p, options.top_k) == (1.0, 0.95, 0)
    for name, (default, _, _) in options_lib.SAMPLING_FIELDS.items():
        assert getattr(options, name) == default
    assert options.constraint is None


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1; wanted 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": "1"}, "temperature: got '1'"),
        ({"top_p": 0}, "top_p: got 0; wanted more than 0, at most 1"),
        ({"top_k": 1.5}, "top_k: got 1.5; wanted a whole number"),
        ({"presence_penalty": 2.1}, "presence_penalty: got 2.1; wanted -2 to 2"),
        ({"frequency_penalty": True}, "frequency_penalty: got True"),
        ({"top_logprobs": 21}, r"top_logprobs: got 21; wanted a whole number, 0 \(off\) to 20"),
        ({"seed": 2**32}, "seed: got 4294967296; wanted 0 to 4294967295"),
        ({"seed": 1.0}, "seed: got 1.0"),
        ({"max_tokens": 0}, "max_tokens: got 0; wanted a whole number, 1 or more"),
        ({"max_tokens": 3, "min_tokens": 4}, r"min_tokens: got 4; wanted 0 to 3 \(max_tokens\)"),
        ({"thinking_tokens": -1}, "thinking_tokens: got -1; wanted a whole number, 0 or more"),
        ({"stop_on_loop": 1}, "stop_on_loop: got 1; wanted True or False"),
        ({"logit_bias": [1]}, r"logit_bias: got \[1\]; wanted a mapping"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias: got '1'; wanted token ids"),
        ({"logit_bias": {7: 101}}, r"logit_bias\[7\]: got 101; wanted -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "got 301 entries; wanted at most 300"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: got -1; wanted token ids"),
        ({"stop_token_ids": 5}, "stop_token_ids: got 5; wanted a tuple"),
        ({"stop": "end"}, "stop: got 'end'; wanted a tuple of strings"),
        ({"stop": ("",)}, "stop: got ''; wanted strings of 1 to 1024 characters"),
        ({"stop": ("a",) * 17}, "stop: got 17 strings; wanted at most 16"),
        ({"regex": "a", "json_schema": {}}, "got json_schema and regex; wanted at most one"),
        ({"regex": ""}, "regex: got ''; wanted text"),
        ({"grammar": {}}, "grammar: got {}; wanted text"),
        ({"json_schema": 3}, "json_schema: got 3; wanted text or an object"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos: got True with regex"),
        ({"regex": "a", "min_tokens": 2}, "min_tokens: got 2 with regex"),
    ],
)
def test_refused(values, error):
    with pytest.raises(ValueError, match=error):
        options_lib.Options(**values)


def test_constraint():
    assert options_lib.Options(json_schema={}).constraint == "json_schema"
    assert options_lib.Options(grammar="start: /a/").constraint == "grammar"


def test_the_caller_s_values_are_copied():
    bias, stop = {3: 1.0}, ["x"]
    options = options_lib.Options(logit_bias=bias, stop=stop, stop_token_ids=[1])
    bias[4] = 2.0
    stop.append("y")
    assert options.logit_bias == {3: 1.0}
    assert (options.stop, options.stop_token_ids) == (("x",), (1,))
    assert dataclasses.replace(options, seed=1).logit_bias == {3: 1.0}


def test_check_of_token_ids():
    options = options_lib.Options(logit_bias={9: 1}, stop_token_ids=(3, 5, 3))
    options_lib.check_options(options, 10)
    assert options_lib.all_stop_ids(options, (3, 7)) == (3, 5, 7)
    with pytest.raises(ValueError, match="logit_bias: got 9; wanted token ids of 0 to 8"):
        options_lib.check_options(options, 9)
    with pytest.raises(ValueError, match="stop_token_ids: got 5; wanted token ids of 0 to 4"):
        options_lib.check_options(options_lib.Options(stop_token_ids=(5,)), 5)
    many = options_lib.Options(stop_token_ids=tuple(range(20)))
    assert options_lib.all_stop_ids(many, tuple(range(15, 40))) == tuple(range(40))
    ignoring = dataclasses.replace(many, ignore_eos=True)
    assert options_lib.all_stop_ids(ignoring, tuple(range(15, 40))) == tuple(range(20))


def test_presets():
    assert set(options_lib.PRESETS) == {"thinking-40k", "thinking-80k", "lightning", "pro"}
    for options in options_lib.PRESETS.values():
        assert options.thinking_tokens + 8 < options.max_tokens  # room for an answer
    changed = options_lib.preset_options("pro", temperature=0.5)
    assert (changed.temperature, changed.stop_on_loop, changed.thinking_tokens) == (
        0.5,
        True,
        80_000,
    )
    with pytest.raises(ValueError, match="preset: got 'thinking80k'; did you mean thinking-80k"):
        options_lib.preset_options("thinking80k")
    with pytest.raises(ValueError, match="preset: got 'x'; wanted one of thinking-40k, "):
        options_lib.preset_options("x")
    with pytest.raises(ValueError, match="option: got 'temprature'; did you mean temperature"):
        options_lib.preset_options("pro", temprature=1)
    with pytest.raises(ValueError, match="top_p: got 2"):
        options_lib.preset_options("pro", top_p=2)


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e-50},
        {"repetition_penalty": 1e39},
        {"temperature": 1e39},
        {"temperature": 1e-45},
        {"temperature": 10**400},
        {"temperature": float("inf")},
        {"min_p": 1e-300},
        {"presence_penalty": -1e-60},
        {"logit_bias": {3: 1e-42}},
    ],
)
def test_what_is_0_or_infinite_on_the_device_is_refused(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"{name}.*: got .*; wanted a number that float32 holds"):
        options_lib.Options(**values)


def test_extreme_numbers_that_float32_holds():
    for values in ({"repetition_penalty": 1.2e-38}, {"temperature": 3e38}, {"temperature": -0.0}):
        options_lib.Options(**values)


def test_numbers_of_other_libraries():
    torch = pytest.importorskip("torch")
    for array in (np.array, jnp.array, torch.tensor):
        options = options_lib.Options(
            seed=array(3),
            temperature=array(0.5),
            top_k=array(7),
            ignore_eos=array(True),
            stop_token_ids=array([4, 5]),
            logit_bias={int(array(6)): array(0.25)},
        )
        assert options == options_lib.Options(
            seed=3,
            temperature=0.5,
            top_k=7,
            ignore_eos=True,
            stop_token_ids=(4, 5),
            logit_bias={6: 0.25},
        )
        # JSON has neither, and a suspended request is written as JSON.
        assert json.loads(json.dumps(options_lib.options_to_json(options)))["seed"] == 3
    many = options_lib.Options(
        seed=np.int64(3), max_tokens=np.uint8(9), logit_bias={np.int32(6): np.float16(0.5)}
    )
    assert [type(value) for value in (many.seed, many.max_tokens)] == [int, int]
    assert many.logit_bias == {6: 0.5}
    assert {type(value) for item in many.logit_bias.items() for value in item} == {int, float}
    with pytest.raises(ValueError, match="seed: got 2.0"):
        options_lib.Options(seed=np.float32(2))
    with pytest.raises(ValueError, match=r"max_tokens: got \[5\]"):
        options_lib.Options(max_tokens=np.array([5]))
