"""The engine: requests in, exact tokens out, by continuous batching on one device or mesh.

    engine = Engine(model, tokenizer, config.EngineConfig(max_length=8192, max_rows=32))
    request = engine.submit(prompt_ids, options.Options(max_tokens=100))
    engine.run()                       # or start(), for a thread of its own
    request.output().text

The scheduler (`scheduling/scheduler.py`) decides, the programs (`execution/programs.py`) compute,
`stepping.py` carries plans to the programs and results back, and this file shows them to callers.
It stays one plan ahead of the results: while the device runs a plan, the host reads the tokens of
the plan before. Everything is compiled when the engine is made, and nothing afterwards.

What leaves a step early, such as the KeyboardInterrupt of a signal, loses no token. If it came
while the host waited for the device, as it mostly does, nothing has changed. Else the next call
gives up the scheduler and its plans, and computes the requests' states again from their tokens, as
after a preemption. Where that cannot be done the engine refuses all work (`EngineFailedError`).
"""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from absl import logging

from infer import config as config_lib
from infer import engine_core, request_check
from infer import options as options_lib
from infer import request as request_lib
from infer.execution import device, leader_follower
from infer.scheduling import scheduler
from infer.scheduling import stats as stats_lib
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.serving import implementations

_KEEP_ALIVE_SECS = 10.0  # an idle engine's pause between two signs of life to its followers

OnToken = Callable[[request_lib.Request, request_lib.OutputToken | None, str], Any]
Prompt = Sequence[int] | Any  # token ids, or an array of them


