"""The notebook: paired with its text form, restarts where it must, runs, and fits the chips."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

from m1_jax import testing
from m1_jax.plan import command as plan_command
from m1_jax.plan import config as plan_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT, NOTEBOOK = (ROOT / "notebooks" / f"m1_colab.{suffix}" for suffix in ("py", "ipynb"))


def read_cells():
    """Return (type, source) of each cell of the notebook."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def find_code(word):
    """Return the source of the one code cell that has a word."""
    (source,) = [source for kind, source in read_cells() if kind == "code" and word in source]
    return source


def test_text_form_and_notebook_have_the_same_cells():
    jupytext = pytest.importorskip("jupytext")
    text = jupytext.read(TEXT)
    assert [(cell.cell_type, cell.source) for cell in text.cells] == read_cells()
    metadata = json.loads(NOTEBOOK.read_text())["metadata"]
    assert {k: v for k, v in text.metadata.items() if k != "jupytext"} == metadata


def test_no_outputs_and_a_tpu():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["metadata"]["accelerator"] == "TPU"
    assert notebook["metadata"]["colab"]["gpuType"] == "V5E1"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_two_sentences_before_each_cell():
    cells = read_cells()
    for number, (kind, _) in enumerate(cells):
        if kind == "code":
            before, text = cells[number - 1]
            assert before == "markdown"
            assert len(re.findall(r"[.](?:\s|$)", text)) == 2, text


# ---- the first cell, with a stand-in for the jax that a runtime comes with

INSTALL_PROGRAM = """
import pathlib, sys
site = pathlib.Path(sys.argv[1])

def install_versions(**versions):
    for name, version in versions.items():
        for old in site.glob(f"{name}-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\\nName: {name.replace('_', '-')}\\nVersion: {version}\\n"
        (folder / "METADATA").write_text(text)

if sys.argv[2] == "imported":
    import jax
"""


def run_install_cell(site, imported, installed):
    """Run the first cell in a process. `installed`: versions that its %pip brings, by name."""
    source = find_code("%pip")
    indented = re.search(r"( *)%pip install .*", source)
    call = f"{indented[1]}install_versions(**{installed!r})"
    program = INSTALL_PROGRAM + source.replace(indented[0], call) + "\nprint('went on')\n"
    env = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"]}
    return subprocess.run(
        # Without site-packages: the libraries of the tests would be found, too.
        [sys.executable, "-S", "-c", program, str(site), "imported" if imported else "fresh"],
        env=env,
        cwd=site,  # a checkout that is installed holds metadata of its own
        capture_output=True,
        text=True,
    )


@pytest.fixture
def old_site(tmp_path):
    """A folder of installed packages with jax 0.7.2 and without ours."""
    (tmp_path / "jax.py").write_text("__version__ = '0.7.2'\n")
    info = tmp_path / "jax-0.7.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.7.2\n")
    return tmp_path


NEW_JAX = {"jax": "0.10.2", "m1_jax": "0.1.0"}


def test_restarts_where_an_imported_library_was_replaced(old_site):
    first = run_install_cell(old_site, imported=True, installed=NEW_JAX)
    assert first.returncode == -9, first.stderr
    assert "jax changed: the runtime restarts" in first.stdout
    assert "went on" not in first.stdout
    # After the restart nothing is left to install, and jax is the new one.
    second = run_install_cell(old_site, imported=True, installed=NEW_JAX)
    assert (second.returncode, second.stdout) == (0, "went on\n"), second.stderr


def test_goes_on_where_nothing_was_imported_before(old_site):
    process = run_install_cell(old_site, imported=False, installed=NEW_JAX)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("installing m1-jax")
    assert process.stdout.endswith("went on\n")


def test_goes_on_where_the_imported_library_stayed(old_site):
    process = run_install_cell(old_site, imported=True, installed={"m1_jax": "0.1.0"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("went on\n")


# ---- the second cell


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"m1-jax": None, "jax": "0.10.2"}, "m1-jax is not installed"),
        ({"m1-jax": "0.1.0", "jax": "0.7.2"}, "jax 0.7.2: wanted 0.10 or 0.11"),
        ({"m1-jax": "0.1.0", "jax": "0.12.0"}, "jax 0.12.0: wanted"),
    ],
)
def test_stops_in_one_line(versions, message):
    scope = {"read_versions": lambda: versions, "sys": sys}
    with pytest.raises(SystemExit, match=message) as error:
        exec(find_code("VERSIONS = "), scope)
    assert "\n" not in str(error.value)


def test_stops_at_an_old_python():
    old = types.SimpleNamespace(version="3.10.12 (main)", version_info=(3, 10, 12))
    scope = {"read_versions": lambda: {"m1-jax": "0.1.0", "jax": "0.10.2"}, "sys": old}
    source = find_code("VERSIONS = ").replace("import jax\n", "")
    with pytest.raises(SystemExit, match=r"Python 3\.10\.12: wanted 3\.11"):
        exec(source, scope)


# ---- on chips, and on CPUs


def read_sizes(platform):
    """Return the names that the cell of sizes sets, for a platform with one device."""
    source = find_code("SIZES = ")
    module = ast.parse(source)
    # Without the statements that make folders.
    module.body = [node for node in module.body if not isinstance(node, ast.Expr)]
    scope = {"PLATFORM": platform, "NUM_DEVICES": 1, "pathlib": pathlib}
    exec(compile(module, "sizes", "exec"), scope)
    return scope


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
@pytest.mark.parametrize("job", ["train", "rl_update", "serve"])
def test_programs_fit_a_chip(topology, job, tmp_path):
    pytest.importorskip("libtpu")
    sizes = read_sizes("tpu")
    config = testing.tiny_config(**sizes["SIZES"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    fields = {
        "train": {"seq": sizes["LENGTH"], "batch": sizes["ROWS"]},
        "rl_update": {"seq": 256, "batch": sizes["RL_ROWS"], "serving_mesh": "data=1"},
        "serve": {"seq": 96, "batch": 64},
    }[job]
    record = plan_command.run(
        plan_config.PlanConfig(topology, job, config=str(file), mesh="data=1", **fields)
    )
    # A tenth is left for what else lies on the chip.
    assert record["hbm_bytes_per_chip"] < 0.9 * record["hbm_limit_bytes"]
    assert record["fits"]


@pytest.mark.long
@pytest.mark.parametrize("num_devices", [1, 8])
def test_runs_from_an_empty_directory(num_devices, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(num_devices)}
    process = subprocess.run(
        [sys.executable, str(TEXT)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    assert f"{num_devices} of cpu" in process.stdout
    assert "in the form that was taught" in process.stdout
