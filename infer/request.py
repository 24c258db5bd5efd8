"""A request to the engine while it runs, and its output.

The engine knows a request's tokens before its caller does. It takes all tokens of a step first, so
that whatever a callback does finds the engine between two steps. Then it shows them one by one, and
calls back after each.
"""

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
_MAX_TEXT_PIECES = 64  # pieces of an output's text that are joined when there are so many


class EngineFailedError(RuntimeError):
    """The engine is not exact any more, and refuses all work. The cause says why."""


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
      tokens: the output's tokens, the stop token included.
      text: the output's text, without the stop token or the stop string.
      finish_reason: "stop", "length", "loop", "cancelled", "suspended", or "error".
      prompt_tokens: number of tokens of the prompt.
      cached_tokens: number of tokens of the prompt that were found in the prefix cache.
      cache_miss_reason: why none were found, else empty.
      reasoning_tokens: number of tokens up to the end of thinking, 0 if the output does not think.
      error: why the output ended in "error": `FloatingPointError` for logits that are not finite,
        `ValueError` for a grammar that grew beyond its limits, the exception of the request's own
        callback, or `EngineFailedError`. A callback that raises after the end leaves its exception
        here, too. Else None.
    """

    tokens: Sequence[OutputToken]
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    cache_miss_reason: str
    reasoning_tokens: int
    error: BaseException | None = None


@dataclasses.dataclass(frozen=True)
class OutputEvent:
    """What a token adds to an output, or an end without one.

    Attributes:
      token: the token, or None.
      text: text that it releases.
      finish_reason: None while the output goes on.
      error: why it ended in "error".
    """

    token: OutputToken | None
    text: str
    finish_reason: str | None = None
    error: BaseException | None = None


class Request:
    """A request while it runs, as `Engine.submit` returns it.

    Attributes:
      sequence_id: counts the engine's requests from 0. The scheduler knows the request by it.
      prompt: token ids.
      options: how the prompt is continued.
      stop_ids: the token ids at which the device ends the output. The host may know others.
      progress: the state of the text, of all tokens taken.
      matcher: follows the output through its grammar. None without a constraint.
      on_token: called with (request, token, new text), or None.
      tokens: the output's tokens so far.
      grammar_mask: the mask of the next token, or None without a constraint.
      prompt_lookup: what proposes drafts of the next tokens. None if nobody asks for drafts.
      finish_reason: None while the request runs.
      error: why it ended in "error", as in `RequestOutput`.
      cached_tokens: number of tokens of the prompt that were found in the prefix cache.
      cache_miss_reason: why none were found, else empty.
      routes: [computed tokens, layers, experts of a token] int8, set at the end if the engine
        records them, else None.
      done: set at the end.
      known_end: the `finish_reason` that the engine knows, perhaps before it is shown.
      is_cut_off: whether the end came from outside: nothing more is taken.
      unheard: the event that was shown last, until the callback is called for it.
    """

    def __init__(
        self,
        sequence_id: int,
        prompt: Sequence[int],
        options: options_lib.Options,
        stop_ids: tuple[int, ...],
        progress: stopping.OutputProgress,
        matcher: "grammar.GrammarMatcher | grammar.StopTokenBan | None",
        on_token: "Callable[[Request, OutputToken | None, str], Any] | None",
    ):
        self.sequence_id, self.prompt = sequence_id, tuple(prompt)
        self.options, self.stop_ids = options, stop_ids
        self.progress, self.matcher, self.on_token = progress, matcher, on_token
        self.tokens = output_tokens.OutputTokens()
        self.grammar_mask = None if matcher is None else matcher.mask()
        self.prompt_lookup: prompt_lookup_lib.PromptLookup | None = None
        self._text_pieces: list[str] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.cached_tokens, self.cache_miss_reason = 0, ""
        self.routes: np.ndarray | None = None
        self.done = threading.Event()
        self.known_end: str | None = None
        self.is_cut_off = False
        self.unheard: OutputEvent | None = None
        self._events: list[OutputEvent] = []  # taken, and shown up to `_num_shown`
        self._num_shown = 0
        self._num_heard = 0  # tokens that the callback was called for

    @property
    def text(self) -> str:
        """The output's text so far, without text that is held back."""
        return "".join(self._text_pieces)

    @property
    def has_penalties(self) -> bool:
        """Whether penalties for earlier tokens change the distribution of the next one."""
        o = self.options
        return o.repetition_penalty != 1 or o.presence_penalty != 0 or o.frequency_penalty != 0

    @property
    def may_draft(self) -> bool:
        """Whether several tokens may ever be chosen in one step."""
        # Both make a token's distribution depend on the tokens drafted before it.
        return not self.has_penalties and self.matcher is None

    @property
    def allows_drafts(self) -> bool:
        """Whether several tokens can be chosen in the next step."""
        return self.may_draft and not self.progress.forced_tokens()

    # ---- tokens that the engine takes

    def take(self, token: OutputToken) -> None:
        """Take the next token. The caller sees it when it is shown."""
        update = self.progress.push(token.id, token.logp_raw)
        if self.prompt_lookup is not None:
            self.prompt_lookup.push(token.id)
        text, reason, error = update.text, update.finish_reason, None
        if self.matcher is not None and reason is None:
            try:
                self.matcher.accept(token.id)
                self.grammar_mask = self.matcher.mask()
            except ValueError as failure:  # the grammar grew beyond its limits
                text, reason, error = text + self.progress.flush(), "error", failure
        self._add_event(OutputEvent(token, text, reason, error))

    def take_error(self, error: BaseException) -> None:
        """Take an end by "error" in place of a token."""
        self._add_event(OutputEvent(None, self.progress.flush(), "error", error))

    def take_prior(self, tokens: Sequence[OutputToken]) -> None:
        """Take tokens of an earlier engine, and show them. The callback has heard of them.

        Raises:
          ValueError: they end the output, or do not fit the options.
        """
        for token in tokens:
            self.take(token)
            if self.known_end == "error":
                raise ValueError(f"prior_tokens: {self._events[-1].error}")
            if self.known_end is not None:
                raise ValueError("prior_tokens: got a finished output; wanted one that goes on")
            self.show_next()
        self.unheard, self._num_heard = None, len(self.tokens)

    def cut_off(
        self,
        reason: str,
        error: BaseException | None,
        make_progress: Callable[[], stopping.OutputProgress],
    ) -> None:
        """End the output after the tokens that are shown. The end is shown by `show_next`."""
        if self._has_unshown:
            self.rewind(make_progress(), None)
            self.routes = None  # of other tokens
        self._add_event(OutputEvent(None, self.progress.flush(), reason, error))
        self.is_cut_off = True

    def rewind(
        self,
        progress: stopping.OutputProgress,
        matcher: "grammar.GrammarMatcher | grammar.StopTokenBan | None",
    ) -> None:
        """Go back to the tokens that are shown, whatever was interrupted. The engine takes on.

        Args:
          progress: a new one.
          matcher: a new one.
        """
        updates = [progress.push(token.id, token.logp_raw) for token in self.tokens]
        if matcher is not None and progress.finish_reason is None:
            for token in self.tokens.ids.tolist():
                matcher.accept(token)
        self._events, self._num_shown = [], 0
        self.progress, self.matcher = progress, matcher
        self.grammar_mask = None if matcher is None else matcher.mask()
        self._text_pieces = [update.text for update in updates]
        self.finish_reason = self.known_end = progress.finish_reason
        self.unheard = None
        if len(self.tokens) > self._num_heard:
            self.unheard = OutputEvent(self.tokens[-1], updates[-1].text, self.finish_reason)
        if self.prompt_lookup is not None:
            self.make_prompt_lookup()

    def make_prompt_lookup(self) -> None:
        """Begin to propose drafts. This takes a second for a million tokens."""
        tokens = [*self.prompt, *self.tokens.ids.tolist()]
        self.prompt_lookup = prompt_lookup_lib.PromptLookup(tokens)

    # ---- tokens that the caller sees

    @property
    def has_news(self) -> bool:
        """Whether something is to be shown, or to be told to the callback."""
        return self.unheard is not None or self._has_unshown

    def show_next(self) -> None:
        """Show the oldest event that was not shown, and leave it in `unheard`."""
        event, num_shown = self._events[self._num_shown], self._num_shown + 1
        if event.token is not None:
            self.tokens.append(event.token)
        pieces = self._add_text(event.text)
        # No signal comes between assignments that call nothing. An end from outside must not be
        # shown twice, as there is no going back behind it.
        self._text_pieces, self._num_shown, self.unheard = pieces, num_shown, event
        self.error, self.finish_reason = event.error, event.finish_reason

    def call_back(self) -> None:
        """Call the callback for what was shown last. Its exceptions come out."""
        event = self.unheard
        assert event is not None
        self.unheard, self._num_heard = None, len(self.tokens)
        if self.on_token is not None:
            self.on_token(self, event.token, event.text)

    def end(self) -> None:
        """Let those go on who wait for the end. A second call changes nothing."""
        self.prompt_lookup = None  # some 200 bytes a token that nobody needs any more
        self.done.set()

    @property
    def _has_unshown(self) -> bool:
        return self._num_shown < len(self._events)

    def _add_text(self, text: str) -> list[str]:
        """Return the pieces of the output's text with one more."""
        # Adding each token's text to one string would copy the string every time. New lists, as
        # another thread may be reading the old one.
        if len(self._text_pieces) >= _MAX_TEXT_PIECES:
            return [self.text, text]
        return [*self._text_pieces, text]

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
            self.error,
        )

    def _add_event(self, event: OutputEvent) -> None:
        if not self._has_unshown:  # the list would hold all tokens of the output
            self._events, self._num_shown = [], 0
        self._events.append(event)
        self.known_end = event.finish_reason
