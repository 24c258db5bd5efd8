"""Episodes: one answer, or turns with tools in between; tokens in, tokens out.

The prompt is rendered once. From then on tokens are appended: those that the model wrote, as it
wrote them, and those that it is told, each tool turn encoded by itself. Nothing is rendered or
tokenised again, so the trainer scores the very tokens that were sampled. Only what the model
wrote has mask 1, its end tokens among it.

An episode ends
  * when the model ends a turn without a call, or the environment says that it is over: "stop";
  * when the model is cut off within a turn: the status says by what;
  * when there are no more turns or no more room for what the model would be told: "length";
  * at a malformed call, where the environment does not tell the model of it: "stop".
An environment that fails makes the sample invalid, and ends nothing else.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from absl import logging

from infer import prompt, tool_calls
from m1_jax import tokenizer as tokenizer_lib
from train.rl import sample as sample_lib
from train.rl.environments import base

_MALFORMED_CALL_NAME = "tool_calls"  # who answers a call that has no tool's name


@dataclasses.dataclass(frozen=True)
class EpisodeLimits:
    """What an episode may use, each at least 1.

    max_turns: of the model. max_tokens: prompt, answers and results together; no episode is
    longer. turn_tokens: of one turn.
    """

    max_turns: int
    max_tokens: int
    turn_tokens: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}: got {getattr(self, field.name)}; wanted at least 1"
                )


class _EpisodeFailure(Exception):
    """The environment failed, or broke its promises; the cause says how."""


def single_turn_episode(
    task: sample_lib.Task,
    tokenizer: tokenizer_lib.Tokenizer,
    max_tokens: int,
    profile: str = "release",
) -> sample_lib.Episode:
    """Make a sample of one turn, without its reward.

    Args:
      max_tokens: of the answer.
      profile: of the chat template, see `infer.prompt`.

    Raises:
      ValueError: messages or tools that cannot be rendered.
    """
    sample = _start_sample(task, tokenizer, profile)
    made = yield sample_lib.Generate(sample.prompt, max_tokens)
    _append_generation(sample, made, tokenizer)
    return sample


def multi_turn_episode(
    task: sample_lib.Task,
    environment: base.Environment,
    tokenizer: tokenizer_lib.Tokenizer,
    limits: EpisodeLimits,
    profile: str = "release",
) -> sample_lib.Episode:
    """Make a sample of several turns, with its rewards; see the module's docstring.

    The sample's `text` is the last turn's. Its parts are "final", and "turns" if there were
    rewards on the way; an invalid sample has "error" instead, and the log has the reason.

    Args:
      environment: a fresh one; it is closed at the end, also when the episode is given up.
      profile: of the chat template, see `infer.prompt`.

    Raises:
      ValueError: messages or tools that cannot be rendered.
    """
    sample = _start_sample(task, tokenizer, profile)
    try:
        if len(sample.prompt) >= limits.max_tokens:
            raise _EpisodeFailure(
                f"got a prompt of {len(sample.prompt)} tokens; wanted fewer than max_tokens, "
                f"{limits.max_tokens}. Leave the task out."
            )
        yield from _run_environment(lambda: environment.start(task))
        text = yield from _run_turns(sample, environment, tokenizer, limits, profile)
        if sample.valid:
            final = yield from _run_environment(lambda: _check_reward(environment.finish(text)))
            _set_reward(sample, final)
    except _EpisodeFailure as failure:
        logging.warning("task %s: %s", task.id, failure, exc_info=failure.__cause__)
        _mark_failed(sample)
    finally:
        environment.close()
    return sample


def _start_sample(
    task: sample_lib.Task, tokenizer: tokenizer_lib.Tokenizer, profile: str
) -> sample_lib.Sample:
    tools = task.tools or None  # an empty list would be rendered by some profiles
    return sample_lib.Sample(
        task, tuple(prompt.encode_prompt(tokenizer, task.messages, tools, profile=profile))
    )


def _run_turns(
    sample: sample_lib.Sample,
    environment: base.Environment,
    tokenizer: tokenizer_lib.Tokenizer,
    limits: EpisodeLimits,
    profile: str,
) -> Generator[Any, Any, str]:
    """Return the answer, empty where the model did not come to one."""
    for turn in range(1, limits.max_turns + 1):
        so_far = (*sample.prompt, *sample.tokens)
        room = min(limits.turn_tokens, limits.max_tokens - len(so_far))
        made = yield sample_lib.Generate(so_far, room)
        _append_generation(sample, made, tokenizer)
        if made.status != "stop":
            return ""
        try:
            parsed = tool_calls.parse_turn(sample.text)
        except ValueError as error:
            if not environment.reports_malformed_calls:
                return ""
            results = [(_MALFORMED_CALL_NAME, f"error: {error}")]
        else:
            if not parsed.calls:
                return parsed.text
            step = yield from _run_environment(
                lambda calls=parsed.calls: _step_environment(environment, calls)
            )
            if step.reward:
                sample.turn_rewards.append((len(sample.tokens) - 1, step.reward))
            if step.done:
                return parsed.text
            names = [call.name for call in parsed.calls]
            results = list(zip(names, step.results, strict=True))
        messages = [{"role": "tool", "name": name, "content": said} for name, said in results]
        told = _encode_observation(messages, tokenizer, profile, made.tokens)
        if turn == limits.max_turns or len(so_far) + len(made.tokens) + len(told) >= (
            limits.max_tokens
        ):
            break
        sample.append_observation(told)
        sample.messages += messages
    sample.status = "length"
    return ""


def _append_generation(
    sample: sample_lib.Sample,
    generation: sample_lib.Generation,
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    """Append a turn to tokens and messages; its text is without the token that ends it."""
    sample.append_generated(generation)
    ended = bool(generation.tokens) and generation.tokens[-1] in tokenizer.stop_ids
    sample.text = tokenizer.decode(generation.tokens[: len(generation.tokens) - ended])
    sample.messages.append({"role": "assistant", "content": sample.text})
    if generation.status == "error":
        _mark_failed(sample)


def _encode_observation(
    messages: Sequence[dict[str, Any]],
    tokenizer: tokenizer_lib.Tokenizer,
    profile: str,
    written_tokens: Sequence[int],
) -> list[int]:
    """Return what stands between a turn and the next: its end, the results, the next head.

    The turn's end is left out where the model wrote it.
    """
    turn = {"role": "assistant", "content": "-"}
    before = prompt.render_prompt([turn], add_generation_prompt=False, profile=profile)
    pieces = prompt.render_prompt([turn, *messages], profile=profile)[len(before) - 2 :]
    ids: list[int] = []
    for piece in pieces:
        if piece.special:
            ids.append(tokenizer.special_token_id(piece.text))
        else:
            ids += tokenizer.encode(piece.text)
    return ids[1:] if written_tokens and written_tokens[-1] == ids[0] else ids


def _run_environment(function: Callable[[], Any]) -> Generator[sample_lib.RunTool, Any, Any]:
    """Have the environment do something.

    Raises:
      _Failure: it did not.
    """
    try:
        return (yield sample_lib.RunTool(function))
    except Exception as error:
        raise _EpisodeFailure(f"the environment failed: {type(error).__name__}: {error}") from error


def _step_environment(
    environment: base.Environment, calls: Sequence[base.EnvironmentCall]
) -> base.EnvironmentStep:
    step = environment.step(calls)
    if len(step.results) != len(calls):
        raise ValueError(f"got {len(step.results)} results; wanted one for each of {len(calls)}")
    for result in step.results:
        result.encode()  # a lone surrogate is no text
    _check_reward(step.reward)
    return step


def _check_reward(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"got the reward {value}; wanted a finite number")
    return float(value)


def _set_reward(sample: sample_lib.Sample, final: float) -> None:
    sample.reward = final + sum(reward for _, reward in sample.turn_rewards)
    sample.parts["final"] = final
    if sample.turn_rewards:
        sample.parts["turns"] = sample.reward - final


def _mark_failed(sample: sample_lib.Sample) -> None:
    sample.valid, sample.status = False, "error"
    sample.parts["error"] = 1.0
