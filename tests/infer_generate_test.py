"""Tests of infer.batch and infer.generate: a fake model with the real one's API, then the real."""

import dataclasses
import io
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m1_jax
from infer import batch, generate, prompt
from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib

V, PRIME = 23, 9973


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = V
    max_position_embeddings: int = 100_000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeState:
    hash: jax.Array
    length: jax.Array
    room: jax.Array  # [S], for its size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeModel:
    """Logits hash all real tokens of a row in order: a padded or lost one changes everything."""

    table: jax.Array = dataclasses.field(default_factory=lambda: jnp.arange(1.0, V + 1))
    config: FakeConfig = dataclasses.field(default=FakeConfig(), metadata={"static": True})

    def init_state(self, batch, max_length):
        zeros = jnp.zeros(batch, jnp.int32)
        return FakeState(zeros, zeros + 0, jnp.zeros(max_length))

    def extend(self, tokens, state, num_tokens=None, last_only=False):
        width = tokens.shape[1]
        real = jnp.full(state.length.shape, width) if num_tokens is None else num_tokens
        assert width <= state.room.shape[0]

        def step(carry, xs):
            token, place = xs
            after = (carry * 31 + token + 1) % PRIME
            after = jnp.where(place < real, after, carry)
            return after, after

        last, every = jax.lax.scan(step, state.hash, (tokens.T, jnp.arange(width)))
        hashes = last[:, None] if last_only else every.T
        logits = jnp.sin(hashes[..., None] * self.table[None, None]) * 3
        return logits, FakeState(last, state.length + real, state.room)


def fake_greedy(prompt_ids, count, stop_ids=()):
    ids, value = [], 0
    for token in prompt_ids:
        value = (value * 31 + token + 1) % PRIME
    while len(ids) < count and not (ids and ids[-1] in stop_ids):
        ids.append(
            int(np.argmax(np.sin(np.float32(value) * np.arange(1, V + 1, dtype=np.float32))))
        )
        value = (value * 31 + ids[-1] + 1) % PRIME
    return ids


def prompts_of(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    source = pathlib.Path(__file__).parent / "data" / "m1-tiny"
    for file in source.iterdir():
        if file.suffix != ".npz":
            shutil.copy(file, directory)
    return testing.write_tiny_tokenizer(directory, vocab_size=512)


def test_widths_are_few():
    assert batch._widths(1) == batch._widths(64) == [64]
    assert batch._widths(65) == batch._widths(128) == [128]
    assert batch._widths(2048) == [2048]
    assert batch._widths(5000) == [2048, 2048, 1024]


def test_greedy_of_different_lengths_and_batch_sizes():
    prompts = prompts_of(1, 70, 3, 2100, 64)
    wanted = [fake_greedy(ids, 9) for ids in prompts]
    for batch_size in (2, 5):
        tokens, stats = batch.generate(
            FakeModel(), prompts, max_tokens=9, batch_size=batch_size, temperature=0
        )
        assert tokens == wanted
        assert (stats.prefill_tokens, stats.decode_tokens) == (2238, 5 * 8)
    assert "tokens/s" in str(stats)


def test_sampling_depends_on_seed_and_number_alone(monkeypatch):
    prompts = prompts_of(5, 9, 5)
    prompts[2] = prompts[0]
    options = {"max_tokens": 30, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.1}
    together, _ = batch.generate(FakeModel(), prompts, **options)
    assert together[0] != together[2]
    monkeypatch.setattr(batch, "_DISPATCH_SECS", 0.0)  # one step per dispatch
    alone, _ = batch.generate(FakeModel(), prompts, batch_size=1, **options)
    assert alone == together
    other, _ = batch.generate(FakeModel(), prompts, seed=1, **options)
    assert other != together


def test_rows_stop_on_their_own():
    prompts = prompts_of(4, 6, 2)
    endless = [fake_greedy(ids, 20) for ids in prompts]
    stop = endless[1][3]
    wanted = [fake_greedy(ids, 20, (stop,)) for ids in prompts]
    assert {len(ids) for ids in wanted} != {20}
    calls = []
    tokens, _ = batch.generate(
        FakeModel(),
        prompts,
        max_tokens=20,
        stop_ids=(stop,),
        temperature=0,
        on_token=lambda *call: calls.append(call),
    )
    assert tokens == wanted
    for number, ids in enumerate(wanted):
        got = [call[1:] for call in calls if call[0] == number]
        assert got == [(token, i == len(ids) - 1) for i, token in enumerate(ids)]


def test_one_token_and_a_stop_at_once():
    prompts = prompts_of(4, 6)
    first = [fake_greedy(ids, 1) for ids in prompts]
    tokens, stats = batch.generate(FakeModel(), prompts, max_tokens=1, temperature=0)
    assert (tokens, stats.decode_tokens) == (first, 0)
    stops = [ids[0] for ids in first]
    tokens, _ = batch.generate(FakeModel(), prompts, max_tokens=5, stop_ids=stops, temperature=0)
    assert tokens == first


def test_repetition_penalty_counts_the_prompt():
    tokens, _ = batch.generate(
        FakeModel(), [[3, 4]], max_tokens=V - 2, temperature=0, repetition_penalty=1e6
    )
    # With so large a penalty a seen token has 0 or a huge negative logit: the positive ones of
    # the unseen go first, then, with zeros left, whatever is largest. None of 3 and 4 comes early.
    assert not {3, 4} & set(tokens[0][:5])
    assert len(set(tokens[0][:5])) == 5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "got 0 prompts"),
        ([[1], []], "prompt 1: got no tokens"),
        ([[V]], "prompt 0: got token id 23; wanted 0 to 22. Does the tokenizer"),
        ([[-1]], "got token id -1"),
        ([[1] * 99_999], "99999 tokens \\+ max_tokens 2 = 100001; wanted at most 100000. Shorten"),
    ],
)
def test_refused_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        batch.generate(FakeModel(), prompts, max_tokens=2)


