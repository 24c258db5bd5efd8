"""What scheduler and engine say to each other: limits, plans, results. Data only.

A plan is what the device does next: `actions`, in order, then at most one program. The device runs
plans strictly in the order in which they were made, so whatever a later plan is given was left by
earlier ones, and memory that is free for the scheduler may still be in use by a plan under way.
"""

import dataclasses
from collections.abc import Hashable


@dataclasses.dataclass(frozen=True)
class SchedulerLimits:
    """What the device was built for, and what requests may ask.

    num_slots, num_pages: of the pools, dummies not counted. chunk_tokens: tokens of a page, the
    grid. max_length: tokens of one sequence, prompt and output. max_queue: requests that wait.
    max_rows: sequences that run side by side. max_prefill_tokens: rows of one prefill program,
    in which each part is padded to a multiple of attention_tile. max_prefill_chunks: most sequences in it.
    decode_steps: most steps of one dispatch. snapshot_every_tokens: distance of snapshots inside
    long prompts, 0 for none. cache_bytes: of all snapshots and their pages; 0 switches the prefix
    cache off. page_bytes, state_bytes: of one page, one slot. swap_tokens: a preempted sequence of
    at least as many tokens goes to host memory, a shorter one is computed again. host_bytes: of
    the sequences there.
    """

    num_slots: int
    num_pages: int
    chunk_tokens: int
    max_length: int
    max_queue: int
    max_rows: int
    max_prefill_tokens: int
    max_prefill_chunks: int
    decode_steps: int
    snapshot_every_tokens: int = 0
    cache_bytes: int = 0
    page_bytes: int = 1
    state_bytes: int = 1
    swap_tokens: int = 0
    host_bytes: int = 0
    attention_tile: int = 8

    def __post_init__(self):
        least_one = ("num_slots", "num_pages", "chunk_tokens", "max_length", "max_queue")
        least_one += ("max_rows", "max_prefill_chunks", "decode_steps", "attention_tile")
        least_one += ("page_bytes", "state_bytes")
        for name in least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}; wanted 1 or more: raise it")
        for name in ("snapshot_every_tokens", "cache_bytes", "swap_tokens", "host_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}; wanted 0 or more: raise it")
        chunk = self.chunk_tokens
        if chunk % self.attention_tile or self.snapshot_every_tokens % chunk:
            raise ValueError(
                f"got chunk_tokens {chunk}, attention_tile {self.attention_tile}, snapshot_every_tokens "
                f"{self.snapshot_every_tokens}; wanted each later one to fit the chunk: rows must "
                "divide it and snapshots be a multiple of it"
            )
        if self.max_prefill_tokens < chunk or self.max_prefill_tokens % self.attention_tile:
            raise ValueError(
                f"got max_prefill_tokens {self.max_prefill_tokens}; wanted a multiple of "
                f"{self.attention_tile}, at least one chunk: set {chunk} or more"
            )


@dataclasses.dataclass(frozen=True)
class CopyState:
    """Copy the matrix of a state slot, which is on the grid: a snapshot taken or restored."""

    source_slot: int
    target_slot: int


@dataclasses.dataclass(frozen=True)
class SwapOut:
    """Copy a sequence to host memory: pages and slot with all that is the sequence's own."""

    sequence_id: Hashable
    slot: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SwapIn:
    """Copy it back, page by page in the same order, to other places; the host copy is done with."""

    sequence_id: Hashable
    slot: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DropHostCopy:
    """Forget the host copy."""

    sequence_id: Hashable


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Compute tokens `start` to `start + count` of a sequence.

    `start` is on the grid. From 0 the state begins empty, otherwise it is the slot's matrix; all
    else that the slot holds (open chunk, next token, whether it stopped) may be a stranger's.
    pages: from the sequence's first on, up to the last token of this part.
    last: decoding may follow. Then the device samples the next token, unless `resume`: that token
    (the one after this part) is known already and decoding goes on from it.
    """

    sequence_id: Hashable
    slot: int
    start: int
    num_tokens: int
    pages: tuple[int, ...]
    is_last: bool
    is_resumed: bool


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """Decode on, by the plan's `steps` at most, until the sequence has `limit` tokens in all.

    pages: up to the last token that this dispatch may compute.
    """

    sequence_id: Hashable
    slot: int
    pages: tuple[int, ...]
    length_limit: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Actions in order, then one program: `prefill`, or `decode` for `steps`, or none."""

    actions: tuple[CopyState | SwapOut | SwapIn | DropHostCopy, ...] = ()
    prefill_chunks: tuple[PrefillChunk, ...] = ()
    decode_rows: tuple[DecodeRow, ...] = ()
    max_steps: int = 0


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a plan made of one job.

    tokens, new_tokens: how many it sampled, and which; all that the device made, even past what
    the host calls the end. finished: the request is over, by whatever reason. length: tokens in
    the device's state, if the device has stopped the row by itself, so that plans under way leave
    it alone; None if that is not certain.
    """

    num_tokens: int = 0
    is_finished: bool = False
    final_length: int | None = None
    new_tokens: tuple[int, ...] = ()


class QueueFull(RuntimeError):
    """No request can be taken now; try again later."""
