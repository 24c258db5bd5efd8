"""An engine's requests and runner, exact between any two calls, whatever leaves a call early.

`Engine` calls this under its lock. Work that must be done as a whole is marked while it goes on. A
mark that is left says that an exception came in the middle, from a signal's handler perhaps. The
next call then gives up the scheduler and its plans, and goes on from the requests' tokens.
"""

import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax

from infer import config as config_lib
from infer import request as request_lib
from infer import request_check, stepping
from infer.execution import device as device_lib
from infer.execution import dispatcher, leader_follower
from infer.scheduling import plan as plan_lib
from infer.scheduling import scheduler
from m1_jax import model as model_lib


class EngineCore:
    """Requests, the runner that serves them, and what their callers see.

    Attributes:
      version: the version of the weights.
      requests: the requests that are not over, by sequence id.
      failure: why all work is refused, or None.
      num_callbacks: callbacks under way, one within another.
      own_thread: the thread that works for the engine, if it has one.
    """

    def __init__(
        self,
        device: device_lib.Device | leader_follower.Leader,
        config: config_lib.EngineConfig,
        checker: request_check.OptionsChecker,
    ):
        self._device, self._config, self._checker = device, config, checker
        self.version, self._known_weights = 0, device.weights
        self.requests: dict[Hashable, request_lib.Request] = {}
        self._unshown: dict[
            Hashable, request_lib.Request
        ] = {}  # those that are to be shown something
        self._section = stepping.ExactSection()
        self._runner = stepping.StepRunner(device, config, self._cache_key(), self.requests)
        self.failure: request_lib.EngineFailedError | None = None
        self.num_callbacks = 0
        self.own_thread: threading.Thread | None = None

    @property
    def scheduler(self) -> scheduler.Scheduler:
        return self._runner.scheduler

    @property
    def has_plans(self) -> bool:
        """Whether the device has plans whose results were not taken."""
        return bool(self._runner.dispatched)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be done, and nobody to be told."""
        return not (self.requests or self._unshown or self.has_plans)

    # ---- work that is done as a whole

    def add_requests(self, requests: Sequence[request_lib.Request], is_resumed: bool) -> None:
        """Queue requests. Those that are resumed are taken into a full queue, too.

        Raises:
          plan.QueueFull: too many wait.
        """
        with self._section("submit", ValueError, plan_lib.QueueFull), self._section.busy:
            for request in requests:
                self._runner.add_request(request, is_resumed)
                self.requests[request.sequence_id] = request

    def swap_weights(self, model: model_lib.MiniMaxM1, keep_running: bool) -> None:
        """See `Engine.swap_weights`."""
        with self._section("swap_weights", ValueError), self._section.busy:
            # Dispatched plans have the old arrays already, and keep the old version.
            self._device.swap_weights(model)
            self._count_swap()
            self.scheduler.set_cache_key(self._cache_key(), keep_running)

    def continue_from_version(self, version: int) -> None:
        """See `Engine.continue_from_version`."""
        with self._section("continue_from_version"), self._section.busy:
            if version > self.version:
                self.version = version
                self.scheduler.set_cache_key(self._cache_key(), True)

    def preempt(self, request: request_lib.Request) -> None:
        """See `Engine.preempt`."""
        with self._section("preempt"), self._section.busy:
            self.scheduler.preempt(request.sequence_id)

    def dispatch_plan(self) -> bool:
        """Give the device its next plan. Return whether there was one."""
        with self._section("a step's plan"), self._section.busy:
            return self._runner.dispatch_plan(self.version)

    def next_results(self, has_plan: bool) -> dispatcher.DispatchedPlan | None:
        """Return the plan whose tokens are to be waited for, or None.

        Args:
          has_plan: whether a plan was dispatched just now.
        """
        dispatched = self._runner.dispatched
        # With a plan behind it the device stays busy while the host reads the oldest. Without one
        # there is nothing better to do than to wait for the oldest.
        return dispatched[0] if dispatched and (not has_plan or len(dispatched) > 1) else None

    def take_results(self, oldest: dispatcher.DispatchedPlan, sampled: Any) -> None:
        """Take a plan's tokens, unless the core began anew since `next_results` returned it."""
        if not self.has_plans or self._runner.dispatched[0] is not oldest:
            return
        with self._section("a step's results"), self._section.busy:
            requests = self._runner.take_oldest(sampled)
            self._unshown.update((request.sequence_id, request) for request in requests)

    def end_requests(
        self,
        requests: Iterable[request_lib.Request],
        reason: str,
        error: BaseException | None = None,
    ) -> None:
        """End requests from outside, and show them that. Those that are over stay as they are."""
        ended = [request for request in requests if request.sequence_id in self.requests]
        with self._section("the end of a request"), self._section.busy:
            for request in ended:
                self._unshown[request.sequence_id] = request
                self.scheduler.cancel(request.sequence_id)
                self._cut_off(request, reason, error)
        for request in ended:
            self._show_request(request)

    # ---- what callers see

    def show_all(self) -> None:
        """Show requests what was taken, and call their callbacks."""
        while self._unshown:
            self._show_request(next(iter(self._unshown.values())))

    def _show_request(self, request: request_lib.Request) -> None:
        # A callback may come here again. It then shows what is left, and nothing is left here.
        while request.has_news:
            if request.unheard is None:
                with self._section("a token's text"), self._section.busy:
                    request.show_next()
            if request.on_token is None:
                request.unheard = None
            else:
                self._call_back(request)
        if request.finish_reason is not None:
            self.requests.pop(request.sequence_id, None)
            request.end()
        self._unshown.pop(request.sequence_id, None)

    def _call_back(self, request: request_lib.Request) -> None:
        """Call a request's callback for what it was shown last. Its exceptions end the request."""
        self.num_callbacks += 1
        try:
            request.call_back()
        except BaseException as error:
            # A callback that raised is not called again.
            request.on_token, request.error = None, error
            self._mend_callback()
            self.end_requests([request], "error", error)
            # An engine's own thread has nobody to tell.
            is_own_thread = threading.current_thread() is self.own_thread
            if not isinstance(error, Exception) and not is_own_thread:
                raise
        else:
            self._mend_callback()
        finally:
            self.num_callbacks -= 1

    def _mend_callback(self) -> None:
        """Go on exactly where a callback was interrupted within a call of the engine."""
        if self.failure is None:
            self.check_exact("a callback")

    # ---- exactness

    def check_exact(self, name: str) -> None:
        """Go on from the tokens if work was left half way. `name` is the call that asks.

        Raises:
          EngineFailedError: the engine cannot go on.
          RuntimeError: a signal's handler calls, in the middle of work.
        """
        if self.failure is not None:
            message = f"{name}: {self.failure}"
            raise request_lib.EngineFailedError(message) from self.failure.__cause__
        if self._section.busy.locked():  # by this thread, which has the engine's lock
            raise RuntimeError(
                f"{name}: got a call from a signal's handler within {self._section.unfinished}; "
                "wanted it between two steps: let the handler set a flag, or raise"
            )
        if self._section.unfinished is not None:
            unfinished, cause = self._section.unfinished, self._section.error
            try:
                self._begin_anew()
            except Exception as error:
                self.fail(unfinished, cause or error)
                self.check_exact(name)

    def _begin_anew(self) -> None:
        """Put an exact runner in the place of one that was left half way.

        Raises:
          RuntimeError: the device has lost its memory, or other processes its last call.
        """
        if jax.process_count() > 1:
            raise RuntimeError("the other processes may have another call under way")
        with self._section(str(self._section.unfinished)), self._section.busy:
            if self._device.weights is not self._known_weights:
                self._count_swap()
            runner = stepping.StepRunner(
                self._device, self._config, self._cache_key(), self.requests, False
            )
            runner.take_over(self.requests, self._rewind)
            self._runner = runner
            self._unshown.update(self.requests)
            for request in list(self.requests.values()):
                if request.is_cut_off:
                    del self.requests[request.sequence_id]

    def fail(self, name: str, error: BaseException) -> None:
        """Refuse all work from now on, and end all requests as "error"."""
        self.failure = request_lib.EngineFailedError(
            f"the engine failed in {name} ({error!r:.300}); make a new one. The tokens so far are "
            "right, and another engine can go on from them (prior_tokens)"
        )
        self.failure.__cause__ = error
        self._section.unfinished = None
        for request in list(self.requests.values()):
            self._unshown[request.sequence_id] = request
            if not request.is_cut_off:
                self._cut_off(request, "error", self.failure)
        self.show_all()

    def _cut_off(
        self, request: request_lib.Request, reason: str, error: BaseException | None
    ) -> None:
        options = request.options
        request.cut_off(reason, error, lambda: self._checker.make_progress(options))
        del self.requests[request.sequence_id]

    def _rewind(self, request: request_lib.Request) -> None:
        options = request.options
        request.rewind(self._checker.make_progress(options), self._checker.make_matcher(options))

    def _count_swap(self) -> None:
        self.version += 1
        self._known_weights = self._device.weights

    def _cache_key(self) -> Hashable:
        """Return what states depend on beside the tokens."""
        return (self.version, self._config.chunk_tokens, self._config.matmul_tile)
