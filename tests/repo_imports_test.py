"""The direction of imports, safe file names, and imports without side effects."""

import ast
import importlib.metadata
import json
import pathlib
import subprocess
import sys

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ("m1_jax", "pallas_kernels", "train", "infer")
_LOADED_BY_PATH = ("configs", "demo", "benchmarks", "tests")
_ENTRY_POINTS = {
    "m1_jax.convert",
    "m1_jax.verify",
    "m1_jax.plan.command",
    "m1_jax.plan.__main__",
    "m1_jax.info.command",
    "m1_jax.info.__main__",
    "infer.generate",
    "infer.offline",
    "infer.server",
    "infer.selfcheck.command",
    "infer.selfcheck.__main__",
    "infer.selfcheck.predict",
    "train.pretrain",
    "train.sft",
    "train.rl.__main__",
    "train.prepare",
    "train.export",
    "train.rehearse",
}

# What a file may import of ours: the first row whose prefix starts the file's path decides.
# An import is allowed when it is, or lies below, one of the row's modules.
_TEXT_LEAVES = ("infer.prompt", "infer.tool_calls")
# What the text leaves share or are split into. They load neither jax nor the engine, so that data
# and rewards can read and write turns without an engine.
_LEAF_PARTS = ("infer.messages", "infer.partial_match", "m1_jax.strict_json")
_ENGINE = (
    "infer.engine",
    "infer.config",
    "infer.execution.leader_follower",
    "infer.options",
    "infer.output_tokens",
    "infer.request",
)
_SCHEMAS = ("m1_jax.config", "train.config", "train.rl.config", "infer.config")
_DIRECTION = {
    "pallas_kernels/": ("pallas_kernels",),
    "m1_jax/plan/__main__.py": ("m1_jax.plan.command",),
    "m1_jax/info/__main__.py": ("m1_jax.info.command",),
    "m1_jax/": ("m1_jax", "pallas_kernels"),
    "infer/messages.py": ("m1_jax.strict_json",),
    "infer/partial_match.py": (),
    "infer/prompt.py": ("m1_jax.tokenizer", *_LEAF_PARTS),
    "infer/tool_calls.py": ("m1_jax.tokenizer", *_LEAF_PARTS),
    "infer/scheduling/": ("infer.scheduling", "infer.config"),
    "infer/execution/": ("infer", "m1_jax"),
    "infer/selfcheck/__main__.py": ("infer.selfcheck.command",),
    # It checks the kernels by themselves, too.
    "infer/selfcheck/": ("infer", "m1_jax", "pallas_kernels"),
    "infer/": ("infer", "m1_jax"),
    "train/data/chat.py": ("train.data", "m1_jax", *_TEXT_LEAVES),
    "train/data/": ("train.data", "m1_jax"),
    # It measures the messages that the engine sends.
    "train/rehearsal/engine_calls.py": (
        "infer.config",
        "infer.execution.argument_changes",
        "infer.execution.host_batch",
    ),
    "train/rl/rollout.py": ("train", "m1_jax", *_ENGINE),
    "train/rl/episodes.py": ("train", "m1_jax", *_TEXT_LEAVES),
    "train/rl/rollout_setup.py": ("train", "m1_jax", "infer.prompt", "infer.config"),
    "train/rl/rewards/": ("train.rl", "m1_jax", *_TEXT_LEAVES),
    "train/rl/environments/": ("train.rl", "m1_jax"),
    "train/": ("train", "m1_jax"),
    "configs/": _SCHEMAS,
    "demo/": _PACKAGES,
    "benchmarks/": _PACKAGES,
    "tests/": _PACKAGES,
}
# The planner compiles exactly what runs, so it reaches up, inside the function that needs it.
_INSIDE_FUNCTIONS = {"m1_jax/plan/jobs.py": ("train", "infer")}
# Packages that a folder must not load: the scheduler decides without a device.
_FORBIDDEN = {"infer/scheduling/": ("jax", "flax", "numpy")}

_DYNAMIC_IMPORTS = ("importlib.import_module", "import_module", "__import__")
_KERNELS_THIRD_PARTY = {"jax", "jaxtyping", "numpy", "absl"}
_ONLY_IN = {
    "torch": ("tests/", "benchmarks/", "demo/"),
    "transformers": ("tests/", "benchmarks/", "demo/", "m1_jax/tokenizer.py"),
    "fastapi": ("tests/", "infer/server.py"),
}


def _source_files(root):
    for top in (*_PACKAGES, *_LOADED_BY_PATH):
        yield from sorted((root / top).rglob("*.py"))


def _is_module(root, name):
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _imports(root, path):
    """Yield (line, module, whether inside a function) of every import in a file."""
    package = path.relative_to(root).parent.parts
    tree = ast.parse(path.read_text(), str(path))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            members = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name if _is_module(root, name) else base for name in members]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _DYNAMIC_IMPORTS:
            modules = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for module in modules:
            yield node.lineno, module, id(node) in inside


def _below(module, allowed):
    return any(module == name or module.startswith(name + ".") for name in allowed)


def _complaint(file, module, in_function):
    top = module.split(".")[0]
    if top in _LOADED_BY_PATH:
        return "nobody imports configs, demo, benchmarks or tests"
    if top not in _PACKAGES:
        forbidden = next((names for k, names in _FORBIDDEN.items() if file.startswith(k)), ())
        if top in forbidden:
            return f"plain Python only: {top} is for the layers that run"
        if not file.startswith(_ONLY_IN.get(top, ("",))):
            return f"{top} belongs in {', '.join(_ONLY_IN[top])} only"
        third_party = top not in sys.stdlib_module_names and top not in _KERNELS_THIRD_PARTY
        if file.startswith("pallas_kernels/") and third_party:
            return "kernels depend on jax alone"
        return None
    packaged = file.startswith((*(f"{p}/" for p in _PACKAGES), "configs/"))
    if module in _ENTRY_POINTS and packaged and not file.endswith("/__main__.py"):
        return "nobody imports an entry point: its flags would be defined twice"
    allowed = next(names for prefix, names in _DIRECTION.items() if file.startswith(prefix))
    if in_function:
        allowed += _INSIDE_FUNCTIONS.get(file, ())
    return None if _below(module, allowed) else f"allowed are {', '.join(allowed)}"


