"""Where prefills stop to take a snapshot, and which requests wait for one.

Chunks of a prefill are cut at snapshot points, because a recurrent state can be copied only while
it stands there. Points are therefore chosen before the prefill passes them: at the end of the
prompt, at regular distances, where the prompt leaves the prefix tree, and where a request that
waits would go on.
"""

import bisect
from collections.abc import Iterable, Sequence

from infer import config as config_lib
from infer.scheduling import prefix_tree, sequence

# Waiting sequences that are compared with a sequence that begins. Each comparison reads both
# prompts, so a long queue would cost time in every admission.
LOOKAHEAD_SEQUENCES = 32


class SnapshotPlanner:
    """Chooses snapshot points of sequences under way.

    Args:
      config: sizes of the engine.
    """

    def __init__(self, config: config_lib.EngineConfig):
        self._config = config

    def plan_admitted(
        self,
        admitted: sequence.Sequence,
        common_tokens: int,
        waiting: Sequence[sequence.Sequence],
    ) -> None:
        """Choose where snapshots of a sequence just admitted are to be taken.

        Args:
          common_tokens: whole chunks that its prompt shares with the prefix tree.
          waiting: sequences without memory, oldest first.
        """
        if not admitted.can_snapshot:
            return
        every = self._config.snapshot_every_tokens
        # The last chunk border of the prompt at which a token remains to be computed: the same
        # prompt again can go on from there.
        points = {self._config.floor_to_chunk(admitted.prompt_tokens - 1), common_tokens}
        points.update(range(every, admitted.prefill_target, every) if every else ())
        admitted.snapshot_points = sorted(
            point for point in points if admitted.computed_tokens < point < admitted.prefill_target
        )
        for waiter in waiting[:LOOKAHEAD_SEQUENCES]:
            if waiter is not admitted:
                self._plan_shared(admitted, waiter)

    def plan_submitted(
        self, submitted: sequence.Sequence, running: Iterable[sequence.Sequence]
    ) -> None:
        """Add the snapshots of running prefills that a request just submitted would go on from."""
        for prefilling in running:
            self._plan_shared(prefilling, submitted)
            if (
                submitted.is_cacheable
                and not prefilling.is_decoding
                and self._last_shared_border(prefilling, submitted) == prefilling.computed_tokens
            ):
                # The state stands at the point right now. The next plan starts with the copy.
                prefilling.pending_snapshot = prefilling.computed_tokens

    def awaited_length(
        self, waiter: sequence.Sequence, running: Iterable[sequence.Sequence]
    ) -> int:
        """Return the length of the longest snapshot to come that saves `waiter` work, 0 for none.

        Only prefills of older sequences count. They end whatever arrives later, and so does the
        wait.
        """
        longest = 0
        if not waiter.is_cacheable or waiter.swapped_pages or waiter.plans_in_flight:
            return longest
        for prefilling in running:
            if (
                prefilling.submission_index < waiter.submission_index
                and not prefilling.is_decoding
                and prefilling.can_snapshot
            ):
                shared = self._last_shared_border(prefilling, waiter)
                points = [*prefilling.snapshot_points, prefilling.pending_snapshot]
                longest = max(longest, *(point for point in points if point <= shared), 0)
        return longest

    def _plan_shared(self, prefilling: sequence.Sequence, waiter: sequence.Sequence) -> None:
        """Add the snapshot of a prefilling sequence that `waiter` would continue from."""
        if prefilling.is_decoding or not prefilling.can_snapshot or not waiter.is_cacheable:
            return
        point = self._last_shared_border(prefilling, waiter)
        if point > prefilling.computed_tokens and point not in prefilling.snapshot_points:
            bisect.insort(prefilling.snapshot_points, point)

    def _last_shared_border(self, prefilling: sequence.Sequence, waiter: sequence.Sequence) -> int:
        """Return the last chunk border that both share and that leaves each a token to compute."""
        # Remembered, because `awaits_snapshot` asks again in every plan. Tokens are only ever
        # appended, so the remembered number stays a lower bound.
        index = prefilling.submission_index
        if index not in waiter.shared_prefix_tokens:
            waiter.shared_prefix_tokens[index] = prefix_tree.count_common_tokens(
                prefilling.tokens, waiter.tokens, self._config.chunk_tokens
            )
        return self._config.floor_to_chunk(
            min(
                waiter.shared_prefix_tokens[index],
                prefilling.prefill_target - 1,
                waiter.prefill_target - 1,
            )
        )
