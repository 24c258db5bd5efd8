"""Cases that take turns: CI runs one of them in each landing, and all of them over a few."""

import pytest


def take_turns(*cases, ids=None):
    """Return the params of cases, marked `long` so that every tenth of the long tests has one."""
    names = ids or [None] * len(cases)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.long(tenths=range(number, 10, len(cases))),
            id=name,
        )
        for number, (case, name) in enumerate(zip(cases, names, strict=True))
    ]
