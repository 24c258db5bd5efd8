"""Tests of infer.offline: what it refuses, what it writes, and that it goes on where it was."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import m1_jax
from infer import batch_input, batch_output, grammar, jsonl, offline
from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    for file in (REPO / "tests" / "data" / "m1-tiny").iterdir():
        if file.suffix != ".npz":
            shutil.copy(file, directory)
    return testing.write_tiny_tokenizer(directory, vocab_size=512)


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def requests(count, max_tokens=30):
    """Requests with prefixes in common and options of their own."""
    many = []
    for number in range(count):
        one = {"id": f"r{number}", "prompt": f"Tell me about {'matrices ' * 20} number {number}"}
        one["max_tokens"] = max_tokens - number % 7
        if number % 3 == 1:
            one |= {"seed": number, "repetition_penalty": 1.2}
        if number % 4 == 2:
            one |= {"regex": "[a-z]{5,12}", "stop": "qq"}
        many.append(one)
    return many


def by_index(path):
    return sorted(path.read_bytes().splitlines(), key=lambda line: json.loads(line)["index"])


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """A run from beginning to end: its config, summary and lines."""
    directory = tmp_path_factory.mktemp("whole")
    config = batch_input.BatchConfig(
        checkpoint=str(checkpoint),
        input=str(write_lines(directory / "in.jsonl", requests(8))),
        output=str(directory / "out.jsonl"),
        max_rows=3,
        tokens=True,
        progress=False,
    )
    return config, offline.run(config), by_index(directory / "out.jsonl")


def test_outputs(whole, checkpoint):
    config, summary, lines = whole
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == list(range(8))
    assert [record["id"] for record in records] == [f"r{number}" for number in range(8)]
    tokenizer = tokenizer_lib.Tokenizer.load(checkpoint)
    for record in records:
        ids = [token["id"] for token in record["tokens"]]
        assert len(ids) == record["completion_tokens"] <= 30
        assert all(token["logp_raw"] <= 0 for token in record["tokens"])
        if record["finish_reason"] == "length":
            assert record["text"] == tokenizer.decode(ids)
    assert (summary.requests, summary.num_done_before, summary.num_done) == (8, 0, 8)
    assert summary.completion_tokens == sum(record["completion_tokens"] for record in records)
    assert summary.cached_tokens > 0
    assert offline.run(config).num_done == 0  # without loading anything


def test_seeds_are_of_the_run_and_the_index(whole, tmp_path):
    config, _, lines = whole
    other = dataclasses.replace(config, seed=1, output=str(tmp_path / "out.jsonl"))
    offline.run(other)
    changed = [a != b for a, b in zip(lines, by_index(tmp_path / "out.jsonl"), strict=True)]
    assert changed[0]
    assert not changed[1]  # it has a seed of its own


def test_interrupted_and_torn(whole, tmp_path):
    """Stopped cleanly thrice, the last line torn once: the same lines in the end."""
    config, _, lines = whole
    output = tmp_path / "out.jsonl"
    config = dataclasses.replace(config, output=str(output))

    def after(count):
        return lambda: signal.SIGTERM if output.read_bytes().count(b"\n") >= count else None

    none = offline.run(config, after(0))  # stopped before any request was done
    assert (none.stopped_by, none.num_done, output.read_bytes()) == (signal.SIGTERM, 0, b"")
    first = offline.run(config, after(2))
    assert first.stopped_by == signal.SIGTERM
    assert 2 <= first.num_done < 8
    content = output.read_bytes()
    output.write_bytes(content[:-9])
    second = offline.run(config, after(first.num_done + 1))
    assert second.num_done_before == first.num_done - 1
    third = offline.run(config)
    assert third.stopped_by is None
    assert third.num_done_before + third.num_done == 8
    assert by_index(output) == lines


def test_a_grammar_that_fails_ends_its_own_request(whole, tmp_path, monkeypatch):
    config, _, lines = whole
    calls = []

    def mask(self, whole_mask=grammar.GrammarMatcher.mask):
        calls.append(self)
        if self is calls[0] and calls.count(self) == 4:
            raise ValueError("constrained decoding: too large")
        return whole_mask(self)

    monkeypatch.setattr(grammar.GrammarMatcher, "mask", mask)
    summary = offline.run(dataclasses.replace(config, output=str(tmp_path / "out.jsonl")))
    assert summary.errors == 1
    assert "; 1 ended in errors" in str(summary)
    got = by_index(tmp_path / "out.jsonl")
    (different,) = (json.loads(a) for a, b in zip(got, lines, strict=True) if a != b)
    assert (different["finish_reason"], different["completion_tokens"]) == ("error", 3)
    assert len(got) == 8


@pytest.mark.long(tenths=range(1, 10, 2))  # half a minute
def test_killed_at_any_time(whole, tmp_path):
    config, _, lines = whole
    output = tmp_path / "out.jsonl"
    values = {**dataclasses.asdict(config), "output": str(output)}
    flags = [f"--{k}={v}" for k, v in values.items() if v is not None]
    command = [sys.executable, "-m", "infer.offline", *flags]
    for count, number in ((2, signal.SIGKILL), (4, signal.SIGTERM)):
        process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            if output.exists() and output.read_bytes().count(b"\n") >= count:
                os.kill(process.pid, number)
                break
            time.sleep(0.001)
        told = process.communicate()[1]
        # By the fourth line of eight, the end may be faster than the signal.
        wanted = {signal.SIGKILL: (-number,), signal.SIGTERM: (0, 128 + number)}
        assert process.returncode in wanted[number], told
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 of 8 requests" in done.stderr
    assert by_index(output) == lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"begun with another seed \(seed: got 3; wanted 0\). Give the same"),
        ({"defaults": '{"top_k": 3}'}, "begun with another defaults"),
        ({"tokens": False, "dtype": "bfloat16"}, "begun with another tokens and dtype"),
    ],
)
def test_another_run_is_refused(whole, changes, message):
    with pytest.raises(ValueError, match=message):
        offline.run(dataclasses.replace(whole[0], **changes))


def test_refused_outputs(whole, tmp_path):
    config = whole[0]
    path = tmp_path / "in.jsonl"
    write_lines(path, requests(7))
    with pytest.raises(ValueError, match="begun with another input"):
        offline.run(dataclasses.replace(config, input=str(path)))
    (tmp_path / "out.jsonl").touch()
    with pytest.raises(ValueError, match=r"out.jsonl exists, but out.jsonl.run.json beside it"):
        offline.run(dataclasses.replace(config, output=str(tmp_path / "out.jsonl")))
    for content, message in [
        ('{"index": 1}\n{"index": 1}\n', ":2: got index 1; wanted each of 0 to 7 once"),
        ('{"index": 9}\n', "got index 9"),
        ("x\n", ":1: got no valid JSON"),
    ]:
        (tmp_path / "out.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            batch_output.read_done_indices(tmp_path / "out.jsonl", 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "seed": 1, "seed": 2}', "seed is given twice: 1 and 2"),
        ('{"prompt": "a", "temperature": NaN}', "NaN is not JSON"),
        ('{"prompt": "a", "temperature": 1e999}', "1e999 is too large"),
    ],
)
def test_what_is_not_json_is_refused(line, message):
    with pytest.raises(ValueError, match=rf"in.jsonl:1: got no valid JSON \({message}"):
        jsonl.parse_line("in.jsonl:1", line)


def test_bad_lines_are_listed_before_anything_runs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(m1_jax, "load", None)  # nothing may get so far
    bad = [
        ({"prompt": "a", "max_token": 3}, "field: got 'max_token'; did you mean max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature: got -1; wanted 0"),
        ({"prompt": "a", "regex": "("}, "regex: "),
        ({"prompt": "a", "max_tokens": 9_999}, r"max_tokens 9999 = \d+; wanted at most 4096"),
        ({"prompt": "a", "id": [1]}, r"id: got \[1\]; wanted text or a whole number"),
        ({"prompt": "a", "id": "same"}, None),
        ({"prompt": "a", "id": "same"}, "id: got 'same' again, first at .*:6; wanted another"),
        ({"prompt": "a", "preset": "fast"}, "preset: got 'fast'; wanted one of "),
        ({"prompt": "a", "messages": []}, 'wanted "prompt" and "system", or'),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "nobody"),
        ({"prompt": "a", "logit_bias": {"512": 1}}, "logit_bias: got 512; wanted token ids"),
        ([], r"got \[\]; wanted an object"),
        ("torn", "got 'torn'; wanted an object"),
    ]
    path = write_lines(tmp_path / "in.jsonl", [value for value, _ in bad])
    config = batch_input.BatchConfig(str(checkpoint), str(path), str(tmp_path / "out.jsonl"))
    with pytest.raises(ValueError, match="got 12 bad lines of 13; nothing was run") as caught:
        offline.run(config)
    told = str(caught.value).split("\n  ")[1:]
    assert told[-1] == "and 2 more"
    wanted = [(n, text) for n, (_, text) in enumerate(bad, 1) if text]
    for line, (number, text) in zip(told, wanted[:10], strict=False):
        assert line.startswith(f"{path}:{number}: ")
        assert re.search(text, line), line
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_of_openais_batch_api_are_requests(checkpoint, tmp_path):
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "m", "messages": messages, "max_completion_tokens": 7}
    line = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [line, {"messages": messages, "max_tokens": 7, "id": "own"}]
    path = write_lines(tmp_path / "in.jsonl", lines)
    config = batch_input.BatchConfig(str(checkpoint), str(path), "out")
    tokenizer = tokenizer_lib.Tokenizer.load(checkpoint)
    model_config = m1_jax.ModelConfig.from_file(checkpoint / "config.json")
    first, second = batch_input.read_requests(config, tokenizer, model_config)
    assert first.output_fields == {"index": 0, "custom_id": "r1"}
    assert first.prompt == second.prompt
    assert first.options == dataclasses.replace(second.options, seed=first.options.seed)
    write_lines(path, [line, line | {"body": body | {"reasoning_effort": "low"}}, line])
    with pytest.raises(ValueError, match="field: got 'reasoning_effort'") as refusal:
        batch_input.read_requests(config, tokenizer, model_config)
    assert "custom_id: got 'r1' again" in str(refusal.value)


def test_fields_of_a_line(checkpoint, tmp_path):
    lines = [
        {"prompt": "a", "preset": "lightning", "max_tokens": 2_000, "stop": "x"},
        {"messages": [{"role": "user", "content": "a"}], "logit_bias": {"7": 2}, "seed": 5},
        {"prompt": "a", "system": "b", "id": 3},
    ]
    path = write_lines(tmp_path / "in.jsonl", lines)
    config = batch_input.BatchConfig(
        str(checkpoint), str(path), "out", defaults='{"top_k": 4, "max_tokens": 99}', seed=11
    )
    tokenizer = tokenizer_lib.Tokenizer.load(checkpoint)
    model_config = m1_jax.ModelConfig.from_file(checkpoint / "config.json")
    first, second, third = batch_input.read_requests(config, tokenizer, model_config)
    assert (first.options.thinking_tokens, first.options.max_tokens) == (1_024, 2_000)
    assert (first.options.stop, first.options.top_k, first.options.seed) == (("x",), 0, 11)
    assert (second.options.logit_bias, second.options.seed) == ({7: 2}, 5)
    assert (second.options.top_k, second.options.max_tokens) == (4, 99)
    assert second.prompt == first.prompt
    assert third.output_fields == {"index": 2, "id": 3}
    assert "b" in tokenizer.decode(third.prompt)
    assert third.options.seed not in (11, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ""}, "--input: got ''; wanted a file"),
        ({"defaults": "[]"}, r"--defaults: got \[\]; wanted a JSON object"),
        ({"defaults": '{"topk": 3}'}, "--defaults: option: got 'topk'; did you mean top_k"),
        ({"defaults": "{"}, "--defaults: got no valid JSON"),
        ({"defaults": '{"seed": 5}'}, "--defaults: seed: got 5; wanted it as --seed"),
        ({"defaults": "[" * 3_000}, "--defaults: got no valid JSON"),
        ({"max_rows": 0}, "--max_rows: got 0"),
        ({"weights": "int8"}, "weights: got 'int8'"),
    ],
)
def test_refused_config(changes, message):
    with pytest.raises(ValueError, match=message):
        batch_input.BatchConfig(**{"checkpoint": "x", "input": "x", "output": "x", **changes})
