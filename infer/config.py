"""What an engine is built for: sizes that fix its programs and its memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

_MAX_PREFILL_TOKENS = 2048  # `fit_config` stops growing its prefill program here


def _help_field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. Each field says what it is in its help text.

    The grid is the multiples of `chunk_tokens`: pages end there, and recurrent states move on
    there.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    max_length: int = _help_field(4096, "Longest sequence, prompt and output together, in tokens.")
    max_rows: int = _help_field(8, "Sequences that run side by side.")
    num_pages: int = _help_field(
        0, "Pages, each the keys and values of one chunk; 0: max_rows sequences of max_length."
    )
    num_snapshots: int = _help_field(8, "State slots beyond max_rows, for the prefix cache.")
    chunk_tokens: int = _help_field(
        64, "Tokens between two updates of a recurrent state; the grid."
    )
    decode_steps: int = _help_field(8, "Most tokens a sequence makes in one dispatch.")
    prefill_tokens: tuple[int, ...] = _help_field(
        (64, 512), "Rows of the prefill programs, ascending."
    )
    max_queue: int = _help_field(1024, "Requests that wait; one more is refused.")
    snapshot_every_tokens: int = _help_field(
        8192, "Distance of snapshots in long prompts, a multiple of chunk_tokens; 0: none."
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
    matmul_tile: int = _help_field(
        8,
        "Rows of every matrix product, for numbers that do not depend on the batch; "
        "0: all rows, and numbers do depend on it.",
    )

    def __post_init__(self):
        for name in ("max_length", "max_rows", "chunk_tokens", "decode_steps", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted 1 or more")
        for name in (
            "num_pages",
            "num_snapshots",
            "snapshot_every_tokens",
            "swap_tokens",
            "host_bytes",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted 0 or more")
        chunk = self.chunk_tokens
        # A tile of a prefill lies in one chunk, so that it reads one state and one page.
        if self.attention_tile < 1 or chunk % self.attention_tile:
            raise ValueError(
                f"attention_tile: got {self.attention_tile}; wanted a divisor of chunk_tokens "
                f"{chunk}"
            )
        if self.snapshot_every_tokens % chunk:
            raise ValueError(
                f"snapshot_every_tokens: got {self.snapshot_every_tokens}; wanted a multiple of "
                f"chunk_tokens {chunk}, or 0"
            )
        # Guesses are checked in one tile of their sequence, together with the token before them.
        if not 0 <= self.draft_tokens < self.attention_tile:
            raise ValueError(
                f"draft_tokens: got {self.draft_tokens}; wanted 0 to {self.attention_tile - 1}, "
                "less than attention_tile"
            )
        sizes = self.prefill_tokens
        # The largest program must hold a whole chunk: a prompt is cut on the grid, so less could
        # never advance it.
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] < chunk:
            raise ValueError(
                f"prefill_tokens: got {sizes}; wanted ascending sizes, the last at least "
                f"chunk_tokens {chunk}"
            )
        # For the message: of two powers of two, the larger one is a multiple of the other.
        unit = max(self.attention_tile, self.matmul_tile)
        for size in sizes:
            if size % self.attention_tile or (self.matmul_tile and size % self.matmul_tile):
                raise ValueError(f"prefill_tokens: got {size}; wanted multiples of {unit}")

    @property
    def pages_per_sequence(self) -> int:
        """Pages of a sequence of max_length."""
        return -(-self.max_length // self.chunk_tokens)

    @property
    def total_pages(self) -> int:
        """Pages of the pool, page 0 of padding not counted."""
        return self.num_pages or self.max_rows * self.pages_per_sequence

    @property
    def total_slots(self) -> int:
        """State slots of the pool, slot 0 of padding not counted."""
        return self.max_rows + self.num_snapshots

    def pad_to_tile(self, tokens: int) -> int:
        """Return the rows that so many tokens of one sequence take in a prefill program."""
        return -(-tokens // self.attention_tile) * self.attention_tile

    @property
    def decode_batch_sizes(self) -> tuple[int, ...]:
        """Rows of the decode programs: 8, 32, 128, ... up to max_rows.

        A dispatch takes the smallest program that holds its rows.
        """
        # Whole matmul tiles, so that no program computes a part of one.
        unit = max(8, self.matmul_tile)
        largest = -(-self.max_rows // unit) * unit
        sizes = [unit]
        # Steps of 4 and not of 2, because each program takes its time to compile.
        while sizes[-1] < largest:
            sizes.append(min(4 * sizes[-1], largest))
        return tuple(sizes)


def fit_config(
    requests: Sequence[tuple[int, int]], max_rows: int, max_length: int, **sizes: Any
) -> EngineConfig:
    """Return sizes for requests that are all known: with few programs, so that they start soon.

    Args:
      requests: tokens of each prompt, and of its longest output.
      max_rows: most sequences side by side.
      max_length: the model's longest sequence.
      **sizes: other fields, as they are to be.

    Raises:
      ValueError: sizes that do not fit each other.
    """
    config = EngineConfig(**sizes)
    chunk = config.chunk_tokens
    longest = max(prompt + output for prompt, output in requests)
    rows = min(max_rows, len(requests))
    # One prefill program, for the prompts that start together. Padding rows cost little in it:
    # tiles past the last real one are left out.
    prompts = sorted((prompt for prompt, _ in requests), reverse=True)[:rows]
    # Each prompt is padded to whole tiles.
    total = sum(prompts) + config.attention_tile * rows
    # A power of two times the chunk, and so a multiple of the attention tile.
    prefill = chunk
    while prefill < min(_MAX_PREFILL_TOKENS, total):
        prefill *= 2
    return dataclasses.replace(
        config,
        max_length=min(-(-longest // chunk) * chunk, max_length),
        max_rows=rows,
        prefill_tokens=(prefill,),
    )
