"""Guesses at the next tokens without a model: what followed the same tokens before (prompt lookup).

Answers repeat what was asked and themselves; a guess costs nothing, and one forward pass checks
several (`programs.verify_drafts`). What is made does not depend on the guesses, only how fast.
"""

from collections.abc import Iterable

NGRAM_LENGTHS = (3, 2)  # of the tokens to recognise, the longest first


class PromptLookup:
    """One sequence's tokens so far, and where each run of them was seen last."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens: list[int] = []
        self._next_index: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take the next token."""
        # What ends before this token is followed by it: noted now, so that a run is not its own
        # example.
        for length in NGRAM_LENGTHS:
            if len(self._tokens) >= length:
                self._next_index[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def draft_tokens(self, max_tokens: int) -> list[int]:
        """Return up to `most` tokens that may come next."""
        for length in NGRAM_LENGTHS:
            start = self._next_index.get(tuple(self._tokens[-length:]))
            if start is not None and len(self._tokens) >= length:
                return self._tokens[start : start + max_tokens]
        return []
