"""Reward functions written for others: by import path, in worker processes.

    function   reward(sample), of this project; may be a coroutine
    slime      rm(args, sample), may be a coroutine
    verl       compute_score(data_source, solution_str, ground_truth, extra_info)
    tunix      fn(prompts, completions, **columns), of whole groups

Options: path="module:function", found on the trainer's search path. A mapping's numbers become
parts: choose the one that counts with a weight such as (("score", 1.0),).
"""

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import generative, pool, worker


class _RewardAdapter:
    """Base: calls one of the functions below in a worker."""

    limit_secs = None  # the pool's

    def __init__(self, workers: pool.WorkerPool, path: str, **options: Any):
        """options: passed on, see the subclass.

        Raises:
          ValueError: a path of another form.
        """
        if not all(path.partition(":")[::2]):
            raise ValueError(f"path: got {path!r}; wanted 'module:function'")
        self._pool, self._path, self._options = workers, path, options

    async def _call_in_worker(self, function: str, samples: Any) -> Any:
        return await self._pool.call(f"{__name__}:{function}", self._path, self._options, samples)


def _drop_routes(sample: sample_lib.Sample) -> sample_lib.Sample:
    """Leave out the routes: they are long, and as a device's array they would bring jax along."""
    return dataclasses.replace(sample, routes=None)


class FunctionReward(_RewardAdapter):
    """Calls `reward(sample, **options)`."""

    async def reward(self, sample: sample_lib.Sample) -> Any:
        """Score one sample."""
        return await self._call_in_worker("call", _drop_routes(sample))


class SlimeReward(_RewardAdapter):
    """Calls `rm(args, sample)`; args has the options, sample slime's names for what there is."""

    async def reward(self, sample: sample_lib.Sample) -> Any:
        """Score one sample."""
        return await self._call_in_worker("slime", _drop_routes(sample))


class VerlReward(_RewardAdapter):
    """Calls `compute_score(..., **options)`; extra_info is the metadata."""

    async def reward(self, sample: sample_lib.Sample) -> Any:
        """Score one sample."""
        return await self._call_in_worker("verl", _drop_routes(sample))


class TunixReward(_RewardAdapter):
    """Calls `fn` once per group; the columns are the metadata's entries, the label as `answer`, and
    the options.
    """

    async def reward_group(self, samples: list[sample_lib.Sample]) -> Any:
        """Score a group."""
        return await self._call_in_worker("tunix", [_drop_routes(sample) for sample in samples])


def prepare_worker(path: str, *_: Any) -> None:
    """Import the function's module; the pool calls this outside of the time limit."""
    worker.find_function(path)


async def call_reward(path: str, options: dict[str, Any], sample: sample_lib.Sample) -> Any:
    """Call a function of this project's kind; this and what follows run in a worker."""
    return await _await_result(worker.find_function(path)(sample, **options))


async def call_slime(path: str, options: dict[str, Any], sample: sample_lib.Sample) -> Any:
    """Call slime's kind."""
    view = types.SimpleNamespace(
        prompt=[dict(message) for message in sample.task.messages],
        tokens=[*sample.prompt, *sample.tokens],
        response=sample.text,
        response_length=len(sample.tokens),
        loss_mask=list(sample.mask),
        label=sample.task.label,
        metadata=dict(sample.task.metadata),
    )
    return await _await_result(worker.find_function(path)(types.SimpleNamespace(**options), view))


async def call_verl(path: str, options: dict[str, Any], sample: sample_lib.Sample) -> Any:
    """Call verl's kind."""
    task = sample.task
    said = worker.find_function(path)(
        data_source=task.source,
        solution_str=sample.text,
        ground_truth=task.label,
        extra_info=dict(task.metadata),
        **options,
    )
    return await _await_result(said)


async def call_tunix(
    path: str, options: dict[str, Any], samples: list[sample_lib.Sample]
) -> list[Any]:
    """Call tunix's kind."""
    names = sorted({name for sample in samples for name in sample.task.metadata})
    columns = {name: [sample.task.metadata.get(name) for sample in samples] for name in names}
    columns["answer"] = [sample.task.label for sample in samples]
    prompts = [generative.render_question(sample.task) for sample in samples]
    said = worker.find_function(path)(
        prompts, [sample.text for sample in samples], **columns, **options
    )
    return list(await _await_result(said))


async def _await_result(result: Any) -> Any:
    """Await a coroutine; of a mapping, leave out what is no number."""
    result = await result if inspect.isawaitable(result) else result
    if not isinstance(result, Mapping):
        return result
    return {name: value for name, value in result.items() if not isinstance(value, str | None)}
