"""Constrained decoding: which tokens a JSON schema, a regular expression or a grammar allows next.

llguidance does the parsing, over the bytes of our own tokenizer's tokens. Free thinking stands on
top of it. A model that may think first (`Options.after_thinking`) goes through

    undecided    the text begins `<think>` and, perhaps, the constrained answer as well
    thinking     everything is allowed but the end of the output
    gap          after `</think>`, at most two newlines, which are not part of the answer
    answer       the constraint, to its end

Whatever the model writes, the answer matches the constraint. Without thinking, all of the output
is the answer.
"""

import re
from collections.abc import Iterable

import llguidance
import numpy as np
from jaxtyping import UInt32

from infer import json_schema, partial_match, stopping
from infer import options as options_lib
from m1_jax import tokenizer as tokenizer_lib

_OPENING_TAG, _CLOSING_TAG = stopping.OPENING_TAG.encode(), stopping.CLOSING_TAG.encode()
_GAP_NEWLINES = 2
# White space between the parts of JSON. Without a limit, a model at a high temperature may write
# white space for ever. 64 characters are enough for one line's indentation.
_JSON_WHITESPACE = r"[ \t\n\r]{1,64}"
_UNKNOWN = "\ufffd".encode()  # what the tokenizer decodes ids to that it does not have
_MAX_ERROR_CHARS = 400  # length of llguidance's messages in ours
# A rule's own temperature, which llguidance leaves to its caller: `rule[temperature=0.5]: ...`.
_RULE_TEMPERATURE = re.compile(r"^\s*[?!]?\w+\s*\[[^\]]*\btemperature\b", re.MULTILINE)


