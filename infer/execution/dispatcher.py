"""From a plan to the programs that carry it out, for the requests that it names."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from infer import config as config_lib
from infer import request as request_lib
from infer.execution import host_batch, transfers
from infer.scheduling import plan as plan_lib


class Dispatcher:
    """Gives plans to a device, and knows whose counts, bias and mask each slot holds."""

    def __init__(self, device: Any, config: config_lib.EngineConfig):
        self._device, self._config = device, config
        self._slot_owner: dict[int, Hashable] = {}  # see `_own`

    def dispatch(
        self, plan: plan_lib.StepPlan, requests: Sequence[request_lib.Request | None]
    ) -> Any:
        """Start a plan; return what `arguments.fetch` waits for.

        requests: of the plan's parts or rows, in order; None for one that is over.
        """
        for action in plan.actions:
            self._run_action(action)
        for item, request in zip(plan.prefill_chunks or plan.decode_rows, requests, strict=True):
            if request is not None:
                self._prepare_slot(item, request)
        if plan.prefill_chunks:
            tokens = [
                self._chunk_tokens(r, p) for r, p in zip(requests, plan.prefill_chunks, strict=True)
            ]
            prompts = host_batch.pack_prompts(plan.prefill_chunks, tokens, self._config)
            batch = host_batch.make_batch(
                host_batch.MAX_PREFILL_CHUNKS, plan.prefill_chunks, requests, self._config
            )
            return self._device.run_program("prefill", len(prompts.tokens), batch, prompts)
        if not plan.decode_rows:
            return None
        size = next(n for n in self._config.decode_batch_sizes if n >= len(plan.decode_rows))
        batch = host_batch.make_batch(size, plan.decode_rows, requests, self._config)
        drafts = self._draft_tokens(size, plan, requests)
        if drafts is None:
            return self._device.run_program("decode", size, batch, np.int32(plan.max_steps))
        return self._device.run_program("verify", size, batch, drafts)

    def _draft_tokens(self, size: int, plan: plan_lib.StepPlan, requests) -> Any:
        """Return guesses for `programs.verify_drafts`; None where there are none to check."""
        config = self._config
        most = min(config.draft_tokens, plan.max_steps - 1)
        if most < 1 or size != config.decode_batch_sizes[0]:
            return None
        drafts = np.full((size, config.attention_tile), -1, np.int32)
        for row, request in enumerate(requests):
            if request is None or not request.plain:
                continue
            length = len(request.prompt) + len(request.tokens) - 1
            first = length % config.attention_tile + 1
            room = config.attention_tile - first
            if (length + 1 + room) % config.chunk_tokens == 0:
                room -= 1  # the chunk's last place
            guess = request.lookup.guess(min(room, most))
            drafts[row, first : first + len(guess)] = guess
        return drafts if np.any(drafts >= 0) else None

    def _run_action(self, action) -> None:
        """Move memory."""
        run, device_ = self._device.run_program, self._device
        if isinstance(action, plan_lib.CopyState):
            run("copy", 0, np.int32(action.source_slot), np.int32(action.target_slot))
        elif isinstance(action, plan_lib.SwapOut):
            device_.swap_out(action.sequence_id, host_batch.split_pages(action.slot, action.pages))
        elif isinstance(action, plan_lib.SwapIn):
            device_.swap_in(action.sequence_id, host_batch.split_pages(action.slot, action.pages))
            self._set_owner(action.slot, action.sequence_id)  # with its counts, bias and mask
        else:
            device_.drop_host_copy(action.sequence_id)

    def _chunk_tokens(
        self, request: request_lib.Request | None, part: plan_lib.PrefillChunk
    ) -> tuple[list[int], int]:
        """Return a part's tokens, and the one after it where the sequence is computed again."""
        if request is None:  # cancelled since: what is computed does not matter
            return [0] * part.num_tokens, 0 if part.is_resumed else -1
        all_ = [*request.prompt, *(token.id for token in request.tokens)]
        end = part.start + part.num_tokens
        return all_[part.start : end], all_[end] if part.is_resumed else -1

    def _prepare_slot(
        self, item: plan_lib.PrefillChunk | plan_lib.DecodeRow, request: request_lib.Request
    ) -> None:
        """Bring a slot's counts, bias and mask in line with the request that now has it."""
        options = request.options
        needs = bool(request.penalised or options.logit_bias or request.matcher)
        owner = self._slot_owner.get(item.slot, -1)
        run, slot = self._device.run_program, np.int32(item.slot)
        if owner != request.number and (needs or owner != -1):
            run("reset", 0, slot, *host_batch.make_bias(options.logit_bias))
            self._set_owner(item.slot, request.number if needs else -1)
            made = [token.id for token in request.tokens]
            for tokens, in_prompt in (
                ((request.prompt, True), (made, False)) if request.penalised else ()
            ):
                for first in range(0, len(tokens), transfers.COUNT_TOKENS):
                    some = host_batch.pad_tokens(tokens[first : first + transfers.COUNT_TOKENS])
                    run("count", 0, slot, some, np.bool_(in_prompt))
        if request.matcher is not None:
            run("set_mask", 0, slot, request.mask)

    def _set_owner(self, slot: int, number: Hashable) -> None:
        """Note whose counts, bias and mask a slot holds; -1 is nobody's: none."""
        for other, owner in self._slot_owner.items():
            if owner == number != -1:  # it was there before it was preempted
                self._slot_owner[other] = None
        self._slot_owner[slot] = number
