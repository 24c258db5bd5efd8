"""What a run's config says about sampling: tasks, episodes, the engine's sizes and options.

`train/rl/loop.py` calls these functions once, before the first batch.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from absl import logging

from infer import config as engine_config
from infer import prompt
from m1_jax import durable, multihost
from m1_jax import tokenizer as tokenizer_lib
from train.rl import config as rl_config
from train.rl import episodes, groups, rollout, task_checks, task_store, tool_pool
from train.rl import sample as sample_lib
from train.rl import tasks as tasks_lib
from train.rl.environments import catalog
from train.rl.rewards import compose

SourceTasks = tasks_lib.FileTasks | tasks_lib.GeneratedTasks | tasks_lib.TaskSubset
TasksBySource = Mapping[str, SourceTasks]
TASKS_DIRECTORY = "tasks"  # in the workdir


def open_run_tasks(
    config: rl_config.RlConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    workdir: pathlib.Path,
    stack: contextlib.ExitStack,
) -> tuple[TasksBySource, TasksBySource]:
    """Return the tasks to train on and the held-out ones, by source.

    Process 0 alone draws tasks, so the other processes get none. They wait until it has them.

    Args:
      config: config of the run.
      tokenizer: encodes the prompts.
      workdir: directory of the run, which keeps generated tasks.
      stack: closes the tasks' files.

    Raises:
      ValueError: a task whose prompt is longer than the config allows, or no such generator.
      DataError: files that cannot be read, generated tasks that are damaged, or tasks that lack
        what their rewards or their environment need.
      ImportError: reasoning-gym is not installed, and tasks of it are yet to be made.
    """
    if jax.process_index():
        # Process 0 may make tasks for an hour. No time limit of Orbax counts here.
        multihost.broadcast_object(None)
        return {}, {}
    directory = workdir / TASKS_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    sources = (*config.sources, *config.evaluation.sources)
    for source in sources:
        tasks_lib.check_task_source(source, directory)
    # Files come first: a file that is missing must not stop the run after an hour of making tasks.
    opened: dict[int, SourceTasks] = {}
    max_tokens = config.rollout.max_prompt_tokens
    for number in sorted(range(len(sources)), key=lambda number: bool(sources[number].make)):
        source = sources[number]
        tasks = tasks_lib.open_task_source(source, directory)
        stack.callback(tasks.close)
        task_checks.check_needs(
            tasks,
            source.name,
            config.rewards,
            config.agent.environment if config.agent else None,
            _record_path(source, directory, ".checked.json"),
        )
        opened[number] = check_prompts(source, tasks, tokenizer, max_tokens, directory)
    multihost.broadcast_object(None)
    by_source = [(source.name, opened[number]) for number, source in enumerate(sources)]
    num_train = len(config.sources)
    return dict(by_source[:num_train]), dict(by_source[num_train:])


def check_prompts(
    source: tasks_lib.TaskSource,
    tasks: tasks_lib.FileTasks | tasks_lib.GeneratedTasks,
    tokenizer: tokenizer_lib.Tokenizer,
    max_tokens: int,
    directory: pathlib.Path,
) -> SourceTasks:
    """Return the tasks whose prompt has at most `max_tokens` tokens.

    Raises:
      ValueError: a longer prompt where the source drops none, or no task that is short enough. A
        long prompt then stops the run before the first batch, not after days.
    """
    lengths = _measure_prompts(source, tasks, tokenizer, directory)
    kept = [index for index, length in enumerate(lengths) if length <= max_tokens]
    if len(kept) == len(lengths):
        return tasks
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if source.overlong == "drop" and kept:
        logging.warning(
            "tasks %s: left out %d of %d, whose prompts have more than %d tokens (the longest: %d)",
            source.name,
            len(lengths) - len(kept),
            len(lengths),
            max_tokens,
            lengths[longest],
        )
        return tasks_lib.TaskSubset(tasks, kept)
    raise ValueError(
        f"task {tasks[longest].id} of {source.name}: got a prompt of {lengths[longest]} tokens; "
        f"wanted at most {max_tokens} (rollout.max_prompt_tokens). It is the longest prompt of its "
        f"source, where {len(lengths) - len(kept)} of {len(lengths)} are too long. Raise that, or "
        "leave long tasks out by overlong='drop' of the source."
    )


def _measure_prompts(
    source: tasks_lib.TaskSource,
    tasks: tasks_lib.FileTasks | tasks_lib.GeneratedTasks,
    tokenizer: tokenizer_lib.Tokenizer,
    directory: pathlib.Path,
) -> list[int]:
    """Return the number of tokens of each prompt.

    All prompts are encoded once, and the directory of tasks keeps their lengths. Later starts
    encode the longest one alone, as long as tasks and tokenizer are the same and it still becomes
    the same tokens.
    """
    path = _record_path(source, directory, ".longest_prompt.json")
    identity = {"tasks": tasks.fingerprint(), "tokenizer": tokenizer.fingerprint}
    saved = _read_longest_prompt(path)
    index, lengths = saved.get("index", 0), saved.get("lengths")
    if (
        saved.get("identity") == identity
        and lengths is not None
        and saved.get("tokens") == _hash_tokens(_encode_task(tokenizer, tasks[index]))
    ):
        return lengths
    # Many tasks take minutes, so there is a progress bar.
    progress = tqdm.tqdm(range(len(tasks)), f"prompts of {source.name}", disable=None)
    lengths = [len(_encode_task(tokenizer, tasks[i])) for i in progress]
    index = max(range(len(lengths)), key=lengths.__getitem__)
    digest = _hash_tokens(_encode_task(tokenizer, tasks[index]))
    saved = {"identity": identity, "index": index, "tokens": digest, "lengths": lengths}
    durable.write_text_atomically(path, json.dumps(saved))
    return lengths


def _record_path(
    source: tasks_lib.TaskSource, directory: pathlib.Path, suffix: str
) -> pathlib.Path:
    return task_store.source_path(tasks_lib.describe_source(source), directory, suffix)


def _read_longest_prompt(path: pathlib.Path) -> dict[str, Any]:
    """Return what an earlier start wrote about a source's prompts, or an empty dict."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        logging.warning("%s: got no JSON object: %s; encoding all prompts again", path, error)
        return {}


def _encode_task(tokenizer: tokenizer_lib.Tokenizer, task: sample_lib.Task) -> list[int]:
    return prompt.encode_prompt(tokenizer, task.messages, task.tools or None)


def _hash_tokens(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def open_rewards(
    config: rl_config.RlConfig, stack: contextlib.ExitStack
) -> compose.GroupScorer | None:
    """Return what scores samples on process 0, or None where environments give all rewards."""
    if config.rewards is None or jax.process_index():
        return None
    rewards = compose.GroupScorer(config.rewards)
    stack.callback(rewards.close)
    return rewards


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


def make_sampler(
    config: rl_config.RlConfig,
    model: Any,
    tokenizer: tokenizer_lib.Tokenizer,
    held_out_tasks: TasksBySource,
) -> rollout.RolloutSampler:
    """Return the run's sampler. Every process calls this.

    Args:
      config: config of the run.
      model: the sampler's model with its first weights.
      tokenizer: tokenizer of the run.
      held_out_tasks: tasks that are evaluated, by source.
    """
    agent, tools = config.agent, None
    if agent is not None:
        tools = tool_pool.ToolPool(agent.tool_workers, agent.tool_limit_secs)
    return rollout.RolloutSampler(
        model,
        tokenizer,
        make_run_engine_config(config, held_out_tasks),
        make_rollout_sampling(config.rollout),
        tools,
    )


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
