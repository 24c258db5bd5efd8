"""Cases that take turns: CI runs one of them in each landing, and all of them over a few."""

import pytest


def take_turns(*cases, ids=None):
    """Return params, marked `long` so that every tenth of the long tests has one of the cases.

    A case is the value of one argument, or a tuple of values. With more than ten cases a tenth has
    several.
    """
    names = ids or [None] * len(cases)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.long(tenths=range(number % 10, 10, len(cases))),
            id=name,
        )
        for number, (case, name) in enumerate(zip(cases, names, strict=True))
    ]
