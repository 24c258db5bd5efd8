"""The rehearsal of whole runs: true slices, rows, lengths and hosts, and fewer steps."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import records_support
import tokenizer_support

from m1_jax.plan import topology
from train import rehearse
from train.data import config as data_config
from train.data import mixture, packing, prefetch, shuffle
from train.data import stream as stream_lib
from train.rehearsal import exchange, hosts, lanes, ledger, page
from train.rehearsal import setting as setting_lib

# Fixtures.
tokenizer = tokenizer_support.tokenizer

POD = "v5p:8x8x8"
# Rows of docs/plan.md's table for training: slice, and the one stage's mesh, length, rows, parts.
PLANNED = [
    ("8 x v5e:16x16", {"fsdp": 16, "expert": 32, "tensor": 4}, 4096, 2048, 4),
    ("v5p:4x4x8", {"fsdp": 2, "expert": 32, "tensor": 2}, 4096, 128, 1),
    ("2 x v6e:16x16", {"fsdp": 8, "expert": 32, "tensor": 2}, 4096, 512, 1),
    ("tpu7x:4x4x4", {"fsdp": 2, "expert": 32, "tensor": 2}, 4096, 128, 1),
    ("8 x v5e:16x16", {"fsdp": 8, "expert": 8, "tensor": 4, "context": 8}, 32_768, 256, 4),
    ("v5p:4x4x8", {"expert": 16, "tensor": 2, "context": 4}, 32_768, 16, 1),
    ("2 x v6e:16x16", {"fsdp": 2, "expert": 8, "tensor": 4, "context": 8}, 32_768, 64, 4),
    ("tpu7x:4x4x4", {"expert": 16, "tensor": 2, "context": 4}, 32_768, 16, 1),
    ("v5p:4x4x8", {"tensor": 2, "context": 64}, 2**20, 1, 1),
    ("tpu7x:4x4x8", {"tensor": 4, "context": 64}, 2**20, 1, 1),
    ("8 x v5e:16x16", {"fsdp": 8, "expert": 32, "tensor": 4, "context": 2}, 8192, 1024, 4),
    ("v5p:4x4x8", {"expert": 16, "tensor": 4, "context": 2}, 8192, 64, 4),
    ("2 x v6e:16x16", {"fsdp": 2, "expert": 32, "tensor": 4, "context": 2}, 8192, 256, 4),
    ("tpu7x:4x4x4", {"expert": 16, "tensor": 4, "context": 2}, 8192, 64, 4),
]


def rehearse_config(name, place=POD, overrides=(), **fields):
    if place:
        pytest.importorskip("libtpu")
    fields = {"steps": 8, "workers": 1, **fields}
    return rehearse.run(
        setting_lib.RehearsalConfig(f"configs/{name}.py", place, tuple(overrides), **fields)
    )


def failures(result):
    return [f"{finding.topic}: {finding.text}" for finding in result.findings.of_kind("fails")]


def texts(result):
    return "\n".join(finding.text for finding in result.findings.findings)


# ---- shipped configs


@pytest.mark.slow
def test_pretraining_passes_on_its_slice():
    result = rehearse_config("pretrain_m1_4k")
    assert not failures(result), failures(result)
    placed = [f for f in result.findings.of_kind("fits") if f.topic == "placement"]
    assert [len(f.values["rows_by_process"]) for f in placed] == [128, 128]
    # Float32 parameters and two moments, and 4 bytes each of two counters of steps.
    saved = next(f for f in result.findings.of_kind("costs") if f.topic == "checkpoint")
    assert saved.values["total_bytes"] == 12 * 456_089_655_296 + 8
    assert saved.values["num_writers"] == 128


@pytest.mark.slow
def test_rl_passes_on_its_slice():
    result = rehearse_config("cispo_m1")
    assert not failures(result), failures(result)
    assert "4 of 8,000 tasks made" in texts(result)
    batch = next(f for f in result.findings.of_kind("costs") if f.topic == "batch")
    # Every place of a row has 4 bytes in ten columns, and an id for 80 layers and 2 experts.
    # A host of 128 makes its own part.
    row_bytes = 16 * 86_016 * (10 * 4 + 160)
    assert batch.values["row_bytes"] == pytest.approx(row_bytes / 128)
    # 13 bytes of columns a token, and its ids. The prompts take a 20th more.
    assert batch.values["sample_bytes"] == pytest.approx(512 * 86_016 * 173, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pretrain_m1_1m", "sft_m1"])
def test_other_shipped_configs_pass_on_their_slice(name):
    assert not failures(rehearse_config(name))


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["tiny_pretrain", "tiny_sft", "tiny_agent_sft", "tiny_cispo_sft", "small_pretrain"]
)
def test_small_configs_pass_on_one_device(name):
    assert not failures(rehearse_config(name, ""))


@pytest.mark.long
@pytest.mark.parametrize(("place", "mesh", "length", "rows", "parts"), PLANNED)
def test_planned_slices_pass(place, mesh, length, rows, parts):
    stage = f"stages.0={{'seq_len': {length}, 'rows': {rows}, 'tokens': {4000 * rows * length}, "
    stage += f"'learning_rate': 1e-5, 'mesh': {tuple(mesh.items())}, 'accumulate': {parts}}}"
    result = rehearse_config("sft_m1", place, [stage, f"data.lanes={max(rows, 64)}"])
    assert not failures(result), failures(result)


@pytest.mark.parametrize("name", ["tiny_cispo", "tiny_agent"])
def test_tiny_rl_passes_on_one_device(name):
    assert not failures(rehearse_config(name, "", model="tiny"))


def test_adapters_on_a_slice_are_named_as_unsized():
    overrides = ["lora={'rank': 8}"]
    result = rehearse_config("tiny_cispo", "v5p:2x2x1", overrides, model="tiny")
    assert not failures(result), failures(result)
    assert "nor its programs were sized" in texts(result)


def test_a_record_of_the_plan_is_read_and_another_jobs_is_not(tmp_path):
    overrides = ["data.lanes=8"]
    plan = {"topology": "v5p:2x2x1", "slices": 1, "job": "train", "config": "tiny", "seq": 128}
    plan |= {"batch": 8, "accumulate": 1, "remat": "none", "mesh": {"fsdp": 4}}
    sizes = {"fits": False, "hbm_bytes_per_chip": 2**38, "hbm_limit_bytes": 2**37}
    record = plan | sizes | {"serving_mesh": "", "lightning": None, "versions": {"jax": "0.10.2"}}
    (tmp_path / "any.json").write_text(json.dumps(record))
    (tmp_path / "broken.json").write_text("{")
    result = rehearse_config("tiny_pretrain", "v5p:2x2x1", overrides, plans=str(tmp_path))
    (failure,) = failures(result)
    assert "step of stage 0: does not fit: needs 256.00 GiB" in failure
    # The other stage has another length, and says which line plans it.
    assert "--job=train --config=tiny --mesh=fsdp=4 --seq=256 --batch=4" in texts(result)


# ---- refusals are those of the run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.mesh=(('fsdp', 16), ('expert', 16))", "is 256 devices; got 512"),
        ("stages.0.rows=500", "batch: got 500 rows over fsdp=16 * expert=32"),
        ("data.lanes=100", "lanes: got 100 with 2048 rows"),
        ("stages.1.accumulate=8", "batch: got 256 rows over fsdp=16 * expert=32"),
        ("stages.0.seq_len=4100", "seq_len: got 4100 over context=8"),
    ],
)
def test_a_refusal_of_the_run_fails_the_rehearsal(override, words):
    overrides = [override]
    if "seq_len" in override:
        overrides += ["stages.0.rows=64"]
        overrides += ["stages.0.mesh=(('fsdp', 2), ('expert', 32), ('context', 8))"]
    result = rehearse_config("pretrain_m1_4k", overrides=overrides)
    assert any(words in line for line in failures(result)), failures(result)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("update.rows=24", "batch: got 24 rows over expert=16"),
        ("update.rows=12", "batch: got 12 rows over expert=16"),
        ("serving_mesh=(('expert', 16), ('tensor', 8))", "the trainer's 512 devices"),
        ("rollout.engine=(('max_rowz', 4),)", "rollout.engine: got 'max_rowz'"),
        (
            "rollout.engine=(('max_rows', 2048), ('num_pages', 40_000_000))",
            "of a chip hold weights",
        ),
    ],
)
def test_a_refusal_of_an_rl_run_fails_the_rehearsal(override, words):
    sources = "sources=({'name': 'code', 'make': 'lookup', 'size': 4},)"
    rewards = "rewards.sources=(('*', (('exact', 1.0, ()),)),)"
    overrides = ["curriculum=None", rewards, sources, override]
    result = rehearse_config("cispo_m1", overrides=overrides)
    assert any(words in line for line in failures(result)), failures(result)


def test_a_schedule_beyond_int32_fails(monkeypatch):
    """As every production config did: a Python number of tokens met a traced step."""
    from train import optim

    def make_schedule(shape, start, end, warmup_tokens, tokens, tokens_per_step, first_step=0):
        return lambda step: step * tokens_per_step / tokens

    monkeypatch.setattr(optim, "make_stage_schedule", make_schedule)
    result = rehearse_config("pretrain_m1_4k")
    assert any("schedules: stage 0" in line for line in failures(result)), failures(result)


def test_slices_are_named_as_in_the_plan():
    assert setting_lib.parse_slices("") is None
    several = setting_lib.parse_slices("8 x v5e:16x16")
    assert several is not None
    assert (several.name, several.num_slices) == ("v5e:16x16", 8)
    for name in ("v5p", "8 v5e:16x16", "v5p:8x8", "two x v5e:16x16"):
        with pytest.raises(topology.TopologyError, match="wanted"):
            setting_lib.parse_slices(name)


# ---- faults of the data are found


def break_order(monkeypatch):
    monkeypatch.setattr(shuffle, "shuffle_position", lambda position, *_: position // 2)
    return "read twice in an epoch"


def break_restart(monkeypatch):
    restore = mixture.LaneState.from_json.__func__

    def forget_pending(cls, value):
        return dataclasses.replace(restore(cls, value), pending=())

    monkeypatch.setattr(mixture.LaneState, "from_json", classmethod(forget_pending))
    return "a restarted lane made"


def break_cut(monkeypatch):
    def split(sample_id, source_index, document, seq_len):
        length = len(document.tokens)
        starts = range(0, length, seq_len)
        return [
            packing.PendingPiece(sample_id, source_index, document, i, min(i + seq_len + 1, length))
            for i in starts
        ]

    monkeypatch.setattr(packing, "split_document", split)
    return "handed out twice"


@pytest.mark.parametrize("break_data", [break_order, break_restart, break_cut])
def test_lost_and_repeated_documents_are_found(monkeypatch, break_data):
    words = break_data(monkeypatch)
    result = rehearse_config("tiny_pretrain", "", ["data.lanes=8"], steps=40)
    assert any(words in line for line in failures(result)), failures(result)


def test_a_host_that_differs_from_the_lanes_is_found(monkeypatch):
    write = packing.write_row
    calls = []

    def write_other_tokens(segments, seq_len):
        row = write(segments, seq_len)
        calls.append(row)
        row.arrays.tokens[0] += len(calls)
        return row

    monkeypatch.setattr(packing, "write_row", write_other_tokens)
    result = rehearse_config("tiny_pretrain", "", ["data.lanes=8"])
    assert any("other tokens than the lane's" in line for line in failures(result))


def test_ledger_tells_gaps_from_overlaps():
    document = packing.TokenizedDocument(np.zeros(10, np.int32), np.ones(10, bool))

    def errors_of(*spans):
        book = ledger.DocumentLedger(["web"])
        for start, end in spans:
            book.add_row([packing.RowSegment("web:0:0", 0, document, start, end - start)])
        book.close(mixture.LaneState({"web": 1}))
        return book.errors

    assert not errors_of((0, 10))
    assert not errors_of((4, 10), (0, 4))
    assert "twice" in errors_of((0, 4), (3, 9))[0]
    assert "never" in errors_of((0, 4), (5, 11))[0]
    assert "not pending" in errors_of((0, 4))[0]


# ---- parts


@pytest.mark.parametrize("lane_numbers", [(0, 8, 16, 24), (0, 4), (3,), tuple(range(64))])
@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_lanes_of_a_torus_spread_over_all_workers(lane_numbers, num_workers):
    """Their numbers are often equal modulo the workers, and one worker then ran all of them."""
    states = dict.fromkeys(lane_numbers, mixture.LaneState())
    config = data_config.StreamConfig(
        data_config.DataConfig((data_config.DataSource("a", "a"),)), seq_len=8, rows=64
    )
    spec = prefetch.PrefetchSpec(config, None, {}, 64, lane_numbers, None, 0, states)  # pyright: ignore
    workers = list(prefetch.assign_workers(spec, num_workers).values())
    counts = [workers.count(i) for i in range(num_workers)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("num_lanes", "num_rows"), [(4, 8), (8, 8), (16, 4)])
def test_sizes_of_states_are_those_of_streams(tmp_path, tokenizer, num_lanes, num_rows):
    texts = [{"text": "attention " * i} for i in range(1, 99)]
    records_support.write_jsonl(tmp_path / "a.jsonl", texts)
    source = data_config.DataSource("a", f"{tmp_path}/a.jsonl")
    data = data_config.DataConfig((source,), lanes=num_lanes, lookahead=8)
    config = data_config.StreamConfig(data, seq_len=32, rows=num_rows)
    rows_by_process = {0: (0, 2), 1: (1, 3), 2: tuple(range(2, num_rows))}
    stage = hosts.StageHosts(config, None, rows_by_process, 0, 100)
    parts, made = [], {}
    for process, rows in rows_by_process.items():
        with stream_lib.BatchStream(config, tokenizer, rows) as stream:
            next(stream)
            parts.append(stream.get_state())
            fingerprint = stream.fingerprint()
            assert stage.lanes_of(process) == tuple(sorted(stream._owned_lanes))
            made[process] = stage.count_made_rows(process)
            made_lanes = {stream._prefetch_spec.row_numbers}
        if num_lanes <= num_rows:
            assert {made[process]} == set(map(len, made_lanes))
    merged = {key: value for part in parts for key, value in part.items()}
    states = {lane: json.dumps(merged[str(lane)]) for lane in range(num_lanes)}
    run = lanes.LaneRun(np.zeros((0, 3)), np.zeros((1, 1)), states={0: states})
    gathered = exchange.count_data_state(stage, run, 0, fingerprint)
    sizes = [len(json.dumps(part)) for part in parts]
    # The keys of the head have one digit each here.
    assert abs(gathered.sent - max(sizes[1:])) <= 4
    assert abs(gathered.received - sum(sizes[1:])) <= 4 * len(sizes)
    assert abs(gathered.merged - len(json.dumps(merged))) <= 4


@pytest.mark.slow
def test_the_command_prints_a_page_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "train.rehearse", "--config=configs/tiny_pretrain.py"]
    command += ["--steps=8", "--workers=1", f"--json={tmp_path}/page.json", "--set=data.lanes=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "What costs most" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("passes (")
    value = json.loads((tmp_path / "page.json").read_text())
    assert value["passes"]
    assert {finding["kind"] for finding in value["findings"]} == {"fits", "costs", "assumes"}
    refused = subprocess.run(
        [*command, "--set=data.lanes=100"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "lanes: got 100 with 8 rows" in refused.stdout.replace("\n      ", " ")


def test_costs_are_ranked_by_how_long_chips_wait():
    result = rehearse_config("tiny_cispo", "", model="tiny")
    costs = result.findings.of_kind("costs")
    assert [c.secs for c in costs] == sorted((c.secs for c in costs), reverse=True)
    assert page.format_page(result).splitlines()[-1].startswith("passes (")
