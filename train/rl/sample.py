"""The data of reinforcement learning: tasks, episodes and samples, in plain Python.

An episode is a generator that makes one sample. It yields its next action, `Generate` (tokens from
the model) or `RunTool` (work outside of the model, such as a tool), and is sent the result. So one
loop runs any number of episodes side by side, and a test runs one without a model.

What there is of every token lies in NumPy columns: an answer may have 80,000 tokens and a batch 512
answers. `Sample` and `Generation` take any sequences of numbers and keep columns of these dtypes:
tokens and versions int32, mask bool, routes int8, log-probabilities float32.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

# Why the model stopped: an end token, a full window, a loop of tokens that it was certain of
# (M1 4.3), or a failure.
SampleStatus = Literal["stop", "length", "repetition", "error"]
# The dtype of each column of `Sample` and `Generation`, which have some of them.
COLUMN_DTYPES = {
    "prompt": np.int32,
    "tokens": np.int32,
    "mask": np.bool_,
    "logprobs": np.float32,
    "raw": np.float32,
    "versions": np.int32,
}


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
      data_source: the record's own name for its kind of task, where a file has several (verl).
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    source: str
    label: Any = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    data_source: str | None = None


@dataclasses.dataclass(frozen=True)
class Generate:
    """Asks for tokens of the model. A `Generation` is the answer."""

    tokens: tuple[int, ...]  # the prompt and all that follows it so far
    max_tokens: int  # the most tokens to generate, at least 1


# `eq=False` here and below: columns have no truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One turn of the model.

    Attributes:
      tokens: the token ids, an end token included.
      logprobs: log-probability of each token under the distribution that it was drawn from.
      versions: version of the weights that generated each token.
      status: why the turn ended.
      routes: the experts of all tokens so far, the prompt's included, as in `Sample`. None where
        they are not known.
      raw: log-probability of each token under the model's plain logits. Empty where the turn is
        over: only one that goes on needs them.
      text: the turn's text without its end token. None has the episode decode the tokens.
    """

    tokens: Any
    logprobs: Any
    versions: Any
    status: SampleStatus
    routes: np.ndarray | None = None
    raw: Any = ()
    text: str | None = None

    def __post_init__(self):
        for name, dtype in COLUMN_DTYPES.items():
            if hasattr(self, name):
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))


@dataclasses.dataclass(frozen=True)
class RunTool:
    """Asks for a call of `function` in another thread. Its result or exception is the answer."""

    function: Callable[[], Any]


@dataclasses.dataclass(eq=False)
class Sample:
    """One answer to a task, and its reward.

    The columns `tokens`, `mask`, `logprobs` and `versions` have one entry for each token of the
    answer. They are replaced and never written in place, so that copies may share them.

    Attributes:
      task: what was sampled.
      prompt: token ids.
      tokens: the model's tokens and the observations between its turns. They are never rendered or
        tokenised again.
      mask: True where the model generated the token, False in observations.
      logprobs: log-probability under the distribution that the token was drawn from, 0.0 where mask
        is False.
      versions: version of the weights that generated the token, -1 where mask is False.
      routes: [tokens, layers, experts of a token] int8, the experts that the sampler sent each
        token of prompt and answer to when it first computed the token. The last tokens, which the
        sampler never computed, have no row. None if the engine does not record routes.
      status: why the last turn ended.
      text: text of the last turn, without its end token.
      messages: all messages after the prompt.
      turn_rewards: (index in `tokens`, reward) of rewards before the end. The index is that of the
        turn's last token.
      reward: the sum that is trained on, None before the sample is scored.
      parts: the reward's parts by name, for the log.
      outcome: the part that says whether the answer is right, see `outcomes`. None before the
        sample is scored, and where that failed.
      error: why there is no reward, empty where there is one. It is the reason of a failure of
        the engine, the environment or the rewards.
      valid: False where the reward is missing. Such a sample is counted, and never trained on.
    """

    task: Task
    prompt: Any
    tokens: Any = ()
    mask: Any = ()
    logprobs: Any = ()
    versions: Any = ()
    routes: np.ndarray | None = None
    status: SampleStatus = "stop"
    text: str = ""
    messages: list[dict] = dataclasses.field(default_factory=list)
    turn_rewards: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    reward: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    outcome: float | None = None
    error: str = ""
    valid: bool = True

    def __post_init__(self):
        for name, dtype in COLUMN_DTYPES.items():
            if hasattr(self, name):
                setattr(self, name, np.asarray(getattr(self, name), dtype))

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Return the number of tokens that the model generated."""
        return int(np.count_nonzero(self.mask))

    def append_generated(self, generation: Generation) -> None:
        """Append one turn of the model."""
        mask = np.ones(len(generation.tokens), np.bool_)
        self._append(generation.tokens, mask, generation.logprobs, generation.versions)
        self.status = generation.status
        # Not appended: routes of a generation are those of all tokens so far.
        self.routes = generation.routes

    def append_observation(self, tokens: Sequence[int]) -> None:
        """Append tokens that the model reads but did not generate."""
        size = len(tokens)
        self._append(
            tokens,
            np.zeros(size, np.bool_),
            np.zeros(size, np.float32),
            np.full(size, -1, np.int32),
        )

    def _append(self, tokens: Any, mask: Any, logprobs: Any, versions: Any) -> None:
        added = {"tokens": tokens, "mask": mask, "logprobs": logprobs, "versions": versions}
        for name, values in added.items():
            column = np.asarray(values, COLUMN_DTYPES[name])
            # The first turn of an answer is most often its only one: it is not copied.
            if len(getattr(self, name)):
                column = np.concatenate([getattr(self, name), column])
            setattr(self, name, column)


def keep_first_routes(first: np.ndarray | None, routes: np.ndarray | None) -> np.ndarray | None:
    """Return routes with the rows that were recorded first.

    The engine computes the tokens of a paused episode anew, and newer weights may send them to
    other experts than those that their log-probabilities come from.

    Args:
      first: what was recorded before the pause, or None.
      routes: of all tokens so far, or None where the engine records none.
    """
    if first is None or routes is None:
        return routes
    routes = routes.copy()
    routes[: len(first)] = first
    return routes


Episode = Generator[Generate | RunTool, Any, Sample]


@dataclasses.dataclass(frozen=True)
class RewardScore:
    """The reward of one sample, or why there is none."""

    value: float | None  # None: the rewards failed, which is not a 0
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by name, for the log
    error: str = ""  # why there is no value
