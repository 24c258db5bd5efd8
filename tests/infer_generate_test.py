"""Tests of infer.generate on the tiny model."""

import dataclasses
import io
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from output_support import token_ids

import m1_jax
from infer import generate, jsonl, prompt
from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    source = pathlib.Path(__file__).parent / "data" / "m1-tiny"
    for file in source.iterdir():
        if file.suffix != ".npz":
            shutil.copy(file, directory)
    return testing.write_tiny_tokenizer(directory, vocab_size=512)


def test_golden_greedy_tokens(golden_dir, checkpoint):
    golden = np.load(golden_dir / "golden.npz")
    model, tok = m1_jax.load(checkpoint), tokenizer_lib.Tokenizer.load(checkpoint)
    prompts = golden["input_ids"][:, :100].tolist()
    config = generate.GenerateConfig(
        checkpoint="x", prompt="x", max_tokens=48, temperature=0, ignore_eos=True
    )

    def generate_tokens(prompts):
        sizes = generate.fit_engine(config, prompts, model.config)
        prepared = generate.PreparedRun(model, sizes, tok, prompts)
        return generate.generate_texts(config, prepared, io.StringIO())

    # Beside each other, and beside a prompt of another length.
    outputs, stats = generate_tokens(prompts)
    assert [token_ids(output) for output in outputs] == golden["greedy_tokens"].tolist()
    assert (stats.prefill_tokens, stats.decode_tokens) == (200, 2 * 47)
    (_, other), _ = generate_tokens([prompts[1][:30], prompts[0]])
    assert token_ids(other) == golden["greedy_tokens"][0].tolist()


