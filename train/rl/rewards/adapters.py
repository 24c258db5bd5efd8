"""Reward functions that live outside this project, called in worker processes by import path.

    function   reward(sample), this project's own form, may be a coroutine
    slime      rm(args, sample), may be a coroutine
    verl       compute_score(data_source, solution_str, ground_truth, extra_info)
    tunix      fn(prompts, completions, **columns), called once for a whole group

Every adapter takes path="module:function", which is found on the trainer's search path. A function
may return a mapping. Its numbers become parts of the score, and a weight such as (("score", 1.0),)
chooses the part that counts.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import generative, pool, worker


class _RewardAdapter:
    """Base of the adapters: sends a sample to one of the `call_*` functions below, in a worker."""

    limit_secs = None  # the pool keeps the time

    def __init__(self, workers: pool.WorkerPool, path: str, **options: Any):
        """Remember what to call.

        Args:
          path: "module:function".
          options: passed on to the function, as the subclass says.

        Raises:
          ValueError: the path has another form.
        """
        # The parts before and after the colon. Whether they exist is known in the worker alone.
        if not all(path.partition(":")[::2]):
            raise ValueError(f"path: got {path!r}; wanted 'module:function'")
        self._pool, self._path, self._options = workers, path, options

    async def _call_in_worker(self, function: Callable[..., Any], samples: Any) -> Any:
        # The worker imports this module and finds the function by its name.
        return await self._pool.call(
            f"{__name__}:{function.__name__}", self._path, self._options, samples
        )


def _drop_routes(sample: sample_lib.Sample) -> sample_lib.Sample:
    """Leave the routes out: they are long, and unpickling a device array would import jax."""
    return dataclasses.replace(sample, routes=None)


class FunctionReward(_RewardAdapter):
    """Calls `reward(sample, **options)`."""

    async def reward(self, sample: sample_lib.Sample) -> Any:
        """Score one sample."""
        return await self._call_in_worker(call_reward, _drop_routes(sample))


class SlimeReward(_RewardAdapter):
    """Calls `rm(args, sample)`: args holds the options, sample has slime's field names.

    As in slime, the metadata's `rm_type` says by which rule a record is scored. `args.rm_type` is
    that one, or else that of the options.
    """

    async def reward(self, sample: sample_lib.Sample) -> Any:
        """Score one sample."""
        return await self._call_in_worker(call_slime, _drop_routes(sample))


class VerlReward(_RewardAdapter):
    """Calls `compute_score(..., **options)`, with the task's metadata as extra_info.

    `data_source` is the record's own, or else the name of the task's source.
    """

    async def reward(self, sample: sample_lib.Sample) -> Any:
        """Score one sample."""
        return await self._call_in_worker(call_verl, _drop_routes(sample))


class TunixReward(_RewardAdapter):
    """Calls `fn` once per group.

    The columns are the entries of the metadata, the label under the name `answer`, and the options.
    """

    async def reward_group(self, samples: list[sample_lib.Sample]) -> Any:
        """Score a group."""
        return await self._call_in_worker(call_tunix, [_drop_routes(sample) for sample in samples])


# ---- what follows runs in a worker


def prepare_worker(path: str, *_: Any) -> None:
    """Import the function's module. The pool calls this outside of the time limit."""
    worker.find_function(path)


async def call_reward(path: str, options: dict[str, Any], sample: sample_lib.Sample) -> Any:
    """Call a function of this project's form."""
    return await _await_result(worker.find_function(path)(sample, **options))


async def call_slime(path: str, options: dict[str, Any], sample: sample_lib.Sample) -> Any:
    """Call a function of slime's form, on a view of the sample with slime's field names."""
    view = types.SimpleNamespace(
        prompt=[dict(message) for message in sample.task.messages],
        tokens=[*sample.prompt.tolist(), *sample.tokens.tolist()],
        response=sample.text,
        response_length=len(sample.tokens),
        loss_mask=sample.mask.astype(int).tolist(),
        label=sample.task.label,
        metadata=dict(sample.task.metadata),
    )
    rm_type = view.metadata.get("rm_type") or options.get("rm_type")
    arguments = types.SimpleNamespace(**{**options, "rm_type": rm_type})
    return await _await_result(worker.find_function(path)(arguments, view))


async def call_verl(path: str, options: dict[str, Any], sample: sample_lib.Sample) -> Any:
    """Call a function of verl's form."""
    task = sample.task
    result = worker.find_function(path)(
        # The record's own: one file may hold several kinds of tasks.
        data_source=task.data_source or task.source,
        solution_str=sample.text,
        ground_truth=task.label,
        extra_info=dict(task.metadata),
        **options,
    )
    return await _await_result(result)


async def call_tunix(
    path: str, options: dict[str, Any], samples: list[sample_lib.Sample]
) -> list[Any]:
    """Call a function of tunix's form."""
    # Tasks of a group need not have the same metadata: a missing entry is None in its column.
    names = sorted({name for sample in samples for name in sample.task.metadata})
    columns = {name: [sample.task.metadata.get(name) for sample in samples] for name in names}
    columns["answer"] = [sample.task.label for sample in samples]
    prompts = [generative.render_question(sample.task) for sample in samples]
    result = worker.find_function(path)(
        prompts, [sample.text for sample in samples], **columns, **options
    )
    return list(await _await_result(result))


async def _await_result(result: Any) -> Any:
    """Await a coroutine, and drop the strings and Nones of a mapping."""
    result = await result if inspect.isawaitable(result) else result
    if not isinstance(result, Mapping):
        return result
    # verl and slime return explanations beside the numbers; only numbers can be parts.
    return {name: value for name, value in result.items() if not isinstance(value, str | None)}
