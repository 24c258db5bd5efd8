"""Lines of OpenAI's batch API: what of them is followed, and what is refused by its name."""

import pytest

from infer import jsonl, openai_batch, options

MESSAGES = [{"role": "user", "content": "a"}]


def make_line(body=None, **fields):
    line = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions"}
    return line | {"body": {"model": "m", "messages": MESSAGES} | (body or {})} | fields


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, {}),
        ({"max_tokens": 5, "stop": "x"}, {"max_tokens": 5, "stop": "x"}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"n": 1, "stream": False, "user": "u", "metadata": {"a": 1}, "seed": None}, {}),
        ({"tool_choice": "auto", "parallel_tool_calls": True, "tools": []}, {"tools": []}),
        ({"logprobs": False, "response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_object"}},
            {"json_schema": {"type": "object"}, "after_thinking": True},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            {"json_schema": {"name": "n"}, "after_thinking": True},
        ),
    ],
)
def test_a_body_has_the_fields_of_our_lines(body, wanted):
    got = openai_batch.translate_line(make_line(body), writes_tokens=False)
    assert got == {"messages": MESSAGES, "custom_id": "r1"} | wanted


def test_the_options_are_those_that_a_line_of_ours_would_have():
    schema = {"name": "n", "strict": True, "schema": {"type": "integer"}}
    body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "logit_bias": {"7": 2},
        "max_completion_tokens": 50,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    values = openai_batch.translate_line(make_line(body), writes_tokens=False)
    del values["messages"], values["custom_id"]
    assert jsonl.options_from_fields(options.Options(), values) == options.Options(
        temperature=0.5,
        top_p=0.9,
        seed=7,
        logit_bias={7: 2},
        max_tokens=50,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        json_schema=schema,
        after_thinking=True,
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (make_line(method="GET"), "got 'GET' '/v1/chat/completions'; wanted POST"),
        (make_line(url="/v1/embeddings"), "'/v1/embeddings'; wanted POST /v1/chat/completions"),
        (make_line(id="x"), "field: got 'id'"),
        (make_line({"n": 2}), "body: n: got 2; wanted 1"),
        (make_line({"n": True}), "body: n: got True; wanted 1"),
        (make_line({"stream": True}), "body: stream: got True; wanted False"),
        (make_line({"tool_choice": "required"}), "body: tool_choice: got 'required'"),
        (make_line({"logprobs": True}), "body: got logprobs; .*--tokens"),
        (make_line({"max_tokens": 1, "max_completion_tokens": 2}), "another max_tokens"),
        (make_line({"response_format": {"type": "xml"}}), "got {'type': 'xml'}; wanted one of"),
        (make_line({"response_format": {"type": "json_schema"}}), "response_format: got"),
        (make_line({"response_format": 3}), "response_format: got 3"),
        (make_line({"custom_id": "b"}), "body: got custom_id"),
    ],
)
def test_what_cannot_be_followed_is_refused(line, words):
    with pytest.raises(ValueError, match=words):
        openai_batch.translate_line(line, writes_tokens=False)


def test_log_probabilities_are_those_of_tokens():
    line = make_line({"logprobs": True, "top_logprobs": 3})
    assert openai_batch.translate_line(line, writes_tokens=True)["top_logprobs"] == 3
