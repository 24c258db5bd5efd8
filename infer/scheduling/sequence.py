"""One request as the scheduler knows it: its tokens, its memory, how far it is."""

import dataclasses
from collections.abc import Hashable


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request.

    age: number of its submission. tokens: prompt and all tokens reported. limit: tokens at which
    it ends. slot: 0 unless it runs. pages: held while it runs. swapped_pages: pages in host memory.
    computed: tokens in the state; while prefilling those of all plans made, afterwards those
    reported. steps_in_flight: decode steps of plans not reported. works_in_flight: plans with it
    not reported. run: how often it began from nothing. waits: for its report before it is
    dispatched again. pure: its state is of one weights version.
    points: where snapshots are to be taken. pending: the one that the state is at.
    common: by another job's age, tokens that both start with.
    """

    sequence_id: Hashable
    age: int
    tokens: list[int]
    prompt_tokens: int
    length_limit: int
    is_cacheable: bool
    single_step: bool
    waits_for_reports: bool = False
    slot: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    swapped_pages: int = 0
    computed_tokens: int = 0
    is_decoding: bool = False
    steps_in_flight: int = 0
    plans_in_flight: int = 0
    restarts: int = 0
    single_version: bool = True
    is_over: bool = False
    snapshot_points: list[int] = dataclasses.field(default_factory=list)
    pending_snapshot: int = 0
    shared_prefix_tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    cached_tokens: int = 0
    cached_reason: str = "not started"

    @property
    def is_resumed(self) -> bool:
        return len(self.tokens) > self.prompt_tokens

    @property
    def prefill_target(self) -> int:
        """Tokens to prefill: all but the last known one of a sequence that sampled already."""
        return len(self.tokens) - 1 if self.is_resumed else self.prompt_tokens

    @property
    def max_computed_tokens(self) -> int:
        """The most tokens that may be in the state once all plans made have run.

        The last token of a sequence is never computed.
        """
        return min(self.computed_tokens + self.steps_in_flight, self.length_limit - 1)

    @property
    def can_decode(self) -> bool:
        """Whether another decode dispatch may be of use."""
        waits = (self.single_step or self.waits_for_reports) and self.plans_in_flight
        return self.is_decoding and not waits and self.max_computed_tokens < self.length_limit - 1

    @property
    def can_snapshot(self) -> bool:
        """Whether its prefixes may become snapshots."""
        return self.is_cacheable and self.single_version

    def restart(self) -> None:
        """Forget all that was computed; plans under way still bring their tokens."""
        self.restarts += 1
        self.computed_tokens = self.steps_in_flight = self.swapped_pages = self.pending_snapshot = 0
        self.is_decoding = False
        self.single_version = True
        self.snapshot_points = []


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduledStep:
    """A job's place in a plan: what its result must look like.

    run: the job's at that time. steps: of decoding. samples: a prefill part with a first token.
    """

    sequence: Sequence
    restarts: int
    decode_steps: int = 0
    samples_token: bool = False
