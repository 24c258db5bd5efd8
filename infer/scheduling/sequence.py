"""One request as the scheduler knows it: its tokens, its memory, how far it is."""

import dataclasses
import operator
from collections.abc import Hashable

from infer.scheduling import plan as plan_lib

# Sequences are kept and served in this order everywhere.
SUBMISSION_ORDER = operator.attrgetter("submission_index")


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request in the scheduler.

    It waits (no slot), runs (a slot and pages), or waits with a copy in host memory. The scheduler
    plans ahead of the results, so progress is known only between two bounds: `computed_tokens` at
    least and `max_computed_tokens` at most.

    Attributes:
      sequence_id: the engine's id of the request.
      submission_index: counts the submissions, from 1. Lower goes first everywhere.
      tokens: prompt and all tokens reported so far.
      prompt_tokens: tokens of the prompt.
      length_limit: tokens of prompt and output at which the sequence ends.
      is_cacheable: whether it may read and write the prefix cache.
      single_step: whether the host must see each token before the next one is made.
      waits_for_reports: whether the tokens of a dispatch must be reported before the next dispatch.
      slot: its state slot. 0 unless it runs.
      partition: the partition where it runs, or ran last.
      pages: its pages, in order, while it runs.
      swapped_pages: pages in host memory. 0 unless it was swapped out.
      computed_tokens: tokens in the state. While prefilling those of all plans made, because a
        prefill has a known length. While decoding those reported.
      is_decoding: whether its prefill is planned to the end.
      steps_in_flight: decode steps of plans not reported.
      plans_in_flight: plans with this sequence that are not reported.
      restarts: how often it began again from nothing. A result of an earlier life still brings
        tokens, but says nothing about the state.
      single_version: whether its state comes from one version of the weights.
      is_over: whether it has ended. Plans under way may still name it.
      snapshot_points: chunk borders, ascending, at which a snapshot is to be taken.
      pending_snapshot: the length at which the state stands and is to be copied. 0 if none.
      shared_prefix_tokens: number of tokens that it starts with as another sequence does, in whole
        chunks, by the other's `submission_index`.
      cached_tokens: prompt tokens that came from the prefix cache.
      cache_miss_reason: why `cached_tokens` is 0, or "".
    """

    sequence_id: Hashable
    submission_index: int
    tokens: list[int]
    prompt_tokens: int
    length_limit: int
    is_cacheable: bool
    single_step: bool
    waits_for_reports: bool = False
    slot: int = 0
    partition: int = 0
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
    cache_miss_reason: str = "not started"

    @property
    def is_resumed(self) -> bool:
        """Whether tokens were sampled already, so that a prefill computes them again."""
        return len(self.tokens) > self.prompt_tokens

    @property
    def prefill_target(self) -> int:
        """Tokens to prefill: all but the last known one of a sequence that sampled already."""
        return len(self.tokens) - 1 if self.is_resumed else self.prompt_tokens

    @property
    def max_computed_tokens(self) -> int:
        """The most tokens that may be in the state once all plans made have run.

        The last token of a sequence is sampled and never computed, hence the limit less 1.
        """
        return min(self.computed_tokens + self.steps_in_flight, self.length_limit - 1)

    @property
    def remaining_steps(self) -> int:
        """Decode steps that the sequence may still need after all plans made."""
        return self.length_limit - 1 - self.max_computed_tokens

    @property
    def can_decode(self) -> bool:
        """Whether another decode dispatch may be of use."""
        must_wait = (self.single_step or self.waits_for_reports) and self.plans_in_flight
        return self.is_decoding and not must_wait and self.remaining_steps > 0

    @property
    def can_snapshot(self) -> bool:
        """Whether its prefixes may become snapshots: a cache key is for one version of weights."""
        return self.is_cacheable and self.single_version

    def restart(self) -> None:
        """Forget all that was computed. Plans under way still bring their tokens."""
        self.restarts += 1
        self.computed_tokens = self.steps_in_flight = 0
        self.swapped_pages = self.pending_snapshot = 0
        self.is_decoding = False
        # The state is computed anew, with the present weights alone.
        self.single_version = True
        self.snapshot_points = []


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduledStep:
    """A sequence's part in a plan: what its result must look like.

    Attributes:
      sequence: whose part it is.
      restarts: the sequence's count when the plan was made.
      decode_steps: most tokens that decoding makes. 0 in a prefill.
      samples_token: whether a prefill chunk samples the first token of the output.
    """

    sequence: Sequence
    restarts: int
    decode_steps: int = 0
    samples_token: bool = False

    def check_result(self, result: plan_lib.StepResult) -> None:
        """Raise ValueError for a result that the plan cannot have had."""
        if self.sequence.is_over:
            return
        min_tokens = max_tokens = int(self.samples_token)
        if self.decode_steps:
            # At least one, because a row that cannot run is not planned.
            min_tokens, max_tokens = 1, self.decode_steps
        if (
            not min_tokens <= result.num_tokens <= max_tokens
            or len(result.new_tokens) != result.num_tokens
        ):
            raise ValueError(
                f"got {result.num_tokens} tokens ({len(result.new_tokens)} values) for sequence "
                f"{self.sequence.sequence_id!r}, wanted {min_tokens} to {max_tokens}: report what "
                "the oldest plan made, and a row that stopped by itself as finished in the plan "
                "where it did"
            )
