"""From a plan to the programs that carry it out, for the requests that it names."""

import dataclasses
import enum
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from infer import config as config_lib
from infer import request as request_lib
from infer.execution import device as device_lib
from infer.execution import host_batch, leader_follower, program_spec, sampling, transfers
from infer.scheduling import plan as plan_lib

ProgramName = program_spec.ProgramName


class SlotState(enum.Enum):
    """What a slot's counts, bias and mask hold (`slot_sampling.SlotSamplingState`).

    CLEAN: no request's values: no counts, no bias, every token allowed.
    OWNED: one request's values.
    DIRTY: leftovers of a request that has another slot now.
    """

    CLEAN = enum.auto()
    OWNED = enum.auto()
    DIRTY = enum.auto()


@dataclasses.dataclass(frozen=True)
class _SlotUse:
    """A slot's state, and the sequence id of the request where it is OWNED."""

    state: SlotState
    owner: Hashable = None


_CLEAN, _DIRTY = _SlotUse(SlotState.CLEAN), _SlotUse(SlotState.DIRTY)


@dataclasses.dataclass(frozen=True)
class DispatchedPlan:
    """A plan given to the device.

    Attributes:
      row_by_request: a request's row in the arrays of `chosen`, by its sequence id.
      chosen: what the program chose, perhaps not computed yet. None without a program.
      version: the version of the weights that compute it.
    """

    row_by_request: dict[Hashable, int]
    chosen: sampling.ChosenTokens | None
    version: int

    def wait_for_tokens(self) -> host_batch.SampledTokens:
        """Wait for the device, and return what it chose."""
        return host_batch.fetch_tokens(self.chosen)


