"""Under the malloc of the comparisons, XLA's programs get memory that earlier calls have freed."""

import os
import pathlib
import platform
import runpy
import subprocess
import sys

import pytest

_BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
_PAGE_BYTES = 4096
_ARRAY_BYTES = 2**27

# Prints the fewest page faults of a call. Blocks of the heap lie differently from call to call, so
# the first few may still grow it.
_COUNT_FAULTS = f"""
import resource
import jax
add_one = jax.jit(lambda x: x + 1)
x = add_one(jax.numpy.zeros({_ARRAY_BYTES} // 4))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    add_one(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def count_faults(environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    run = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_programs_reuse_memory():
    environment = runpy.run_path(str(_BENCHMARKS / "kept_memory.py"))["ENVIRONMENT"]
    pages = _ARRAY_BYTES // _PAGE_BYTES
    if count_faults({}) < pages / 2:
        pytest.skip("this system gives out huge pages, or its malloc keeps memory by itself")
    assert count_faults(environment) < pages / 100
