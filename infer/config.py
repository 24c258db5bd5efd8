"""What an engine is built for: sizes that fix its programs and its memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

_MAX_PREFILL_TOKENS = 2048


def _help_field(default, text: str):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; those of 0 are derived from the others by `resolve`.

    Raises:
      ValueError: sizes that do not fit each other, or too many programs.
    """

    max_length: int = _help_field(4096, "Longest sequence, prompt and output together, in tokens.")
    max_rows: int = _help_field(8, "Sequences that run side by side.")
    num_pages: int = _help_field(
        0, "Pages of one chunk of KV; 0: max_rows sequences of max_length."
    )
    num_snapshots: int = _help_field(8, "State slots beyond max_rows, for the prefix cache.")
    chunk_tokens: int = _help_field(
        64, "Tokens between two updates of a recurrent state; the grid."
    )
    decode_steps: int = _help_field(8, "Most tokens a sequence makes in one dispatch.")
    prefill_tokens: tuple[int, ...] = _help_field((64, 512), "Rows of the prefill programs.")
    max_queue: int = _help_field(1024, "Requests that wait; one more is refused.")
    snapshot_every_tokens: int = _help_field(
        8192, "Distance of snapshots in long prompts; 0: none."
    )
    swap_tokens: int = _help_field(
        10_240, "From this length on, preempted sequences go to the host."
    )
    host_bytes: int = _help_field(0, "Memory of preempted sequences at the host; 0: none go there.")
    prefix_cache: bool = _help_field(
        True, "Keep states and pages of prompts and outputs for reuse."
    )
    draft_tokens: int = _help_field(
        0, "Guesses (prompt lookup) checked at once; 0 guesses nothing."
    )
    attention_tile: int = _help_field(8, "Rows that attention computes at a time.")
    record_routes: bool = _help_field(False, "Keep each token's experts, for a trainer to replay.")
    matmul_tile: int = _help_field(8, "Rows of every matrix product, for numbers that do not depend on "
                              "company; 0: all rows, numbers do.")  # fmt: skip

    def __post_init__(self):
        for name in ("max_length", "max_rows", "chunk_tokens", "decode_steps", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted 1 or more")
        for name in ("num_pages", "num_snapshots", "snapshot_every_tokens", "host_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted 0 or more")
        if self.attention_tile < 1 or self.chunk_tokens % self.attention_tile:
            raise ValueError(
                f"attention_tile: got {self.attention_tile}; wanted a divisor of chunk_tokens "
                f"{self.chunk_tokens}"
            )
        if not 0 <= self.draft_tokens < self.attention_tile:
            raise ValueError(
                f"draft_tokens: got {self.draft_tokens}; wanted 0 to {self.attention_tile - 1}, less "
                "than attention_tile"
            )
        sizes = self.prefill_tokens
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] < self.chunk_tokens:
            raise ValueError(
                f"prefill_tokens: got {sizes}; wanted ascending sizes, the last at least "
                f"chunk_tokens {self.chunk_tokens}"
            )
        unit = max(self.attention_tile, self.matmul_tile)
        for size in sizes:
            if size % self.attention_tile or (self.matmul_tile and size % self.matmul_tile):
                raise ValueError(f"prefill_tokens: got {size}; wanted multiples of {unit}")

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_length // self.chunk_tokens)

    @property
    def total_pages(self) -> int:
        return self.num_pages or self.max_rows * self.pages_per_sequence

    @property
    def total_slots(self) -> int:
        return self.max_rows + self.num_snapshots

    @property
    def decode_batch_sizes(self) -> tuple[int, ...]:
        """Return the rows of the decode programs: 8, 32, 128, ... up to max_rows."""
        unit = max(8, self.matmul_tile)
        most = -(-self.max_rows // unit) * unit
        sizes = [unit]
        while sizes[-1] < most:
            sizes.append(min(4 * sizes[-1], most))
        return tuple(sizes)


def fit_config(
    requests: Sequence[tuple[int, int]], max_rows: int, max_length: int, **sizes: Any
) -> EngineConfig:
    """Return sizes for requests that are all known: with few programs, so that they start soon.

    Args:
      requests: tokens of each prompt, and of its longest output.
      most_rows: sequences side by side. most_length: the model's.
      **sizes: other fields, as they are to be.

    Raises:
      ValueError: sizes that do not fit each other.
    """
    made = EngineConfig(**sizes)
    chunk = made.chunk_tokens
    longest = max(prompt + output for prompt, output in requests)
    rows = min(max_rows, len(requests))
    # One prefill program, for the prompts that start together. Rows of no use cost little in it.
    prompts = sorted((prompt for prompt, _ in requests), reverse=True)[:rows]
    prefill = chunk
    while prefill < min(_MAX_PREFILL_TOKENS, sum(prompts) + made.attention_tile * rows):
        prefill *= 2
    return dataclasses.replace(
        made,
        max_length=min(-(-longest // chunk) * chunk, max_length),
        max_rows=rows,
        prefill_tokens=(prefill,),
    )
