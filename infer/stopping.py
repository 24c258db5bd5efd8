"""From tokens to text and to the end of an output: one request's bookkeeping in plain Python.

Everything here is a pure function of the tokens so far and of their log-probabilities. It does not
depend on the dispatches that brought them, so an output depends neither on timing nor on the
requests beside it.

  * Text comes out with the last byte of each character. Text that may still become a stop string
    is held back. Neither a complete stop string nor what follows it is released.
  * Control tokens have no text. One whose name is a stop string ends the output all the same, as
    does ordinary text that spells the name.
  * Thinking is read off the text, not off token ids: nothing promises that its tags are single
    tokens. An output thinks if `<think>` is the first thing in it but white space. The next
    `</think>` ends the thinking. Later tags are text.
  * A thinking budget is kept by forcing the closing tag in, token by token.
"""

import dataclasses
import math
from collections.abc import Sequence

from infer import options as options_lib
from infer import partial_match
from m1_jax import tokenizer as tokenizer_lib

OPENING_TAG, CLOSING_TAG = "<think>", "</think>"
# The text that ends thinking at its budget. A model that ends by itself writes line ends too.
FORCED_CLOSING_TEXT = "\n</think>\n\n"
MAX_CLOSING_TOKENS = 8
# An output is taken for a loop after so many tokens in a row above this probability (M1 4.3).
LOOP_NUM_TOKENS = 3_000
LOOP_PROBABILITY = 0.99


@dataclasses.dataclass(frozen=True)
class OutputUpdate:
    """The effect of one token.

    Attributes:
      text: text that the token released.
      finish_reason: None while the output goes on, else "stop" (a stop token or string), "length"
        (max_tokens) or "loop".
    """

    text: str
    finish_reason: str | None


class OutputProgress:
    """One request's output so far. Tokens are pushed in order.

    For a thinking budget, the engine never dispatches this row beyond `pause_at` tokens. Once the
    output has that many, the engine forces `next_forced()`, or all of `forced_tokens()`, instead of
    sampling. A push never moves `pause_at` back, so work that is already dispatched up to an older
    value stays valid.

    Attributes:
      num_tokens: tokens pushed so far, the stop token included.
      reasoning_tokens: tokens up to the end of thinking, 0 if the output does not think.
      finish_reason: why the output ended, as in the last `OutputUpdate`.
    """

    def __init__(
        self,
        options: options_lib.Options,
        tokenizer: tokenizer_lib.Tokenizer,
        loop_tokens: int = LOOP_NUM_TOKENS,
    ):
        """Start an output.

        Args:
          options: the request's options.
          tokenizer: decodes the tokens. Its stop tokens end the output.
          loop_tokens: tokens in a row that are taken for a loop. Tests set it.

        Raises:
          ValueError: a thinking budget with a tokenizer that needs more than
            `MAX_CLOSING_TOKENS` for the closing tag, or a stop string that holds the name of a
            control token and more.
        """
        self.num_tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: str | None = None
        self._options = options
        self._stop_ids = frozenset(options_lib.all_stop_ids(options, tokenizer.stop_ids))
        self._stop_string_ids = _find_stop_string_ids(options.stop, tokenizer)
        self._decoder = tokenizer.decoder()
        self._stops = _StopStrings(options.stop)
        self._thinking = _ThinkingState()
        self._loop_tokens, self._num_certain = loop_tokens, 0
        # Where all of the output is the answer to a constraint, there is no free thinking to close.
        is_answer_alone = options.constraint is not None and not options.after_thinking
        self._budget = None if is_answer_alone else options.thinking_tokens
        self._closing = () if self._budget is None else encode_closing_tag(tokenizer)
        self._num_before_closing: int | None = None  # tokens before the first forced one

    def push(self, token: int, logp_raw: float) -> OutputUpdate:
        """Take the next token.

        Args:
          token: its id.
          logp_raw: its log-probability under the plain logits.

        Raises:
          ValueError: a token after the end, or one that differs from `next_forced()`.
        """
        if self.finish_reason is not None:
            raise ValueError(f"got token {token} after the end; wanted none, drop what is left")
        forced_token = self.next_forced()
        if forced_token is not None and token != forced_token:
            raise ValueError(f"got token {token}; wanted {forced_token}, which closes the thinking")
        self.num_tokens += 1
        self._count_certain_tokens(logp_raw, was_forced=forced_token is not None)
        is_stop_token = token in self._stop_ids and self.num_tokens > self._options.min_tokens
        # The last one counts among the tokens before the end, as with any stop string.
        if token in self._stop_string_ids and self.num_tokens >= self._options.min_tokens:
            is_stop_token = True
        # A stop token ends the output and has no text of its own.
        token_text = "" if is_stop_token else self._decoder.push(token)
        self._follow_thinking(token_text)
        text, has_stop_string = self._match_stops(token_text)
        reason = "stop" if is_stop_token or has_stop_string else self._find_limit()
        if reason is not None and not has_stop_string:
            # Bytes of an incomplete character come out last, and may complete a stop string.
            last_text, has_stop_string = self._match_stops(self._decoder.flush())
            text += last_text if has_stop_string else last_text + self._stops.flush()
            reason = "stop" if has_stop_string else reason
        self.finish_reason = reason
        return OutputUpdate(text, reason)

    @property
    def pause_at(self) -> int | None:
        """Most output tokens that the row may be dispatched to, None without a limit."""
        if self._budget is None or self.finish_reason is not None:
            return None
        if self.next_forced() is not None:
            return self.num_tokens
        if self._thinking.state == "open":
            return self._budget
        if self._thinking.state == "undecided":  # thinking may open with the next token
            return max(self._budget, self.num_tokens + 1)
        return None

    def next_forced(self) -> int | None:
        """Return the token that must come next, None where the model chooses."""
        return next(iter(self.forced_tokens()), None)

    def forced_tokens(self) -> tuple[int, ...]:
        """Return the rest of the closing tag, which must come next, or () if nothing is forced."""
        if self._num_before_closing is None or self.finish_reason is not None:
            return ()
        return self._closing[self.num_tokens - self._num_before_closing :]

    def flush(self) -> str:
        """Return the text that is held back, for an output that is cut off from outside."""
        if self.finish_reason is not None:
            return ""
        text, has_stop_string = self._match_stops(self._decoder.flush())
        return text if has_stop_string else text + self._stops.flush()

    def _count_certain_tokens(self, logp_raw: float, was_forced: bool) -> None:
        # A forced token is not the model's choice, so it ends a row of certain ones.
        is_certain = logp_raw > math.log(LOOP_PROBABILITY) and not was_forced
        self._num_certain = self._num_certain + 1 if is_certain else 0

    def _follow_thinking(self, text: str) -> None:
        was_closed = self._thinking.state == "closed"
        self._thinking.push(text)
        if self._thinking.state == "open" or (self._thinking.state == "closed" and not was_closed):
            self.reasoning_tokens = self.num_tokens
        over_budget = self._budget is not None and self.num_tokens >= self._budget
        if over_budget and self._num_before_closing is None and self._thinking.state == "open":
            self._num_before_closing = self.num_tokens

    def _match_stops(self, text: str) -> tuple[str, bool]:
        return self._stops.push(text, active=self.num_tokens >= self._options.min_tokens)

    def _find_limit(self) -> str | None:
        loops = self._options.stop_on_loop and self._num_certain >= self._loop_tokens
        if loops and self.num_tokens >= self._options.min_tokens:
            return "loop"
        return "length" if self.num_tokens >= self._options.max_tokens else None


