"""What reinforcement learning passes around: tasks, episodes and samples; plain Python.

An episode is a generator that makes one sample. It yields what it needs next, `Generate` (tokens
from the model) or `RunTool` (work outside of it, such as a tool), and is sent the result, so one
loop runs any number of episodes side by side, and a test runs one without a model.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

# Why the model stopped: an end token, a window that was full, certainty without end (M1 4.3).
SAMPLE_STATUSES = ("stop", "length", "repetition", "error")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a group of samples is drawn for.

    messages: the prompt, as OpenAI spells it. source: where the task came from; it names the
    reward. label: what the reward compares with. tools: function schemas that the model may call.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    source: str
    label: Any = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Generate:
    """Asks for at most `max_tokens` tokens after these; answered by a `Generation`."""

    tokens: tuple[int, ...]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the model said.

    logprobs: of each token under the distribution it was drawn from. versions: of the weights that
    made each. status: one of `SAMPLE_STATUSES`. routes: see `Sample`, of all tokens so far. raw: as
    logprobs, under the model's plain logits.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    status: str
    routes: Any = None
    raw: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class RunTool:
    """Asks for `function()`, called in another thread; answered by what it returns or raises."""

    function: Callable[[], Any]


@dataclasses.dataclass
class Sample:
    """One answer to a task, and what it was worth.

    prompt: token ids. tokens: of the answer, with what tools said in between; never rendered or
      tokenised again. mask: 1 where the model wrote the token. logprobs: 0.0 where mask is 0.
    versions: of the weights that made each token, -1 where mask is 0.
    routes: [tokens, layers, choices] int8, the experts that the sampler sent the tokens to, of
      prompt and answer, but for the last ones, which it did not compute; None: not recorded.
    text: of the answer. messages: of all turns after the prompt.
    turn_rewards: (place in `tokens`, reward) of what was rewarded on the way: the place is that of
      the turn's last token.
    reward: the sum that is trained on; None while it is not scored. parts: by name.
    valid: False where no reward could be had; such a sample is counted, never trained on.
    """

    task: Task
    prompt: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    mask: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    routes: Any = None
    status: str = "stop"
    text: str = ""
    messages: list[dict] = dataclasses.field(default_factory=list)
    turn_rewards: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    reward: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    valid: bool = True

    def append_generated(self, generation: Generation) -> None:
        """Append what the model said."""
        self.tokens += generation.tokens
        self.mask += [1] * len(generation.tokens)
        self.logprobs += generation.logprobs
        self.versions += generation.versions
        self.status = generation.status
        self.routes = generation.routes

    def append_observation(self, tokens: tuple[int, ...] | list[int]) -> None:
        """Append what the model was told."""
        self.tokens += tokens
        self.mask += [0] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [-1] * len(tokens)


Episode = Generator[Generate | RunTool, Any, Sample]


@dataclasses.dataclass(frozen=True)
class RewardScore:
    """What a reward says of one sample: its value, by named parts, or why there is none."""

    value: float | None
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""
