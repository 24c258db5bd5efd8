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

    def __init__(self, device: Any, config: config_lib.Config):
        self._device, self._config = device, config
        self._slot_owner: dict[int, Hashable] = {}  # see `_own`

    def give(self, plan: plan_lib.Plan, requests: Sequence[request_lib.Request | None]) -> Any:
        """Start a plan; return what `arguments.fetch` waits for.

        requests: of the plan's parts or rows, in order; None for one that is over.
        """
        for action in plan.actions:
            self._act(action)
        for item, request in zip(plan.prefill or plan.decode, requests, strict=True):
            if request is not None:
                self._prepare(item, request)
        if plan.prefill:
            tokens = [self._sequence(r, p) for r, p in zip(requests, plan.prefill, strict=True)]
            prompts = host_batch.prompts(plan.prefill, tokens, self._config)
            batch = host_batch.batch(host_batch.PREFILL_PARTS, plan.prefill, requests, self._config)
            return self._device.run("prefill", len(prompts.tokens), batch, prompts)
        if not plan.decode:
            return None
        size = next(n for n in self._config.decode_rows if n >= len(plan.decode))
        batch = host_batch.batch(size, plan.decode, requests, self._config)
        drafts = self._drafts(size, plan, requests)
        if drafts is None:
            return self._device.run("decode", size, batch, np.int32(plan.steps))
        return self._device.run("verify", size, batch, drafts)

    def _drafts(self, size: int, plan: plan_lib.Plan, requests) -> Any:
        """Return guesses for `programs.verify`; None where there are none to check."""
        config = self._config
        most = min(config.draft_tokens, plan.steps - 1)
        if most < 1 or size != config.decode_rows[0]:
            return None
        drafts = np.full((size, config.tile_rows), -1, np.int32)
        for row, request in enumerate(requests):
            if request is None or not request.plain:
                continue
            length = len(request.prompt) + len(request.tokens) - 1
            first = length % config.tile_rows + 1
            room = config.tile_rows - first
            if (length + 1 + room) % config.chunk_tokens == 0:
                room -= 1  # the chunk's last place
            guess = request.lookup.guess(min(room, most))
            drafts[row, first : first + len(guess)] = guess
        return drafts if np.any(drafts >= 0) else None

    def _act(self, action) -> None:
        """Move memory."""
        run, device_ = self._device.run, self._device
        if isinstance(action, plan_lib.Copy):
            run("copy", 0, np.int32(action.source_slot), np.int32(action.target_slot))
        elif isinstance(action, plan_lib.SwapOut):
            device_.swap_out(action.job_id, host_batch.pieces(action.slot, action.pages))
        elif isinstance(action, plan_lib.SwapIn):
            device_.swap_in(action.job_id, host_batch.pieces(action.slot, action.pages))
            self._own(action.slot, action.job_id)  # with its counts, bias and mask
        else:
            device_.drop(action.job_id)

    def _sequence(
        self, request: request_lib.Request | None, part: plan_lib.Part
    ) -> tuple[list[int], int]:
        """Return a part's tokens, and the one after it where the sequence is computed again."""
        if request is None:  # cancelled since: what is computed does not matter
            return [0] * part.count, 0 if part.resume else -1
        all_ = [*request.prompt, *(token.id for token in request.tokens)]
        end = part.start + part.count
        return all_[part.start : end], all_[end] if part.resume else -1

    def _prepare(self, item: plan_lib.Part | plan_lib.Row, request: request_lib.Request) -> None:
        """Bring a slot's counts, bias and mask in line with the request that now has it."""
        options = request.options
        needs = bool(request.penalised or options.logit_bias or request.matcher)
        owner = self._slot_owner.get(item.slot, -1)
        run, slot = self._device.run, np.int32(item.slot)
        if owner != request.number and (needs or owner != -1):
            run("reset", 0, slot, *host_batch.bias(options.logit_bias))
            self._own(item.slot, request.number if needs else -1)
            made = [token.id for token in request.tokens]
            for tokens, in_prompt in (
                ((request.prompt, True), (made, False)) if request.penalised else ()
            ):
                for first in range(0, len(tokens), transfers.COUNT_TOKENS):
                    some = host_batch.counted(tokens[first : first + transfers.COUNT_TOKENS])
                    run("count", 0, slot, some, np.bool_(in_prompt))
        if request.matcher is not None:
            run("set_mask", 0, slot, request.mask)

    def _own(self, slot: int, number: Hashable) -> None:
        """Note whose counts, bias and mask a slot holds; -1 is nobody's: none."""
        for other, owner in self._slot_owner.items():
            if owner == number != -1:  # it was there before it was preempted
                self._slot_owner[other] = None
        self._slot_owner[slot] = number
