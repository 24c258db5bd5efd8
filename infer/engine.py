"""The engine: requests in, exact tokens out, by continuous batching on one device or mesh.

    engine = Engine(model, tokenizer, config.EngineConfig(max_length=8192, max_rows=32))
    request = engine.submit(prompt_ids, options.Options(max_tokens=100))
    engine.run()                       # or start(), for a thread of its own
    request.output().text

The scheduler (`scheduling/scheduler.py`) decides, the programs (`execution/programs.py`) compute,
and this file carries plans to the programs and results back to the scheduler. It stays one plan
ahead of the results: while the device runs a plan, the host reads the tokens of the plan before.
Everything is compiled when the engine is made, and nothing afterwards.
"""

import collections
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
from infer.scheduling import stats as stats_lib
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax import tokenizer as tokenizer_lib

_KEEP_ALIVE_SECS = 10.0  # an idle engine's pause between two signs of life to its followers


class Engine:
    """Serves requests with one model.

    Thread safety: `submit`, `cancel`, `swap_weights`, `suspend` and `close` from any thread. Either
    `start` a thread, or call `run` or `step` from one thread of your own.

    Attributes:
      version: the version of the weights, 0 at first. Every `swap_weights` adds 1.
    """

    def __init__(
        self,
        model: model_lib.MiniMaxM1,
        tokenizer: tokenizer_lib.Tokenizer,
        config: config_lib.EngineConfig,
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
                "the others in leader_follower.follow_engine(model, config)"
            )
        self.config, self.tokenizer = config, tokenizer
        self.version = 0
        self._model_config = model.config
        self._device: device.Device | leader_follower.Leader = device.Device(model, config)
        if jax.process_count() > 1:
            self._device = leader_follower.Leader(self._device)
        self._dispatcher = dispatcher.Dispatcher(self._device, config)
        self._compiler = grammar.GrammarCompiler(tokenizer, model.config.vocab_size)
        self._scheduler = scheduler.Scheduler(config, self._device.limits, self._cache_key())
        # Requests that are not over, by sequence id.
        self._requests: dict[Hashable, request_lib.Request] = {}
        # Plans whose results were not taken, oldest first. Their number is the scheduler's affair.
        self._dispatched: collections.deque[dispatcher.DispatchedPlan] = collections.deque()
        self._sequence_ids = itertools.count()
        # Reentrant, because callbacks of a request may call `submit` and `cancel`.
        self._lock = threading.RLock()
        self._work_condition = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = self._failed = False

    # ---- for callers

    def submit(
        self,
        prompt: Sequence[int],
        options: options_lib.Options,
        on_token: Callable[[request_lib.Request, request_lib.OutputToken, str], Any] | None = None,
        prior_tokens: Sequence[request_lib.OutputToken] | None = None,
    ) -> request_lib.Request:
        """Queue a prompt of token ids.

        Args:
          on_token: called with (request, token, new text) from the engine's thread.
          prior_tokens: tokens of a request that was suspended and goes on after them.

        Raises:
          ValueError: options or ids that cannot be served.
          plan.QueueFull: too many wait.
        """
        vocab_size = self._model_config.vocab_size
        bad = [token for token in prompt if not options_lib.is_token_id(token, vocab_size)]
        if bad:
            raise ValueError(
                f"prompt: got token id {bad[0]}; wanted 0 to {vocab_size - 1}. "
                "Does the tokenizer belong to this model?"
            )
        options_lib.check_options(options, vocab_size, self.tokenizer.stop_ids)
        progress = stopping.OutputProgress(options, self.tokenizer)
        # Compiling a grammar may take long: outside the lock.
        matcher = self._compiler.compile_matcher(options)
        with self._work_condition:
            if self._closed:
                raise RuntimeError("submit: the engine is closed; make a new one")
            stop_ids = options_lib.all_stop_ids(options, self.tokenizer.stop_ids)
            sequence_id = next(self._sequence_ids)
            request = request_lib.Request(
                sequence_id, prompt, options, stop_ids, progress, matcher, on_token
            )
            for token in prior_tokens or ():
                request.push(token)
            if request.finish_reason is not None:
                raise ValueError("prior_tokens: got a finished output; wanted one that goes on")
            self._scheduler.submit(
                sequence_id,
                request.prompt,
                options.max_tokens,
                single_step=self._needs_single_step(request),
                # Guesses are made from the tokens so far, so these must be known.
                waits_for_reports=self.config.draft_tokens > 0,
                prior_tokens=None if prior_tokens is None else request.tokens.ids.tolist(),
            )
            self._requests[sequence_id] = request
            self._work_condition.notify()
        return request

    def cancel(self, request: request_lib.Request) -> None:
        """End a request. Its output so far stays. Nothing happens if it is over."""
        with self._work_condition:
            if request.sequence_id in self._requests and request.finish_reason is None:
                self._scheduler.cancel(request.sequence_id)
                request.add_text(request.progress.flush())
                self._end_request(request, "cancelled")

    def swap_weights(self, model: model_lib.MiniMaxM1, keep_running: bool = True) -> int:
        """Put other weights of the same shapes in place, and return their version.

        They enter between two dispatches, and nothing is compiled.

        Args:
          keep_running: requests under way go on from the states that the old weights left. Else
            they are computed again from their tokens.

        Raises:
          ValueError: other shapes, dtypes or layout.
        """
        with self._work_condition:
            # Dispatched plans have the old arrays already, and keep the old version.
            self._device.swap_weights(model)
            self.version += 1
            self._scheduler.set_cache_key(self._cache_key(), keep_running)
            return self.version

    def preempt(self, request: request_lib.Request) -> None:
        """Take a request's memory away for now. It goes on later, and its output is the same."""
        with self._work_condition:
            self._scheduler.preempt(request.sequence_id)

    def suspend(self, save_requests: Callable[[list[request_lib.Request]], None]) -> None:
        """End all requests under way as "suspended", once `save_requests` has them.

        See `suspend.py`. If `save_requests` raises, all of them go on.
        """
        with self._work_condition:
            # Requests with a reason are over, and only not yet reported.
            requests = [r for r in self._requests.values() if r.finish_reason is None]
            save_requests(requests)
            for request in requests:
                self._scheduler.cancel(request.sequence_id)
                self._end_request(request, "suspended")

    def continue_from_version(self, version: int) -> None:
        """Count versions of the weights from this one on, if it is later than the engine's."""
        with self._work_condition:
            if version > self.version:
                self.version = version
                self._scheduler.set_cache_key(self._cache_key(), True)

    def generate(
        self, prompts: Iterable[Sequence[int]], options: options_lib.Options
    ) -> list[request_lib.RequestOutput]:
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
        """Let the other processes go until this one works again. See `leader_follower.Follower`.

        Raises:
          RuntimeError: requests are under way.
        """
        with self._work_condition:
            if self._requests or self._dispatched:
                raise RuntimeError(
                    "dismiss_followers: requests are under way; run() them to their ends first"
                )
            self._device.dismiss_followers()

    def close(self) -> None:
        """Stop the thread. Requests under way are cancelled."""
        with self._work_condition:
            self._closed = True
            for request in list(self._requests.values()):
                self.cancel(request)
            self._work_condition.notify()
        if self._thread is not None:
            self._thread.join()
        if not self._failed:
            self.run()  # plans under way, so that the scheduler ends with all memory free
        self._device.close()

    @property
    def model_config(self) -> model_config_lib.ModelConfig:
        return self._model_config

    @property
    def weights(self) -> list[jax.Array]:
        """The parameters, leaf by leaf."""
        return self._device.weights

    def stats(self) -> stats_lib.SchedulerStats:
        with self._lock:
            return self._scheduler.stats()

    # ---- the engine's own thread

    def _run_thread(self) -> None:
        try:
            self._serve_until_closed()
        except BaseException:
            # Perhaps an error of a callback. Nobody may wait for ever for this engine.
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
        """Give the device its next plan, then take the results of an earlier one.

        Returns:
          False if all is done.
        """
        with self._lock:
            plan = self._scheduler.plan()
            if plan is not None:
                requests = [self._requests.get(entry.sequence_id) for entry in plan.entries]
                self._dispatched.append(self._dispatcher.dispatch(plan, requests, self.version))
            oldest = None
            # With a plan behind it the device stays busy while the host reads the oldest. Without
            # one there is nothing better to do than to wait for the oldest.
            if self._dispatched and (plan is None or len(self._dispatched) > 1):
                oldest = self._dispatched.popleft()
        if oldest is None:
            return plan is not None
        # This waits for the device, so without the lock: `submit` must not wait for a step.
        sampled = oldest.wait_for_tokens()
        with self._lock:
            self._apply_results(oldest, sampled)
        return True

    def _apply_results(
        self, dispatched: dispatcher.DispatchedPlan, sampled: host_batch.SampledTokens
    ) -> None:
        """Give requests the tokens that a plan made, and report them to the scheduler."""
        results = {}
        for sequence_id, row in dispatched.row_by_request.items():
            request = self._requests.get(sequence_id)
            if request is None:  # over since the plan was made
                continue
            tokens = sampled.row_tokens(row)
            num_before = len(request.tokens)
            for token in tokens:
                if request.finish_reason is None:
                    self._push_token(request, token, dispatched.version)
            if sequence_id not in self._requests:  # cancelled by its own `on_token`
                continue
            is_over = request.finish_reason is not None
            if not tokens and not is_over:
                continue
            # Tokens past an end that only the host knows are in the device's state all the same.
            was_cut = len(request.tokens) - num_before < len(tokens)
            knows_end = is_over and tokens and not was_cut and self._device_knows_end(request)
            length = len(request.prompt) + len(request.tokens) - 1 if knows_end else None
            ids = tuple(token.id for token in tokens)
            results[sequence_id] = plan_lib.StepResult(len(ids), is_over, length, ids)
            if not request.cached_tokens and not request.cache_miss_reason:
                cached = self._scheduler.cached_prompt(sequence_id)
                request.cached_tokens, request.cache_miss_reason = cached
            self._scheduler.set_single_step(sequence_id, self._needs_single_step(request))
            if is_over and self.config.record_routes:
                # Before the report, which frees the pages.
                request.routes = self._read_expert_ids(request)
        self._scheduler.report(results)
        for sequence_id in results:
            request = self._requests[sequence_id]
            if request.finish_reason is not None:
                self._end_request(request, request.finish_reason)

    def _read_expert_ids(self, request: request_lib.Request) -> np.ndarray | None:
        """Return the experts of all tokens but the last, which is in no page yet.

        None where the request lost its pages while its last token was on the way.
        """
        pages = self._scheduler.sequence_pages(request.sequence_id)
        if not pages:
            return None
        length = len(request.prompt) + len(request.tokens) - 1
        return self._dispatcher.read_expert_ids(pages)[:length]

    def _push_token(
        self, request: request_lib.Request, sampled: host_batch.SampledToken, version: int
    ) -> None:
        """Give a request its next token, or end it where the token or its grammar is no good."""
        if not np.isfinite(sampled.logp_raw):  # the model's logits are not finite
            request.finish_reason = "error"
            request.add_text(request.progress.flush())
            return
        # The program returns as many as any request may ask for.
        top = sampled.top[: request.options.top_logprobs]
        token = request_lib.OutputToken(sampled.id, sampled.logp, sampled.logp_raw, version, top)
        try:
            text = request.push(token)
        except ValueError:  # the grammar grew beyond its limits
            request.finish_reason, text = "error", ""
            request.add_text(request.progress.flush())
        if request.on_token is not None:
            request.on_token(request, token, text)

    def _device_knows_end(self, request: request_lib.Request) -> bool:
        """Return whether the device stopped by itself after the last token.

        It does at a stop token and at the limit. A stop string, say, is the host's discovery, and
        by then the device may have computed on.
        """
        options, num_tokens = request.options, len(request.tokens)
        is_stop = request.tokens[-1].id in request.stop_ids and num_tokens > options.min_tokens
        return is_stop or num_tokens >= options.max_tokens

    def _needs_single_step(self, request: request_lib.Request) -> bool:
        """Return whether the host must see each token before the next one is made.

        A grammar's mask depends on every token before. The end of a thought is forced by the host.
        """
        pause = request.progress.pause_at
        # Two plans may be under way when this is asked, and this is asked once a plan.
        reach = len(request.tokens) + 3 * self.config.decode_steps
        return request.matcher is not None or (pause is not None and reach >= pause)

    def _end_request(self, request: request_lib.Request, reason: str) -> None:
        request.finish_reason = reason
        self._requests.pop(request.sequence_id, None)
        request.done.set()

    def _cache_key(self) -> Hashable:
        """Return what states depend on beside the tokens."""
        return (self.version, self.config.chunk_tokens, self.config.matmul_tile)
