"""What an engine is built for: sizes that fix its programs and its memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from m1_jax.serving import ragged_batch

_MAX_PREFILL_TOKENS = 2048  # `fit_config` stops growing its prefill program here
_FEWEST_DECODE_ROWS = 8
# On CPU small products are cheap, and matrices of small models lie in a cache.
_CPU_MATMUL_TILE = 8


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine, of all its devices together.

    A mesh serves with several groups of devices, and each has a partition of the rows, the pages
    and the snapshots (`split`).

    The chunk borders are the multiples of `chunk_tokens`: pages end there, and recurrent states
    move on there.

    Attributes:
      max_length: longest sequence, prompt and output together, in tokens.
      max_rows: sequences that run side by side, at least 1.
      num_pages: pages of the pool, each the keys and values of one chunk. 0: enough for `max_rows`
        sequences of `max_length`.
      num_snapshots: state slots beyond `max_rows`, for the prefix cache. 0 switches it off.
      chunk_tokens: tokens between two updates of a recurrent state, and tokens of a page.
      decode_steps: most tokens that a sequence makes in one dispatch, at least 1.
      prefill_tokens: rows of the prefill programs in each partition, ascending, multiples of
        `attention_tile`. The last one is at least `chunk_tokens`.
      max_queue: requests that may wait, at least 1. One more is refused.
      snapshot_every_tokens: distance of snapshots in long prompts, a multiple of `chunk_tokens`.
        0: none but those at the ends of prompts and where prompts part.
      swap_tokens: preempted sequences of at least this length go to host memory. Shorter ones are
        computed again.
      host_bytes: most bytes of preempted sequences in host memory. 0: none go there.
      prefix_cache: whether states and pages of prompts and outputs are kept for reuse.
      draft_tokens: guesses (prompt lookup) that are checked at once, less than `attention_tile`.
        0: none are made.
      attention_tile: rows of a sequence that attention computes at a time, a divisor of
        `chunk_tokens`.
      record_routes: whether each token's experts are kept, for a trainer to replay.
      matmul_tile: rows that a matrix product computes at a time, so that numbers do not depend on
        the batch. Fewer rows are filled up. Weights are read once for each such tile. 0: all rows
        at once, and numbers do depend on the batch. None: 8 on CPU, and 128 on accelerators, whose
        memory the weights are read from. See `for_platform`.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    max_length: int = 4096
    max_rows: int = 8
    num_pages: int = 0
    num_snapshots: int = 8
    chunk_tokens: int = 64
    decode_steps: int = 8
    prefill_tokens: tuple[int, ...] = (64, 512)
    max_queue: int = 1024
    snapshot_every_tokens: int = 8192
    swap_tokens: int = 10_240
    host_bytes: int = 0
    prefix_cache: bool = True
    draft_tokens: int = 0
    attention_tile: int = 8
    record_routes: bool = False
    matmul_tile: int | None = None

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
        # The largest program must hold a whole chunk: a prompt is cut at chunk borders, so less
        # could never advance it.
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] < chunk:
            raise ValueError(
                f"prefill_tokens: got {sizes}; wanted ascending sizes, the last at least "
                f"chunk_tokens {chunk}"
            )
        for size in sizes:
            if size % self.attention_tile:
                raise ValueError(
                    f"prefill_tokens: got {size}; wanted multiples of {self.attention_tile}"
                )
        if self.matmul_tile is not None and self.matmul_tile < 0:
            raise ValueError(f"matmul_tile: got {self.matmul_tile}; wanted 1 or more, 0 or None")

    @property
    def pages_per_sequence(self) -> int:
        """Pages of a sequence of max_length."""
        return self.count_pages(self.max_length)

    @property
    def total_pages(self) -> int:
        """Pages of the pool, page 0 of padding not counted."""
        return self.num_pages or self.max_rows * self.pages_per_sequence

    @property
    def total_slots(self) -> int:
        """State slots of the pool, slot 0 of padding not counted."""
        return self.max_rows + self.num_snapshots

    def for_platform(self, platform: str) -> "EngineConfig":
        """Return the config with the default of a platform where it says None."""
        if self.matmul_tile is not None:
            return self
        tile = _CPU_MATMUL_TILE if platform == "cpu" else ragged_batch.ACCELERATOR_MATMUL_TILE
        return dataclasses.replace(self, matmul_tile=tile)

    def split(self, num_partitions: int) -> "EngineConfig":
        """Return the sizes of one of several equal partitions. Queue and host memory stay whole.

        Shares are rounded up. A partition has pages for the longest sequence that all pages
        together could hold, because a sequence has all of its pages in one partition.
        """
        pages = max(
            -(-self.total_pages // num_partitions), min(self.pages_per_sequence, self.total_pages)
        )
        return dataclasses.replace(
            self,
            max_rows=-(-self.max_rows // num_partitions),
            num_pages=pages,
            num_snapshots=-(-self.num_snapshots // num_partitions),
        )

    def count_pages(self, tokens: int) -> int:
        """Return the pages that so many tokens fill, the last one perhaps in part."""
        return -(-tokens // self.chunk_tokens)

    def floor_to_chunk(self, tokens: int) -> int:
        """Return the last chunk border at or before a length."""
        return tokens // self.chunk_tokens * self.chunk_tokens

    def pad_to_tile(self, tokens: int) -> int:
        """Return the rows that so many tokens of one sequence take in a prefill program."""
        return -(-tokens // self.attention_tile) * self.attention_tile

    @property
    def decode_batch_sizes(self) -> tuple[int, ...]:
        """Rows of the decode programs: 8, 32, 128, ... up to max_rows.

        A dispatch takes the smallest program that holds its rows.
        """
        # They need not be whole matmul tiles: products are filled up, and nothing else is.
        largest = -(-self.max_rows // _FEWEST_DECODE_ROWS) * _FEWEST_DECODE_ROWS
        sizes = [_FEWEST_DECODE_ROWS]
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
