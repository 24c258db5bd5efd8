"""The comparison with transformers runs, and says what it promises to say."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_engine_vs_transformers_runs(tmp_path):
    pytest.importorskip("transformers")
    report = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/engine_vs_transformers.py", "--size=tiny"]
    command += ["--repeats=1", "--patience_secs=0", "--cases=batch-8,prefill,shared-prefix,host"]
    # By path, the script's own directory comes first, and another checkout may be installed.
    environment = os.environ | {"PYTHONPATH": str(_REPO)}
    run = subprocess.run(
        [*command, f"--json={report}"],
        cwd=_REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(report.read_text())["rows"]
    assert [row["case"] for row in rows] == ["batch-8"] * 3 + ["prefill"] * 2 + [
        "shared-prefix",
        "host",
    ]
    for row in rows[:-1]:
        assert row["ratio"] > 0
        assert {row["ours"], row["against"]} <= row["min_secs"].keys()
    assert 0 <= rows[-1]["share"] < 1
