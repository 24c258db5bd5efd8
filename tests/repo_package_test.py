"""The wheel holds the four packages, all of them, and nothing else."""

import configparser
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PROJECT = tomllib.loads((_REPO / "pyproject.toml").read_text())["project"]
_PACKAGES = {"m1_jax", "pallas_kernels", "train", "infer"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that a stale `build/` neither leaks in nor is left behind."""
    source = tmp_path_factory.mktemp("source") / "repo"
    ignored = (".*", "__pycache__", "build", "dist", "*.egg-info", "out")
    shutil.copytree(_REPO, source, ignore=shutil.ignore_patterns(*ignored))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", "dist", "."], cwd=source, check=True)
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def _metadata(wheel, name):
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_top_level_names_are_the_four(wheel):
    assert set(_metadata(wheel, "top_level.txt").split()) == _PACKAGES


def test_wheel_holds_every_module_and_nothing_else(wheel):
    modules = {path for path in wheel.namelist() if ".dist-info/" not in path}
    sources = {p.relative_to(_REPO) for name in _PACKAGES for p in (_REPO / name).rglob("*.py")}
    data = {path.relative_to(_REPO) for path in _list_data_files()}
    assert modules == {path.as_posix() for path in sources | data}


def _list_data_files():
    """Return the files beside modules: what m1-selfcheck compares with."""
    folder = _REPO / "infer" / "selfcheck"
    return [folder / "predicted_times.json", *(folder / "m1-tiny").iterdir()]


def test_data_files_are_small_and_whole(wheel):
    for path in _list_data_files():
        assert wheel.read(path.relative_to(_REPO).as_posix()) == path.read_bytes()
    assert pathlib.Path(wheel.filename).stat().st_size < 6 * 2**20


def test_every_command_has_its_module(wheel):
    commands = configparser.ConfigParser()
    commands.read_string(_metadata(wheel, "entry_points.txt"))
    targets = dict(commands["console_scripts"])
    assert targets == _PROJECT["scripts"]
    for target in targets.values():
        module, function = target.split(":")
        source = wheel.read(module.replace(".", "/") + ".py").decode()
        assert f"def {function}(" in source
