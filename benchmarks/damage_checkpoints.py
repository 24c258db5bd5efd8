"""Random damages of checkpoints. Each must be refused in one short line, or read as it should be.

    python benchmarks/damage_checkpoints.py [--cases=1000] [--first=0] [--seed=0] [--workers=2]

A case damages a fresh copy of a tiny release, of its conversion, of an interrupted conversion, or
of config.json and the tokenizer's files alone. It changes bytes, JSON values, or what kind of file
stands there. Then the case converts, goes on with the conversion, or loads. It must end within
60 s, by an error of one line of at most 300 characters or with the right result. A refusal must
leave nothing that looks complete, and no case may write outside of its destination or end its
process. Bits of weights cannot be checked, since a checkpoint has no digest: such a case counts as
unseen. The exit status is 1 where any case is none of these.

Case N of a seed is the same case on every machine. A worker is a process that runs cases until one
of them kills it or hangs.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import multiprocessing.connection
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import random_damages
import tqdm

from m1_jax import config as config_lib
from m1_jax import convert, testing
from m1_jax import params as params_lib
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import load as load_lib
from m1_jax.checkpoints import release as release_lib

MAX_MESSAGE, MAX_SECONDS, MAX_MEMORY_BYTES = 300, 60, 24 * 2**30
# What is damaged, and how often it is drawn.
KIND_WEIGHTS = {"release": 8, "conversion": 6, "config": 4, "half": 1, "half back": 1}
HALF_KINDS = ("half", "half back")  # interrupted conversions to Orbax, and back to a release
ELSEWHERE = "elsewhere"  # the name of a file outside of the checkpoint
REFUSED, READ, UNSEEN, FAILED = "refused", "read", "unseen", "failed"
SMALL_CONFIG = {"attn_type_list": [0, 1], "num_local_experts": 2, "num_experts_per_tok": 1}


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """How a case ended: one of the four outcomes, the damage in words, and the error's text."""

    case: int
    outcome: str
    damage: str
    message: str = ""


class CaseFailure(Exception):
    """A case that ended in another way than it may."""


# ---- what is damaged


def make_originals(directory: pathlib.Path) -> None:
    """Write the undamaged release, its conversion, and an interrupted conversion."""
    hf = testing.tiny_config(**SMALL_CONFIG)
    source = testing.write_release(directory / "release", hf, testing.random_tensors(hf))
    testing.write_tiny_tokenizer(source)
    settings = '{"eos_token_id": [510, 5], "do_sample": true}'
    (source / "generation_config.json").write_text(settings)
    conversion = run_convert("orbax", source, directory / "conversion")
    _interrupt_convert(20, "orbax", source, directory / "half")
    _interrupt_convert(2, "hf", conversion, directory / "half back")


def _interrupt_convert(num_finished: int, to: str, src: pathlib.Path, dst: pathlib.Path) -> None:
    """Convert until so many tensors (to Orbax) or files (to a release) are finished."""

    class Interrupted(Exception):
        pass

    finish, finished = convert._ConvertProgress.finish, []

    def finish_or_stop(self, name: str, nbytes: int) -> None:
        finish(self, name, nbytes)
        finished.append(name)
        if len(finished) == num_finished:
            raise Interrupted

    convert._ConvertProgress.finish = finish_or_stop
    try:
        run_convert(to, src, dst)
    except Interrupted:
        pass
    finally:
        convert._ConvertProgress.finish = finish


def run_convert(to: str, src: pathlib.Path, dst: pathlib.Path) -> pathlib.Path:
    return convert.run(convert.ConvertConfig(to, str(src), str(dst), progress=False))


# ---- cases


def run_case(
    case: int,
    seed: int,
    originals: pathlib.Path,
    directory: pathlib.Path,
    tell: Callable[[str], Any] = str,
) -> CaseResult:
    """Run one case in an empty directory of its own. `tell` is called with the damage in words."""
    rng = random.Random(f"{seed} {case}")
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    is_half = kind in HALF_KINDS
    original = "release" if kind == "config" else f"{kind}.partial" if is_half else kind
    name = "dst.partial" if is_half else "src"
    target = pathlib.Path(shutil.copytree(originals / original, directory / name))
    candidates = sorted(p for p in target.rglob("*") if p.is_file())
    small = [p for p in candidates if p.parent == target]
    if kind == "config":
        small = [p for p in small if "safetensors" not in p.name]
    # Small files are few, and chunks are many: half of the damages go to each.
    file = rng.choice(small if kind == "config" or rng.random() < 0.5 else candidates)
    shown_name = f"{kind}: {file.relative_to(target)}"
    try:
        damage = f"{shown_name}: {random_damages.damage_file(rng, file, directory / ELSEWHERE)}"
    except Exception as error:
        raise AssertionError(f"case {case}: the damage itself failed") from error
    tell(damage)
    is_weight = "c" in file.relative_to(target).parts or file.suffix == ".safetensors"
    known_names = {path.name for path in directory.iterdir()} | {
        "dst",
        "dst.partial",
        "back",
        ELSEWHERE,
    }
    try:
        _use(kind, originals, target, directory / "dst", is_weight)
    except (ValueError, OSError) as error:
        if failure := _judge_refusal(str(error), directory, known_names):
            return CaseResult(case, FAILED, damage, failure)
        return CaseResult(case, REFUSED, damage, str(error))
    except CaseFailure as failure:
        return CaseResult(case, UNSEEN if is_weight else FAILED, damage, str(failure))
    except BaseException as error:
        return CaseResult(case, FAILED, damage, f"{type(error).__name__}: {error}"[:300])
    if extra := {path.name for path in directory.iterdir()} - known_names:
        return CaseResult(case, FAILED, damage, f"left {sorted(extra)}")
    return CaseResult(case, READ, damage)


