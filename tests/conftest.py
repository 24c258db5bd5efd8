"""Eight CPU devices, strict rank promotion and a compilation cache for every test.

Must not import our packages: `--jaxtyping-packages` checks only what is imported after its hook.
"""

import os
import pathlib
import zlib
from collections.abc import Collection

# The environment reaches the commands that tests start, too; set it before jax is imported.
_REPO = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_REPO / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Tests compile much and compute little: LLVM's optimisations double their time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# The emitters that write whole fusions take a third of a compilation, modules in 32 parts and notes
# on aliases a seventh of the rest. XLA reads its flags once, with the first program. libtpu reads
# them later, on its own, and stops the process at one of the CPU.
_FLAGS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = " ".join(
    [
        _FLAGS,
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_llvm_enable_alias_scope_metadata=false",
        "--xla_llvm_enable_invariant_load_metadata=false",
        "--xla_llvm_enable_noalias_metadata=false",
    ]
)

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


def _tenths_of(item) -> Collection[int] | None:
    """Return which tenths of the long tests have this one; None: it is not long.

    The mark says so, as in `long(tenths=[2, 7])`, or the checksum of the test's name: new tests
    then move no other. `turns_support.take_turns` has cases of which every tenth has one.
    """
    mark = item.get_closest_marker("long")
    return mark and mark.kwargs.get("tenths", [zlib.crc32(item.nodeid.encode()) % 10])


def pytest_collection_modifyitems(config, items):
    """Select a tenth of the long tests, and put files with slow tests first.

    Workers take whole files, and the last file should be short.
    """
    tenth = config.getoption("tenth")
    if tenth is not None:
        tenths = {item: _tenths_of(item) for item in items}
        left_out = [item for item in items if tenths[item] and tenth not in tenths[item]]
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
