"""Eight CPU devices, strict rank promotion and a compilation cache for every test.

Must not import our packages: `--jaxtyping-packages` checks only what is imported after its hook.
"""

import os
import pathlib
import zlib

# The environment reaches the commands that tests start, too; set it before jax is imported.
_REPO = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_REPO / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Tests compile much and compute little: LLVM's optimisations double their time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# The emitters that write whole fusions take a third of a compilation. XLA reads its flags once,
# with the first program. libtpu reads them later, on its own, and stops the process at one of the
# CPU.
_FLAGS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_cpu_use_fusion_emitters=false"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

jax.jit(lambda x: x + 1)(0)
os.environ["XLA_FLAGS"] = _FLAGS

# The first example compiles, so a deadline would measure XLA; a fixed seed keeps CI repeatable.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repo")


def pytest_addoption(parser):
    parser.addoption(
        "--tenth",
        type=int,
        choices=range(10),
        help="of the tests marked `long`, run only those of this tenth, 0 to 9",
    )


def pytest_report_header(config):
    tenth = config.getoption("tenth")
    return None if tenth is None else f"of the long tests: tenth {tenth} (0 to 9)"


def _tenth_of(item) -> int | None:
    """Return which tenth of the long tests has this one; None: it is not long.

    The mark says so, as in `long(tenth=2)`, or the checksum of the test's name: new tests then move
    no other.
    """
    mark = item.get_closest_marker("long")
    return mark and mark.kwargs.get("tenth", zlib.crc32(item.nodeid.encode()) % 10)


def pytest_collection_modifyitems(config, items):
    """Select a tenth of the long tests, and put files with slow tests first.

    Workers take whole files, and the last file should be short.
    """
    tenth = config.getoption("tenth")
    if tenth is not None:
        left_out = [item for item in items if _tenth_of(item) not in (None, tenth)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    marks = ("slow", "long")
    slow = {item.path for item in items if any(map(item.get_closest_marker, marks))}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drop compiled programs: each maps memory, of which a process may have only so many pieces."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """The tiny checkpoint in the release's format, with `golden.npz` beside it."""
    return _REPO / "tests" / "data" / "m1-tiny"