def test_golden_greedy_tokens(golden_dir):
    golden = np.load(golden_dir / "golden.npz")
    model = m1_jax.load(golden_dir)
    prompts = golden["input_ids"][:, :100].tolist()
    tokens, _ = batch.generate(model, prompts, max_tokens=48, temperature=0)
    np.testing.assert_array_equal(tokens, golden["greedy_tokens"])
    # Alone, and beside a prompt of another length, a row says the same.
    shorter = [prompts[1][:30], prompts[0]]
    tokens, _ = batch.generate(model, shorter, max_tokens=48, temperature=0)
    np.testing.assert_array_equal(tokens[1], golden["greedy_tokens"][0])


class Writes(io.StringIO):
    """A stream that counts how often it was written to."""

    count = 0

    def write(self, text):
        self.count += 1
        return super().write(text)


def test_run_end_to_end(checkpoint):
    out = Writes()
    config = generate.Config(
        checkpoint=str(checkpoint), prompt="Hé, <end_of_sentence>", system="Kind.", max_tokens=12
    )
    outputs, stats = generate.run(config, out)
    tok = tokenizer_lib.Tokenizer.load(checkpoint)
    messages = [
        {"role": "system", "content": "Kind."},
        {"role": "user", "content": "Hé, <end_of_sentence>"},
    ]
    wanted = prompt.encode(tok, messages)
    assert stats.prefill_tokens == len(wanted)
    _, _, prompts = generate.prepare(config)
    assert prompts == [wanted]
    assert out.getvalue() == outputs[0].text + "\n"
    assert out.count > 3
    assert outputs[0].text == tok.decode(outputs[0].tokens)
    assert 1 <= len(outputs[0].tokens) <= 12
    again, _ = generate.run(dataclasses.replace(config, stream=False), io.StringIO())
    assert again == outputs


def test_int8_weights(checkpoint):
    config = generate.Config(
        checkpoint=str(checkpoint), prompt="hi", max_tokens=4, temperature=0, weights="int8-all"
    )
    (output,), _ = generate.run(config, io.StringIO())
    model, tok, (ids,) = generate.prepare(config)
    assert model.layers[0].attention.qkv.kernel.dtype == jnp.int8
    # One pass instead of a prefill and steps.
    logits = model(jnp.asarray([ids + output.tokens], jnp.int32))[0, len(ids) - 1 : -1]
    assert np.argmax(logits, axis=-1).tolist() == output.tokens
    assert output.text == tok.decode(output.tokens)


def test_prompts_file_raw_and_lines(checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one<end_of_sentence>\n\n two \r\n")
    config = generate.Config(
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
    assert {output.finish for output in outputs} == {"length"}
    lines = out.getvalue().split("\n")[:-1]
    for number, output in enumerate(outputs):
        mark = f"[{number}] "
        own = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        assert "\n".join(own) == output.text.removesuffix("\n")
    tok = tokenizer_lib.Tokenizer.load(checkpoint)
    _, _, prompts = generate.prepare(config)
    assert prompts[0] == tok.encode("one<end_of_sentence>", allow_special=True)
    assert prompts[1] == tok.encode(" two ")


def requests(tmp_path, *lines, **options):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return generate.read_requests(
        generate.Config(checkpoint="x", prompts_file=str(file), **options)
    )


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
    config = generate.Config(checkpoint="x", prompts_file=str(file))
    with pytest.raises(FileNotFoundError, match=r"prompts\.jsonl"):
        generate.read_requests(config)
    for content, message in [
        (b"{", "prompts.jsonl:1: not JSON"),
        (b"\xff", "got bytes that are not UTF-8"),
        (b"\n \n", "got no prompts; wanted one per line"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            generate.read_requests(config)


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
    ],
)
def test_refused_config(changes, message):
    with pytest.raises(ValueError, match=message):
        generate.Config(**{"checkpoint": "x", "prompt": "a", **changes})


def test_errors_before_any_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(m1_jax, "load", None)  # nothing may get so far
    config = generate.Config(checkpoint=str(checkpoint), prompt="hello", max_length=40)
    with pytest.raises(ValueError, match=r"\+ max_tokens 512 = 5..; wanted at most 40\. .*raise"):
        generate.prepare(config)
    with pytest.raises(ValueError, match="prompt 0: got no tokens|prompt: got ''"):
        generate.prepare(dataclasses.replace(config, prompt=""))
    with pytest.raises(ValueError, match="is no directory"):
        generate.prepare(dataclasses.replace(config, checkpoint=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file; wanted"):
        generate.prepare(dataclasses.replace(config, checkpoint=str(tmp_path)))


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
    assert failed.stderr.startswith("error: prompt 0: got ")
    assert failed.stderr.count("\n") == 1
