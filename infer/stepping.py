"""Steps of an engine: plans to the device, tokens back to requests. Nobody is called back here.

A runner is exact between two of its methods. One that an exception left half way is given up, and
another takes its place: all that a request needs to go on are its tokens.
"""

import collections
import threading
from collections.abc import Callable, Hashable

import numpy as np

from infer import config as config_lib
from infer import request as request_lib
from infer.execution import device as device_lib
from infer.execution import dispatcher, host_batch, leader_follower
from infer.scheduling import plan as plan_lib
from infer.scheduling import scheduler as scheduler_lib


class ExactSection:
    """Marks work that must be done as a whole.

        with section("a step"), section.busy:
            ...

    An exception that leaves it, wherever a signal's handler raised it, leaves the mark.

    Attributes:
      busy: held while the work goes on. A lock, because no signal comes between the end of a `with`
        block and a lock's release.
      unfinished: what was begun and did not end, or None.
      error: the exception that left it.
    """

    def __init__(self):
        self.busy = threading.Lock()
        self.unfinished: str | None = None
        self.error: BaseException | None = None
        self._harmless: tuple[type[BaseException], ...] = ()

    def __call__(self, name: str, *harmless: type[BaseException]) -> "ExactSection":
        """Begin the work `name`. `harmless` exceptions come before it has changed anything."""
        self._harmless, self.error = harmless, None
        # Here and not in `__enter__`: a signal may come between the two.
        self.unfinished = name
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, self._harmless):
            self.unfinished = None
        else:
            self.error = error