def test_sampling_depends_on_seed_and_number_alone(checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("same\nanother one\nsame\n")
    config = generate.GenerateConfig(
        checkpoint=str(checkpoint), prompts_file=str(file), max_tokens=20, repetition_penalty=1.1
    )
    together, _ = generate.run(config, io.StringIO())
    assert together[0].tokens != together[2].tokens
    alone, _ = generate.run(dataclasses.replace(config, batch_size=1), io.StringIO())
    assert [output.tokens for output in alone] == [output.tokens for output in together]
    other, _ = generate.run(dataclasses.replace(config, seed=1), io.StringIO())
    assert other[1].tokens != together[1].tokens


def test_options(checkpoint, tmp_path):
    schema, file = tmp_path / "schema.json", tmp_path / "logprobs.jsonl"
    schema.write_text('{"enum": ["red", "green"]}')
    config = generate.GenerateConfig(
        checkpoint=str(checkpoint),
        prompt="hi",
        preset="lightning",
        max_tokens=24,
        temperature=1.5,
        json_schema=f"@{schema}",
        logprobs=str(file),
        top_logprobs=2,
    )
    assert config.options.thinking_tokens == 1_024  # the preset's
    out = io.StringIO()
    (output,), _ = generate.run(config, out)
    assert json.loads(out.getvalue()) in ("red", "green")
    assert output.finish_reason == "stop"
    record = json.loads(file.read_text())
    assert [token["id"] for token in record["tokens"]] == token_ids(output)
    assert all(len(token["top"]) == 2 for token in record["tokens"])
    stopped = dataclasses.replace(config, json_schema=None, regex="ab+c+", stop=("bc",))
    out = io.StringIO()
    (output,), _ = generate.run(stopped, out)
    assert output.finish_reason == "stop"
    assert out.getvalue().removesuffix("\n") in ("a" + "b" * n for n in range(24))


class Writes(io.StringIO):
    """A stream that counts how often it was written to."""

    count = 0

    def write(self, text):
        self.count += 1
        return super().write(text)


def test_run_end_to_end(checkpoint):
    out = Writes()
    config = generate.GenerateConfig(
        checkpoint=str(checkpoint), prompt="Hé, <end_of_sentence>", system="Kind.", max_tokens=12
    )
    outputs, stats = generate.run(config, out)
    tok = tokenizer_lib.Tokenizer.load(checkpoint)
    messages = [
        {"role": "system", "content": "Kind."},
        {"role": "user", "content": "Hé, <end_of_sentence>"},
    ]
    wanted = prompt.encode_prompt(tok, messages)
    assert stats.prefill_tokens == len(wanted)
    assert generate.prepare_run(config).prompts == [wanted]
    assert out.getvalue() == outputs[0].text + "\n"
    assert out.count > 3
    assert outputs[0].text == tok.decode(token_ids(outputs[0]))
    assert 1 <= len(outputs[0].tokens) <= 12
    again, _ = generate.run(dataclasses.replace(config, stream=False), io.StringIO())
    assert again == outputs


def test_int8_weights(checkpoint):
    config = generate.GenerateConfig(
        checkpoint=str(checkpoint), prompt="hi", max_tokens=4, temperature=0, weights="int8-all"
    )
    (output,), _ = generate.run(config, io.StringIO())
    prepared = generate.prepare_run(config)
    model, tok, (ids,) = prepared.model, prepared.tokenizer, prepared.prompts
    assert model.layers[0].attention.qkv.kernel.dtype == jnp.int8
    # One pass instead of a prefill and steps.
    made = token_ids(output)
    logits = model(jnp.asarray([ids + made], jnp.int32))[0, len(ids) - 1 : -1]
    assert np.argmax(logits, axis=-1).tolist() == made
    assert output.text == tok.decode(made)


def test_prompts_file_raw_and_lines(checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one<end_of_sentence>\n\n two \r\n")
    config = generate.GenerateConfig(
        checkpoint=str(checkpoint),
        prompts_file=str(file),
        raw=True,
        ignore_eos=True,
        max_tokens=20,
        dtype="bfloat16",
    )
    out = io.StringIO()
    outputs, _ = generate.run(config, out)
    assert [len(output.tokens) for output in outputs] == [20, 20]
    assert {output.finish_reason for output in outputs} == {"length"}
    lines = out.getvalue().split("\n")[:-1]
    for number, output in enumerate(outputs):
        mark = f"[{number}] "
        own = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        assert "\n".join(own) == output.text.removesuffix("\n")
    tok = tokenizer_lib.Tokenizer.load(checkpoint)
    prompts = generate.prepare_run(config).prompts
    assert prompts[0] == tok.encode("one<end_of_sentence>", allow_special=True)
    assert prompts[1] == tok.encode(" two ")


def requests(tmp_path, *lines, **options):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    config = generate.GenerateConfig(checkpoint="x", prompts_file=str(file), **options)
    return [request for _, request in generate.read_conversations(config)]


def test_jsonl(tmp_path):
    tools = [{"name": "f"}]
    user = {"role": "user", "content": "a"}
    whole = {"messages": [user], "tools": tools}
    got = requests(tmp_path, {"prompt": "a"}, {"prompt": "a", "system": "own"}, system="all")
    assert [request["messages"][0]["content"] for request in got] == ["all", "own"]
    assert requests(tmp_path, whole, {"prompt": "a", "system": None}) == [
        whole,
        {"messages": [user]},
    ]


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ({"prompt": ""}, {}, "jsonl:1: prompt: got ''; wanted a text that is not empty"),
        ({"system": "a"}, {}, "prompt: got None"),
        ({"prompt": 3}, {}, "prompt: got 3"),
        ({"prompt": "a", "sytem": "b"}, {}, r"got \['prompt', 'sytem'\]; wanted"),
        (["a"], {}, r"got \['a'\]; wanted"),
        ({"messages": []}, {"system": "a"}, "got messages with --raw or --system"),
        ({"prompt": "a", "system": "b"}, {"raw": True}, "system: got one with --raw"),
    ],
)
def test_refused_jsonl(tmp_path, line, options, message):
    with pytest.raises(ValueError, match=message):
        requests(tmp_path, line, **options)


