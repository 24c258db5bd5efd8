"""Load a module of `demo/`, which is no package."""

import importlib.util
import pathlib
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def load_demo_module(name: str):
    """Return the module of demo/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", _ROOT / "demo" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
