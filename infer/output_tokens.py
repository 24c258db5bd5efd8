"""The tokens of an output as NumPy columns that grow, 16 bytes a token."""

import collections.abc
import dataclasses
from collections.abc import Iterator
from typing import Any, overload

import numpy as np

_FIRST_CAPACITY = 64  # tokens that the columns have room for at first


@dataclasses.dataclass(frozen=True)
class OutputToken:
    """One token of an output."""

    id: int
    logp: float  # log-probability under the distribution that the token was drawn from
    logp_raw: float  # log-probability under the model's plain logits
    version: int  # version of the weights that chose the token
    # The `Options.top_logprobs` likeliest tokens: (id, log-probability under the plain logits).
    top: tuple[tuple[int, float], ...] = ()


class OutputTokens(collections.abc.Sequence):
    """A sequence of `OutputToken`, which is made when an entry is asked for.

    An answer may have 80,000 tokens, and an object a token would take 200 bytes and more. So the
    numbers lie in columns, whose room doubles when it is used up. The properties are views of the
    columns, which the next `append` leaves as they are.
    """

    def __init__(self):
        self._length = 0
        self._ids = np.empty(_FIRST_CAPACITY, np.int32)
        self._logps = np.empty(_FIRST_CAPACITY, np.float32)
        self._raw_logps = np.empty(_FIRST_CAPACITY, np.float32)
        self._versions = np.empty(_FIRST_CAPACITY, np.int32)
        # By index, of tokens with any: few requests ask for them.
        self._top: dict[int, tuple[tuple[int, float], ...]] = {}

    @classmethod
    def from_columns(cls, ids: Any, logps: Any, raw_logps: Any, versions: Any) -> "OutputTokens":
        """Return tokens of columns of one length. The columns are copied."""
        tokens = cls()
        tokens._length = len(ids)
        tokens._ids = np.array(ids, np.int32)
        tokens._logps = np.array(logps, np.float32)
        tokens._raw_logps = np.array(raw_logps, np.float32)
        tokens._versions = np.array(versions, np.int32)
        lengths = {len(column) for column in tokens._columns()}
        if len(lengths) != 1:
            raise ValueError(f"columns: got the lengths {sorted(lengths)}; wanted one length")
        return tokens

    @property
    def ids(self) -> np.ndarray:
        """Return the token ids, [tokens] int32."""
        return self._ids[: self._length]

    @property
    def logps(self) -> np.ndarray:
        """Return `OutputToken.logp` of all tokens, [tokens] float32."""
        return self._logps[: self._length]

    @property
    def raw_logps(self) -> np.ndarray:
        """Return `OutputToken.logp_raw` of all tokens, [tokens] float32."""
        return self._raw_logps[: self._length]

    @property
    def versions(self) -> np.ndarray:
        """Return `OutputToken.version` of all tokens, [tokens] int32."""
        return self._versions[: self._length]

    def append(self, token: OutputToken) -> None:
        """Add a token at the end."""
        if self._length == len(self._ids):
            self._grow()
        n = self._length
        self._ids[n], self._logps[n] = token.id, token.logp
        self._raw_logps[n], self._versions[n] = token.logp_raw, token.version
        if token.top:
            self._top[n] = token.top
        self._length = n + 1

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> OutputToken: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[OutputToken, ...]: ...

    def __getitem__(self, index: int | slice) -> OutputToken | tuple[OutputToken, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self._length)))
        n = index + self._length if index < 0 else index
        if not 0 <= n < self._length:
            raise IndexError(f"token: got index {index} of {self._length} tokens")
        return OutputToken(
            int(self._ids[n]),
            float(self._logps[n]),
            float(self._raw_logps[n]),
            int(self._versions[n]),
            self._top.get(n, ()),
        )

    def __iter__(self) -> Iterator[OutputToken]:
        # Not entry by entry: `tolist` makes numbers of a whole column at once.
        columns = (self.ids, self.logps, self.raw_logps, self.versions)
        numbers = zip(*(column.tolist() for column in columns), strict=True)
        for n, (token, logp, raw_logp, version) in enumerate(numbers):
            yield OutputToken(token, logp, raw_logp, version, self._top.get(n, ()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, collections.abc.Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"OutputTokens({list(self)})"

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self._ids, self._logps, self._raw_logps, self._versions

    def _grow(self) -> None:
        # New arrays, so that views of the old ones stay as they are.
        self._ids, self._logps, self._raw_logps, self._versions = (
            np.concatenate([column, np.empty(max(len(column), _FIRST_CAPACITY), column.dtype)])
            for column in self._columns()
        )
