"""Logic tasks and their reward, by the generators and verifiers of reasoning-gym."""

import contextlib
import functools
import importlib.util
import pickle
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import answer, pool

_MISSING_MESSAGE = "got no reasoning_gym; wanted it for logic tasks. Run: pip install 'm1-jax[rl]'"
_ANSWER_INSTRUCTION = "Write the final answer between <answer> and </answer>."


def generate_tasks(
    name: str, size: int, seed: int, indices: Iterable[int] | None = None, /, **config: Any
) -> Iterator[sample_lib.Task]:
    """Yield the tasks of one generator. Their metadata holds all that the verifier needs.

    A task depends on these arguments, its index and, for a few generators, on PYTHONHASHSEED.
    `train.rl.task_maker` fixes the last of these.

    Args:
      name: the generator's name, such as "chain_sum".
      size: number of tasks.
      seed: equal seeds yield equal tasks.
      indices: which of the tasks to make, each below `size`. None makes all.
      config: the generator's own options.

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: there is no such generator, or it does not take these options.
    """
    _require_library()
    with _seed_global_random(f"{name} {seed}"):
        dataset = _create_dataset(name, config, size=size, seed=seed)
    for index in range(size) if indices is None else indices:
        with _seed_global_random(f"{name} {seed} {index}"):
            entry = dataset[index]
        yield sample_lib.Task(
            id=f"{name}-{seed}-{index}",
            messages=(
                {"role": "user", "content": f"{entry['question']}\n\n{_ANSWER_INSTRUCTION}"},
            ),
            source=name,
            label=entry["answer"],
            metadata={"generator": name, "config": config, "entry": entry},
        )


def check_generator(name: str, config: Mapping[str, Any]) -> None:
    """Check that there is such a generator, and that it takes these options.

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: there is no such generator, or it does not take these options.
    """
    _require_library()
    _create_dataset(name, config, size=1, seed=0)


def extract_answer(text: str) -> str:
    """Return the content of the last `<answer>` after the thinking.

    Where that tag is missing, return the last line that is not empty, without a leading `Answer:`.
    """
    text = answer.strip_thinking(text)  # a thought may quote the tags
    tagged = answer.find_tagged_answer(text)
    if tagged is not None:
        return tagged
    last_line = (text.strip().splitlines() or [""])[-1]
    return re.sub(r"(?i)^answer:\s*", "", last_line.strip())


def prepare_worker(*_: object) -> None:
    """Import the library. The pool calls this outside of the time limit."""
    import reasoning_gym  # noqa: F401


def grade_answer(text: str, metadata: Mapping[str, Any], strict: bool) -> float:
    """Return the verifier's score, in [0, 1]. Runs in a worker.

    Args:
      strict: return 1 for a full score, and 0 for a partial one.
    """
    # Pickled, because the cache of `_make_verifier` needs a hashable key.
    config = pickle.dumps(metadata.get("config", {}))
    score = _make_verifier(metadata["generator"], config).score_answer(
        extract_answer(text), metadata["entry"]
    )
    return float(score >= 1) if strict else float(score)


class LogicReward:
    """The score of the task's verifier, by `grade_answer` in a worker."""

    limit_secs = None  # the pool keeps the time

    def __init__(self, workers: pool.WorkerPool, strict: bool = False):
        """Set the reward up.

        Args:
          workers: the pool that grades.
          strict: see `grade_answer`.

        Raises:
          ImportError: reasoning-gym is not installed.
        """
        _require_library()
        self._pool, self._strict = workers, strict

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample of a task from `generate_tasks`.

        Raises:
          ValueError: the task is not from `generate_tasks`.
        """
        try:
            check_task(sample.task)
        except ValueError as error:
            raise ValueError(f"task {sample.task.id!r}: {error}") from None
        text, metadata = answer.final_text(sample), dict(sample.task.metadata)
        return await self._pool.call(
            "train.rl.rewards.logic:grade_answer", text, metadata, self._strict
        )


def check_task(task: sample_lib.Task) -> None:
    """Raise ValueError where a task is not from `generate_tasks`."""
    if not task.metadata.keys() >= {"generator", "entry"}:
        raise ValueError(
            f"got the metadata {sorted(task.metadata)}; wanted generator and entry, as "
            "logic.generate_tasks makes them"
        )


def _require_library() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError(_MISSING_MESSAGE)


@contextlib.contextmanager
def _seed_global_random(text: str) -> Iterator[None]:
    """Seed Python's global `random` within the context: some generators draw from that one too."""
    state = random.getstate()
    # A text seeds by SHA-512, so equal texts draw equal numbers on every machine.
    random.seed(text)
    try:
        yield
    finally:
        random.setstate(state)


@functools.lru_cache(maxsize=256)
def _make_verifier(name: str, config: bytes) -> Any:
    """Return a generator to verify answers with. Some verifiers read its config.

    Args:
      config: the generator's options, pickled.
    """
    return _create_dataset(name, pickle.loads(config))


def _create_dataset(name: str, config: Mapping[str, Any], **size_and_seed: int) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, **size_and_seed, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"logic: got the generator {name!r} with {dict(config)}: {error}; wanted one of "
            "reasoning_gym.factory.DATASETS, with options of its own"
        ) from error
