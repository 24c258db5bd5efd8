"""Random operations on an engine. Every request must give what it gives alone and cold.

    python benchmarks/fuzz_engine.py [--operations=10000] [--seed=0] [--dtype=float32]

A plain engine without a prefix cache first serves a pool of requests one by one. The requests have
all options, and prompts that share beginnings. Then engines of other sizes, short of pages and
slots, get the same requests over and over, between new requests that are seen once. Requests are
submitted, cancelled and preempted (to the host, and to be computed again), and weights are swapped.
Callbacks raise, and call back: they cancel any request, submit, suspend and close. A
KeyboardInterrupt comes at any line of a step. Requests are suspended to a file, and resumed.
Engines are closed under way, and others take their devices.
Tokens and log-probabilities must be bit-exact, and nothing may be compiled. Each callback must hear
of all of its output, and once of its end. A token whose embedding is NaN makes some requests end in
an error, and must affect no other request. The exit status is 1 where anything differs, or where an
operation was never tried.
"""

import argparse
import random
import sys
import tempfile

import jax.numpy as jnp
import tqdm

from infer.selfcheck import engine_fuzz, fuzz_requests
from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib


def main() -> None:
    configs = fuzz_requests.BUSY_CONFIGS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--cases", type=int, default=60, help="requests in the pool")
    parser.add_argument(
        "--engines", type=int, default=len(configs), help="engines, one after the other"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = tokenizer_lib.Tokenizer.load(testing.write_tiny_tokenizer(directory))
    model = fuzz_requests.make_model(jnp.dtype(arguments.dtype))
    with tqdm.tqdm(total=arguments.operations, unit="operation") as bar:
        outcome = engine_fuzz.run_fuzz(
            model,
            tokenizer,
            random.Random(arguments.seed),
            arguments.cases,
            configs[: arguments.engines],
            arguments.operations,
            bar.update,
        )
    counts = outcome.counts
    problems = [*outcome.problems, *(f"never tried: {name}" for name in outcome.list_untried())]
    print(", ".join(f"{name} {counts[name]}" for name in sorted(counts)))
    setup_secs = outcome.setup_secs
    print(f"{len(setup_secs)} engines made in {sum(setup_secs):.0f} s, ", end="")
    print(f"busy for {outcome.busy_secs:.0f} s")
    print(*problems[:20] or ["all outputs bit-exact, nothing compiled"], sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
