"""From tokens to text and to the end of an output: one request's bookkeeping in plain Python.

Everything here is a pure function of the tokens so far (and of their log-probabilities), whatever
the dispatches that brought them, so an output never depends on timing or on its neighbours.

  * Text comes out with the last byte of each character. Text that may still become a stop string
    is held back; what follows the beginning of a stop string is never released.
  * Thinking is read off the text, not off token ids: nobody promises that its tags are single
    tokens. An output thinks if `<think>` is the first thing in it but white space; the next
    `</think>` ends that. Tags after it are text.
  * A thinking budget is kept by forcing the closing tag in, token by token.
"""

import dataclasses
import math
from collections.abc import Sequence

from infer import options as options_lib
from m1_jax import tokenizer as tokenizer_lib

OPENING_TAG, CLOSING_TAG = "<think>", "</think>"
FORCED_CLOSING_TEXT = (
    "\n</think>\n\n"  # what is forced; the model writes its own answer after a newline, too
)
MAX_CLOSING_TOKENS = 8
# M1's report: such outputs go round in circles.
LOOP_NUM_TOKENS = 3_000
LOOP_PROBABILITY = 0.99


@dataclasses.dataclass(frozen=True)
class OutputUpdate:
    """What one token brought.

    text: newly releasable text.
    finished: None while the output goes on; else "stop" (a stop token or string), "length"
      (max_tokens) or "loop".
    """

    text: str
    finish_reason: str | None


class OutputProgress:
    """One request's output so far; push its tokens in order.

    The engine's part for a thinking budget: never dispatch this row beyond `pause_at` tokens, and
    once it has that many, force `next_forced()` (or all of `close()`) instead of choosing. Every
    push moves `pause_at` on, so work that is already dispatched up to an older value stays valid.

    Attributes:
      num_tokens: pushed so far, the stop token included.
      reasoning_tokens: those up to the one that ends thinking; 0 if the output does not think.
      finished: as in the last `UpdateConfig`.
    """

    def __init__(
        self,
        options: options_lib.Options,
        tokenizer: tokenizer_lib.Tokenizer,
        loop_tokens: int = LOOP_NUM_TOKENS,
    ):
        """Start an output.

        Raises:
          ValueError: a thinking budget with a tokenizer that needs more than
            `MAX_CLOSING_TOKENS` for the closing tag.
        """
        self.num_tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: str | None = None
        self._options = options
        self._stop_ids = frozenset(options_lib.all_stop_ids(options, tokenizer.stop_ids))
        self._decoder = tokenizer.decoder()
        self._stops = _StopStrings(options.stop)
        self._thinking = _ThinkingState()
        self._loop_tokens, self._certain = loop_tokens, 0
        self._budget = options.thinking_tokens
        self._closing = () if self._budget is None else encode_closing_tag(tokenizer)
        self._closing_at: int | None = None  # how many tokens came before the first forced one

    def push(self, token: int, logp_raw: float) -> OutputUpdate:
        """Take the next token.

        Args:
          token: its id.
          logp_raw: its log-probability under the plain logits.

        Raises:
          ValueError: a token after the end, or another one than `next_forced()`.
        """
        if self.finish_reason is not None:
            raise ValueError(f"got token {token} after the end; wanted none, drop what is left")
        wanted = self.next_forced()
        if wanted is not None and token != wanted:
            raise ValueError(f"got token {token}; wanted {wanted}, which closes the thinking")
        self.num_tokens += 1
        self._count_certain_tokens(logp_raw, was_forced=wanted is not None)
        stopped = token in self._stop_ids and self.num_tokens > self._options.min_tokens
        new = "" if stopped else self._decoder.push(token)
        self._follow_thinking(new)
        text, found = self._match_stops(new)
        reason = "stop" if stopped or found else self._find_limit()
        if reason is not None and not found:
            rest, found = self._match_stops(self._decoder.flush())
            text += rest if found else rest + self._stops.flush()
            reason = "stop" if found else reason
        self.finish_reason = reason
        return OutputUpdate(text, reason)

    @property
    def pause_at(self) -> int | None:
        """Number of output tokens beyond which the row must not be dispatched; None is no end."""
        if self._budget is None or self.finish_reason is not None:
            return None
        if self.next_forced() is not None:
            return self.num_tokens
        if self._thinking.state == "open":
            return self._budget
        if self._thinking.state == "undecided":  # it may open with the very next token
            return max(self._budget, self.num_tokens + 1)
        return None

    def next_forced(self) -> int | None:
        """Return the token that must come next; None where the model chooses."""
        return next(iter(self.forced_tokens()), None)

    def forced_tokens(self) -> tuple[int, ...]:
        """Return the tokens that must come next: what is left of the closing tag, or nothing."""
        if self._closing_at is None or self.finish_reason is not None:
            return ()
        return self._closing[self.num_tokens - self._closing_at :]

    def flush(self) -> str:
        """Return the text that is held back, for an output that is cut off from outside."""
        if self.finish_reason is not None:
            return ""
        text, found = self._match_stops(self._decoder.flush())
        return text if found else text + self._stops.flush()

    def _count_certain_tokens(self, logp_raw: float, was_forced: bool) -> None:
        certain = logp_raw > math.log(LOOP_PROBABILITY) and not was_forced
        self._certain = self._certain + 1 if certain else 0

    def _follow_thinking(self, text: str) -> None:
        closed_before = self._thinking.state == "closed"
        self._thinking.push(text)
        if self._thinking.state == "open" or (
            self._thinking.state == "closed" and not closed_before
        ):
            self.reasoning_tokens = self.num_tokens
        over = self._budget is not None and self.num_tokens >= self._budget
        if over and self._closing_at is None and self._thinking.state == "open":
            self._closing_at = self.num_tokens

    def _match_stops(self, text: str) -> tuple[str, bool]:
        return self._stops.push(text, active=self.num_tokens >= self._options.min_tokens)

    def _find_limit(self) -> str | None:
        loops = self._options.stop_on_loop and self._certain >= self._loop_tokens
        if loops and self.num_tokens >= self._options.min_tokens:
            return "loop"
        return "length" if self.num_tokens >= self._options.max_tokens else None