def encode_closing_tag(tokenizer: tokenizer_lib.Tokenizer) -> tuple[int, ...]:
    """Return the ids of `FORCED_CLOSING_TEXT`.

    Raises:
      ValueError: more than `MAX_CLOSING_TOKENS`, or ids that decode to another text.
    """
    ids = tuple(tokenizer.encode(FORCED_CLOSING_TEXT))
    if len(ids) > MAX_CLOSING_TOKENS or tokenizer.decode(ids) != FORCED_CLOSING_TEXT:
        raise ValueError(
            f"thinking_tokens: got a tokenizer that spells {FORCED_CLOSING_TEXT!r} with {len(ids)} "
            f"tokens as {tokenizer.decode(ids)!r}; wanted at most {MAX_CLOSING_TOKENS} tokens "
            "of that very text. Leave the budget out, or use the release's tokenizer."
        )
    return ids


def _find_stop_string_ids(
    stops: Sequence[str], tokenizer: tokenizer_lib.Tokenizer
) -> frozenset[int]:
    """Return the control tokens whose names are stop strings.

    Raises:
      ValueError: a stop string that such a name is a part of. No output has it: control tokens have
        no text.
    """
    control_ids = set()
    for stop in stops:
        ids = tokenizer.encode(stop, allow_special=True)
        has_control_token = any(not tokenizer.token_bytes(token) for token in ids)
        if has_control_token and len(ids) > 1:
            raise ValueError(
                f"stop: got {stop!r:.80}, which holds a control token's name; wanted the name "
                "alone, or the token's id in stop_token_ids"
            )
        if has_control_token:
            control_ids.update(ids)
    return frozenset(control_ids)


class _StopStrings:
    """Finds the stop string that is complete first, the longest where several end there.

    So the result depends on the text alone, wherever the borders of tokens are.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held_text = ""

    def push(self, text: str, active: bool) -> tuple[str, bool]:
        """Return text that is released, and whether a stop string ends it.

        Args:
          text: the next text.
          active: whether a stop string that ends in this text counts.
        """
        buffer = self._held_text + text
        if active and text:
            ends = []
            for stop in self._stops:
                # It must end in the new text: one that ended before was not active then.
                start = buffer.find(stop, max(0, len(self._held_text) - len(stop) + 1))
                if start >= 0:
                    ends.append((start + len(stop), start))
            if ends:
                # The earliest end, and there the earliest start, which is the longest string.
                self._held_text = ""
                return buffer[: min(ends)[1]], True
        num_held = max(
            (partial_match.overlap_length(buffer, stop) for stop in self._stops), default=0
        )
        cut = len(buffer) - num_held
        self._held_text = buffer[cut:]
        return buffer[:cut], False

    def flush(self) -> str:
        """Return the text that is held back, for an output that ends here."""
        held_text, self._held_text = self._held_text, ""
        return held_text


class _ThinkingState:
    """Reads off the text whether the output thinks.

    Attributes:
      state: "undecided" at the start, then "none", or "open" and later "closed".
    """

    def __init__(self):
        self.state = "undecided"
        self._tail = ""  # text in which a tag may have begun

    def push(self, text: str) -> None:
        """Take the next text."""
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
            # All that can begin a closing tag, so the work per push is constant.
            self._tail = self._tail[1 - len(CLOSING_TAG) :]
