"""Version, extras and supported Pythons are the same wherever they are written."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging import requirements, specifiers

import m1_jax
from m1_jax import version

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PYPROJECT = tomllib.loads((_REPO / "pyproject.toml").read_text())
_PROJECT = _PYPROJECT["project"]
_PYTHONS = ("3.11", "3.12", "3.13")
# What users are told to install. test, parity and dev are for those who change the code.
_USER_EXTRAS = {"tpu", "gpu", "gcs", "serve", "rl", "eval", "docs", "demo"}


def test_the_version_has_one_source():
    assert m1_jax.__version__ == version.VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.VERSION)
    assert _PROJECT["dynamic"] == ["version"]
    assert _PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "m1_jax.version.VERSION"
    }
    (cited,) = re.findall(r"(?m)^version: (.+)$", (_REPO / "CITATION.cff").read_text())
    assert cited == version.VERSION
    headings = re.findall(r"(?m)^## (.+)$", (_REPO / "CHANGELOG.md").read_text())
    assert headings[0].startswith(("Unreleased", version.VERSION))


def test_pythons_agree():
    prefix = "Programming Language :: Python :: 3."
    named = [c.removeprefix(prefix) for c in _PROJECT["classifiers"] if c.startswith(prefix)]
    assert [f"3.{minor}" for minor in named] == list(_PYTHONS)
    supported = specifiers.SpecifierSet(_PROJECT["requires-python"])
    assert all(python in supported for python in _PYTHONS)
    assert "3.10" not in supported
    first, last = _PYTHONS[0], _PYTHONS[-1]
    assert f"Python {first} to {last}" in (_REPO / "README.md").read_text()
    assert _PYPROJECT["tool"]["pyright"]["pythonVersion"] == first
    assert _PYPROJECT["tool"]["ruff"]["target-version"] == f"py{first.replace('.', '')}"


def test_extras_are_those_that_are_documented():
    extras = _PROJECT["optional-dependencies"]
    assert extras.keys() == _USER_EXTRAS | {"test", "parity", "dev"}
    for name, lines in extras.items():
        parsed = [requirements.Requirement(line) for line in lines]
        # A library without a lower bound may be so old that it lacks what is called.
        unbounded = [str(r) for r in parsed if not r.specifier and not r.extras]
        assert not unbounded, name
    # jax itself is bounded among the dependencies, and its extras bring the accelerator.
    assert [requirements.Requirement(line).name for line in extras["tpu"]] == ["jax"]


def test_a_dependency_that_is_named_twice_has_one_range():
    ranges = {}
    lines = [*_PROJECT["dependencies"], *sum(_PROJECT["optional-dependencies"].values(), [])]
    for requirement in map(requirements.Requirement, lines):
        if requirement.specifier:
            ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert not {name: found for name, found in ranges.items() if len(found) > 1}


@pytest.mark.long
@pytest.mark.parametrize("python", _PYTHONS)
def test_extras_resolve(python, tmp_path):
    """Together, as an environment that has all of them."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(pathlib.Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv, which resolves for Pythons that are not here, is not installed")
    extras = [f"--extra={name}" for name in sorted(_USER_EXTRAS - {"gpu"})]
    for chosen in (extras, ["--extra=gpu"]):  # libtpu and CUDA in one environment make no sense
        command = [uv, "pip", "compile", "pyproject.toml", f"--python-version={python}", "--quiet"]
        command += ["--python-platform=x86_64-manylinux_2_28", *chosen]
        done = subprocess.run(command, cwd=_REPO, capture_output=True, text=True, check=False)
        if re.search(r"(?i)failed to (fetch|connect)|network|timed out", done.stderr):
            pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[0]}")
        assert done.returncode == 0, done.stderr
        assert "jax==" in done.stdout
