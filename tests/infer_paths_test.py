"""Tests of paths that the commands of infer take: the home directory, buckets, files to write."""

import json
import os
import pathlib
import shutil

import pytest

import m1_jax
from infer import batch_input, command, generate, offline
from m1_jax import testing

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home directory, with a checkpoint m1. The working directory is another one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "m1").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copy(REPO / "tests" / "data" / "m1-tiny" / "config.json", tmp_path / "home" / "m1")
    testing.write_tiny_tokenizer(tmp_path / "home" / "m1", vocab_size=512)
    (tmp_path / "home" / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    return tmp_path / "home"


def test_home_in_every_path(home):
    (home / "schema.json").write_text('\ufeff{"type": "null"}')
    config = generate.GenerateConfig(
        checkpoint="~/m1",
        prompts_file="~/p.jsonl",
        json_schema="@~/schema.json",
        logprobs="~/logprobs.jsonl",
    )
    assert len(generate.read_inputs(config)[1]) == 1
    assert config.options.json_schema == '{"type": "null"}'
    (home / "answer.lark").write_text('\ufeffstart: "a"')
    config = generate.GenerateConfig(checkpoint="~/m1", prompt="a", grammar="@~/answer.lark")
    assert config.options.grammar == 'start: "a"'
    assert config.model_choice.checkpoint == "~/m1"
    assert command.checkpoint_dir(config.model_choice.checkpoint) == home / "m1"
    batch = batch_input.BatchConfig("~/m1", "~/p.jsonl", "~/out.jsonl")
    assert len(offline.read_inputs(batch).requests) == 1
    assert os.listdir() == []


def test_an_output_in_the_home_directory(home, monkeypatch):
    monkeypatch.setattr(m1_jax, "load", None)  # the run ends here
    for file in (REPO / "tests" / "data" / "m1-tiny").glob("model*"):
        shutil.copy(file, home / "m1")
    with pytest.raises(TypeError):
        offline.run(batch_input.BatchConfig("~/m1", "~/p.jsonl", "~/out.jsonl"))
    assert (home / "out.jsonl").exists()
    assert json.loads((home / "out.jsonl.run.json").read_text())
    assert os.listdir() == []


@pytest.mark.parametrize(
    "path",
    ["gs://bucket/x", "s3://b/x", "hf://b/x", "file:///x", "gs:/b/x", "~nobody-has-this-name/x"],
)
def test_buckets_and_unknown_homes_are_refused_before_anything_is_made(home, path):
    wanted = "; wanted a local path|, the home of an unknown user"
    generate_flags = {"checkpoint": "~/m1", "prompts_file": "~/p.jsonl", "logprobs": "~/l"}
    for name in generate_flags:
        with pytest.raises(ValueError, match=f"--{name}: got '{path}'({wanted})"):
            generate.GenerateConfig(**{**generate_flags, name: path})
    for name in ("json_schema", "grammar"):
        with pytest.raises(ValueError, match=f"--{name}: got '{path}'({wanted})"):
            generate.GenerateConfig(**generate_flags, **{name: f"@{path}"})
    batch_flags = {"checkpoint": "~/m1", "input": "~/p.jsonl", "output": "~/out.jsonl"}
    for name in batch_flags:
        with pytest.raises(ValueError, match=f"--{name}: got '{path}'({wanted})"):
            batch_input.BatchConfig(**{**batch_flags, name: path})
    assert os.listdir() == []


def test_outputs_that_cannot_be_written_are_refused_first(home):
    for output, message in [
        ("none/out.jsonl", "got none/out.jsonl; wanted a file in a directory that exists"),
        ("~", f"got {home}; wanted a file in a directory"),
        ("~/p.jsonl", "got .*p.jsonl, which is read; wanted another file"),
    ]:
        with pytest.raises(ValueError, match=f"--output: {message}"):
            offline.read_inputs(batch_input.BatchConfig("~/m1", "~/p.jsonl", output))
        config = generate.GenerateConfig(
            checkpoint="~/m1", prompts_file="~/p.jsonl", logprobs=output
        )
        with pytest.raises(ValueError, match=f"--logprobs: {message}"):
            generate.read_inputs(config)
    assert (home / "p.jsonl").read_text() == '{"prompt": "Hi"}\n'


def test_errors_of_prompts_name_file_and_line(home):
    (home / "p.ndjson").write_text('{"prompt": "a"}\n\n{"messages": [{"role": "x"}]}\n')
    (home / "p.txt").write_text("a\n" + "long " * 900)
    for name, message in [
        ("p.ndjson", r"p\.ndjson:3: messages\[0\]\.role: got 'x'"),
        ("p.txt", r"p\.txt:2: got \d+ tokens \+ max_tokens 9 = \d+; wanted at most 40\. Shorten"),
    ]:
        config = generate.GenerateConfig(
            checkpoint="~/m1", prompts_file=f"~/{name}", max_tokens=9, max_length=40
        )
        with pytest.raises(ValueError, match=message):
            generate.read_inputs(config)