class GrammarCompiler:
    """Makes matchers for one tokenizer. Its construction takes a second or two for the release's.

    Masks are arrays of 32-bit words: bit v % 32 of word v // 32 is set where token v is allowed.

    Attributes:
      token_bytes: the text of each token, empty for control tokens and unknown ids.
      free_mask: allows all known tokens but the stop tokens.
      opening_masks: the tokens that go on with the opening tag, by how many of its bytes are
        written.
      not_closing_masks: all tokens but those that would close the tag and go on with more than the
        gap allows, by how many bytes of the closing tag are written.
      newline_masks: the tokens of newlines that fit, by how many newlines the gap may still have.
    """

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer, vocab_size: int):
        """Read the tokenizer's vocabulary.

        Args:
          tokenizer: the model's.
          vocab_size: the model's, which may be padded. Ids that the tokenizer lacks are forbidden.

        Raises:
          ValueError: a tokenizer without stop tokens, or with more ids than the model.
        """
        num_ids = tokenizer.vocab_size
        if not tokenizer.stop_ids:
            raise ValueError(
                "constrained decoding: got a tokenizer without stop tokens; wanted one at least. "
                "Copy the release's tokenizer_config.json, which names eos_token."
            )
        if num_ids > vocab_size or max(tokenizer.stop_ids) >= num_ids:
            raise ValueError(
                f"constrained decoding: got a tokenizer of {num_ids} ids with stop ids "
                f"{tokenizer.stop_ids} for a model of {vocab_size}; wanted files of one release"
            )
        self._vocab_size = vocab_size
        # Control tokens have no text, so a constraint on text never meets them.
        tokens = [tokenizer.token_bytes(i) for i in range(num_ids)]
        self.token_bytes = [b"" if data == _UNKNOWN else data for data in tokens]
        self._library = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_VocabularyAdapter(tokenizer, self.token_bytes)),
            eos_token=list(tokenizer.stop_ids),
        )
        known_ids = [i for i, data in enumerate(tokens) if data != _UNKNOWN]
        self._known_mask = self.make_mask(known_ids)
        self.free_mask = self.make_mask(i for i in known_ids if i not in tokenizer.stop_ids)
        texts = [(i, data) for i, data in enumerate(self.token_bytes) if data]
        # The few tokens that can be a part of a tag, or end one. Searching all is slow.
        tags = [(i, data) for i, data in texts if b">" in data or data in _OPENING_TAG]
        self.opening_masks = [
            self.make_mask(_find_opening_tokens(tags, n)) for n in range(len(_OPENING_TAG))
        ]
        self.not_closing_masks = [
            ~self.make_mask(_find_bad_closing_tokens(tags, n)) for n in range(len(_CLOSING_TAG))
        ]
        newlines = {i: len(data) for i, data in texts if not data.strip(b"\n")}
        self.newline_masks = [
            self.make_mask(i for i, n in newlines.items() if n <= newlines_left)
            for newlines_left in range(_GAP_NEWLINES + 1)
        ]

    def compile_matcher(self, options: options_lib.Options) -> "GrammarMatcher | None":
        """Compile a request's constraint, or return None for a request without one.

        Raises:
          ValueError: a schema, expression or grammar that is wrong, of which a part would not be
            applied, or that no text matches.
        """
        name = options.constraint
        if name is None:
            return None
        library = llguidance.LLMatcher
        value = getattr(options, name)
        if name == "json_schema":
            value = json_schema.plain_schema(value)
            grammar = library.grammar_from_json_schema(
                value, overrides={"whitespace_pattern": _JSON_WHITESPACE}
            )
        elif name == "regex":
            grammar = library.grammar_from_regex(value)
        else:
            grammar = library.grammar_from_lark(value)
        inner = library(self._library, grammar, log_level=0)
        inner.compute_bitmask()  # only this finds a constraint that no text matches
        if inner.is_error():
            raise ValueError(f"{name}: {_error_message(inner)}. Correct it or leave it out.")
        # After llguidance, whose own refusals say more.
        if name == "json_schema":
            json_schema.check_keywords(value)
        if name == "grammar" and _RULE_TEMPERATURE.search(value):
            raise ValueError(
                "grammar: got a rule with a temperature; wanted one temperature for all of the "
                "output (Options.temperature)"
            )
        return GrammarMatcher(self, inner, options.after_thinking)

    def make_mask(self, ids: Iterable[int]) -> UInt32[np.ndarray, "W"]:
        """Return the mask that allows `ids` alone."""
        # Whole words: bits beyond the vocabulary are 0.
        bits = np.zeros(-(-self._vocab_size // 32) * 32, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

    def allowed_mask(self, inner: llguidance.LLMatcher) -> UInt32[np.ndarray, "W"]:
        """Return the mask of the tokens that llguidance allows.

        Raises:
          ValueError: a grammar that grew beyond llguidance's limits.
        """
        words = np.frombuffer(inner.compute_bitmask(), "<u4")[: len(self._known_mask)]
        if inner.is_error():
            raise ValueError(f"constrained decoding: {_error_message(inner)}")
        # llguidance's mask is as long as the tokenizer's vocabulary, the model's may be longer.
        mask = np.zeros_like(self._known_mask)
        mask[: len(words)] = words
        return mask & self._known_mask


class GrammarMatcher:
    """Follows one output. `GrammarCompiler.compile_matcher` makes it."""

    def __init__(
        self, compiler: GrammarCompiler, inner: llguidance.LLMatcher, after_thinking: bool
    ):
        self._compiler, self._inner = compiler, inner
        self._phase = "undecided" if after_thinking else "answer"
        # While undecided all of the text; while thinking as much as a closing tag can begin in.
        self._text = b""
        self._answer_fits = True  # while undecided: the text may be the answer's beginning
        self._newlines_left = 0  # newlines that the gap may still have

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, so that nothing but a stop token may follow."""
        return self._phase == "answer" and self._inner.is_stopped()

    def mask(self) -> UInt32[np.ndarray, "W"]:
        """Return a new mask of the tokens that may come next, laid out as in `GrammarCompiler`.

        Raises:
          ValueError: a grammar that grew beyond llguidance's limits.
        """
        compiler = self._compiler
        if self._phase == "thinking":
            return (
                compiler.free_mask
                & compiler.not_closing_masks[partial_match.overlap_length(self._text, _CLOSING_TAG)]
            )
        if self._phase == "undecided":
            opening = compiler.opening_masks[len(self._text)]
            return (
                opening | compiler.allowed_mask(self._inner)
                if self._answer_fits
                else opening.copy()
            )
        mask = compiler.allowed_mask(self._inner)
        return mask | compiler.newline_masks[self._newlines_left] if self._phase == "gap" else mask

    def accept(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
          ValueError: a token that `mask` forbids.
        """
        texts = self._compiler.token_bytes
        data = texts[token] if 0 <= token < len(texts) else b""
        if self._phase == "thinking":
            self._accept_thinking(token, data)
        elif self._phase == "undecided":
            self._accept_undecided(token, data)
        elif self._phase == "gap" and data in (
            b"\n" * n for n in range(1, self._newlines_left + 1)
        ):
            self._newlines_left -= len(data)
        else:
            self._phase = "answer"
            if not self._inner.consume_token(token):
                raise self._make_refusal(token)

    def _accept_undecided(self, token: int, data: bytes) -> None:
        text = self._text + data
        # Read off the mask: llguidance's validate_tokens refuses the end of a complete answer.
        self._answer_fits = self._answer_fits and _mask_allows(
            self._compiler.allowed_mask(self._inner), token
        )
        if data and text.startswith(_OPENING_TAG):
            # The tag may have matched the answer's beginning: the answer starts anew later.
            self._inner.reset()
            self._phase, self._text = "thinking", b""
            self._accept_thinking(token, text[len(_OPENING_TAG) :])
            return
        opens = bool(data) and _OPENING_TAG.startswith(text)
        if not (opens or self._answer_fits):
            raise self._make_refusal(token)
        if self._answer_fits:
            self._inner.consume_token(token)
        self._phase, self._text = ("undecided", text) if opens else ("answer", b"")

    def _accept_thinking(self, token: int, data: bytes) -> None:
        thought, tag, gap = (self._text + data).partition(_CLOSING_TAG)
        if not tag:
            self._text = thought[1 - len(_CLOSING_TAG) :]
            return
        if len(gap) > _GAP_NEWLINES or gap.strip(b"\n"):
            raise self._make_refusal(token)
        self._phase, self._newlines_left = "gap", _GAP_NEWLINES - len(gap)

    def _make_refusal(self, token: int) -> ValueError:
        return ValueError(
            f"constrained decoding: got token {token}; wanted one that mask() allows. Was another "
            "mask applied, or one token left out?"
        )


class StopTokenBan:
    """Forbids stop tokens before `min_tokens`, as a matcher does: for more than the device knows.

    Args:
      stop_ids: the token ids. Those beyond the vocabulary are never chosen.
      vocab_size: the model's vocabulary size.
      min_tokens: tokens that come before any of them.
    """

    def __init__(self, stop_ids: Iterable[int], vocab_size: int, min_tokens: int):
        self._stop_ids = [token for token in stop_ids if token < vocab_size]
        self._num_words, self._num_left = -(-vocab_size // 32), min_tokens

    def mask(self) -> UInt32[np.ndarray, "W"]:
        """Return a new mask of the tokens that may come next, laid out as in `GrammarCompiler`."""
        mask = np.full(self._num_words, 0xFFFFFFFF, np.uint32)
        if self._num_left:
            for token in self._stop_ids:
                mask[token // 32] &= ~np.uint32(1 << token % 32)
        return mask

    def accept(self, _: int) -> None:
        """Take the token that was chosen."""
        self._num_left = max(0, self._num_left - 1)


class _VocabularyAdapter:
    """The tokenizer's interface that llguidance reads: attributes by these names, and a call."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer, texts: list[bytes]):
        self.eos_token_id, self.bos_token_id = tokenizer.stop_ids[0], None
        self.special_token_ids = [i for i, data in enumerate(texts) if not data]
        # A grammar may name control tokens, so these come with their names.
        names = (tokenizer.token_bytes(i, skip_special=False) for i in self.special_token_ids)
        self.tokens = list(texts)
        for i, name in zip(self.special_token_ids, names, strict=True):
            self.tokens[i] = b"<unknown_%d>" % i if name == _UNKNOWN else name
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _mask_allows(mask: UInt32[np.ndarray, "W"], token: int) -> bool:
    return 0 <= token < 32 * len(mask) and bool(int(mask[token // 32]) >> token % 32 & 1)


def _find_opening_tokens(texts: list[tuple[int, bytes]], length: int) -> list[int]:
    """Return tokens that go on with the opening tag, of which `length` bytes are written."""
    tag_end = _OPENING_TAG[length:]
    fitting = [
        (i, data) for i, data in texts if tag_end.startswith(data) or data.startswith(tag_end)
    ]
    # A token may complete the tag, hold a thought, close it and go on: only the end is checked.
    return [i for i, data in fitting if not _closes_badly(data.removeprefix(tag_end))]


def _find_bad_closing_tokens(texts: list[tuple[int, bytes]], length: int) -> list[int]:
    """Return tokens that close a tag of which `length` bytes are written, and go on badly."""
    close = _CLOSING_TAG[:length]
    return [i for i, data in texts if _closes_badly(close + data)]


def _closes_badly(text: bytes) -> bool:
    """Return whether a closing tag is followed by more than the gap may hold."""
    gap = text.partition(_CLOSING_TAG)[2]
    return len(gap) > _GAP_NEWLINES or bool(gap.strip(b"\n"))


def _error_message(inner: llguidance.LLMatcher) -> str:
    """Return llguidance's message without its dump of the parser's state."""
    text = inner.get_error().partition("<state>")[0].strip()
    return text[:_MAX_ERROR_CHARS] or "no text matches it"
