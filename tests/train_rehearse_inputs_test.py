"""The rehearsal of what a run reads: bad records, tasks that lack something, padded columns."""

import dataclasses
import json

import pytest
import records_support
import tokenizer_support

from m1_jax import ModelConfig
from train import rehearse
from train.data import config as data_config
from train.data import records as records_lib
from train.rehearsal import setting as setting_lib
from train.rehearsal import speed

# Fixtures.
tokenizer = tokenizer_support.tokenizer


def rehearse_config(name, overrides, topology="", model="m1"):
    config = setting_lib.RehearsalConfig(
        f"configs/{name}.py", topology, tuple(overrides), model, steps=4, workers=1
    )
    return rehearse.run(config).findings


def list_texts(findings, kind, topic):
    return [finding.text for finding in findings.of_kind(kind) if finding.topic == topic]


# ---- records


def measure(tmp_path, tokenizer, num_bad, num_records=300, **fields):
    """Measure a source of so many records, whose first ones are bad."""
    texts = [{"text": "" if i < num_bad else f"number {i}"} for i in range(num_records)]
    records_support.write_jsonl(tmp_path / "a.jsonl", texts)
    source = data_config.DataSource("a", f"{tmp_path}/a.jsonl", "text")
    data = data_config.DataConfig((source,), **fields)
    files = {"a": records_lib.RecordFiles("a", source.path)}
    return speed.measure_encoding(data, 64, files, tokenizer)


def test_bad_records_are_left_out_as_the_run_does(tmp_path, tokenizer):
    encoding = measure(tmp_path, tokenizer, 3, bad_records="skip")
    assert len(encoding.lengths["a"]) == 297
    assert [error.partition(": ")[0] for error in encoding.bad_records["a"]] == [
        f"{tmp_path}/a.jsonl:{line}" for line in (1, 2, 3)
    ]
    assert measure(tmp_path, tokenizer, 0, bad_records="skip").bad_records == {}


@pytest.mark.parametrize(
    ("num_bad", "fields", "words"),
    [
        (1, {}, r"a\.jsonl:1: text: got ''"),
        (4, {"bad_records": "skip"}, "'a': got 4 bad among 300 records.*max_bad_share=0.01"),
        (300, {"bad_records": "skip", "max_bad_share": 1.0}, "got 300 bad records of 300 sampled"),
    ],
)
def test_bad_records_that_would_end_the_run_are_refused(
    tmp_path, tokenizer, num_bad, fields, words
):
    with pytest.raises(records_lib.DataError, match=words):
        measure(tmp_path, tokenizer, num_bad, **fields)


def test_the_page_tells_of_bad_records(tmp_path):
    texts = [{"text": f"number {i}" if i else ""} for i in range(200)]
    records_support.write_jsonl(tmp_path / "a.jsonl", texts)
    overrides = [f"data.sources.0.path={tmp_path}/a.jsonl", "data.lanes=8"]
    (failure,) = rehearse_config("tiny_pretrain", overrides).of_kind("fails")
    assert "a.jsonl:1: text: got ''" in failure.text
    findings = rehearse_config("tiny_pretrain", [*overrides, "data.bad_records=skip"])
    assert not findings.has_failed
    assert any(
        "1 of 200 sampled records are bad and left out" in text
        for text in list_texts(findings, "costs", "data")
    )


# ---- tasks


def rehearse_tasks(tmp_path, tasks, *overrides):
    records_support.write_jsonl(tmp_path / "tasks.jsonl", tasks)
    path = f"sources.0.path={tmp_path}/tasks.jsonl"
    return rehearse_config("tiny_cispo", [path, *overrides], model="tiny")


def test_every_task_is_checked_as_the_run_does(tmp_path):
    tasks = [{"prompt": f"What is {i} + 1?", "label": str(i + 1)} for i in range(20)]
    assert not rehearse_tasks(tmp_path, tasks).has_failed
    del tasks[7]["label"]
    findings = rehearse_tasks(tmp_path, tasks)
    (text,) = list_texts(findings, "fails", "tasks")
    assert "1 of 20 lack what is needed to score them" in text
    assert "tasks.jsonl:8: " in text
    assert "needed by the reward 'exact'" in text


def test_held_out_tasks_are_checked_too(tmp_path):
    records_support.write_jsonl(tmp_path / "tasks.jsonl", [{"prompt": "What?"}])
    override = f"evaluation.sources.0.path={tmp_path}/tasks.jsonl"
    findings = rehearse_config("tiny_cispo", [override], model="tiny")
    (text,) = list_texts(findings, "fails", "tasks")
    assert "1 of 1 lack" in text


def test_prompts_are_as_long_as_the_run_allows(tmp_path):
    tasks = [{"prompt": f"What is {i} + 1?", "label": str(i + 1)} for i in range(5)]
    tasks[3]["prompt"] *= 20
    with_tokenizer = "tokenizer=demo/data/tokenizer"
    findings = rehearse_tasks(tmp_path, tasks, with_tokenizer)
    (text,) = list_texts(findings, "fails", "tasks")
    assert "where 1 of 5 are too long" in text
    findings = rehearse_tasks(tmp_path, tasks, with_tokenizer, "sources.0.overlong=drop")
    assert not list_texts(findings, "fails", "tasks")
    (text,) = list_texts(findings, "costs", "tasks")
    assert "1 of 5 tasks are left out, whose prompts have more than 32 tokens" in text


def test_tasks_that_are_made_are_checked():
    overrides = ["sources=({'name': 'sums', 'make': 'lookup', 'size': 4},)"]
    overrides += ["rewards.sources=(('sums', (('tool_calls', 1.0, ()),)),)"]
    overrides += ["evaluation.sources=()", "evaluation.every_batches=0"]
    findings = rehearse_config("tiny_cispo", overrides, model="tiny")
    (text,) = list_texts(findings, "fails", "tasks")
    assert "4 of 4 lack what is needed" in text


# ---- meshes


def test_padded_columns_are_warned_of_as_in_the_plan(tmp_path):
    pytest.importorskip("libtpu")
    words = "mesh: intermediate_size 384 over tensor=2 leaves 192 columns on a chip; wanted a mul"
    mesh = "(('fsdp', 2), ('tensor', 2))"
    overrides = [f"stages.{stage}.mesh={mesh}" for stage in range(2)]
    overrides += ["model.intermediate_size=384", "data.lanes=8"]
    findings = rehearse_config("tiny_pretrain", overrides, "v5p:2x2x1")
    texts = list_texts(findings, "costs", "mesh")
    assert [text.partition(": ")[0] for text in texts] == ["step of stage 0", "step of stage 1"]
    assert all(words in text for text in texts)
    model_config = dataclasses.replace(ModelConfig.tiny(), intermediate_size=384)
    (tmp_path / "config.json").write_text(json.dumps(model_config.to_hf()))
    overrides = ["mesh=(('fsdp', 4),)", "serving_mesh=(('expert', 2), ('tensor', 2))"]
    findings = rehearse_config("tiny_cispo", overrides, "v5p:2x2x1", str(tmp_path))
    (text,) = list_texts(findings, "costs", "mesh")
    assert text.startswith(f"sampler: {words}")
    assert "GiB a chip here" in text
