"""One request as the scheduler knows it: its tokens, its memory, how far it is."""

import dataclasses
from collections.abc import Hashable


@dataclasses.dataclass(eq=False)
class Job:
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

    job_id: Hashable
    age: int
    tokens: list[int]
    prompt_tokens: int
    limit: int
    cacheable: bool
    single_step: bool
    waits: bool = False
    slot: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    swapped_pages: int = 0
    computed: int = 0
    decoding: bool = False
    steps_in_flight: int = 0
    works_in_flight: int = 0
    run: int = 0
    pure: bool = True
    over: bool = False
    points: list[int] = dataclasses.field(default_factory=list)
    pending: int = 0
    common: dict[int, int] = dataclasses.field(default_factory=dict)
    cached_tokens: int = 0
    cached_reason: str = "not started"

    @property
    def resumed(self) -> bool:
        return len(self.tokens) > self.prompt_tokens

    @property
    def target(self) -> int:
        """Tokens to prefill: all but the last known one of a sequence that sampled already."""
        return len(self.tokens) - 1 if self.resumed else self.prompt_tokens

    @property
    def most_computed(self) -> int:
        """The most tokens that may be in the state once all plans made have run.

        The last token of a sequence is never computed.
        """
        return min(self.computed + self.steps_in_flight, self.limit - 1)

    @property
    def ready(self) -> bool:
        """Whether another decode dispatch may be of use."""
        waits = (self.single_step or self.waits) and self.works_in_flight
        return self.decoding and not waits and self.most_computed < self.limit - 1

    @property
    def saves(self) -> bool:
        """Whether its prefixes may become snapshots."""
        return self.cacheable and self.pure

    def restart(self) -> None:
        """Forget all that was computed; plans under way still bring their tokens."""
        self.run += 1
        self.computed = self.steps_in_flight = self.swapped_pages = self.pending = 0
        self.decoding = False
        self.pure = True
        self.points = []


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A job's place in a plan: what its result must look like.

    run: the job's at that time. steps: of decoding. samples: a prefill part with a first token.
    """

    job: Job
    run: int
    steps: int = 0
    samples: bool = False