def test_refused_files(tmp_path):
    file = tmp_path / "prompts.jsonl"
    config = generate.GenerateConfig(checkpoint="x", prompts_file=str(file))
    with pytest.raises(FileNotFoundError, match=r"prompts\.jsonl"):
        generate.read_conversations(config)
    for content, message in [
        (b"{", "prompts.jsonl:1: got no valid JSON"),
        (b"\xff", "got bytes that are not UTF-8"),
        (b"\n \n", "got no prompts; wanted one per line"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            generate.read_conversations(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "--checkpoint: got ''; wanted a directory"),
        ({"prompt": None}, "got both or neither"),
        ({"prompts_file": "f"}, "got both or neither"),
        ({"max_tokens": 0}, "--max_tokens: got 0; wanted 1 or more"),
        ({"max_length": -1}, "--max_length: got -1"),
        ({"batch_size": 0}, "--batch_size: got 0"),
        ({"dtype": "float16"}, "--dtype: got 'float16'; wanted float32 or bfloat16"),
        ({"weights": "int8"}, "weights: got 'int8'; wanted None, int8-experts or int8-all; did"),
        ({"seed": -1}, "--seed: got -1"),
        ({"profile": "x"}, "--profile: got 'x'; wanted release or vllm"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"raw": True, "system": "a"}, "--system: got one with --raw"),
        ({"preset": "thinking"}, "preset: got 'thinking'; did you mean thinking-"),
        ({"regex": "a", "grammar": "b"}, "got regex and grammar; wanted at most one"),
        ({"stop": ("",)}, "stop: got ''; wanted strings of 1"),
        ({"min_tokens": 600}, r"min_tokens: got 600; wanted 0 to 512 \(max_tokens\)"),
        ({"top_logprobs": 3}, "--top_logprobs: got it without --logprobs"),
    ],
)
def test_refused_config(changes, message):
    with pytest.raises(ValueError, match=message):
        generate.GenerateConfig(**{"checkpoint": "x", "prompt": "a", **changes})


def test_errors_before_any_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(m1_jax, "load", None)  # nothing may get so far
    config = generate.GenerateConfig(checkpoint=str(checkpoint), prompt="hello", max_length=40)
    with pytest.raises(ValueError, match=r"\+ max_tokens 512 = 5..; wanted at most 40\. .*raise"):
        generate.prepare_run(config)
    with pytest.raises(ValueError, match="--prompt: prompt: got ''; wanted a text"):
        generate.prepare_run(dataclasses.replace(config, prompt=""))
    with pytest.raises(ValueError, match="regex: "):
        generate.prepare_run(dataclasses.replace(config, max_length=0, regex="("))
    with pytest.raises(ValueError, match="--checkpoint: .*none does not exist"):
        generate.prepare_run(dataclasses.replace(config, checkpoint=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="is empty"):
        generate.prepare_run(dataclasses.replace(config, checkpoint=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file; wanted"):
        generate.prepare_run(dataclasses.replace(config, checkpoint=str(tmp_path)))


def test_seeds_of_a_run_differ():
    seeds = {jsonl.derive_seed(seed, number) for seed in range(200) for number in range(1_000)}
    assert len(seeds) == 200 * 1_000
    assert jsonl.derive_seed(7, 0) == 7


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "infer.generate", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
    )


def test_command(checkpoint):
    done = command(f"--checkpoint={checkpoint}", "--prompt=hi", "--max_tokens=3", "--temperature=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "prefill: " in done.stderr
    assert "decode: " in done.stderr
    failed = command(f"--checkpoint={checkpoint}", "--prompt=hi", "--max_length=5")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: --prompt: got ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.long(tenths=range(0, 10, 2))
def test_a_reader_that_goes_away_ends_the_command_quietly(checkpoint):
    """As in `| head -1`: the status of a process that SIGPIPE ended, and no word on stderr."""
    values = ("--prompt=hi", "--max_tokens=2000", "--ignore_eos")
    arguments = [sys.executable, "-m", "infer.generate", f"--checkpoint={checkpoint}", *values]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[1],
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
