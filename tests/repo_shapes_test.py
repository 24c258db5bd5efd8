"""The shapes and dtypes in the signatures are true: checked by jaxtyping while the code runs."""

import pathlib
import subprocess
import sys

import pytest

HOOK = "--jaxtyping-packages=m1_jax,pallas_kernels,infer,typeguard.typechecked"
# Tests of wrong arguments are left out: here the hook refuses them before our own messages do.
CHOSEN = "six_heads or shared_expert or packed or different_lengths or experts or logprobs"


@pytest.mark.long
def test_signatures_hold():
    repo = pathlib.Path(__file__).parents[1]
    files = ("m1_jax_parity", "m1_jax_model", "pallas_lightning")
    command = [sys.executable, "-m", "pytest", "-q", HOOK, "-k", CHOSEN, "-p", "no:cacheprovider"]
    command += [str(repo / "tests" / f"{name}_test.py") for name in files]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
