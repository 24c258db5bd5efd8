"""Commands on a mesh: in several processes as in one, and what they refuse before any weight."""

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
from command_process_support import finish, run, start

from m1_jax import testing

REPO = pathlib.Path(__file__).resolve().parents[1]
MESH = "--mesh=expert=2,tensor=2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    for file in (REPO / "tests" / "data" / "m1-tiny").iterdir():
        if file.suffix != ".npz":
            shutil.copy(file, directory)
    return testing.write_tiny_tokenizer(directory, vocab_size=512)


# ---- several processes


@pytest.fixture(scope="module")
def requests_file(tmp_path_factory):
    """Two requests, for which both commands make engines of the same sizes."""
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    lines = [{"prompt": "Tell me more"}, {"prompt": "Tell me less"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch_flags(checkpoint, requests_file, output, max_tokens=12):
    return [
        f"--checkpoint={checkpoint}",
        f"--input={requests_file}",
        f"--output={output}",
        f'--defaults={{"max_tokens": {max_tokens}, "ignore_eos": true}}',
        "--num_snapshots=1",
        "--tokens",
        "--noprogress",
        MESH,
    ]


@pytest.mark.long
def test_two_processes_generate_as_one(checkpoint, requests_file, tmp_path):
    def generate(processes):
        logprobs = tmp_path / f"logprobs-{processes}"
        return logprobs, run(
            processes,
            "infer.generate",
            f"--checkpoint={checkpoint}",
            f"--prompts_file={requests_file}",
            "--max_tokens=12",
            "--ignore_eos",
            f"--logprobs={logprobs}",
            MESH,
        )

    alone, ((status, text, told),) = generate(1)
    assert status == 0, told
    assert text.count("[0] ") >= 1
    both, (first, second) = generate(2)
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1] == text
    assert second[1] == ""
    # Tokens with the bits of their log-probabilities.
    assert both.read_text() == alone.read_text()
    assert len(json.loads(alone.read_text().splitlines()[0])["tokens"]) == 12


@pytest.mark.long
def test_two_processes_answer_a_file_as_one(checkpoint, requests_file, tmp_path):
    lines = []
    for processes in (1, 2):
        output = tmp_path / f"out-{processes}.jsonl"
        ends = run(processes, "infer.offline", *batch_flags(checkpoint, requests_file, output))
        assert [status for status, _, _ in ends] == [0] * processes, ends
        assert "2 of 2 requests, 2 of them now" in ends[0][2]
        lines.append(sorted(output.read_bytes().splitlines()))
    assert lines[0] == lines[1]
    # Once more: nothing is left to do, and no process waits for another.
    ends = run(2, "infer.offline", *batch_flags(checkpoint, requests_file, output))
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "2 of 2 requests, 0 of them now" in ends[0][2]
    # Another mesh may have other bits.
    flags = batch_flags(checkpoint, requests_file, output)[:-1]
    ((status, _, told),) = run(1, "infer.offline", *flags)
    assert status == 1
    assert "begun with another mesh (mesh: got None; wanted 'expert=2,tensor=2')" in told


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_any_process_stops_all(checkpoint, requests_file, tmp_path, index):
    output = tmp_path / "out.jsonl"
    output_flags = batch_flags(checkpoint, requests_file, output, max_tokens=2_000)
    started = start(2, "infer.offline", *output_flags)
    run_file = output.with_name("out.jsonl.run.json")
    while not run_file.exists() and started[0].poll() is None:
        time.sleep(0.05)
    started[index].send_signal(signal.SIGTERM)  # while the engine is made, and heard after it
    ends = finish(started)
    assert [status for status, _, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    assert "stopped; the same command goes on" in ends[0][2]


@pytest.mark.long
def test_two_processes_verify_as_one(golden_dir, tmp_path):
    with np.load(golden_dir / "golden.npz") as golden:
        arrays = dict(golden)
    names = ("input_ids", "logits", "logits_positions", "aux_loss")
    kept = {name: arrays[name] for name in names}
    np.savez(tmp_path / "golden.npz", **kept)
    kept["aux_loss"] = np.asarray(7, np.float32)
    np.savez(tmp_path / "other.npz", **kept)
    flags = [f"--checkpoint={golden_dir}", "--noprogress", MESH]
    for name, wanted in (("golden", 0), ("other", 1)):
        golden_flag = f"--golden={tmp_path / name}.npz"
        ((status, table, told),) = run(1, "m1_jax.verify", *flags, golden_flag)
        assert status == wanted, told
        assert table.endswith(f"{2 - wanted} of 2 within tolerance")
        first, second = run(2, "m1_jax.verify", *flags, golden_flag)
        assert (first[0], second[0]) == (wanted, wanted), (first, second)
        assert first[1] == table
        assert second[1] == ""


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(checkpoint, tmp_path):
    bad = tmp_path / "in.jsonl"
    bad.write_text('{"prompt": ""}\n')
    flags = batch_flags(checkpoint, bad, tmp_path / "out.jsonl")
    first, second = run(2, "infer.offline", *flags)
    assert (first[0], second[0]) == (1, 1), (first, second)
    assert "error: got 1 bad lines of 1" in first[2]
    assert "error" not in second[2]
    # A mesh that all of them refuse: one line, of process 0.
    flags = [f"--checkpoint={checkpoint}", "--prompt=hi"]
    first, second = run(2, "infer.generate", *flags, "--mesh=expert=3")
    assert (first[0], second[0]) == (1, 1), (first, second)
    assert "error: mesh: expert=3 is 3 devices; got 4" in first[2]
    assert "error" not in second[2]
