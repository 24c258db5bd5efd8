"""`make demo`: a tiny MiniMax-M1 through every step that a real checkpoint takes.

Takes the tiny checkpoint in the release's own format (random weights, real shapes' ratios),
converts it to Orbax, checks it against the release code's outputs, generates text, exports it
back and compares bytes. Everything lands in demo/out.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import contextlib
import io
import pathlib
import shutil
import time

from absl import logging

from infer import generate
from m1_jax import convert, testing, verify

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = HERE.parent / "tests" / "data" / "m1-tiny"
OUT = HERE / "out"


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    shutil.rmtree(OUT, ignore_errors=True)
    release, orbax, back = OUT / "release", OUT / "orbax", OUT / "exported"
    summary = []

    with step("1. a release directory: config.json, 3 safetensors shards, index, tokenizer"):
        shutil.copytree(SOURCE, release, ignore=shutil.ignore_patterns("golden.npz"))
        testing.write_tiny_tokenizer(release)
        print(*sorted(f"   {file.name}" for file in release.iterdir()), sep="\n")

    with step("2. release -> Orbax (python -m m1_jax.convert --to=orbax)"):
        convert.run(convert.Config("orbax", str(release), str(orbax)))

    with step("3. check against the release code's outputs (python -m m1_jax.verify)"):
        rows = verify.run(verify.Config(str(orbax), str(SOURCE / "golden.npz")))
        print(verify.table(rows))
        passed = sum(row.passed for row in rows)
        summary.append(f"{passed} of {len(rows)} golden quantities within tolerance")

    with step("4. generate (python -m infer.generate); the weights are random, so is the text"):
        prompts = OUT / "prompts.txt"
        prompts.write_text("Why is the sky blue?\nWrite a haiku about matrices.\nCount to ten.\n")
        outputs, stats = generate.run(
            generate.Config(checkpoint=str(orbax), prompts_file=str(prompts), max_tokens=48)
        )
        summary.append(f"{len(outputs)} prompts of different lengths: {stats}")

    with step("5. Orbax -> release (python -m m1_jax.convert --to=hf), bytes compared"):
        convert.run(convert.Config("hf", str(orbax), str(back)))
        files = sorted(release.iterdir())
        same = [file.read_bytes() == (back / file.name).read_bytes() for file in files]
        summary.append(f"{sum(same)} of {len(files)} exported files equal byte for byte")
        with contextlib.redirect_stdout(io.StringIO()):
            greedy = [
                generate.run(
                    generate.Config(str(path), prompt="Hello", max_tokens=16, temperature=0.0)
                )[0][0].tokens
                for path in (release, orbax, back)
            ]
        summary.append(f"greedy tokens equal from all three: {greedy[0] == greedy[1] == greedy[2]}")

    print("\nSummary")
    print(*(f"  {line}" for line in summary), sep="\n")
    print(f"  files in {OUT.relative_to(HERE.parent)}; {time.perf_counter() - START:.0f} s in all")
    if passed < len(rows) or not all(same) or greedy[0] != greedy[1] or greedy[1] != greedy[2]:
        raise SystemExit("demo: FAILED")


@contextlib.contextmanager
def step(title: str):
    """Print a title before and the time after."""
    print(f"\n{title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


START = time.perf_counter()

if __name__ == "__main__":
    main()
