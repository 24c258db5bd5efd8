"""Rewards of a text's form: thinking that ends before the answer, and no repetition."""

import re

from train.rl import sample as sample_lib

# Templates often end the prompt with `<think>`, so the text may begin inside the thinking.
_FORM_PATTERN = re.compile(r"\s*(?:<think>)?(?P<thinking>.*?)</think>(?P<answer>.*)", re.DOTALL)


def is_well_formed(text: str) -> bool:
    """Tell whether a text is `<think>...</think>` and an answer, with each tag once.

    The opening tag may be missing. Neither thinking nor answer is empty.
    """
    match = _FORM_PATTERN.fullmatch(text)
    if match is None:
        return False
    thinking, answer = match["thinking"], match["answer"]
    has_stray_tag = any(
        tag in part for tag in ("<think>", "</think>") for part in (thinking, answer)
    )
    return bool(thinking.strip() and answer.strip()) and not has_stray_tag


def repeated_ngram_share(text: str, n: int) -> float:
    """Return the share of a text's n-grams of words that occurred before in it, in [0, 1)."""
    words = text.lower().split()
    # n copies of the words, each shifted by one more: a column of them is an n-gram.
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class FormatReward:
    """1 for a well-formed text that the model ended itself, else 0."""

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample."""
        return float(sample.status == "stop" and is_well_formed(sample.text))


class RepetitionReward:
    """Minus the share of repeated n-grams above a free share, in (-1, 0]."""

    def __init__(self, n: int = 20, free: float = 0.0):
        """Choose what counts as repetition.

        Args:
          n: number of words in an n-gram.
          free: share of repeated n-grams that costs nothing, in [0, 1).

        Raises:
          ValueError: an argument is out of range.
        """
        if n < 1 or not 0 <= free < 1:
            raise ValueError(f"repetition: got n={n}, free={free}; wanted n >= 1, free in [0, 1)")
        self._n, self._free = n, free

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample."""
        return min(0.0, self._free - repeated_ngram_share(sample.text, self._n))
