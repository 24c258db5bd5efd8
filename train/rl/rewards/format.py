"""Rewards of the form: thinking closed before the answer, and no going round in circles."""

import re

from train.rl import sample as sample_lib

# The thinking may have been opened by the prompt.
_FORM_PATTERN = re.compile(r"\s*(?:<think>)?(?P<thinking>.*?)</think>(?P<answer>.*)", re.DOTALL)


def is_well_formed(text: str) -> bool:
    """Tell whether a text is `<think>...</think>` and then an answer, each tag once.

    The opening tag may be missing: templates often end the prompt with it.
    """
    found = _FORM_PATTERN.fullmatch(text)
    if found is None:
        return False
    inside, after = found["thinking"], found["answer"]
    stray = any(tag in part for tag in ("<think>", "</think>") for part in (inside, after))
    return bool(after.strip()) and not stray


def repeated_ngram_share(text: str, n: int) -> float:
    """Return which share of a text's n-grams of words came before in it, in [0, 1)."""
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class FormatReward:
    """1 for a text of the right form that ended by itself, else 0."""

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample."""
        return float(sample.status == "stop" and is_well_formed(sample.text))


class RepetitionReward:
    """Minus the share of repeated n-grams, from `free` on: in (-1, 0]."""

    def __init__(self, n: int = 20, free: float = 0.0):
        """n: words in a row. free: share that costs nothing, in [0, 1).

        Raises:
          ValueError: out of range.
        """
        if n < 1 or not 0 <= free < 1:
            raise ValueError(f"repetition: got n={n}, free={free}; wanted n >= 1, free in [0, 1)")
        self._n, self._free = n, free

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample."""
        return min(0.0, self._free - repeated_ngram_share(sample.text, self._n))
