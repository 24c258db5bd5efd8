"""A request to the engine while it runs, and its output."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infer import grammar, output_tokens, stopping
from infer import options as options_lib
from infer import prompt_lookup as prompt_lookup_lib

# A user of requests imports this module alone.
OutputToken = output_tokens.OutputToken
OutputTokens = output_tokens.OutputTokens
_MAX_TEXT_PIECES = 1024  # pieces of an output's text that are joined when there are so many


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
      tokens: the output's tokens, the stop token included.
      text: the output's text, without the stop token or the stop string.
      finish_reason: "stop", "length", "loop", "cancelled", "suspended", or "error" for logits that
        are not finite or a grammar that grew beyond its limits.
      prompt_tokens: number of tokens of the prompt.
      cached_tokens: number of tokens of the prompt that were found in the prefix cache.
      cache_miss_reason: why none were found, else empty.
      reasoning_tokens: number of tokens up to the end of thinking, 0 if the output does not think.
    """

    tokens: Sequence[OutputToken]
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    cache_miss_reason: str
    reasoning_tokens: int


class Request:
    """A request while it runs, as `Engine.submit` returns it.

    Attributes:
      sequence_id: counts the engine's requests from 0. The scheduler knows the request by it.
      prompt: token ids.
      options: how the prompt is continued.
      stop_ids: all token ids that end the output.
      progress: the state of the text.
      matcher: follows the output through its grammar. None without a constraint.
      on_token: called with (request, token, new text), or None.
      tokens: the output's tokens so far.
      grammar_mask: the mask of the next token, or None without a constraint.
      finish_reason: None while the request runs.
      cached_tokens: number of tokens of the prompt that were found in the prefix cache.
      cache_miss_reason: why none were found, else empty.
      routes: [computed tokens, layers, experts of a token] int8, set at the end if the engine
        records them, else None.
      done: set at the end.
    """

    def __init__(
        self,
        sequence_id: int,
        prompt: Sequence[int],
        options: options_lib.Options,
        stop_ids: tuple[int, ...],
        progress: stopping.OutputProgress,
        matcher: grammar.GrammarMatcher | None,
        on_token: "Callable[[Request, OutputToken, str], Any] | None",
    ):
        self.sequence_id, self.prompt = sequence_id, tuple(prompt)
        self.options, self.stop_ids = options, stop_ids
        self.progress, self.matcher, self.on_token = progress, matcher, on_token
        self.tokens = output_tokens.OutputTokens()
        self.grammar_mask = None if matcher is None else matcher.mask()
        self._text_pieces: list[str] = []
        self.finish_reason: str | None = None
        self.cached_tokens, self.cache_miss_reason = 0, ""
        self.routes: np.ndarray | None = None
        self.done = threading.Event()
        self._prompt_lookup: prompt_lookup_lib.PromptLookup | None = None

    @property
    def text(self) -> str:
        """The output's text so far, without text that is held back."""
        return "".join(self._text_pieces)

    @property
    def prompt_lookup(self) -> prompt_lookup_lib.PromptLookup:
        """What proposes drafts of the next tokens."""
        # Made when drafts are first asked for: it takes some 200 bytes a token.
        if self._prompt_lookup is None:
            tokens = [*self.prompt, *self.tokens.ids.tolist()]
            self._prompt_lookup = prompt_lookup_lib.PromptLookup(tokens)
        return self._prompt_lookup

    @property
    def has_penalties(self) -> bool:
        """Whether penalties for earlier tokens change the distribution of the next one."""
        o = self.options
        return o.repetition_penalty != 1 or o.presence_penalty != 0 or o.frequency_penalty != 0

    @property
    def allows_drafts(self) -> bool:
        """Whether several tokens can be chosen in one step."""
        # Each of the three makes a token's distribution depend on the tokens drafted before it.
        return not self.has_penalties and self.matcher is None and not self.progress.forced_tokens()

    def push(self, token: OutputToken) -> str:
        """Take a token, and return the text that it releases."""
        update = self.progress.push(token.id, token.logp_raw)
        self.tokens.append(token)
        if self._prompt_lookup is not None:
            self._prompt_lookup.push(token.id)
        self.add_text(update.text)
        self.finish_reason = update.finish_reason
        if self.matcher is not None and update.finish_reason is None:
            self.matcher.accept(token.id)
            self.grammar_mask = self.matcher.mask()
        return update.text

    def add_text(self, text: str) -> None:
        """Add to the output's text."""
        # Adding each token's text to one string would copy the string every time. A new list, as
        # another thread may be reading the old one.
        if len(self._text_pieces) == _MAX_TEXT_PIECES:
            self._text_pieces = [self.text]
        self._text_pieces.append(text)

    def output(self, timeout_secs: float | None = None) -> RequestOutput:
        """Wait for the end, and return the whole output.

        Raises:
          TimeoutError: the request did not end in time.
        """
        if not self.done.wait(timeout_secs):
            raise TimeoutError(f"request {self.sequence_id}: not finished after {timeout_secs} s")
        return RequestOutput(
            self.tokens,
            self.text,
            str(self.finish_reason),
            len(self.prompt),
            self.cached_tokens,
            self.cache_miss_reason,
            self.progress.reasoning_tokens,
        )
