"""What `--help` prints of a command: its docstring and all of its own flags."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("m1_jax.convert", ["src", "dst", "memory_gib"]),
        ("m1_jax.plan", ["topology", "job", "serving_mesh"]),
        ("infer.generate", ["checkpoint", "prompt", "json_schema", "mesh", "distributed"]),
        ("infer.offline", ["checkpoint", "input", "mesh", "distributed", "dtype"]),
        ("infer.selfcheck", ["report", "seconds", "only", "choices"]),
        ("m1_jax.verify", ["checkpoint", "golden", "mesh", "distributed", "dtype"]),
        ("train.export", ["workdir", "dst", "mesh", "distributed"]),
        ("train.rl", ["config", "set", "workdir"]),
        ("train.rehearse", ["config", "topology", "steps", "compile"]),
    ],
)
def test_help_lists_the_flags(module, flags):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not [flag for flag in flags if f"--{flag}:" not in done.stdout.replace("[no]", "")]
    docstring = done.stdout.splitlines()[:12]
    assert any(len(line) > 20 and not line.lstrip().startswith("--") for line in docstring)
