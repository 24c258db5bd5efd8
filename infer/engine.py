"""The engine: requests in, exact tokens out, by continuous batching on one device or mesh.

    engine = Engine(model, tokenizer, config.Config(max_length=8192, max_rows=32))
    request = engine.submit(prompt_ids, request.Options(max_tokens=100))
    engine.run()                       # or start(), for a thread of its own
    request.output().text

The scheduler (`scheduling/scheduler.py`) decides, the programs (`execution/programs.py`) compute, and this file carries
plans to the one and results back to the other, one plan ahead of the results: while the device
runs a plan the host reads the tokens of the one before. Everything is compiled before the engine
is made; nothing is compiled after.
"""

import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from infer import config as config_lib
from infer import grammar, stopping
from infer import options as options_lib
from infer import request as request_lib
from infer.execution import device, dispatcher, host_batch, leader_follower
from infer.scheduling import plan as plan_lib
from infer.scheduling import scheduler
from m1_jax import tokenizer as tokenizer_lib

_KEEP_ALIVE_SECS = 10.0


@dataclasses.dataclass
class _DispatchedPlan:
    """A plan given to the device: what it chose, by job and place in the arrays."""

    row_by_request: dict[Hashable, int]
    sampled: Any
    version: int


class Engine:
    """Serves requests with one model.

    Thread safety: `submit`, `cancel`, `swap`, `suspend` and `close` from any thread. Either `start`
    a thread, or call `run` or `step` from one thread of your own.

    Attributes:
      version: of the weights, 0 at first, one more with every `swap`.
    """

    def __init__(
        self, model: Any, tokenizer: tokenizer_lib.Tokenizer, config: config_lib.EngineConfig
    ):
        """Allocate all memory and compile all programs.

        Raises:
          ValueError: a config that the model cannot serve.
        """
        if config.max_length > model.config.max_position_embeddings:
            raise ValueError(
                f"max_length: got {config.max_length}; the model allows "
                f"{model.config.max_position_embeddings} at most"
            )
        if jax.process_index():
            raise ValueError(
                f"engine: got process {jax.process_index()}; wanted process 0 to have it, and "
                "the others in controller.follow(model, config)"
            )
        self.config, self.tokenizer = config, tokenizer
        self.version = 0
        self._model_config = model.config
        self._device: Any = device.Device(model, config)
        if jax.process_count() > 1:
            self._device = leader_follower.Leader(self._device)
        self._dispatcher = dispatcher.Dispatcher(self._device, config)
        self._compiler = grammar.Compiler(tokenizer, model.config.vocab_size)
        self._scheduler = scheduler.Scheduler(self._scheduler_limits(), self._cache_key())
        self._requests: dict[Hashable, request_lib.Request] = {}
        self._dispatched: collections.deque[_DispatchedPlan] = collections.deque()
        self._request_numbers = itertools.count()
        self._lock = threading.RLock()
        self._work_condition = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = self._failed = False

    # ---- for callers

    def submit(
        self,
        prompt: Sequence[int],
        options: options_lib.Options,
        on_token=None,
        prior_tokens: Sequence[request_lib.Token] | None = None,
    ) -> request_lib.Request:
        """Queue a prompt of token ids.

        on_token: called with (request, token, new text) from the engine's thread.
        made: tokens of a request that was suspended and goes on after them.

        Raises:
          ValueError: options or ids that cannot be served. scheduler.QueueFull: too many wait.
        """
        vocab_size = self._model_config.vocab_size
        bad = [token for token in prompt if not _is_token_id(token, vocab_size)]
        if bad:
            raise ValueError(
                f"prompt: got token id {bad[0]}; wanted 0 to {vocab_size - 1}. "
                "Does the tokenizer belong to this model?"
            )
        options_lib.check(options, vocab_size, self.tokenizer.stop_ids)
        progress = stopping.Progress(options, self.tokenizer)
        matcher = self._compiler.matcher(options)
        with self._work_condition:
            if self._closed:
                raise RuntimeError("the engine is closed")
            stop_ids = options_lib.stop_ids(options, self.tokenizer.stop_ids)
            number = next(self._request_numbers)
            request = request_lib.Request(
                number, prompt, options, stop_ids, progress, matcher, on_token
            )
            for token in prior_tokens or ():
                request.push(token)
            if request.finish_reason is not None:
                raise ValueError("made: got a whole output; wanted one that goes on")
            self._scheduler.submit(
                number,
                request.prompt,
                options.max_tokens,
                single_step=self._needs_single_step(request),
                waits_for_reports=self.config.draft_tokens > 0,
                prior_tokens=None if prior_tokens is None else [token.id for token in prior_tokens],
            )
            self._requests[number] = request
            self._work_condition.notify()
        return request

    def cancel(self, request: request_lib.Request) -> None:
        """End a request; its output so far stays. Nothing happens if it is over."""
        with self._work_condition:
            if request.number in self._requests and request.finish_reason is None:
                self._scheduler.cancel(request.number)
                request.text += request.progress.flush()
                self._end_request(request, "cancelled")

    def swap_weights(self, model: Any, keep_running: bool = True) -> int:
        """Put other weights of the same shapes in place; return their version.

        They enter between two dispatches, and nothing is compiled.

        keep_running: requests under way go on from the states that the old weights left; else
        they are computed again from their tokens.

        Raises:
          ValueError: other shapes, dtypes or layout.
        """
        with self._work_condition:
            self._device.swap_weights(model)
            self.version += 1
            self._scheduler.set_cache_key(self._cache_key(), keep_running)
            return self.version

    def preempt(self, request: request_lib.Request) -> None:
        """Take a request's memory away for now; it goes on later, and nobody can tell."""
        with self._work_condition:
            self._scheduler.preempt(request.number)

    def suspend(self, save_requests: Callable[[list[request_lib.Request]], None]) -> None:
        """End all requests under way as "suspended", once `keep` has them; see `suspend.py`."""
        with self._work_condition:
            # Those with a reason are over, and only not yet reported.
            requests = [one for one in self._requests.values() if one.finish_reason is None]
            save_requests(requests)
            for request in requests:
                self._scheduler.cancel(request.number)
                self._end_request(request, "suspended")

    def continue_from_version(self, version: int) -> None:
        """Count versions of the weights from this one on, if it is later than the engine's."""
        with self._work_condition:
            if version > self.version:
                self.version = version
                self._scheduler.set_cache_key(self._cache_key(), True)

    def generate(
        self, prompts: Iterable[Sequence[int]], options: options_lib.Options
    ) -> list[request_lib.Output]:
        """Serve prompts to their ends, from a thread of your own."""
        requests = [self.submit(prompt, options) for prompt in prompts]
        self.run()
        return [request.output() for request in requests]

    def run(self) -> None:
        """Work until nothing is left to do."""
        while self.step():
            pass

    def start(self) -> None:
        """Work in a thread until `close`."""
        self._thread = threading.Thread(target=self._run_thread, name="engine", daemon=True)
        self._thread.start()

    def dismiss_followers(self) -> None:
        """Let the other processes go until this one works again; see `controller.Follower`.

        Raises:
          RuntimeError: requests are under way.
        """
        with self._work_condition:
            if self._requests or self._dispatched:
                raise RuntimeError(
                    "dismiss: requests are under way; run() them to their ends first"
                )
            self._device.dismiss_followers()

    def close(self) -> None:
        """Stop the thread; requests under way are cancelled."""
        with self._work_condition:
            self._closed = True
            for request in list(self._requests.values()):
                self.cancel(request)
            self._work_condition.notify()
        if self._thread is not None:
            self._thread.join()
        if not self._failed:
            self.run()  # what is under way
        self._device.close()

    @property
    def model_config(self) -> Any:
        return self._model_config

    @property
    def weights(self) -> list[Any]:
        """Return the parameters, leaf by leaf."""
        return self._device.weights

    def stats(self) -> scheduler.SchedulerStats:
        with self._lock:
            return self._scheduler.stats()

    # ---- the engine's own thread

    def _run_thread(self) -> None:
        try:
            self._serve_until_closed()
        except BaseException:  # a callback's, perhaps: nobody may wait for ever
            with self._work_condition:
                self._closed = self._failed = True
                for request in list(self._requests.values()):
                    self._end_request(request, "error")
            raise

    def _serve_until_closed(self) -> None:
        while True:
            with self._work_condition:
                while not self._closed and not self._requests and not self._dispatched:
                    if not self._work_condition.wait(_KEEP_ALIVE_SECS):
                        self._device.keep_alive()
                if self._closed and not self._dispatched:
                    return
            self.step()

    def step(self) -> bool:
        """Give the device its next plan, then take what an earlier one made; False: all is done."""
        with self._lock:
            plan = self._scheduler.plan()
            if plan is not None:
                self._dispatch(plan)
            flight = None
            if self._dispatched and (plan is None or len(self._dispatched) > 1):
                flight = self._dispatched.popleft()
        if flight is None:
            return plan is not None
        chosen = host_batch.fetch_tokens(flight.sampled)  # waits, so without the lock
        with self._lock:
            self._apply_results(flight, chosen)
        return True

    def _dispatch(self, plan: plan_lib.StepPlan) -> None:
        work = plan.prefill_chunks or plan.decode_rows
        asked = [self._requests.get(item.sequence_id) for item in work]
        chosen = self._dispatcher.dispatch(plan, asked)
        places = {item.sequence_id: place for place, item in enumerate(work)}
        self._dispatched.append(_DispatchedPlan(places, chosen, self.version))

    def _apply_results(self, flight: _DispatchedPlan, chosen) -> None:
        """Take over the tokens that a plan made, and report them."""
        results = {}
        for number, place in flight.row_by_request.items():
            request = self._requests.get(number)
            if request is None:
                continue
            made = chosen.row_tokens(place)
            before = len(request.tokens)
            for one in made:
                if request.finish_reason is None:
                    self._push_token(request, one, flight.version)
            if number not in self._requests:  # cancelled by its own callback
                continue
            if not made and request.finish_reason is None:
                continue
            cut = len(request.tokens) - before < len(made)
            over = request.finish_reason is not None
            # The device stops by itself at a stop token and at the limit alone.
            exact = over and bool(made) and not cut and self._device_knows_end(request)
            length = len(request.prompt) + len(request.tokens) - 1 if exact else None
            ids = tuple(one.id for one in made)
            results[number] = plan_lib.StepResult(len(ids), over, length, ids)
            if not request.cached_tokens and not request.cache_reason:
                request.cached_tokens, request.cache_reason = self._scheduler.cached_prompt(number)
            self._scheduler.set_single_step(number, self._needs_single_step(request))
            if over and self.config.record_routes:
                request.routes = self._read_expert_ids(request)
        self._scheduler.report(results)
        for number in results:
            request = self._requests[number]
            if request.finish_reason is not None:
                self._end_request(request, request.finish_reason)

    def _read_expert_ids(self, request: request_lib.Request) -> np.ndarray | None:
        """Return the experts of all tokens but the last, which is in no page yet.

        None where the request lost its pages while its last token was on the way.
        """
        pages = self._scheduler.sequence_pages(request.number)
        if not pages:
            return None
        pieces = host_batch.split_pages(0, pages)
        parts = [self._device.run_program("read_routes", 0, piece) for _, piece in pieces]
        chosen = np.concatenate([np.asarray(part) for part in parts])
        length = len(request.prompt) + len(request.tokens) - 1
        return chosen.reshape(-1, *chosen.shape[2:])[:length]

    def _push_token(
        self, request: request_lib.Request, one: host_batch.SampledToken, version: int
    ) -> None:
        if not np.isfinite(one.logp_raw):
            request.finish_reason = "error"
            request.text += request.progress.flush()
            return
        top = one.top[: request.options.top_logprobs]
        token = request_lib.Token(one.id, one.logp, one.logp_raw, version, top)
        try:
            text = request.push(token)
        except ValueError:  # the grammar grew beyond its limits
            request.finish_reason, text = "error", ""
            request.text += request.progress.flush()
        if request.on_token is not None:
            request.on_token(request, token, text)

    def _device_knows_end(self, request: request_lib.Request) -> bool:
        """Say whether the device knows that the last token is the last."""
        options, number = request.options, len(request.tokens)
        stopped = request.tokens[-1].id in request.stop_ids and number > options.min_tokens
        return stopped or number >= options.max_tokens

    def _needs_single_step(self, request: request_lib.Request) -> bool:
        """Say whether the host must see each token before the next one is made."""
        pause = request.progress.pause_at
        # Two plans may be under way when this is asked.
        near = pause is not None and len(request.tokens) + 3 * self.config.decode_steps >= pause
        return request.matcher is not None or near

    def _end_request(self, request: request_lib.Request, reason: str) -> None:
        request.finish_reason = reason
        self._requests.pop(request.number, None)
        request.done.set()

    # ---- sizes

    def _cache_key(self):
        return (self.version, self.config.chunk_tokens, self.config.matmul_tile)

    def _scheduler_limits(self) -> plan_lib.SchedulerLimits:
        config = self.config
        state_bytes, page_bytes = self._device.state_bytes, self._device.page_bytes
        cache_bytes = config.num_snapshots * state_bytes + config.total_pages * page_bytes
        return plan_lib.SchedulerLimits(
            num_slots=config.total_slots,
            num_pages=config.total_pages,
            chunk_tokens=config.chunk_tokens,
            max_length=config.max_length,
            max_queue=config.max_queue,
            max_rows=config.max_rows,
            max_prefill_tokens=config.prefill_tokens[-1],
            max_prefill_chunks=host_batch.MAX_PREFILL_CHUNKS,
            decode_steps=config.decode_steps,
            snapshot_every_tokens=config.snapshot_every_tokens,
            cache_bytes=cache_bytes if config.prefix_cache and config.num_snapshots else 0,
            page_bytes=page_bytes,
            state_bytes=state_bytes,
            swap_tokens=config.swap_tokens,
            host_bytes=config.host_bytes,
            attention_tile=config.attention_tile,
        )


def _is_token_id(token: Any, vocab_size: int) -> bool:
    return hasattr(token, "__index__") and 0 <= token < vocab_size