class StepRunner:
    """The scheduler, the dispatcher, and the plans between them.

    Attributes:
      scheduler: decides.
      requests: the requests that are not over, by sequence id. The engine adds and removes.
      dispatched: plans whose results were not taken, oldest first. Their number is the scheduler's
        affair.
    """

    def __init__(
        self,
        device: device_lib.Device | leader_follower.Leader,
        config: config_lib.EngineConfig,
        cache_key: Hashable,
        requests: dict[Hashable, request_lib.Request],
        is_device_new: bool = True,
    ):
        self._config, self.requests = config, requests
        self.scheduler = scheduler_lib.Scheduler(config, device.limits, cache_key)
        self.dispatched: collections.deque[dispatcher.DispatchedPlan] = collections.deque()
        self._dispatcher = dispatcher.Dispatcher(device, config, is_device_new)

    def add_request(self, request: request_lib.Request, is_resumed: bool) -> None:
        """Give the scheduler a request. One that is resumed is taken into a full queue, too."""
        self.scheduler.submit(
            request.sequence_id,
            request.prompt,
            request.options.max_tokens,
            single_step=self._needs_single_step(request),
            # Guesses are made from the tokens so far, so these must be known.
            waits_for_reports=self._config.draft_tokens > 0,
            prior_tokens=request.tokens.ids.tolist() if is_resumed else None,
        )

    def take_over(
        self,
        requests: dict[Hashable, request_lib.Request],
        rewind: Callable[[request_lib.Request], None],
    ) -> None:
        """Go on with the requests of a runner that was left half way, from their tokens.

        Args:
          requests: all of its requests.
          rewind: brings a request back to the tokens that are shown.

        Raises:
          RuntimeError: the device has lost its memory.
        """
        self._dispatcher.clear_device(requests)
        for request in list(requests.values()):
            if not request.is_cut_off:
                rewind(request)
                if request.finish_reason is None:
                    self.add_request(request, is_resumed=True)

    def dispatch_plan(self, version: int) -> bool:
        """Give the device its next plan. Return whether there was one."""
        plan = self.scheduler.plan()
        if plan is None:
            return False
        requests = [self.requests.get(entry.sequence_id) for entry in plan.entries]
        self.dispatched.append(self._dispatcher.dispatch(plan, requests, version))
        return True

    def take_oldest(self, sampled: host_batch.SampledTokens) -> list[request_lib.Request]:
        """Take the tokens of the oldest plan, and report them to the scheduler.

        Returns:
          The requests that took any. Nothing is shown yet.
        """
        dispatched = self.dispatched.popleft()
        results: dict[Hashable, plan_lib.StepResult] = {}
        for sequence_id, row in dispatched.row_by_request.items():
            request = self.requests.get(sequence_id)
            # Over since the plan was made.
            if request is None or request.known_end is not None:
                continue
            result = self._take_row(request, sampled.row_tokens(row), dispatched.version)
            if result is not None:
                results[sequence_id] = result
        self.scheduler.report(results)
        return [self.requests[sequence_id] for sequence_id in results]

    def _take_row(
        self,
        request: request_lib.Request,
        tokens: list[host_batch.SampledToken],
        version: int,
    ) -> plan_lib.StepResult | None:
        """Give a request what a plan made in its row. Return it for the scheduler."""
        if not tokens:
            return None
        num_before = request.progress.num_tokens
        for token in tokens:
            if request.known_end is None:
                _take_token(request, token, version)
        is_over, num_tokens = request.known_end is not None, request.progress.num_tokens
        # Tokens past an end that only the host knows are in the device's state all the same.
        was_cut = num_tokens - num_before < len(tokens)
        knows_end = is_over and not was_cut and _device_knows_end(request, tokens[-1].id)
        length = len(request.prompt) + num_tokens - 1
        if not request.cached_tokens and not request.cache_miss_reason:
            cached = self.scheduler.cached_prompt(request.sequence_id)
            request.cached_tokens, request.cache_miss_reason = cached
        self.scheduler.set_single_step(request.sequence_id, self._needs_single_step(request))
        if is_over and self._config.record_routes:
            # Before the report, which frees the pages.
            request.routes = self._read_expert_ids(request, length)
        ids = tuple(token.id for token in tokens)
        return plan_lib.StepResult(len(ids), is_over, length if knows_end else None, ids)

    def _read_expert_ids(self, request: request_lib.Request, length: int) -> np.ndarray | None:
        """Return the experts of all tokens but the last, which is in no page yet.

        None where the request lost its pages while its last token was on the way.
        """
        pages = self.scheduler.sequence_pages(request.sequence_id)
        return self._dispatcher.read_expert_ids(pages)[:length] if pages else None

    def _needs_single_step(self, request: request_lib.Request) -> bool:
        """Return whether the host must see each token before the next one is made.

        A grammar's mask depends on every token before. The end of a thought is forced by the host.
        """
        pause = request.progress.pause_at
        # Two plans may be under way when this is asked, and this is asked once a plan.
        reach = request.progress.num_tokens + 3 * self._config.decode_steps
        return request.matcher is not None or (pause is not None and reach >= pause)


def _take_token(
    request: request_lib.Request, sampled: host_batch.SampledToken, version: int
) -> None:
    """Give a request its next token, or end it where the token is no good."""
    # -inf is the log-probability of a forced token that could not have been drawn.
    if not np.isfinite(sampled.logp_raw) or np.isnan(sampled.logp):
        request.take_error(
            FloatingPointError(
                f"the logits of token {request.progress.num_tokens} of the output are not finite; "
                "wanted other weights, or milder penalties"
            )
        )
        return
    # The program returns as many as any request may ask for.
    top = sampled.top[: request.options.top_logprobs]
    request.take(request_lib.OutputToken(sampled.id, sampled.logp, sampled.logp_raw, version, top))


def _device_knows_end(request: request_lib.Request, last_token: int) -> bool:
    """Return whether the device stopped by itself after the last token.

    It does at a stop token and at the limit. A stop string, say, is the host's discovery, and by
    then the device may have computed on.
    """
    options, num_tokens = request.options, request.progress.num_tokens
    is_stop = last_token in request.stop_ids and num_tokens > options.min_tokens
    return is_stop or num_tokens >= options.max_tokens
