"""How far long work is: a bar on a terminal, and a line now and then where stderr is a file.

    with progress_bar.open_bar("convert", total_bytes, "B", scaled=True) as bar:
        bar.update(num_bytes)

Bars are tqdm's. In a file its bar would be one line of thousands of pieces, so there a line is
written after `LINE_SECS` at the earliest, and one at the end.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import IO, TypeVar

import tqdm

Item = TypeVar("Item")
LINE_SECS = 20.0  # between two lines where stderr is no terminal
_LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} passed, {remaining} left{postfix}"


class _LineStream:
    """A stream that takes tqdm's updates of one line, and writes a line for each."""

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self._last_line = ""

    def write(self, text: str) -> None:
        # tqdm goes back to the start of the line, and covers the rest of the old one by spaces.
        line = text.strip()
        if line and line != self._last_line:
            self._stream.write(line + "\n")
            self._last_line = line

    def flush(self) -> None:
        self._stream.flush()


def open_bar(
    name: str,
    total: int,
    unit: str,
    *,
    initial: int = 0,
    shown: bool = True,
    scaled: bool = False,
) -> tqdm.tqdm:
    """Return a bar on stderr. It is a context, which closes it.

    Args:
      name: what is done, such as "convert".
      total: how many units there are.
      unit: of what is counted, such as "step" or "B".
      initial: units that are done already.
      shown: False shows nothing.
      scaled: whether numbers are written as 1.2G.
    """
    shared = {"desc": name, "total": total, "initial": initial, "unit_scale": scaled}
    if sys.stderr.isatty():
        # tqdm writes the unit behind the rate, too.
        return tqdm.tqdm(unit=unit, disable=not shown, **shared)
    return tqdm.tqdm(
        unit=unit,
        disable=not shown,
        file=_LineStream(sys.stderr),  # pyright: ignore[reportArgumentType]  # tqdm only writes
        bar_format=_LINE_FORMAT,
        mininterval=LINE_SECS,
        maxinterval=LINE_SECS,
        **shared,
    )


def iterate_with_bar(
    name: str, items: Sequence[Item], unit: str, shown: bool = True
) -> Iterator[Item]:
    """Yield the items, with a bar that counts those whose work is done."""
    with open_bar(name, len(items), unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()
