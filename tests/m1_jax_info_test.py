"""m1-info: what a bug report needs, also where parts of it cannot be found."""

import json
import pathlib
import subprocess
import sys

import pytest

from m1_jax import testing, version
from m1_jax.info import machine, report

_SECTIONS = ["software", "devices", "host", "working_directory", "compilation_cache", "environment"]


@pytest.fixture(scope="module")
def sections(golden_dir):
    """All sections of the tests' checkpoint, through the command."""
    command = [sys.executable, "-m", "m1_jax.info", "--json", f"--checkpoint={golden_dir}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_all_sections_are_told(sections):
    assert list(sections) == [*_SECTIONS, "checkpoint"]
    assert not {name: section for name, section in sections.items() if "error" in section}


def test_versions_and_devices(sections):
    import jax
    import numpy as np

    software = sections["software"]
    assert software["m1_jax"] == version.VERSION
    assert (software["jax"], software["numpy"]) == (jax.__version__, np.__version__)
    assert software["python"].startswith("{}.{}.{} ".format(*sys.version_info[:3]))
    assert pathlib.Path(software["m1_jax_folder"]) == pathlib.Path(machine.__file__).parents[1]
    devices = sections["devices"]
    assert devices["backend"] == "cpu"
    assert len(devices["local"]) == devices["devices"] == 1
    assert sections["host"]["memory_bytes"] > sections["host"]["memory_available_bytes"] > 0
    assert sections["environment"]["JAX_PLATFORMS"] == "cpu"


def test_checkpoint(sections, golden_dir):
    told = sections["checkpoint"]
    assert told["kind"] == "release (safetensors)"
    assert (told["layers"], told["layers_lightning"], told["layers_softmax"]) == (8, 6, 2)
    assert told["shards"] == 3
    files = list(golden_dir.iterdir())
    assert told["size_bytes"] == sum(file.stat().st_size for file in files)
    index = json.loads((golden_dir / "model.safetensors.index.json").read_text())
    assert told["weights_bytes"] == index["metadata"]["total_size"]
    assert told["tokenizer"].startswith("none that can be read: ")


def test_a_part_that_fails_says_why(tmp_path, monkeypatch):
    testing.write_tiny_tokenizer(tmp_path)

    def fail():
        raise PermissionError("no\nwonder")

    monkeypatch.setattr(machine, "describe_host", fail)
    monkeypatch.setattr(machine, "describe_devices", lambda limit_secs: {"limit": limit_secs})
    sections = report.collect_sections(str(tmp_path), 3.0)
    assert sections["host"] == {"error": "PermissionError: no wonder"}
    assert sections["devices"] == {"limit": 3.0}
    assert "has no config.json" in sections["checkpoint"]["error"]
    assert "python" in sections["software"]
    assert "PermissionError: no wonder" in report.format_sections(sections)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import time; time.sleep(60)", "TimeoutError: JAX found no devices in 0.5 s"),
        ("import sys; sys.exit('Unable to initialize backend')", "Unable to initialize backend"),
        ("import os; os.abort()", "RuntimeError: JAX ended with status -6"),
        ("print('half of')", "JSONDecodeError"),
    ],
)
def test_devices_that_cannot_be_found(tmp_path, monkeypatch, source, words):
    probe = tmp_path / "probe.py"
    probe.write_text(source)
    monkeypatch.setattr(machine.device_probe, "__file__", str(probe))
    section = report._describe_or_explain(lambda: machine.describe_devices(0.5))
    assert words in section["error"]


def test_secrets_are_not_shown(monkeypatch):
    monkeypatch.setenv("TPU_API_TOKEN", "abc")
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/secret.json")
    told = machine.describe_environment()
    assert told["TPU_API_TOKEN"] == "(set, not shown)"
    assert told["XLA_FLAGS"] == "--xla_x=1"
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in told


def test_compilation_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    assert machine.describe_compilation_cache()["files"] == 0
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "entry").write_bytes(bytes(1000))
    told = machine.describe_compilation_cache()
    assert (told["directory"], told["files"], told["size_bytes"]) == (
        str(tmp_path / "cache"),
        1,
        1000,
    )
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    assert machine.describe_compilation_cache()["size"].startswith("not measured")


def test_text_has_a_line_for_each_value():
    text = report.format_sections(
        {
            "host": {"memory_bytes": 3 * 2**30, "processors": 2},
            "devices": {"local": [{"id": 0, "memory_bytes": None}, {"id": 1}]},
            "environment": {},
        }
    )
    assert text.splitlines() == [
        "Host",
        "  memory                   3.00 GiB (3,221,225,472 bytes)",
        "  processors               2",
        "",
        "Devices",
        "  local                    id 0, memory unknown",
        "  local                    id 1",
        "",
        "Environment",
        "  none",
    ]
