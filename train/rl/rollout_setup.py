"""What a run's config says about sampling: tasks, episodes, the engine's sizes and options.

`train/rl/loop.py` calls these functions once, before the first batch.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm

from infer import config as engine_config
from infer import prompt
from m1_jax import tokenizer as tokenizer_lib
from train.rl import config as rl_config
from train.rl import episodes, groups, rollout
from train.rl import sample as sample_lib
from train.rl import tasks as tasks_lib
from train.rl.environments import catalog

TasksBySource = Mapping[str, tasks_lib.FileTasks | tasks_lib.GeneratedTasks]


def open_run_tasks(
    config: rl_config.RlConfig, tokenizer: tokenizer_lib.Tokenizer, stack: contextlib.ExitStack
) -> tuple[TasksBySource, TasksBySource]:
    """Return the tasks to train on and the held-out ones, by source.

    `stack` closes their files.

    Raises:
      ValueError: a task whose prompt is longer than the config allows.
      DataError: files that cannot be read.
    """
    tasks = _open_sources(config, config.sources, tokenizer, stack)
    return tasks, _open_sources(config, config.evaluation.sources, tokenizer, stack)


def _open_sources(
    config: rl_config.RlConfig,
    sources: Sequence[tasks_lib.TaskSource],
    tokenizer: tokenizer_lib.Tokenizer,
    stack: contextlib.ExitStack,
) -> TasksBySource:
    max_tokens = config.rollout.max_prompt_tokens
    tasks_by_source = {}
    for source in sources:
        tasks = tasks_by_source[source.name] = tasks_lib.open_task_source(source)
        stack.callback(tasks.close)
        # Every prompt is encoded here, so that a long one stops the run before the first batch,
        # not after days. Many tasks take minutes, so there is a progress bar.
        for i in tqdm.tqdm(range(len(tasks)), f"prompts of {source.name}", disable=None):
            task = tasks[i]
            num_tokens = len(prompt.encode_prompt(tokenizer, task.messages, task.tools or None))
            if num_tokens > max_tokens:
                raise ValueError(
                    f"task {task.id}: got a prompt of {num_tokens} tokens; wanted at most "
                    f"{max_tokens} (rollout.max_prompt_tokens). Raise that, or leave the task out."
                )
    return tasks_by_source


def make_episode_factory(
    config: rl_config.RlConfig, tokenizer: tokenizer_lib.Tokenizer
) -> groups.EpisodeFactory:
    """Return what begins an episode from a task and its window, in tokens."""
    agent = config.agent
    if agent is None:
        return lambda task, window: episodes.single_turn_episode(task, tokenizer, window)

    def make_agent_episode(task: sample_lib.Task, window: int) -> sample_lib.Episode:
        limits = episodes.EpisodeLimits(
            max_turns=agent.max_turns,
            # Prompt, answers and tools' tokens together, as a row of the trainer must hold them.
            max_tokens=config.rollout.max_prompt_tokens + window,
            turn_tokens=min(agent.turn_tokens, window),
        )
        # Every episode changes its environment, so every episode gets a fresh one.
        environment = catalog.make_environment(agent.environment)
        return episodes.multi_turn_episode(task, environment, tokenizer, limits)

    return make_agent_episode


def make_run_engine_config(
    config: rl_config.RlConfig, held_out_tasks: TasksBySource
) -> engine_config.EngineConfig:
    """Return the sizes of the run's engine, whose queue holds a batch or an evaluation at once.

    Raises:
      ValueError: `rollout.engine` has an unknown field, or sizes that do not fit each other.
    """
    rollout_config = config.rollout
    # Replayed routes must have been recorded. The config's own fields win.
    sizes: dict[str, Any] = {
        "record_routes": rollout_config.replay_routes,
        **dict(rollout_config.engine),
    }
    # All episodes of a round are submitted at once, and so are those of an evaluation.
    num_groups = round(rollout_config.groups * rollout_config.oversample)
    batch_samples = num_groups * rollout_config.group_size
    held_out_samples = sum(map(len, held_out_tasks.values())) * config.evaluation.samples
    return rollout.make_engine_config(
        sizes, rollout_config.max_sample_tokens, max(batch_samples, held_out_samples, 1)
    )


def make_rollout_sampling(config: rl_config.RolloutConfig) -> rollout.RolloutSampling:
    """Return how tokens are drawn: the fields that both classes have."""
    names = [field.name for field in dataclasses.fields(rollout.RolloutSampling)]
    return rollout.RolloutSampling(**{name: getattr(config, name) for name in names})
