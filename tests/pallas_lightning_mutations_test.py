"""Broken kernels turn the suite red; see `lightning_mutations.py`."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "lightning_mutations.py"


def run(*flags):
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_mutation_finds_its_text():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fifth", [pytest.param(fifth, marks=pytest.mark.long(tenths=[2 * fifth])) for fifth in range(5)]
)
def test_every_mutation_turns_the_suite_red(fifth):
    done = run(f"--fifth={fifth}")
    assert done.returncode == 0, done.stdout + done.stderr