class Engine:
    """Serves requests with one model.

    Thread safety: `submit`, `cancel`, `swap_weights`, `suspend` and `close` from any thread. Either
    `start` a thread, or call `run` or `step` from one thread of your own.

    A callback may call all of these, for any request. It is called by the thread that works, or by
    the thread that ends its request, one at a time, when all tokens of a step are taken. It must
    not wait for another thread that calls the engine. If it raises, its own request ends as "error"
    with the exception in `Request.error`, and all others go on. An exception that is no
    `Exception`, such as KeyboardInterrupt, leaves `step` as well, unless a thread of the engine's
    own works.

    A signal's handler must not call the engine: let it set a flag, or raise.
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
        config = config.for_platform(jax.default_backend())
        self.config, self.tokenizer = config, tokenizer
        # What runs, and not what was asked for: bits depend on it.
        self._model_config, self.attention_implementations = implementations.resolve_for_model(
            model, config.attention_tile, config.chunk_tokens
        )
        self._device: device.Device | leader_follower.Leader = device.Device(model, config)
        if jax.process_count() > 1:
            self._device = leader_follower.Leader(self._device)
        self._checker = request_check.RequestChecker(tokenizer, model.config.vocab_size, config)
        self._core = engine_core.EngineCore(self._device, config, self._checker.options_checker)
        self._sequence_ids = itertools.count()
        # Reentrant, because callbacks of a request may call `submit` and `cancel`. Entered by
        # itself, not by the condition, whose method a signal may leave with the lock taken.
        self._lock = threading.RLock()
        self._work_condition = threading.Condition(self._lock)
        self._step_lock = threading.RLock()  # one thread steps; always taken before `_lock`
        self._closed = self._device_closed = False

    # ---- for callers

    def submit(
        self,
        prompt: Prompt,
        options: options_lib.Options,
        on_token: OnToken | None = None,
        prior_tokens: Sequence[request_lib.OutputToken] | None = None,
    ) -> request_lib.Request:
        """Queue a prompt of token ids.

        Args:
          prompt: a sequence of token ids, or an array of NumPy, JAX or PyTorch.
          options: how it is continued.
          on_token: called with (request, token, new text). An end that comes without a token
            (cancelled, suspended, logits that are not finite, a failed engine) is told as
            (request, None, text that was held back), so that all texts together are the output's.
            `request.finish_reason` is set at the last call.
          prior_tokens: tokens of a request that was suspended and goes on after them.

        Raises:
          ValueError: options or ids that cannot be served.
          plan.QueueFull: too many wait.
          RuntimeError: the engine is closed, or has failed (`EngineFailedError`).
        """
        request = self.prepare_request(prompt, options, on_token, prior_tokens)
        self.submit_prepared([request], is_resumed=prior_tokens is not None)
        return request

    def prepare_request(
        self,
        prompt: Prompt,
        options: options_lib.Options,
        on_token: OnToken | None = None,
        prior_tokens: Sequence[request_lib.OutputToken] | None = None,
    ) -> request_lib.Request:
        """Return what `submit` would queue, with the same checks. Nothing is queued.

        Raises:
          ValueError: options or ids that cannot be served.
        """
        # Outside the lock: compiling a grammar, or reading a long prompt, may take a second.
        checked = self._checker.check(prompt, options)
        request = request_lib.Request(
            next(self._sequence_ids),
            checked.prompt,
            options,
            checked.stop_ids,
            checked.progress,
            checked.matcher,
            on_token,
        )
        ids = (token.id for token in prior_tokens or ())
        request_check.plain_token_ids(ids, self._model_config.vocab_size, "prior_tokens")
        request.take_prior(prior_tokens or ())
        if self.config.draft_tokens and request.may_draft:
            request.make_prompt_lookup()
        return request

    def submit_prepared(
        self, requests: Sequence[request_lib.Request], is_resumed: bool = False
    ) -> None:
        """Queue requests of `prepare_request`.

        Args:
          is_resumed: they began before, in another engine. A full queue takes them, too.

        Raises:
          plan.QueueFull: too many wait. Those before the first that found no room are queued.
          RuntimeError: the engine is closed, or has failed (`EngineFailedError`).
        """
        with self._lock:
            self._check_open("submit")
            self._core.add_requests(requests, is_resumed)
            self._work_condition.notify()

    def cancel(self, request: request_lib.Request) -> None:
        """End a request. Its output so far stays. Nothing happens if it is over."""
        with self._lock:
            self._core.check_exact("cancel")
            self._core.end_requests([request], "cancelled")

    def swap_weights(self, model: model_lib.MiniMaxM1, keep_running: bool = True) -> int:
        """Put other weights of the same shapes in place, and return their version.

        They enter between two dispatches, and nothing is compiled.

        Args:
          keep_running: requests under way go on from the states that the old weights left. Else
            they are computed again from their tokens.

        Raises:
          ValueError: other shapes, dtypes or layout.
        """
        with self._lock:
            self._core.check_exact("swap_weights")
            self._core.swap_weights(model, keep_running)
            return self.version

    def preempt(self, request: request_lib.Request) -> None:
        """Take a request's memory away for now. It goes on later, and its output is the same."""
        with self._lock:
            self._core.check_exact("preempt")
            self._core.preempt(request)

    def suspend(self, save_requests: Callable[[list[request_lib.Request]], None]) -> None:
        """End all requests under way as "suspended", once `save_requests` has them.

        See `suspend.py`. If `save_requests` raises, all of them go on.
        """
        with self._lock:
            self._core.check_exact("suspend")
            # Requests with a reason are over, and their callbacks not yet back.
            requests = [r for r in self._core.requests.values() if r.finish_reason is None]
            save_requests(requests)
            self._core.end_requests(requests, "suspended")

    def continue_from_version(self, version: int) -> None:
        """Count versions of the weights from this one on, if it is later than the engine's."""
        with self._lock:
            self._core.check_exact("continue_from_version")
            self._core.continue_from_version(version)

    def generate(
        self, prompts: Iterable[Prompt], options: options_lib.Options, samples: int = 1
    ) -> list[request_lib.RequestOutput]:
        """Serve prompts to their ends, from a thread of your own.

        Equal prompts get equal outputs, as all have the seed of `options`. For several outputs of
        a prompt ask for samples.

        Args:
          prompts: token ids of each prompt.
          options: the options of all.
          samples: outputs of each prompt (`n` in OpenAI's API). Sample i has the seed
            `options.seed` + i, modulo 2^32.

        Returns:
          The outputs, with the samples of a prompt one after another.

        Raises:
          ValueError: a prompt or options that cannot be served. Then none has run.
        """
        if not options_lib.is_whole_number(samples) or samples < 1:
            raise ValueError(f"samples: got {samples!r}; wanted a whole number, 1 or more")
        seeds = [(options.seed + i) % 2**32 for i in range(samples)]
        requests = [
            self.prepare_request(prompt, dataclasses.replace(options, seed=seed))
            for prompt in prompts
            for seed in seeds
        ]
        try:
            for request in requests:
                while self.stats().num_waiting >= self.config.max_queue:
                    self.step()
                self.submit_prepared([request])
            self.run()
        except BaseException:
            # The caller has no handle to cancel them by.
            for request in requests if self._core.failure is None else ():
                self.cancel(request)
            raise
        return [request.output() for request in requests]

    def run(self) -> None:
        """Work until nothing is left to do."""
        while self.step():
            pass

    def start(self) -> None:
        """Work in a thread until `close`."""
        with self._lock:
            self._check_open("start")
            if self._core.own_thread is not None:
                raise RuntimeError("start: the engine's thread works already; call it once")
            self._core.own_thread = threading.Thread(
                target=self._run_thread, name="engine", daemon=True
            )
            self._core.own_thread.start()

    def dismiss_followers(self) -> None:
        """Let the other processes go until this one works again. See `leader_follower.Follower`.

        Raises:
          RuntimeError: requests are under way.
        """
        with self._lock:
            self._core.check_exact("dismiss_followers")
            if not self._core.is_idle:
                raise RuntimeError(
                    "dismiss_followers: requests are under way; run() them to their ends first"
                )
            self._device.dismiss_followers()

    def close(self) -> None:
        """Stop the thread. Requests under way are cancelled. A second call changes nothing.

        In a callback this returns at once, and whoever works takes what is under way.
        """
        with self._lock:
            self._closed = True
            if self._core.failure is None:
                self._core.check_exact("close")
                self._core.end_requests(list(self._core.requests.values()), "cancelled")
            self._work_condition.notify()
            if self._core.num_callbacks:
                return
        if self._core.own_thread is not None:
            self._core.own_thread.join()
        elif self._core.failure is None:
            self.run()  # plans under way, so that the scheduler ends with all memory free
        self._close_device()

    @property
    def version(self) -> int:
        """The version of the weights, 0 at first. Every `swap_weights` adds 1."""
        return self._core.version

    @property
    def model_config(self) -> model_config_lib.ModelConfig:
        return self._model_config

    @property
    def weights(self) -> list[jax.Array]:
        """The parameters, leaf by leaf."""
        return self._device.weights

    def stats(self) -> stats_lib.SchedulerStats:
        """Return sizes and counts. They begin anew after an interruption."""
        with self._lock:
            return self._scheduler.stats()

    # ---- the engine's own thread

    def _run_thread(self) -> None:
        try:
            self._serve_until_closed()
        except BaseException as error:
            # Nobody may wait for ever for this engine. The requests and `submit` say why.
            logging.exception("the engine's thread ends")
            with self._lock:
                if self._core.failure is None:
                    self._core.fail("its thread", error)
        self._close_device()

    def _serve_until_closed(self) -> None:
        while True:
            with self._lock:
                while not self._closed and self._core.is_idle:
                    if not self._work_condition.wait(_KEEP_ALIVE_SECS):
                        self._device.keep_alive()
            if not self.step() and self._closed:
                return

    def step(self) -> bool:
        """Give the device its next plan, then take the results of an earlier one.

        Returns:
          False if all is done.

        Raises:
          EngineFailedError: the engine cannot go on.
        """
        with self._step_lock:
            with self._lock:
                self._core.check_exact("step")
                self._core.show_all()
                if self._device_closed:
                    return False
                has_plan = self._core.dispatch_plan()
                oldest = self._core.next_results(has_plan)
            if oldest is None:
                if self._closed and not has_plan:
                    self._close_device()
                return has_plan
            # This waits for the device, so without the lock: `submit` must not wait for a step.
            sampled = oldest.wait_for_tokens()
            with self._lock:
                self._core.take_results(oldest, sampled)
                self._core.show_all()
            return True

    # ---- parts

    def _check_open(self, name: str) -> None:
        self._core.check_exact(name)
        if self._closed:
            raise RuntimeError(f"{name}: the engine is closed; make a new one")

    def _close_device(self) -> None:
        with self._lock:
            if not self._device_closed:
                self._device_closed = True
                self._device.close()

    @property
    def _scheduler(self) -> scheduler.Scheduler:
        return self._core.scheduler
