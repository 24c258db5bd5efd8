"""Command: break the training kernels one line at a time and see the suite go red.

    python tests/lightning_mutations.py [--only=WORDS] [--dry-run]

Every mutation is an exact text of a source file that must occur once there, and what replaces it.
It is applied to a temporary copy of the packages, never to the checkout; a narrow selection of
the suite must pass on the unmutated copy and fail an assertion on each mutated one.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

REPO = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "pallas_kernels/lightning_attention"
COPIED = (
    "pallas_kernels",
    "m1_jax",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/support/lightning_support.py",
    "tests/support/tpu_support.py",
    "tests/support/turns_support.py",
    "tests/pallas_lightning_test.py",
    "tests/pallas_lightning_precision_test.py",
)
SUITE, PRECISION = COPIED[-2:]
# Ordered so that most mutations are caught by the first, which are quick.
SELECTION = (
    f"{SUITE}::TestImplementations::test_values",
    f"{PRECISION}::test_splits_and_blocks_change_neither_values_nor_gradients",
    f"{PRECISION}::test_packed_documents_equal_separate_ones",
    f"{SUITE}::TestImplementations::test_extreme_slopes_of_the_release",
)
# The failures that count: an assertion, or numpy about a NaN on the way to one.
CAUGHT = re.compile(r"^FAILED .* - (assert|AssertionError|RuntimeWarning)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """What goes wrong, in which implementation, and the (file, text, replacement) that do it."""

    name: str
    implementation: str
    edits: tuple[tuple[str, str, str], ...]


def mutation(name: str, implementation: str, file: str, *texts: str) -> Mutation:
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Mutation(name, implementation, tuple((file, old, new) for old, new in pairs))


def rounded(expression: str) -> str:
    return f"({expression}).astype(jnp.bfloat16).astype(jnp.float32)"


STATE = "state[h] - forgotten_fraction * state[h] + gain"
SAVED, D_STATE = "superblock_states[0, :, 0]", "scratch.d_state[...]"
MUTATIONS = (
    # The +1 of the query decay: o_i reads lambda^i of the carried state, i from 1.
    mutation(
        "no +1 in the query decay", "chunked", "chunked.py",
        "count.reshape(1, 1, -1, 1))", "count.reshape(1, 1, -1, 1) - 1)",
    ),
    mutation(
        "no +1 in the query decay of packed chunks", "chunked", "chunked.py",
        "jnp.where(document == 0, count, jnp.inf)", "jnp.where(document == 0, count - 1, jnp.inf)",
    ),
    mutation(
        "no +1 in the query decay", "tpu", "tpu_chunk.py",
        "head_iota(weights.query_ramp, 0) + 1", "head_iota(weights.query_ramp, 0)",
    ),
    mutation(
        "no +1 in the query decay of packed chunks", "tpu", "boundaries.py",
        "jnp.where((column >> COUNT_BITS) == 0, count, -1)",
        "jnp.where((column >> COUNT_BITS) == 0, count - 1, -1)",
    ),
    # lambda^C on a chunk of m < C tokens.
    mutation(
        "lambda^C for lambda^m on a tail", "chunked", "chunked.py",
        "-rate * size)", "-rate * MIN_CHUNK_TOKENS)",
    ),
    mutation(
        "lambda^C for lambda^m on a packed chunk", "chunked", "chunked.py",
        "-rate * total[:, :, None, None]", "-rate * count.shape[1]",
    ),
    mutation(
        "lambda^C for lambda^m", "tpu", "tpu_chunk.py", "(scalar & boundaries.COUNT_MASK)]", "size]"
    ),
    mutation(
        "lambda^C for lambda^m in the key decay", "tpu", "boundaries.py",
        "total - count, -1)", "size - count, -1)",
    ),
    # The product masked instead of the exponent.
    mutation(
        "unmasked exponent", "chunked", "chunked.py",
        "_decay_weights(rate, jnp.where(gap >= 0, gap, jnp.inf)[None, None])",
        "jnp.exp(-rate * gap[None, None]) * (gap >= 0)[None, None]",
    ),
    # Packed chunks select by the weight as well, so there it would change nothing.
    mutation(
        "unmasked exponent", "tpu", "boundaries.py",
        "jnp.maximum(steps, 0).astype", "steps.astype",
        # XLA would turn a product with a boolean back into a select.
        "jnp.where(steps >= 0, power, 0.0)", "power * jnp.clip(steps + 1.0, 0.0, 1.0)",
    ),
    # The carried state in bfloat16.
    mutation(
        "bfloat16 state", "chunked", "chunked.py",
        "return state, _join_heads(o, qkv)", f"return {rounded('state')}, _join_heads(o, qkv)",
    ),
    mutation("bfloat16 state", "tpu", "tpu_chunk.py", f" = {STATE}", f" = {rounded(STATE)}"),
    mutation(
        "bfloat16 state in the backward pass", "tpu", "tpu_bwd.py",
        f"scratch.state[...] = {SAVED}", f"scratch.state[...] = {rounded(SAVED)}",
    ),
    mutation(
        "bfloat16 gradient of the state", "tpu", "tpu_bwd.py",
        f"d_initial[0] = {D_STATE}", f"{D_STATE} = d_initial[0] = {rounded(D_STATE)}",
    ),
    # A document boundary that something crosses.
    mutation(
        "no document ever starts", "chunked", "documents.py",
        "(segment_ids != previous)", "(segment_ids < 0)",
    ),
    mutation(
        "no document ever starts", "tpu", "documents.py",
        "(segment_ids != previous)", "(segment_ids < 0)",
    ),
    mutation(
        "the state crosses a boundary", "chunked", "chunked.py", "(last == 0)", "(last >= 0)"
    ),
    mutation(
        "queries read the state across a boundary", "chunked", "chunked.py",
        "jnp.where(document == 0,", "jnp.where(document >= 0,",
    ),
    mutation(
        "keys reach the next state across a boundary", "chunked", "chunked.py",
        "document == last", "document <= last",
    ),
    mutation(
        "pairs across a boundary", "chunked", "chunked.py",
        "(document[:, :, None] == document", "(document[:, :, None] >= document",
    ),
    mutation(
        "the state crosses a boundary", "tpu", "tpu_chunk.py",
        "jnp.where(scalar > boundaries.COUNT_MASK, 0.0, state[h] - fraction * state[h])",
        "state[h] - fraction * state[h]",
    ),
    mutation(
        "queries read the state across a boundary", "tpu", "boundaries.py",
        "(column >> COUNT_BITS) == 0", "(column >> COUNT_BITS) >= 0",
    ),
    mutation(
        "keys reach the next state across a boundary", "tpu", "boundaries.py",
        "(column >> COUNT_BITS) == (scalar >> COUNT_BITS)",
        "(column >> COUNT_BITS) <= (scalar >> COUNT_BITS)",
    ),
    mutation(
        "pairs across a boundary", "tpu", "boundaries.py",
        "(column >> COUNT_BITS) == (row >> COUNT_BITS)",
        "(column >> COUNT_BITS) >= (row >> COUNT_BITS)",
    ),
)  # fmt: skip


def mutated(change: Mutation, root: pathlib.Path) -> dict[pathlib.Path, str]:
    """Return the new text of each file the mutation changes.

    Raises:
      ValueError: a text that does not occur exactly once.
    """
    changed: dict[pathlib.Path, str] = {}
    for file, old, new in change.edits:
        path = root / PACKAGE / file
        text = changed.get(path) or path.read_text()
        if (times := text.count(old)) != 1:
            raise ValueError(f"{change.name}: {old!r} occurs {times} times in {file}; wanted once")
        changed[path] = text.replace(old, new)
    return changed


def copy_packages(root: pathlib.Path) -> None:
    for name in COPIED:
        source, target = REPO / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def run_suite(root: pathlib.Path, implementation: str) -> tuple[int, str]:
    """Run the selection on the copy; return pytest's exit status and its output."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "--tb=no", "-rf"]
    command += ["-p", "no:cacheprovider", "-k", implementation, *SELECTION]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
        "COLUMNS": "250",  # the summary names the failure, uncut
    }
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def judge(label: str, status: int, output: str, since: float, *, wanted_red: bool) -> bool:
    """Print one line about a run, its output too where it is not as wanted; say whether it is."""
    fine = status == 1 and bool(CAUGHT.search(output)) if wanted_red else status == 0
    color = {0: "green", 1: "red"}.get(status, f"status {status}")
    caught = re.search(r"^FAILED \S+::(\S+)", output, re.MULTILINE)
    by = f" by {caught.group(1)}" if caught else ""
    verdict = "ok " if fine else "BAD"
    print(f"{verdict} {color}{by}: {label} ({time.monotonic() - since:.0f} s)", flush=True)
    if not fine:
        print(output, flush=True)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the mutations whose label contains this")
    parser.add_argument("--fifth", type=int, choices=range(5), help="run every fifth, from this")
    parser.add_argument("--dry-run", action="store_true", help="only look for the texts")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in f"{m.implementation}: {m.name}"]
    if args.fifth is not None:
        chosen = chosen[args.fifth :: 5]
    if not chosen:
        parser.error(f"--only: no mutation's label contains {args.only!r}")
    for change in chosen:
        mutated(change, REPO)
    if args.dry_run:
        print(f"{len(chosen)} mutations: each text occurs once")
        return
    fine = []
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        copy_packages(root)
        for implementation in sorted({m.implementation for m in chosen}):
            since = time.monotonic()
            result = run_suite(root, implementation)
            fine.append(judge(f"{implementation}: as it is", *result, since, wanted_red=False))
        for change in chosen:
            since, new = time.monotonic(), mutated(change, root)
            old = {path: path.read_text() for path in new}
            for path, text in new.items():
                path.write_text(text)
            result = run_suite(root, change.implementation)
            label = f"{change.implementation}: {change.name}"
            fine.append(judge(label, *result, since, wanted_red=True))
            for path, text in old.items():
                path.write_text(text)
    print(f"{sum(fine)} of {len(fine)} runs as wanted")
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
