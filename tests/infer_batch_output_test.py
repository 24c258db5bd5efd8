"""Tests of the output of infer.offline: its fingerprint, its lock, and what it refuses."""

import dataclasses
import json
import pathlib
import shutil

import pytest

import m1_jax
from infer import batch_fingerprint, batch_input, batch_output, offline
from m1_jax import convert, file_lock, testing
from m1_jax import tokenizer as tokenizer_lib

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    directory = tmp_path_factory.mktemp("release")
    for file in (REPO / "tests" / "data" / "m1-tiny").iterdir():
        if file.suffix != ".npz":
            shutil.copy(file, directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 510}')
    return testing.write_tiny_tokenizer(directory, vocab_size=512)


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "m1"
    convert.run(convert.ConvertConfig(to="orbax", src=str(release), dst=str(directory)))
    return directory


@pytest.fixture
def checkpoint(release, tmp_path):
    """A copy of the release, to be changed."""
    return shutil.copytree(release, tmp_path / "checkpoint")


def make_config(checkpoint, output, lines=({"prompt": "a"}, {"prompt": "b"}), **changes):
    path = output.with_name("in.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return batch_input.BatchConfig(str(checkpoint), str(path), str(output), **changes)


def make_fingerprint(config):
    """The fingerprint as a run on one device makes it."""
    checkpoint = pathlib.Path(config.checkpoint)
    requests = batch_input.read_requests(
        config,
        tokenizer_lib.Tokenizer.load(checkpoint),
        m1_jax.ModelConfig.from_file(checkpoint / "config.json"),
    )
    return batch_fingerprint.fingerprint_run(config, None, checkpoint, requests)


def begin(config):
    return batch_output.begin_output(pathlib.Path(config.output), make_fingerprint(config), 2)


def test_a_run_goes_on_beside_files_that_no_line_depends_on(checkpoint, tmp_path):
    """The output itself may lie in the checkpoint."""
    config = make_config(checkpoint, checkpoint / "out.jsonl")
    assert begin(config) == set()
    pathlib.Path(config.output).write_text('{"index": 1}\n')
    (checkpoint / "README.md").write_text("another")
    (checkpoint / ".cache" / "huggingface").mkdir(parents=True)
    (checkpoint / ".cache" / "huggingface" / "config.json.lock").touch()
    (checkpoint / "adapter.safetensors").write_text("not read")
    (checkpoint / "config.json").touch()
    with file_lock.hold_lock(pathlib.Path(config.output), "writes"):
        assert begin(config) == {1}
    # Blank lines, line ends and a mark of the input are not read, nor are its name and place.
    text = pathlib.Path(config.input).read_text()
    moved = tmp_path / "other.jsonl"
    moved.write_text("\ufeff\n" + text.replace("\n", "\r\n\n"))
    assert begin(dataclasses.replace(config, input=str(moved))) == {1}
    sizes = {"max_rows": 3, "num_pages": 50, "num_snapshots": 0, "progress": False}
    assert begin(dataclasses.replace(config, **sizes)) == {1}
    # Options that are the same in other words.
    assert begin(dataclasses.replace(config, defaults='{"top_k": 0.0, "stop": null}')) == {1}


def test_a_run_goes_on_where_the_checkpoint_lies_now(checkpoint, tmp_path):
    config = make_config(checkpoint, tmp_path / "out.jsonl")
    begin(config)
    moved = checkpoint.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    for place in (moved, tmp_path / "link"):
        assert begin(dataclasses.replace(config, checkpoint=str(place))) == set()


def swap_end_tokens(checkpoint):
    path = checkpoint / "tokenizer_config.json"
    text = path.read_text().replace("<end_of_sentence>", "@")
    text = text.replace("<end_of_document>", "<end_of_sentence>").replace("@", "<end_of_document>")
    path.write_text(text)


def change_generation_config(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 511}')


def delete_generation_config(checkpoint):
    (checkpoint / "generation_config.json").unlink()


def change_config(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_theta": 2 * config["rope_theta"]}))


def change_merges(checkpoint):
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"][:2] = tokenizer["model"]["merges"][1::-1]
    path.write_text(json.dumps(tokenizer))


def change_weight(checkpoint):
    path = checkpoint / "model-00001-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (swap_end_tokens, "tokenizer_config.json"),
        (change_generation_config, "generation_config.json"),
        (delete_generation_config, "generation_config.json"),
        (change_config, "config.json"),
        (change_merges, "tokenizer.json"),
        (change_weight, "model-00001-of-00003.safetensors"),
    ],
)
def test_a_changed_checkpoint_is_refused_and_named(checkpoint, tmp_path, change, name):
    config = make_config(checkpoint, tmp_path / "out.jsonl")
    begin(config)
    change(checkpoint)
    with pytest.raises(
        ValueError, match=rf"begun with another checkpoint \({name} changed\)\. Give"
    ):
        begin(config)