def _use(
    kind: str,
    originals: pathlib.Path,
    target: pathlib.Path,
    dst: pathlib.Path,
    is_weight: bool,
) -> None:
    """Do with the damaged files what a user would. Raise CaseFailure where the result is wrong."""
    if kind == "config":
        config = load_lib.read_config(target)
        if config_lib.ModelConfig.from_hf(config.to_hf()) != config:
            raise CaseFailure("config.json is not read back")
        params_lib.abstract_model(config)
        tokenizer = tokenizer_lib.Tokenizer.load(target)
        if tokenizer.decode(tokenizer.encode("Hello")) != "Hello":
            raise CaseFailure("the tokenizer changes text")
    elif kind == "half":
        run_convert("orbax", originals / "release", dst)
        _compare_tensors(originals / "release", run_convert("hf", dst, dst.with_name("back")))
    elif kind == "half back":
        _compare_tensors(originals / "release", run_convert("hf", originals / "conversion", dst))
    else:
        load_lib.load(target)
        run_convert("orbax" if kind == "release" else "hf", target, dst)
        back = run_convert("hf", dst, dst.with_name("back")) if kind == "release" else dst
        _compare_tensors(target if kind == "release" else originals / "release", back)
        for file in (p for p in target.iterdir() if p.is_file() and p.name != "release.json"):
            if file.read_bytes() != (back / file.name).read_bytes():
                raise CaseFailure(f"{file.name} has other bytes")


def _compare_tensors(wanted_dir: pathlib.Path, got_dir: pathlib.Path) -> None:
    wanted, got = (release_lib.Release(path).tensors for path in (wanted_dir, got_dir))
    for name, tensor in wanted.items():
        first, second = (x.read().reshape(-1).view(np.uint8) for x in (tensor, got[name]))
        if tensor.shape != got[name].shape or not np.array_equal(first, second):
            raise CaseFailure(f"{name} has other bytes")


def _judge_refusal(message: str, directory: pathlib.Path, known_names: set[str]) -> str:
    """Return what is wrong with a refusal, or an empty text."""
    if len(message) > MAX_MESSAGE or "\n" in message or not message:
        return f"a message of {len(message)} characters: {message[:400]!r}"
    if extra := {path.name for path in directory.iterdir()} - known_names:
        return f"left {sorted(extra)} after: {message}"
    if (directory / "dst").exists() and not (directory / "back.partial").exists():
        return f"made its destination, and then: {message}"
    for path in directory.glob("*.partial"):
        try:
            load_lib.load(path)
        except ValueError:
            continue
        return f"{path.name} loads, after: {message}"
    return ""


# ---- workers


def work(connection: multiprocessing.connection.Connection, seed: int, root: pathlib.Path) -> None:
    """Run the cases that come, and send their results, until the connection ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    while (case := connection.recv()) is not None:
        directory = root / f"{case}"
        directory.mkdir()
        connection.send(run_case(case, seed, root / "originals", directory, connection.send))
        shutil.rmtree(directory, ignore_errors=True)


class Worker:
    """A process that runs one case at a time, and is replaced where a case ends it."""

    def __init__(self, seed: int, root: pathlib.Path):
        self._arguments = (seed, root)
        self._start()

    def _start(self) -> None:
        self.case: int | None = None
        self.damage = ""  # of the case
        self.connection, other_end = multiprocessing.Pipe()
        # A fork has JAX imported already, and its devices not yet started.
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=work, args=(other_end, *self._arguments), daemon=True)
        self.process.start()
        other_end.close()

    def give(self, case: int) -> None:
        self.connection.send(case)
        self.case, self.started = case, time.monotonic()

    def take(self) -> CaseResult | None:
        """Return the result of its case, or None while it runs."""
        case = self.case
        assert case is not None
        try:
            if self.connection.poll(0.02):
                answer = self.connection.recv()
                if isinstance(answer, CaseResult):
                    self.case = None
                    return answer
                self.damage = answer
            if time.monotonic() - self.started < MAX_SECONDS:
                return None
            message = f"no end within {MAX_SECONDS} s"
        except EOFError:
            self.process.join()
            message = f"ended its process: {self.process.exitcode}"
        result = CaseResult(case, FAILED, self.damage, message)
        self.close()
        self._start()
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def run_cases(cases: range, seed: int, num_workers: int) -> list[CaseResult]:
    """Return the results of the cases, in their order."""
    results, waiting = {}, collections.deque(cases)
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        root = pathlib.Path(name)
        maker = multiprocessing.get_context("fork").Process(
            target=make_originals, args=(root / "originals",)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError("the undamaged checkpoints could not be made")
        workers = [Worker(seed, root) for _ in range(num_workers)]
        progress = tqdm.tqdm(total=len(cases), disable=None)
        while len(results) < len(cases):
            for worker in workers:
                if worker.case is None and waiting:
                    worker.give(waiting.popleft())
                if worker.case is not None and (result := worker.take()):
                    results[result.case] = result
                    progress.update()
        progress.close()
        for worker in workers:
            worker.close()
    return [results[case] for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description="Random damages of checkpoints.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="Print every case.")
    options = parser.parse_args()
    cases = range(options.first, options.first + options.cases)
    results = run_cases(cases, options.seed, options.workers)
    for result in results:
        if options.verbose or result.outcome == FAILED:
            line = f"{result.outcome} {result.case}: {result.damage}: {result.message}"
            print(line.encode(errors="backslashreplace").decode())  # it may hold surrogates
    counts = collections.Counter(result.outcome for result in results)
    print(f"{len(results)} cases of seed {options.seed}: {dict(counts)}")
    sys.exit(1 if counts[FAILED] else 0)


if __name__ == "__main__":
    main()
