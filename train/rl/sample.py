"""The data of reinforcement learning: tasks, episodes and samples, in plain Python.

An episode is a generator that makes one sample. It yields its next action, `Generate` (tokens from
the model) or `RunTool` (work outside of the model, such as a tool), and is sent the result. So one
loop runs any number of episodes side by side, and a test runs one without a model.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

# Why the model stopped: an end token, a full window, a loop of tokens that it was certain of
# (M1 4.3), or a failure.
SampleStatus = Literal["stop", "length", "repetition", "error"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a group of samples is drawn for.

    Attributes:
      id: unique in a run. Pass rates are counted by it.
      messages: the prompt, in OpenAI's form.
      source: name of the task's source, which selects the rewards.
      label: what rewards compare with, such as the right answer.
      metadata: further values for rewards and environments.
      tools: schemas of the functions that the model may call.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    source: str
    label: Any = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Generate:
    """Asks for tokens of the model. A `Generation` is the answer."""

    tokens: tuple[int, ...]  # the prompt and all that follows it so far
    max_tokens: int  # the most tokens to generate, at least 1


@dataclasses.dataclass(frozen=True)
class Generation:
    """One turn of the model.

    Attributes:
      tokens: the token ids, an end token included.
      logprobs: log-probability of each token under the distribution that it was drawn from.
      versions: version of the weights that generated each token.
      status: why the turn ended.
      routes: the experts of all tokens so far, the prompt's included, as in `Sample`.
      raw: log-probability of each token under the model's plain logits.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    status: SampleStatus
    routes: Any = None
    raw: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class RunTool:
    """Asks for a call of `function` in another thread. Its result or exception is the answer."""

    function: Callable[[], Any]


@dataclasses.dataclass
class Sample:
    """One answer to a task, and its reward.

    The columns `tokens`, `mask`, `logprobs` and `versions` have one entry for each token of the
    answer.

    Attributes:
      task: what was sampled.
      prompt: token ids.
      tokens: the model's tokens and the observations between its turns. They are never rendered or
        tokenised again.
      mask: 1 where the model generated the token, 0 in observations.
      logprobs: log-probability under the distribution that the token was drawn from, 0.0 where mask
        is 0.
      versions: version of the weights that generated the token, -1 where mask is 0.
      routes: [tokens, layers, experts of a token] int8, the experts that the sampler sent each
        token of prompt and answer to. The last tokens, which the sampler never computed, have no
        row. None if the engine does not record routes.
      status: why the last turn ended.
      text: text of the last turn, without its end token.
      messages: all messages after the prompt.
      turn_rewards: (index in `tokens`, reward) of rewards before the end. The index is that of the
        turn's last token.
      reward: the sum that is trained on, None before the sample is scored.
      parts: the reward's parts by name, for the log.
      valid: False where the reward is missing. Such a sample is counted, and never trained on.
    """

    task: Task
    prompt: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    mask: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    routes: Any = None
    status: SampleStatus = "stop"
    text: str = ""
    messages: list[dict] = dataclasses.field(default_factory=list)
    turn_rewards: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    reward: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    valid: bool = True

    def append_generated(self, generation: Generation) -> None:
        """Append one turn of the model."""
        self.tokens += generation.tokens
        self.mask += [1] * len(generation.tokens)
        self.logprobs += generation.logprobs
        self.versions += generation.versions
        self.status = generation.status
        # Not appended: routes of a generation are those of all tokens so far.
        self.routes = generation.routes

    def append_observation(self, tokens: tuple[int, ...] | list[int]) -> None:
        """Append tokens that the model reads but did not generate."""
        self.tokens += tokens
        self.mask += [0] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [-1] * len(tokens)


Episode = Generator[Generate | RunTool, Any, Sample]


@dataclasses.dataclass(frozen=True)
class RewardScore:
    """The reward of one sample, or why there is none."""

    value: float | None  # None: the rewards failed, which is not a 0
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by name, for the log
    error: str = ""  # why there is no value