def test_a_changed_parameter_of_a_conversion_is_named(converted, tmp_path):
    checkpoint = shutil.copytree(converted, tmp_path / "checkpoint")
    before = batch_fingerprint.digest_checkpoint(checkpoint)
    (checkpoint / "params" / ".DS_Store").touch()
    (checkpoint / "progress.txt").touch()
    assert batch_fingerprint.digest_checkpoint(checkpoint) == before
    chunk = max((checkpoint / "params").rglob("c/**/*"), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    after = batch_fingerprint.digest_checkpoint(checkpoint)
    (changed,) = [name for name in before if before[name] != after[name]]
    assert (checkpoint / changed) in chunk.parents


def test_large_weights_are_sampled(tmp_path):
    """Evenly: a change of all weights is seen, and few bytes are read."""
    path = tmp_path / "w"
    size = 64 * 2**20
    with path.open("wb") as file:
        file.truncate(size)
    before = batch_fingerprint._sample_digest(tmp_path, [path])
    for offset in (0, size // 2, size - 2**20):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"x" * 2**20)
        after = batch_fingerprint._sample_digest(tmp_path, [path])
        assert after != before
        before = after
    (tmp_path / "longer").write_bytes(path.read_bytes() + b"x")
    assert batch_fingerprint._sample_digest(tmp_path, [tmp_path / "longer"]) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"another seed \(seed: got 1; wanted 0\)"),
        ({"defaults": '{"logit_bias": {"7": 2}}'}, r"another defaults \(logit_bias changed\)"),
        ({"system": "b", "profile": "vllm"}, "another system and profile "),
    ],
)
def test_other_options_are_refused(release, tmp_path, changes, message):
    config = make_config(release, tmp_path / "out.jsonl")
    begin(config)
    with pytest.raises(ValueError, match=message):
        begin(dataclasses.replace(config, **changes))


def test_the_same_options_of_all_kinds_go_on(release, tmp_path):
    defaults = '{"logit_bias": {"7": 2}, "stop": ["x"], "json_schema": {"type": "null"}}'
    config = make_config(release, tmp_path / "out.jsonl", defaults=defaults)
    assert begin(config) == begin(config) == set()


@pytest.mark.parametrize("text", ["[1]", "{", "", "[" * 1000, "\xff"])
def test_a_damaged_fingerprint_is_one_line(release, tmp_path, text):
    config = make_config(release, tmp_path / "out.jsonl")
    begin(config)
    (tmp_path / "out.jsonl.run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"out\.jsonl\.run\.json: got .*") as refused:
        begin(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"index": true}', ":2: got index True"),
        (b'{"index": 1.0}', ":2: got index 1.0"),
        (b'{"index": 0}', ":2: got index 0; wanted each of 0 to 1 once"),
        (b'{"text": "\xff"}', r":2: got no valid JSON \(byte 10 is no UTF-8\)"),
        (b"[" * 5000, ":2: got no valid JSON"),
        (b"3", ":2: got index None"),
    ],
)
def test_damaged_lines_of_an_output_are_named(tmp_path, line, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"index": 0}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"out\.jsonl{message}"):
        batch_output.read_done_indices(path, 2)
    path.write_bytes(b'{"index": 0}\n' + line)  # torn by a kill: made again
    assert batch_output.read_done_indices(path, 2) == {0}
    assert path.read_bytes() == b'{"index": 0}\n'


def test_two_runs_cannot_write_one_output(release, tmp_path, monkeypatch):
    monkeypatch.setattr(m1_jax, "load", None)  # nothing may get so far
    output = tmp_path / "out.jsonl"
    config = make_config(release, output)
    with (
        file_lock.hold_lock(output, "writes"),
        pytest.raises(file_lock.LockError, match=r"out\.jsonl: process \d+ on .* writes it; wait"),
    ):
        offline.run(config)
    assert not output.exists()
    # The lock goes with its run, and is free again after a run that fails.
    with pytest.raises(TypeError):
        offline.run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("in.jsonl", "out.jsonl", "out.jsonl.run.json")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "id": "row-\ud835"}, r":2: got a lone surrogate '\\ud835' in 'row-"),
        (
            {"prompt": "a", "id": 7.5, "max_tokens": 9},
            ":2: id: got 7.5; wanted text or a whole number",
        ),
        ({"prompt": "a", "stop": "\udfff"}, r":2: got a lone surrogate"),
        ({"prompt": "a", "max_tokens": 200}, r":2: got \d+ tokens .* at most 129\. .*--num_pages"),
        ({"prompt": "a", "temperature": 10**400}, ":2: got no valid JSON .* has 401 digits"),
        ({"custom_id": "r", "body": {"messages": []}}, r":2: messages: got \[\]"),
        ({"custom_id": "r", "body": {"input": "a"}}, ":2: field: got 'input'"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": 3}, ":2: tools: got 3; wanted"),
    ],
)
def test_a_line_that_could_not_be_served_is_refused_before_anything_runs(
    release, tmp_path, monkeypatch, line, message
):
    monkeypatch.setattr(m1_jax, "load", None)
    lines = [{"prompt": "a", "max_tokens": 9}, line]
    config = make_config(release, tmp_path / "out.jsonl", lines, num_pages=2)
    with pytest.raises(ValueError, match=rf"in\.jsonl{message}") as refused:
        offline.run(config)
    assert str(refused.value).startswith("got 1 bad lines of 2; nothing was run: /")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 300
    assert not (tmp_path / "out.jsonl").exists()


def test_null_and_whole_floats_of_data_frames(release, tmp_path):
    null = {"prompt": "Hi", "stop": None, "seed": None, "max_tokens": 50.0, "id": None}
    lines = [null | {"preset": None, "system": None, "messages": None}, {"prompt": "a", "id": 7.0}]
    config = make_config(release, tmp_path / "out.jsonl", lines, seed=5)
    first, second = offline.read_inputs(config).requests
    assert first.output_fields == {"index": 0}
    assert (first.options.max_tokens, first.options.seed, first.options.stop) == (50, 5, ())
    assert second.output_fields == {"index": 1, "id": 7}
    same = make_config(release, tmp_path / "out.jsonl", [{"prompt": "a", "id": 7}] + lines[1:])
    with pytest.raises(ValueError, match="id: got 7 again"):
        offline.read_inputs(same)