def _violations(root):
    found = []
    for path in _source_files(root):
        file = path.relative_to(root).as_posix()
        for line, module, in_function in _imports(root, path):
            complaint = _complaint(file, module, in_function)
            if complaint:
                found.append(f"{file}:{line} imports {module}: {complaint}")
    return found


def test_imports_follow_the_direction():
    assert not _violations(_REPO)


def _plant(root, file, source):
    others = (
        "m1_jax.tokenizer",
        "infer.execution.device",
        "train.step",
        "train.config",
        "infer.engine",
        *_TEXT_LEAVES,
    )
    for module in (*_ENTRY_POINTS, *others):
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("m1_jax/model.py", "from train import step"),
        ("m1_jax/model.py", "def f():\n  import train.step"),
        ("m1_jax/model.py", "import torch.nn"),
        ("m1_jax/__init__.py", "from m1_jax import convert"),
        ("m1_jax/__init__.py", "from .verify import run"),
        ("m1_jax/__init__.py", "from .plan import command"),
        ("m1_jax/plan/command.py", "from train import step"),
        ("m1_jax/plan/command.py", "def f():\n  from train import rl"),
        ("pallas_kernels/lightning_attention/api.py", "import m1_jax"),
        ("pallas_kernels/lightning_attention/api.py", "import flax"),
        ("infer/engine.py", "import train"),
        ("infer/engine.py", "import pallas_kernels"),
        ("infer/engine.py", "import fastapi"),
        ("infer/prompt.py", "from infer import engine"),
        ("infer/tool_calls.py", "import m1_jax"),
        ("infer/scheduling/memory.py", "import jax.numpy"),
        ("infer/scheduling/memory.py", "from infer.execution import device"),
        ("train/data/packing.py", "from train import step"),
        ("train/rl/rewards/maths.py", "from train import step"),
        ("train/loop.py", "from infer import engine"),
        ("train/loop.py", "import importlib; importlib.import_module('infer.engine')"),
        ("train/rl/rollout.py", "from infer import prompt"),
        ("train/loop.py", "import configs.tiny"),
        ("configs/tiny_rl.py", "from train import step"),
        ("demo/run.py", "from tests import conftest"),
    ],
)
def test_planted_violation_is_found(tmp_path, file, source):
    _plant(tmp_path, file, source)
    assert len(_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("m1_jax/plan/jobs.py", "def f():\n  from train import step"),
        ("m1_jax/plan/__main__.py", "from m1_jax.plan import command"),
        ("m1_jax/tokenizer.py", "import transformers"),
        ("infer/prompt.py", "from m1_jax import tokenizer"),
        ("train/rl/rollout.py", "from infer import engine"),
        ("train/rl/rewards/maths.py", "from infer import tool_calls"),
        ("configs/tiny_rl.py", "from train import config"),
        ("tests/train_rl_test.py", "import torch\nfrom train.rl import __main__"),
    ],
)
def test_allowed_import_is_not_reported(tmp_path, file, source):
    _plant(tmp_path, file, source)
    assert not _violations(tmp_path)


def test_application_file_names_shadow_nothing():
    """`python train/rl/__main__.py` puts `train/` first on sys.path, where `profile.py` breaks
    cProfile.
    """
    installed = importlib.metadata.packages_distributions()
    taken = sys.stdlib_module_names | (installed.keys() - set(_PACKAGES))
    paths = [path for top in ("train", "infer") for path in (_REPO / top).rglob("*")]
    names = {p: p.stem for p in paths if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
    assert not [str(path) for path, name in names.items() if name in taken]


_PROBE = """
import importlib, json, os, sys
import absl.flags, jax

theirs, ours = json.loads(sys.stdin.read())
for name in theirs:  # what third parties do at import is theirs
    try:
        importlib.import_module(name)
    except ImportError:
        pass

def world():
    return dict(jax.config.values), dict(os.environ), set(absl.flags.FLAGS)

config, environ, flags = world()
for name in ours:
    importlib.import_module(name)
new_config, new_environ, new_flags = world()
assert {key: new_config[key] for key in config} == config, "jax.config changed"
assert new_environ == environ, "the environment changed"
assert new_flags == flags, f"flags defined: {new_flags - flags}"
assert not absl.flags.FLAGS.is_parsed(), "flags were read"
jax.config.update("jax_num_cpu_devices", 2)  # raises once a backend has started
print(json.dumps(sorted(sys.modules)))
"""


def _module_name(path):
    parts = path.relative_to(_REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _probe(ours):
    imported = [name for p in _source_files(_REPO) for _, name, _ in _imports(_REPO, p)]
    theirs = sorted({name for name in imported if not _below(name, _PACKAGES + _LOADED_BY_PATH)})
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, "--no_such_flag"],
        input=json.dumps([theirs, ours]),
        capture_output=True,
        text=True,
        cwd=_REPO,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_library_changes_nothing():
    assert not _probe(["m1_jax"]) & _ENTRY_POINTS


def test_importing_every_module_changes_nothing():
    paths = [path for top in _PACKAGES for path in (_REPO / top).rglob("*.py")]
    names = sorted({_module_name(path) for path in paths} - _ENTRY_POINTS)
    assert not _probe(names) & _ENTRY_POINTS
