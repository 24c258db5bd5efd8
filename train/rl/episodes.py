"""Episodes: one answer, or several turns with tools in between. Tokens in, tokens out.

The prompt is rendered once. From then on tokens are appended: the model's own, as they were
sampled, and the observations, which are the tools' results after a turn. Nothing is rendered or
tokenised again, so the trainer scores exactly the tokens that were sampled. Only the model's tokens
have mask 1, its end tokens included.

An episode ends
  * when the model ends a turn without a call, or the environment says that it is over: "stop";
  * when the model is cut off within a turn: the status says by what;
  * when no turn is left, or no room for the observation: "length";
  * at a malformed call, where the environment does not report such calls to the model: "stop".
An environment that fails makes its own sample invalid. Other episodes go on.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from absl import logging

from infer import prompt, tool_calls
from m1_jax import tokenizer as tokenizer_lib
from train.rl import sample as sample_lib
from train.rl.environments import base

_CLOSE_SECS = 10.0  # after which nobody waits for an environment's `close`
_MALFORMED_CALL_NAME = "tool_calls"  # stands for the tool's name in the answer to a malformed call


@dataclasses.dataclass(frozen=True)
class EpisodeLimits:
    """What an episode may use, each at least 1."""

    max_turns: int  # turns of the model
    max_tokens: int  # tokens of prompt, answers and observations together
    turn_tokens: int  # tokens of one turn of the model

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}: got {getattr(self, field.name)}; wanted at least 1"
                )


class _EpisodeFailure(Exception):
    """The environment failed, or broke its interface. `__cause__` says how."""


def single_turn_episode(
    task: sample_lib.Task,
    tokenizer: tokenizer_lib.Tokenizer,
    max_tokens: int,
    profile: str = "release",
) -> sample_lib.Episode:
    """Make a sample of one turn, without its reward.

    Args:
      task: what is sampled.
      max_tokens: the most tokens that the answer may have.
      profile: profile of the chat template, see `infer.prompt`.

    Raises:
      ValueError: messages or tools that cannot be rendered.
    """
    sample = _start_sample(task, tokenizer, profile)
    generation = yield sample_lib.Generate(tuple(sample.prompt.tolist()), max_tokens)
    _append_generation(sample, generation, tokenizer)
    return sample


def multi_turn_episode(
    task: sample_lib.Task,
    environment: base.Environment,
    tokenizer: tokenizer_lib.Tokenizer,
    limits: EpisodeLimits,
    profile: str = "release",
) -> sample_lib.Episode:
    """Make a sample of several turns, with its rewards, by the rules of the module's docstring.

    The sample's `text` is the last turn's. Its parts are "final", and "turns" if there were
    rewards before the end. An invalid sample has the part "error" instead, and the log has the
    reason.

    Args:
      task: what is sampled.
      environment: a fresh one. It is closed at the end, also when the episode is given up.
      limits: limits on turns and tokens.
      profile: profile of the chat template, see `infer.prompt`.

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
            final_reward = yield from _run_environment(
                lambda: _check_reward(environment.finish(text))
            )
            _set_reward(sample, final_reward)
    except _EpisodeFailure as failure:
        logging.warning("task %s: %s", task.id, failure, exc_info=failure.__cause__)
        _mark_failed(sample, str(failure))
    finally:
        _close_environment(task, environment)
    return sample


def _start_sample(
    task: sample_lib.Task, tokenizer: tokenizer_lib.Tokenizer, profile: str
) -> sample_lib.Sample:
    tools = task.tools or None  # an empty list would be rendered by some profiles
    return sample_lib.Sample(
        task, prompt.encode_prompt(tokenizer, task.messages, tools, profile=profile)
    )


def _run_turns(
    sample: sample_lib.Sample,
    environment: base.Environment,
    tokenizer: tokenizer_lib.Tokenizer,
    limits: EpisodeLimits,
    profile: str,
) -> Generator[Any, Any, str]:
    """Append turns to the sample until the episode ends.

    Returns:
      The text of the answer, empty where the model did not come to one.
    """
    for turn in range(1, limits.max_turns + 1):
        so_far = (*sample.prompt.tolist(), *sample.tokens.tolist())
        # At least 1: the last observation was appended only because it left room.
        max_tokens = min(limits.turn_tokens, limits.max_tokens - len(so_far))
        generation = yield sample_lib.Generate(so_far, max_tokens)
        _append_generation(sample, generation, tokenizer)
        if generation.status != "stop":
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
                # A default argument binds this turn's calls; a closure would see the last turn's.
                lambda calls=parsed.calls: _step_environment(environment, calls)
            )
            if step.reward:
                # At the turn's last token: the observation is not appended yet.
                sample.turn_rewards.append((len(sample.tokens) - 1, step.reward))
            if step.done:
                return parsed.text
            names = [call.name for call in parsed.calls]
            results = list(zip(names, step.results, strict=True))
        messages = [{"role": "tool", "name": name, "content": result} for name, result in results]
        observation = _encode_observation(messages, tokenizer, profile, generation.tokens)
        num_tokens = len(so_far) + len(generation.tokens) + len(observation)
        # An observation that leaves no room for an answer is not appended: nothing would follow it.
        if turn == limits.max_turns or num_tokens >= limits.max_tokens:
            break
        sample.append_observation(observation)
        sample.messages += messages
    sample.status = "length"
    return ""


