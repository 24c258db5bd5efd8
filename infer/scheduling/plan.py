"""What scheduler and engine say to each other: limits, plans, results. Data, and one check.

A plan is what the device does next: `actions`, in order, then at most one program. The device runs
plans strictly in the order in which they were made. A plan therefore reads what earlier plans left
behind, and memory that the scheduler counts as free may still be in use by a plan under way.

The states and pages named here exist on the device. A state slot holds one sequence's recurrent
states. A page holds the keys and values of one chunk of `chunk_tokens` tokens. Recurrent states
move on only at chunk borders, the multiples of `chunk_tokens`, so copies of states are taken only
there.

On a mesh, groups of devices have a partition of the slots and pages each. Ids are of all partitions
together: partition p has those after p (n + 1), n to a partition, and p (n + 1) is its padding's.
"""

import dataclasses
from collections.abc import Hashable

from infer import config as config_lib


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """What the device was built with, beyond the sizes that `EngineConfig` gives.

    Attributes:
      num_slots: state slots of a partition. The one that padding uses is not counted.
      num_pages: pages of a partition. The one that padding uses is not counted.
      max_prefill_chunks: most sequences of a partition in one prefill program.
      page_bytes: bytes of one page, on all devices together.
      state_bytes: bytes of one state slot, on all devices together.
      cache_bytes: most bytes of a partition's snapshots and their pages. 0 switches the prefix
        cache off.
      num_partitions: groups of devices that have slots and pages of their own.

    Raises:
      ValueError: a size is too small.
    """

    num_slots: int
    num_pages: int
    max_prefill_chunks: int
    page_bytes: int = 1
    state_bytes: int = 1
    cache_bytes: int = 0
    num_partitions: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            # 0 is a value of cache_bytes alone.
            minimum = int(field.name != "cache_bytes")
            value = getattr(self, field.name)
            if value < minimum:
                raise ValueError(f"got {field.name} {value}; wanted {minimum} or more: raise it")


@dataclasses.dataclass(frozen=True)
class CopyState:
    """Copy the recurrent states of a slot whose sequence stands at a chunk border.

    This takes a snapshot or restores one. Pages need no copy, because holders share them.
    """

    source_slot: int
    target_slot: int


@dataclasses.dataclass(frozen=True)
class SwapOut:
    """Copy a sequence to host memory: its pages, and everything in its slot.

    Attributes:
      sequence_id: name of the host copy.
      slot: the sequence's state slot.
      pages: the pages that hold computed tokens, from the sequence's first page on.
    """

    sequence_id: Hashable
    slot: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SwapIn:
    """Copy a sequence back from host memory, and forget the host copy.

    Attributes:
      sequence_id: name of the host copy.
      slot: any free slot of any partition. It need not be the one that the sequence had before.
      pages: as many pages of that partition as were swapped out, in the same order.
    """

    sequence_id: Hashable
    slot: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DropHostCopy:
    """Forget the host copy of a sequence."""

    sequence_id: Hashable