class Dispatcher:
    """Gives plans to a device, and knows what each slot's sampling state holds."""

    def __init__(
        self,
        device: device_lib.Device | leader_follower.Leader,
        config: config_lib.EngineConfig,
        is_device_new: bool = True,
    ):
        """Know nothing of the slots but whether `init_sampling_state` made them just now."""
        self._device, self._num_partitions = device, device.limits.num_partitions
        self._config = config.split(self._num_partitions)
        self._slots: dict[int, _SlotUse] = {}
        self._first_use = _CLEAN if is_device_new else _DIRTY  # of slots without an entry

    def clear_device(self, sequence_ids: Iterable[Hashable]) -> None:
        """Have a device that another dispatcher left half way forget its sequences.

        Raises:
          RuntimeError: a program was interrupted that had its memory.
        """
        for sequence_id in sequence_ids:
            self._device.drop_host_copy(sequence_id)
        # Slot 0 is padding's. JAX refuses arrays that a program took and nobody got back.
        padding = np.int32(0)
        self._device.run_program(ProgramName.COPY_STATE, 0, padding, padding)
        self._device.run_program(ProgramName.RESET_SLOT, 0, padding, *host_batch.make_bias({}))

    def dispatch(
        self,
        plan: plan_lib.StepPlan,
        requests: Sequence[request_lib.Request | None],
        version: int,
    ) -> DispatchedPlan:
        """Start a plan, without waiting for it.

        Args:
          requests: the requests of the plan's entries, in order. None for one that is over.
          version: the version of the device's weights.
        """
        for action in plan.actions:
            self._run_action(action)
        # After the actions: a sequence that comes back from the host brings its slot's state.
        for entry, request in zip(plan.entries, requests, strict=True):
            if request is not None:
                self._prepare_slot(entry.slot, request)
        if not plan.entries:
            return DispatchedPlan({}, None, version)
        if plan.prefill_chunks:
            rows, chosen = self._start_prefill(plan, requests)
        else:
            rows, chosen = self._start_decode(plan, requests)
        ids = [entry.sequence_id for entry in plan.entries]
        return DispatchedPlan(dict(zip(ids, rows, strict=True)), chosen, version)

    def read_expert_ids(self, pages: Sequence[int]) -> np.ndarray:
        """Wait for the experts of all tokens in some pages: [tokens, layers, experts]."""
        slices = host_batch.split_pages(0, pages)
        parts = [
            self._device.run_program(ProgramName.READ_EXPERT_IDS, 0, page_ids)
            for _, page_ids in slices
        ]
        expert_ids = np.concatenate([np.asarray(part) for part in parts])
        return expert_ids.reshape(-1, *expert_ids.shape[2:])

    def _start_prefill(
        self, plan: plan_lib.StepPlan, requests: Sequence[request_lib.Request | None]
    ) -> tuple[list[int], sampling.ChosenTokens]:
        """Return the entries' rows, and what the program chooses in them."""
        chunks, num_rows = plan.prefill_chunks, host_batch.MAX_PREFILL_CHUNKS
        rows = plan.assign_rows(self._num_partitions, num_rows)
        tokens = [
            _chunk_tokens(request, chunk) for request, chunk in zip(requests, chunks, strict=True)
        ]
        prompts = host_batch.pack_prompts(chunks, rows, tokens, self._config, self._num_partitions)
        batch = host_batch.make_batch(
            self._num_partitions * num_rows, plan, rows, requests, self._config
        )
        size = len(prompts.tokens)
        return rows, self._device.run_program(ProgramName.PREFILL, size, batch, prompts)

    def _start_decode(
        self, plan: plan_lib.StepPlan, requests: Sequence[request_lib.Request | None]
    ) -> tuple[list[int], sampling.ChosenTokens]:
        """Return the entries' rows, and what the program chooses in them."""
        sizes = self._config.decode_batch_sizes
        # The partition with the most rows decides. Sizes ascend, so the smallest that holds it.
        most_rows = max(plan.count_rows(self._num_partitions))
        num_rows = next(rows for rows in sizes if rows >= most_rows)
        rows = plan.assign_rows(self._num_partitions, num_rows)
        size = self._num_partitions * num_rows
        batch = host_batch.make_batch(size, plan, rows, requests, self._config)
        guesses = self._draft_tokens(size, plan, rows, requests)
        if guesses is None:
            steps = np.int32(plan.max_steps)
            return rows, self._device.run_program(ProgramName.DECODE, size, batch, steps)
        return rows, self._device.run_program(ProgramName.VERIFY, size, batch, guesses)

    def _draft_tokens(
        self,
        size: int,
        plan: plan_lib.StepPlan,
        rows: Sequence[int],
        requests: Sequence[request_lib.Request | None],
    ) -> np.ndarray | None:
        """Return guesses for `drafts.verify_drafts`, or None where there are none to check."""
        config = self._config
        # A row makes one token more than it has right guesses, and at most `max_steps` in all.
        max_drafts = min(config.draft_tokens, plan.max_steps - 1)
        # With many rows the device is busy without guesses: only the smallest program has them.
        if max_drafts < 1 or size != self._num_partitions * config.decode_batch_sizes[0]:
            return None
        drafts = np.full((size, config.attention_tile), -1, np.int32)
        for row, request in zip(rows, requests, strict=True):
            if request is None or not request.allows_drafts:
                continue
            # The last token of a sequence is not in its state yet: it enters first, at the row of
            # the open tile that its position says, and guesses fill the rows after it.
            length = len(request.prompt) + len(request.tokens) - 1
            first = length % config.attention_tile + 1
            room = config.attention_tile - first
            if (length + 1 + room) % config.chunk_tokens == 0:
                # A guess in the chunk's last row would move the recurrent state on, for good.
                room -= 1
            assert request.prompt_lookup is not None, "the engine made one"
            guess = request.prompt_lookup.draft_tokens(min(room, max_drafts))
            drafts[row, first : first + len(guess)] = guess
        return drafts if np.any(drafts >= 0) else None

    def _run_action(self, action: plan_lib.Action) -> None:
        """Move memory."""
        match action:
            case plan_lib.CopyState(source, target):
                self._device.run_program(
                    ProgramName.COPY_STATE, 0, np.int32(source), np.int32(target)
                )
            case plan_lib.SwapOut(sequence_id, slot, pages):
                self._device.swap_out(sequence_id, host_batch.split_pages(slot, pages))
            case plan_lib.SwapIn(sequence_id, slot, pages):
                self._device.swap_in(sequence_id, host_batch.split_pages(slot, pages))
                # Its counts, bias and mask came with it.
                self._set_owner(slot, sequence_id)
            case plan_lib.DropHostCopy(sequence_id):
                self._device.drop_host_copy(sequence_id)

    def _prepare_slot(self, slot: int, request: request_lib.Request) -> None:
        """Bring a slot's counts, bias and mask in line with the request that now has it."""
        options, slot_id = request.options, np.int32(slot)
        has_own_state = bool(request.has_penalties or options.logit_bias or request.matcher)
        use = self._slots.get(slot, self._first_use)
        is_own = use.state is SlotState.OWNED and use.owner == request.sequence_id
        # A request without penalties, bias or grammar is served from a clean slot as it is.
        if not is_own and (has_own_state or use.state is not SlotState.CLEAN):
            bias = host_batch.make_bias(options.logit_bias)
            self._device.run_program(ProgramName.RESET_SLOT, 0, slot_id, *bias)
            if has_own_state:
                self._set_owner(slot, request.sequence_id)
            else:
                self._slots[slot] = _CLEAN
            if request.has_penalties:
                # Sampling counts each token that it chooses. Those from before must be counted
                # here: the prompt, and the output of a request that begins again.
                self._count_tokens(slot_id, request.prompt, in_prompt=True)
                self._count_tokens(slot_id, request.tokens.ids.tolist(), in_prompt=False)
        # A grammar allows other tokens after every token, so its mask is sent every time.
        if request.matcher is not None:
            self._device.run_program(ProgramName.SET_MASK, 0, slot_id, request.grammar_mask)

    def _count_tokens(self, slot_id: np.int32, tokens: Sequence[int], in_prompt: bool) -> None:
        for first in range(0, len(tokens), transfers.COUNT_TOKENS):
            block = host_batch.pad_tokens(tokens[first : first + transfers.COUNT_TOKENS])
            self._device.run_program(
                ProgramName.COUNT_TOKENS, 0, slot_id, block, np.bool_(in_prompt)
            )

    def _set_owner(self, slot: int, sequence_id: Hashable) -> None:
        """Note that a slot holds a request's own state. A slot that it had before is dirty now."""
        for other_slot, use in self._slots.items():
            if use.state is SlotState.OWNED and use.owner == sequence_id:
                self._slots[other_slot] = _DIRTY
        self._slots[slot] = _SlotUse(SlotState.OWNED, sequence_id)


def _chunk_tokens(
    request: request_lib.Request | None, chunk: plan_lib.PrefillChunk
) -> tuple[list[int], int]:
    """Return a chunk's tokens, and the token after them where that is known already, else -1."""
    if request is None:
        # Cancelled since it was planned. The program has its shape already, so padding tokens are
        # computed, and nobody reads the result.
        return [0] * chunk.num_tokens, 0 if chunk.is_resumed else -1
    tokens = [*request.prompt, *request.tokens.ids.tolist()]
    end = chunk.start + chunk.num_tokens
    return tokens[chunk.start : end], tokens[end] if chunk.is_resumed else -1