def encode_closing_tag(tokenizer: tokenizer_lib.Tokenizer) -> tuple[int, ...]:
    """Return the ids of `FORCED_CLOSING_TEXT`.

    Raises:
      ValueError: more than `MAX_CLOSING_TOKENS`, or ids that do not read as that text.
    """
    ids = tuple(tokenizer.encode(FORCED_CLOSING_TEXT))
    if len(ids) > MAX_CLOSING_TOKENS or tokenizer.decode(ids) != FORCED_CLOSING_TEXT:
        raise ValueError(
            f"thinking_tokens: got a tokenizer that spells {FORCED_CLOSING_TEXT!r} with {len(ids)} "
            f"tokens as {tokenizer.decode(ids)!r}; wanted at most {MAX_CLOSING_TOKENS} tokens "
            "of that very text. Leave the budget out, or use the release's tokenizer."
        )
    return ids


class _StopStrings:
    """Finds the stop string that is complete first; of several that end there, the longest.

    So the result is one of the text alone, wherever the borders of tokens are.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held_text = ""

    def push(self, text: str, active: bool) -> tuple[str, bool]:
        """Return releasable text, and whether a stop string ends it.

        active: whether one that is complete with this text counts.
        """
        buffer = self._held_text + text
        if active and text:
            ends = []
            for stop in self._stops:
                # It must end in the new text: one that did before was not active then.
                start = buffer.find(stop, max(0, len(self._held_text) - len(stop) + 1))
                if start >= 0:
                    ends.append((start + len(stop), start))
            if ends:
                self._held_text = ""
                return buffer[: min(ends)[1]], True
        held = max((_overlap_length(buffer, stop) for stop in self._stops), default=0)
        cut = len(buffer) - held
        self._held_text = buffer[cut:]
        return buffer[:cut], False

    def flush(self) -> str:
        held, self._held_text = self._held_text, ""
        return held


def _overlap_length(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _ThinkingState:
    """Reads off the text whether the output thinks.

    state: "undecided" at the start, "open", "closed", or "none".
    """

    def __init__(self):
        self.state = "undecided"
        self._tail = ""

    def push(self, text: str) -> None:
        if self.state in ("closed", "none"):
            return
        self._tail += text
        if self.state == "undecided":
            self._tail = self._tail.lstrip()
            if self._tail.startswith(OPENING_TAG):
                self.state, self._tail = "open", self._tail[len(OPENING_TAG) :]
            elif not OPENING_TAG.startswith(self._tail):
                self.state = "none"
        if self.state == "open":
            if CLOSING_TAG in self._tail:
                self.state = "closed"
            self._tail = self._tail[1 - len(CLOSING_TAG) :]
