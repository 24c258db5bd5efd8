"""Guesses at the next tokens without a model: what followed the same tokens before (prompt lookup).

Answers repeat what was asked, and themselves. A guess costs nothing, and one forward pass checks
several (`programs.verify_drafts`). The tokens do not depend on the guesses, only the speed does.
"""

from collections.abc import Iterable

NGRAM_LENGTHS = (3, 2)  # tokens that must agree before a guess, the longest first


class PromptLookup:
    """One sequence's tokens so far, and where each run of them was seen last."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens: list[int] = []
        # Index of the token after a run, where it was seen last, by the run's last tokens.
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
        """Return up to `max_tokens` tokens that may come next."""
        for length in NGRAM_LENGTHS:
            start = self._next_index.get(tuple(self._tokens[-length:]))
            if start is not None and len(self._tokens) >= length:
                return self._tokens[start : start + max_tokens]
        return []
