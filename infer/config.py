"""What an engine is built for: sizes that fix its programs and its memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

_MOST_PREFILL_TOKENS = 2048


def _field(default, text: str):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an engine; those of 0 are derived from the others by `resolve`.

    Raises:
      ValueError: sizes that do not fit each other, or too many programs.
    """

    max_length: int = _field(4096, "Longest sequence, prompt and output together, in tokens.")
    max_rows: int = _field(8, "Sequences that run side by side.")
    num_pages: int = _field(0, "Pages of one chunk of KV; 0: max_rows sequences of max_length.")
    num_snapshots: int = _field(8, "State slots beyond max_rows, for the prefix cache.")
    chunk_tokens: int = _field(64, "Tokens between two updates of a recurrent state; the grid.")
    decode_steps: int = _field(8, "Most tokens a sequence makes in one dispatch.")
    prefill_tokens: tuple[int, ...] = _field((64, 512), "Rows of the prefill programs.")
    max_queue: int = _field(1024, "Requests that wait; one more is refused.")
    snapshot_every_tokens: int = _field(8192, "Distance of snapshots in long prompts; 0: none.")
    swap_tokens: int = _field(10_240, "From this length on, preempted sequences go to the host.")
    host_bytes: int = _field(0, "Memory of preempted sequences at the host; 0: none go there.")
    prefix_cache: bool = _field(True, "Keep states and pages of prompts and outputs for reuse.")
    draft_tokens: int = _field(0, "Guesses (prompt lookup) checked at once; 0 guesses nothing.")
    tile_rows: int = _field(8, "Rows that attention computes at a time.")
    record_routes: bool = _field(False, "Keep each token's experts, for a trainer to replay.")
    row_tile: int = _field(8, "Rows of every matrix product, for numbers that do not depend on "
                              "company; 0: all rows, numbers do.")  # fmt: skip

    def __post_init__(self):
        for name in ("max_length", "max_rows", "chunk_tokens", "decode_steps", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted 1 or more")
        for name in ("num_pages", "num_snapshots", "snapshot_every_tokens", "host_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted 0 or more")
        if self.tile_rows < 1 or self.chunk_tokens % self.tile_rows:
            raise ValueError(
                f"tile_rows: got {self.tile_rows}; wanted a divisor of chunk_tokens "
                f"{self.chunk_tokens}"
            )
        if not 0 <= self.draft_tokens < self.tile_rows:
            raise ValueError(
                f"draft_tokens: got {self.draft_tokens}; wanted 0 to {self.tile_rows - 1}, less "
                "than tile_rows"
            )
        sizes = self.prefill_tokens
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] < self.chunk_tokens:
            raise ValueError(
                f"prefill_tokens: got {sizes}; wanted ascending sizes, the last at least "
                f"chunk_tokens {self.chunk_tokens}"
            )
        unit = max(self.tile_rows, self.row_tile)
        for size in sizes:
            if size % self.tile_rows or (self.row_tile and size % self.row_tile):
                raise ValueError(f"prefill_tokens: got {size}; wanted multiples of {unit}")

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_length // self.chunk_tokens)

    @property
    def pages(self) -> int:
        return self.num_pages or self.max_rows * self.pages_per_sequence

    @property
    def slots(self) -> int:
        return self.max_rows + self.num_snapshots

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """Return the rows of the decode programs: 8, 32, 128, ... up to max_rows."""
        unit = max(8, self.row_tile)
        most = -(-self.max_rows // unit) * unit
        sizes = [unit]
        while sizes[-1] < most:
            sizes.append(min(4 * sizes[-1], most))
        return tuple(sizes)


def fitting(
    requests: Sequence[tuple[int, int]], most_rows: int, most_length: int, **sizes: Any
) -> Config:
    """Return sizes for requests that are all known: with few programs, so that they start soon.

    Args:
      requests: tokens of each prompt, and of its longest output.
      most_rows: sequences side by side. most_length: the model's.
      **sizes: other fields, as they are to be.

    Raises:
      ValueError: sizes that do not fit each other.
    """
    made = Config(**sizes)
    chunk = made.chunk_tokens
    longest = max(prompt + output for prompt, output in requests)
    rows = min(most_rows, len(requests))
    # One prefill program, for the prompts that start together. Rows of no use cost little in it.
    prompts = sorted((prompt for prompt, _ in requests), reverse=True)[:rows]
    prefill = chunk
    while prefill < min(_MOST_PREFILL_TOKENS, sum(prompts) + made.tile_rows * rows):
        prefill *= 2
    return dataclasses.replace(
        made,
        max_length=min(-(-longest // chunk) * chunk, most_length),
        max_rows=rows,
        prefill_tokens=(prefill,),
    )
