"""A request under way, and what comes of it."""

import dataclasses
import threading
from typing import Any

from infer import prompt_lookup


@dataclasses.dataclass(frozen=True)
class OutputToken:
    """One token of an output.

    logp: under the distribution it was drawn from. logp_raw: under the model's plain logits.
    version: of the weights that made it. top: the most likely tokens and their plain
    log-probabilities, as many as asked for.
    """

    id: int
    logp: float
    logp_raw: float
    version: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    finish_reason: "stop", "length", "loop", "cancelled", "suspended" or "error" (logits that are
      not finite, or a grammar that outgrew its limits on the way).
    cached_tokens: of the prompt, found in the prefix cache; cache_reason says why if none.
    """

    tokens: tuple[OutputToken, ...]
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    cache_reason: str
    reasoning_tokens: int


class Request:
    """A request under way; `Engine.submit` makes it.

    Attributes:
      tokens, text: so far. finish_reason: None while it goes on.
      routes: at the end, [tokens computed, layers, choices] int8, if the engine records them.
    """

    def __init__(self, number: int, prompt, options, stop_ids, progress, matcher, on_token):
        self.number, self.prompt = number, tuple(prompt)
        self.options, self.stop_ids = options, stop_ids
        self.progress, self.matcher, self.on_token = progress, matcher, on_token
        self.tokens: list[OutputToken] = []
        self.grammar_mask = None if matcher is None else matcher.mask()
        self.text = ""
        self.finish_reason: str | None = None
        self.cached_tokens, self.cache_reason = 0, ""
        self.routes: Any = None
        self.done = threading.Event()
        self.prompt_lookup = prompt_lookup.PromptLookup(self.prompt)

    @property
    def has_penalties(self) -> bool:
        """Whether its choices depend on what it said before."""
        o = self.options
        return o.repetition_penalty != 1 or o.presence_penalty != 0 or o.frequency_penalty != 0

    @property
    def allows_drafts(self) -> bool:
        """Whether several of its tokens can be chosen at once."""
        return not self.has_penalties and self.matcher is None and not self.progress.forced_tokens()

    def push(self, token: OutputToken) -> str:
        """Take a token; return the text that it releases."""
        update = self.progress.push(token.id, token.logp_raw)
        self.tokens.append(token)
        self.prompt_lookup.push(token.id)
        self.text += update.text
        self.finish_reason = update.finish_reason
        if self.matcher is not None and update.finish_reason is None:
            self.matcher.accept(token.id)
            self.grammar_mask = self.matcher.mask()
        return update.text

    def output(self, timeout_secs: float | None = None) -> RequestOutput:
        """Wait for the end, and return all of it.

        Raises:
          TimeoutError: it did not end in time.
        """
        if not self.done.wait(timeout_secs):
            raise TimeoutError(f"request {self.number}: not finished after {timeout_secs} s")
        return RequestOutput(
            tuple(self.tokens),
            self.text,
            str(self.finish_reason),
            len(self.prompt),
            self.cached_tokens,
            self.cache_reason,
            self.progress.reasoning_tokens,
        )