Action = CopyState | SwapOut | SwapIn | DropHostCopy


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Compute tokens `start` to `start + num_tokens` of a sequence.

    Attributes:
      sequence_id: whose tokens they are.
      slot: the sequence's state slot. A chunk that starts at 0 begins with an empty state, any
        other with the slot's recurrent states. Everything else in the slot (tokens past the last
        chunk border, next token, whether decoding stopped) may be left over from another sequence.
      start: first token to compute, at a chunk border.
      num_tokens: tokens to compute, at least 1.
      pages: the sequence's pages, from the first to that of the last token computed here.
      is_last: whether the prompt ends here. Then the device samples the next token and decoding
        may follow, unless `is_resumed`.
      is_resumed: whether the token after this chunk was sampled before. Such a sequence is computed
        again after a preemption, and decoding goes on from that token.
      partition: the partition that has the slot and the pages.
    """

    sequence_id: Hashable
    slot: int
    start: int
    num_tokens: int
    pages: tuple[int, ...]
    is_last: bool
    is_resumed: bool
    partition: int = 0


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """Decode a sequence on, by the plan's `max_steps` at most.

    Attributes:
      sequence_id: whose tokens are made.
      slot: the sequence's state slot.
      pages: the sequence's pages, from the first to the last that this dispatch may write.
      length_limit: tokens of prompt and output at which the device stops the row by itself.
      partition: the partition that has the slot and the pages.
    """

    sequence_id: Hashable
    slot: int
    pages: tuple[int, ...]
    length_limit: int
    partition: int = 0


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Actions in order, then at most one program: prefill or decode.

    Attributes:
      actions: copies of memory that must happen before the program.
      prefill_chunks: chunks of one prefill program, oldest sequence first. Empty without one.
      decode_rows: rows of one decode program, oldest sequence first. Empty without one.
      max_steps: most tokens that each decode row makes. 0 without a decode program.
    """

    actions: tuple[Action, ...] = ()
    prefill_chunks: tuple[PrefillChunk, ...] = ()
    decode_rows: tuple[DecodeRow, ...] = ()
    max_steps: int = 0

    @property
    def entries(self) -> tuple[PrefillChunk, ...] | tuple[DecodeRow, ...]:
        """The sequences of the plan's program, oldest first."""
        return self.prefill_chunks or self.decode_rows

    def count_rows(self, num_partitions: int) -> list[int]:
        """Return the number of entries of each partition."""
        counts = [0] * num_partitions
        for entry in self.entries:
            counts[entry.partition] += 1
        return counts

    def assign_rows(self, num_partitions: int, partition_rows: int) -> list[int]:
        """Return each entry's row in the program's arrays.

        A partition's rows go by the length of their sequences, in powers of two of pages. Attention
        on CPU takes neighbours together, and as long for all of them as for the longest.

        Args:
          partition_rows: rows of a partition, which lie one after another.
        """
        next_rows = [partition * partition_rows for partition in range(num_partitions)]
        rows = [0] * len(self.entries)
        # Not by pages themselves: rows would move with every page, and a leader sends its followers
        # what changed in each row.
        lengths = [len(entry.pages).bit_length() for entry in self.entries]
        for index in sorted(range(len(rows)), key=lengths.__getitem__):
            partition = self.entries[index].partition
            rows[index] = next_rows[partition]
            next_rows[partition] += 1
        return rows


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a plan made of one sequence.

    Attributes:
      num_tokens: tokens that the device sampled, even those past what the host calls the end.
      is_finished: whether the request is over, for whatever reason.
      final_length: tokens in the device's state, if the device has stopped the row by itself, so
        that plans under way leave the state alone. None if that is not certain.
      new_tokens: the `num_tokens` tokens.
    """

    num_tokens: int = 0
    is_finished: bool = False
    final_length: int | None = None
    new_tokens: tuple[int, ...] = ()


class QueueFull(RuntimeError):
    """No request can be taken now. Try again later."""


def check_length(
    config: config_lib.EngineConfig, num_pages: int, prompt_tokens: int, max_tokens: int
) -> None:
    """Raise ValueError for a request that can never be served.

    Args:
      config: sizes of the engine.
      num_pages: pages that one sequence may have.
      prompt_tokens: tokens of the prompt.
      max_tokens: longest output.
    """
    if not prompt_tokens or max_tokens < 1:
        raise ValueError(
            f"got {prompt_tokens} prompt tokens and max_tokens {max_tokens}; wanted 1 of each "
            "at least: send a prompt, raise max_tokens"
        )
    # One more than the pages hold, because the last token is never computed.
    pool_tokens = num_pages * config.chunk_tokens + 1
    longest = min(config.max_length, pool_tokens)
    total = prompt_tokens + max_tokens
    if total > longest:
        name = "max_length" if longest == config.max_length else "num_pages"
        raise ValueError(
            f"got {prompt_tokens} prompt tokens and max_tokens {max_tokens}, {total} together; "
            f"wanted {longest} at most ({name}): shorten the prompt or lower max_tokens"
        )
