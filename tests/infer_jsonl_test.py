"""Tests of infer.jsonl: files of requests, and what is refused in them."""

import concurrent.futures
import json
import os

import pytest

from infer import jsonl
from infer import options as options_lib
from m1_jax import config as config_lib

MARK = "\ufeff"
USER = {"messages": [{"role": "user", "content": "Hi"}]}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"{MARK}one\ntwo", [(1, "one"), (2, "two")]),
        (f"one\n{MARK}two\n", [(1, "one"), (2, "two")]),  # two files put together
        ("one\r\n\r\n two \r\n", [(1, "one"), (3, " two ")]),
        ("one\rtwo", [(1, "one"), (2, "two")]),
        ("a\u2028b\x85c\x0bd", [(1, "a\u2028b\x85c\x0bd")]),
        (MARK, []),
    ],
)
def test_lines(tmp_path, content, lines):
    path = write(tmp_path, "p", content)
    assert jsonl.read_lines(path) == [(f"{path}:{n}", line) for n, line in lines]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo \xff", "p:2: got bytes that are not UTF-8, the first one 0xff; save"),
        (b"\xef\xbb\xbfone\r\n\r\n\xe9", "p:3: got bytes that are not UTF-8, the first one 0xe9"),
        ("é".encode("utf-16"), "p:1: got bytes that are not UTF-8, the first one 0xff"),
        ("one\ntwo".encode("utf-16-le"), "p:1: got a NUL character; save the file as text in UTF"),
        (b"one\ntwo\n" + b"\0" * 4096, "p:3: got a NUL character"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        jsonl.read_lines(write(tmp_path, "p", content))


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "P.JSONL", "p.json", "p.JsonLines"])
def test_json_lines_by_any_of_their_names(tmp_path, name):
    path = write(tmp_path, name, f'{MARK}{{"prompt": "Hi"}}\n{json.dumps(USER)}\n')
    requests = jsonl.read_conversations(path, None, raw=False)
    assert requests == [(f"{path}:1", USER), (f"{path}:2", USER)]


@pytest.mark.parametrize(
    "line", ['{"prompt": "Hi"}', json.dumps(USER), '  {"custom_id": "1", "body": {}}']
)
@pytest.mark.parametrize("name", ["p.txt", "p", "p.jsonl.bak"])
def test_json_lines_by_another_name_are_refused(tmp_path, name, line):
    path = write(tmp_path, name, f"plain\n{line}\n")
    with pytest.raises(
        ValueError, match=rf"{name}:2: got a request as JSON .* name the file .json"
    ):
        jsonl.read_conversations(path, None, raw=False)


def test_other_json_is_a_plain_prompt(tmp_path):
    path = write(tmp_path, "p.txt", '{"a": 1}\n[1]\n7\n{\n')
    requests = jsonl.read_conversations(path, None, raw=True)
    assert [value["prompt"] for _, value in requests] == ['{"a": 1}', "[1]", "7", "{"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps([USER, USER]),
            r"p.json: got one JSON array; wanted an object .*: jq -c '\.\[\]'",
        ),
        (json.dumps([USER, USER], indent=2), r"got one JSON array; wanted an object per line"),
        (json.dumps(USER, indent=2), r"got one JSON object; wanted an object per line: jq -c '\.'"),
        ('["a"]', r"p.json:1: got \['a'\]; wanted"),
        ("[\n", "p.json:1: got no valid JSON"),
    ],
)
def test_one_json_value_over_lines(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        jsonl.read_conversations(write(tmp_path, "p.json", content), None, raw=False)


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for content, num_lines in [('{"prompt": "a"}\n', 1), ("[\n", 1)]:
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            executor.submit(path.write_text, content)
            assert len(jsonl.read_json_lines(path)) == num_lines


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "row-\\ud835"}',
        '{"stop": ["a", "\\udfff"]}',
        '{"\\ud800": 1}',
        '[[["\\ude00\\ud83d"]]]',
    ],
)
def test_lone_surrogates_are_refused_wherever_they_stand(text):
    with pytest.raises(ValueError, match=r"^f:3: got a lone surrogate '\\ud.* in '.*\\ud"):
        jsonl.parse_line("f:3", text)
    assert jsonl.parse_line("f:3", '"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"json_schema": ' + '{"items":' * 3_000 + "1" + "}" * 3_001,
        "[" * 250 + "]" * 250,
        '{"temperature": 1' + "0" * 400 + "}",
        '{"seed": ' + "9" * 5_000 + "}",
        '{"' + "k" * 9_000 + '": 1, "' + "k" * 9_000 + '": 2}',
    ],
)
def test_depth_and_digits_are_one_short_line(text):
    with pytest.raises(ValueError, match=r"^f:3: got no valid JSON \(") as refused:
        jsonl.parse_line("f:3", text)
    assert len(str(refused.value)) <= 300


