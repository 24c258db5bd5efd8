"""Logic tasks: the generators and verifiers of reasoning-gym."""

import functools
import importlib.util
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import answer, pool

_MISSING_MESSAGE = "got no reasoning_gym; wanted it for logic tasks. Run: pip install 'm1-jax[rl]'"
_ANSWER_INSTRUCTION = "Write the final answer between <answer> and </answer>."


def generate_tasks(name: str, size: int, seed: int, **config: Any) -> Iterator[sample_lib.Task]:
    """Yield the tasks of one generator; their metadata holds all that their verifier needs.

    Args:
      name: of the generator, such as "chain_sum".
      size: how many.
      seed: of all of them; the same one makes the same tasks.
      config: the generator's own options.

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: no such generator, or options it does not take.
    """
    _require_library()
    for place, entry in enumerate(_create_dataset(name, config, size=size, seed=seed)):
        yield sample_lib.Task(
            id=f"{name}-{seed}-{place}",
            messages=(
                {"role": "user", "content": f"{entry['question']}\n\n{_ANSWER_INSTRUCTION}"},
            ),
            source=name,
            label=entry["answer"],
            metadata={"generator": name, "config": config, "entry": entry},
        )


def extract_answer(text: str) -> str:
    """Return what the last `<answer>` after the thinking holds, else the last line that is not
    empty, without a leading `Answer:`.
    """
    text = answer.strip_thinking(text)
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tags:
        return tags[-1].strip()
    last = (text.strip().splitlines() or [""])[-1]
    return re.sub(r"(?i)^answer:\s*", "", last.strip())


def prepare_worker(*_: object) -> None:
    """Import the library; the pool calls this outside of the time limit."""
    import reasoning_gym  # noqa: F401


def grade_answer(text: str, metadata: Mapping[str, Any], strict: bool) -> float:
    """Return the verifier's score, in [0, 1]; runs in a worker.

    strict: only full marks count.
    """
    config = pickle.dumps(metadata.get("config", {}))
    score = _make_verifier(metadata["generator"], config).score_answer(
        extract_answer(text), metadata["entry"]
    )
    return float(score >= 1) if strict else float(score)


class LogicReward:
    """See `grade_answer`."""

    limit_secs = None  # the pool's

    def __init__(self, workers: pool.WorkerPool, strict: bool = False):
        """Take the pool to work in.

        Raises:
          ImportError: reasoning-gym is not installed.
        """
        _require_library()
        self._pool, self._strict = workers, strict

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample of a task from `generate_tasks`.

        Raises:
          ValueError: the task is from elsewhere.
        """
        metadata = dict(sample.task.metadata)
        if not metadata.keys() >= {"generator", "entry"}:
            raise ValueError(
                f"task {sample.task.id!r}: got the metadata {sorted(metadata)}; wanted generator "
                "and entry, as logic.generate_tasks makes them"
            )
        return await self._pool.call(
            "train.rl.rewards.logic:grade_answer", sample.text, metadata, self._strict
        )


def _require_library() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError(_MISSING_MESSAGE)


@functools.lru_cache(maxsize=256)
def _make_verifier(name: str, config: bytes) -> Any:
    """Return a dataset that makes nothing: some verifiers look at its config.

    config: pickled, since its values may be lists.
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