def _append_generation(
    sample: sample_lib.Sample,
    generation: sample_lib.Generation,
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    """Append a turn to tokens and messages. Its text excludes the stop token."""
    sample.append_generated(generation)
    sample.text = generation.text or ""
    if generation.text is None:
        ids = generation.tokens.tolist()
        has_stop_token = bool(ids) and ids[-1] in tokenizer.stop_ids
        sample.text = tokenizer.decode(ids[: len(ids) - has_stop_token])
    sample.messages.append({"role": "assistant", "content": sample.text})
    if generation.status == "error":
        _mark_failed(sample, "the engine could not finish the answer")


def _encode_observation(
    messages: Sequence[dict[str, Any]],
    tokenizer: tokenizer_lib.Tokenizer,
    profile: str,
    written_tokens: Sequence[int],
) -> list[int]:
    """Return the tokens between two turns of the model.

    They are the end of the first turn, the results, and the head of the next turn. The end is left
    out where the model wrote it.

    Args:
      messages: messages of the results, with role "tool".
      written_tokens: the first turn, as the model wrote it.
    """
    # Rendered after a turn that stands for the model's, and cut off behind it. The last two pieces
    # of a turn are its end token and a line end: the observation begins there.
    turn = {"role": "assistant", "content": "-"}
    turn_pieces = prompt.render_prompt([turn], add_generation_prompt=False, profile=profile)
    pieces = prompt.render_prompt([turn, *messages], profile=profile)[len(turn_pieces) - 2 :]
    ids: list[int] = []
    for prompt_piece in pieces:
        if prompt_piece.special:
            ids.append(tokenizer.special_token_id(prompt_piece.text))
        else:
            ids += tokenizer.encode(prompt_piece.text)
    return ids[1:] if len(written_tokens) and written_tokens[-1] == ids[0] else ids


def _run_environment(function: Callable[[], Any]) -> Generator[sample_lib.RunTool, Any, Any]:
    """Have a worker thread call the environment, and return the call's result.

    Raises:
      _EpisodeFailure: the call raised an exception.
    """
    try:
        return (yield sample_lib.RunTool(function))
    except Exception as error:
        raise _EpisodeFailure(f"the environment failed: {type(error).__name__}: {error}") from error


def _close_environment(task: sample_lib.Task, environment: base.Environment) -> None:
    """Close an environment. One that hangs or fails at its end must not hold up other episodes."""

    def close() -> None:
        try:
            environment.close()
        except Exception as error:
            logging.warning("task %s: its environment did not close", task.id, exc_info=error)

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(_CLOSE_SECS)
    if thread.is_alive():
        logging.warning(
            "task %s: its environment did not close in %s s; going on", task.id, _CLOSE_SECS
        )


def _step_environment(
    environment: base.Environment, calls: Sequence[base.EnvironmentCall]
) -> base.EnvironmentStep:
    step = environment.step(calls)
    if len(step.results) != len(calls):
        raise ValueError(f"got {len(step.results)} results; wanted one for each of {len(calls)}")
    for result in step.results:
        result.encode()  # raises for a lone surrogate, which no tokenizer can encode
    _check_reward(step.reward)
    return step


def _check_reward(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"got the reward {value}; wanted a finite number")
    return float(value)


def _set_reward(sample: sample_lib.Sample, final_reward: float) -> None:
    """Set the sum of the turns' rewards and the final one."""
    sample.reward = final_reward + sum(reward for _, reward in sample.turn_rewards)
    sample.parts["final"] = final_reward
    if sample.turn_rewards:
        sample.parts["turns"] = sample.reward - final_reward


def _mark_failed(sample: sample_lib.Sample, reason: str) -> None:
    sample.valid, sample.status, sample.error = False, "error", reason
    sample.parts["error"] = 1.0