def test_errors_have_the_location_and_the_remedy():
    with pytest.raises(ValueError, match="^f:3: got xxx") as refused, jsonl.locate_errors("f:3"):
        raise ValueError(f"got {'x' * 900};\n wanted   a. Do this.")
    message = str(refused.value)
    assert message.endswith("x; wanted a. Do this.")
    assert len(message) == 250
    with pytest.raises(ValueError, match="^f:3: got 1$"), jsonl.locate_errors("f:3"):
        raise ValueError("f:3: got 1")


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "Hi", "system": None, "messages": None, "tools": None},
        {**USER, "prompt": None, "system": None, "tools": None},
    ],
)
def test_null_is_absence_in_requests(value):
    assert jsonl.check_conversation(value, None, raw=False) == USER


def test_null_is_absence_in_options():
    base = options_lib.Options(max_tokens=7, thinking_tokens=3, stop=("x",))
    names = list(options_lib.options_to_json(base)) + ["seed", "json_schema", "preset", "top_p"]
    assert jsonl.options_from_fields(base, dict.fromkeys(names)) == base


def test_whole_numbers_may_be_floats():
    whole = {"max_tokens": 50, "seed": 3, "min_tokens": 0, "thinking_tokens": 9, "top_k": 5}
    whole |= {"top_logprobs": 2, "stop_token_ids": [1, 2]}
    floats = {
        name: [float(item) for item in value] if isinstance(value, list) else float(value)
        for name, value in whole.items()
    }
    base = options_lib.Options()
    options = jsonl.options_from_fields(base, floats)
    assert options == jsonl.options_from_fields(base, whole)
    assert all(type(getattr(options, name)) is int for name in whole if name != "stop_token_ids")
    assert all(type(token) is int for token in options.stop_token_ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 50.5}, "max_tokens: got 50.5"),
        ({"seed": 1e300}, r"seed: got 1e\+300"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids: got 1.5"),
        ({"seed": True}, "seed: got True"),
        ({"preset": ["pro"]}, r"preset: got \['pro'\]; wanted a preset's name"),
        ({"preset": {}}, r"preset: got \{\}"),
    ],
)
def test_refused_options(values, message):
    with pytest.raises(ValueError, match=message):
        jsonl.options_from_fields(options_lib.Options(), values)


def test_lines_of_openais_batch_api_are_told_apart():
    body = {"model": "m", **USER, "max_tokens": 5}
    line = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    with pytest.raises(
        ValueError, match=r"OpenAI's batch API, which m1-batch reads; .* jq -c '\.body"
    ):
        jsonl.check_conversation(line, None, raw=False)


def test_length_is_checked_against_the_smallest_limit():
    config = config_lib.ModelConfig.tiny()
    model_limit = config.max_position_embeddings
    jsonl.check_prompt_length([1] * 29, 100, config, num_pages=2)
    for limits, message in [
        (
            {"num_pages": 2},
            r"30 tokens \+ max_tokens 100 = 130; wanted at most 129\. .*--num_pages",
        ),
        ({"num_pages": 2, "max_length": 128}, "at most 128. .*raise --max_length"),
        ({"num_pages": 1, "max_length": 128}, "at most 65. .*raise --num_pages"),
    ]:
        with pytest.raises(ValueError, match=message):
            jsonl.check_prompt_length([1] * 30, 100, config, **limits)
    with pytest.raises(ValueError, match=f"at most {model_limit}. .*the model allows no more"):
        jsonl.check_prompt_length([1], model_limit, config, max_length=model_limit + 1)
