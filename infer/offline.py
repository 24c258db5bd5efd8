"""Command: answer many requests from a file. A run that was killed goes on when started again.

    python -m infer.offline --checkpoint=DIR --input=requests.jsonl --output=outputs.jsonl
        [--mesh=expert=8,tensor=8] [--distributed]

A line of the input is {"prompt": ..., "system": ...} or {"messages": [...], "tools": [...]}. It may
have an "id", a "preset" and any field of `options.Options`: {"prompt": "Hi", "max_tokens": 9}. A
field that is null counts as absent. Lines of OpenAI's batch API are read as well, and their answers
have "custom_id" in place of "id" (`infer/openai_batch.py`). All lines are checked before the first
one runs. A line of the output is written when its request is done, so they are in no certain order.
Its "index" counts the input's lines that are not blank, from 0:

    {"index": 0, "id": ..., "text": ..., "finish_reason": "stop", "prompt_tokens": 12,
     "completion_tokens": 40, "reasoning_tokens": 0}

On a mesh each device holds its part of the weights alone. With --distributed the same command runs
on every host: process 0 reads and writes, and the others compute with it.

With --tokens a line also has "tokens" with their log-probabilities. OUTPUT.run.json beside the
output records what the run depends on, and OUTPUT.lock keeps other runs from writing it meanwhile.
The same command, started again, answers the requests that are missing. A line is the same byte for
byte wherever the run was interrupted: a request without a seed gets one that is derived from the
run's seed and its index.
"""

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import BinaryIO

import tqdm
from absl import flags, logging

import m1_jax
from infer import batch_fingerprint, batch_input, batch_output, command, engine
from infer import config as config_lib
from infer import request as request_lib
from infer.execution import leader_follower
from m1_jax import (
    command_help,
    distributed,
    durable,
    file_lock,
    multihost,
    progress_bar,
    sharding,
)
from m1_jax import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class BatchSummary:
    """What one run did."""

    requests: int  # requests of the input
    num_done_before: int  # requests that earlier runs had done
    num_done: int = 0  # requests that this run did, of which the counts below are
    errors: int = 0  # requests that ended with finish_reason "error"
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that were found in the prefix cache
    completion_tokens: int = 0
    stopped_by: int | None = None  # the signal that ended the run, if one did

    def __str__(self):
        return (
            f"{self.num_done_before + self.num_done} of {self.requests} requests, "
            f"{self.num_done} of them now: "
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached), "
            f"{self.completion_tokens} made"
            + (f"; {self.errors} ended in errors" if self.errors else "")
        )


def run(
    config: batch_input.BatchConfig, stop: Callable[[], int | None] = lambda: None
) -> BatchSummary:
    """Answer all requests of the input that the output does not have.

    With several processes, all of them call this, and get the summary of process 0.

    Args:
      config: the flags.
      stop: called between two steps of the engine. A signal's number ends the run, and what is
        done stays in the output.

    Raises:
      ValueError, OSError: an input, checkpoint or unfinished output that cannot be used, found
        before anything runs.
    """
    inputs = distributed.run_on_first(lambda: read_inputs(config))
    plan = config.model_choice.plan_engine(None if inputs is None else inputs.sizes)
    with contextlib.ExitStack() as stack:
        # With the memory known to suffice, so that a run that cannot begin leaves no output.
        done_indices = distributed.run_on_first(
            lambda: None if inputs is None else _begin_output(config, plan.layout, inputs, stack)
        )
        num_done = multihost.broadcast_object(None if done_indices is None else len(done_indices))
        num_requests = multihost.broadcast_object(None if inputs is None else len(inputs.requests))
        if num_done == num_requests:
            return BatchSummary(num_requests, num_done, 0)
        model = config.model_choice.load(plan.layout)
        summary = None
        if inputs is None or done_indices is None:
            leader_follower.follow_engine(model, plan.sizes)
        else:
            running_engine = engine.Engine(model, inputs.tokenizer, plan.sizes)
            summary = _answer_requests(config, running_engine, inputs.requests, done_indices, stop)
        return multihost.broadcast_object(summary)


@dataclasses.dataclass(frozen=True)
class BatchInputs:
    """What process 0 reads before anything runs."""

    tokenizer: tokenizer_lib.Tokenizer  # the checkpoint's
    requests: list[batch_input.BatchRequest]  # of all lines, those that are done included
    sizes: config_lib.EngineConfig  # sizes of the engine


def read_inputs(config: batch_input.BatchConfig) -> BatchInputs:
    command.output_path("output", config.output, [config.input])
    folder = command.checkpoint_dir(config.checkpoint)
    tokenizer = tokenizer_lib.Tokenizer.load(folder)
    model_config = m1_jax.ModelConfig.from_file(folder / "config.json")
    requests = batch_input.read_requests(config, tokenizer, model_config)
    # Sizes for all requests, not for those still to do: a run that goes on has the same programs,
    # which a compilation cache then holds.
    sizes = config_lib.fit_config(
        [(len(request.prompt), request.options.max_tokens) for request in requests],
        config.max_rows,
        model_config.max_position_embeddings,
        num_pages=config.num_pages,
        num_snapshots=config.num_snapshots,
        draft_tokens=config.draft_tokens,
    )
    return BatchInputs(tokenizer, requests, sizes)


def _begin_output(
    config: batch_input.BatchConfig,
    layout: sharding.MeshLayout | None,
    inputs: BatchInputs,
    stack: contextlib.ExitStack,
) -> set[int]:
    """Lock the output until `stack` ends, and begin it or take it up.

    Returns:
      The indices of the requests that the output has.
    """
    output = command.local_path("output", config.output)
    stack.enter_context(file_lock.hold_lock(output, "writes"))
    folder = command.checkpoint_dir(config.checkpoint)
    fingerprint = batch_fingerprint.fingerprint_run(config, layout, folder, inputs.requests)
    return batch_output.begin_output(output, fingerprint, len(inputs.requests))


def _answer_requests(
    config: batch_input.BatchConfig,
    running_engine: engine.Engine,
    requests: list[batch_input.BatchRequest],
    done_indices: set[int],
    stop: Callable[[], int | None],
) -> BatchSummary:
    """Run the requests that are not done, with a progress bar, and close the engine."""
    todo = [request for request in requests if request.index not in done_indices]
    bar = progress_bar.open_bar(
        "batch", len(requests), "request", initial=len(done_indices), shown=config.progress
    )
    with bar, command.local_path("output", config.output).open("ab") as file:
        return _serve_requests(config, running_engine, todo, len(done_indices), file, bar, stop)


def _serve_requests(
    config: batch_input.BatchConfig,
    running_engine: engine.Engine,
    todo: list[batch_input.BatchRequest],
    num_done_before: int,
    file: BinaryIO,
    bar: tqdm.tqdm,
    stop: Callable[[], int | None],
) -> BatchSummary:
    """Run requests, and write each when it ends."""
    waiting = collections.deque(todo)
    live: dict[int, tuple[batch_input.BatchRequest, request_lib.Request]] = {}  # requests by index
    # The engine knows a window of requests: enough to keep its rows busy, however many there are.
    window = min(3 * running_engine.config.max_rows, running_engine.config.max_queue)
    counts, signal_number, going = collections.Counter(), None, True
    while going and signal_number is None:
        while waiting and len(live) < window:
            batch_request = waiting.popleft()
            live[batch_request.index] = (
                batch_request,
                running_engine.submit(batch_request.prompt, batch_request.options),
            )
        going = running_engine.step() or bool(waiting)
        for index in [i for i, (_, request) in live.items() if request.done.is_set()]:
            batch_request, request = live.pop(index)
            output = request.output()
            batch_output.append_output(file, batch_request.output_fields, output, config.tokens)
            bar.update()
            counts["num_done"] += 1
            counts["errors"] += output.finish_reason == "error"
            for name in ("prompt_tokens", "cached_tokens"):
                counts[name] += getattr(output, name)
            counts["completion_tokens"] += len(output.tokens)
        bar.set_postfix(tokens=counts["completion_tokens"], refresh=False)
        signal_number = stop()
    durable.flush_to_disk(file)
    running_engine.close()
    total = num_done_before + counts["num_done"] + len(waiting) + len(live)
    return BatchSummary(total, num_done_before, **counts, stopped_by=signal_number)


def main(_) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every step at INFO
    distributed.run_to_exit(_run_command, one_line=False)  # bad lines are listed


def _run_command() -> int:
    """Run with the flags, and return the exit status, which all processes share."""
    config = command.config_from_flags(batch_input.BatchConfig)
    with distributed.join_processes(config.distributed):
        signals = command.StopSignals()
        signals.listen()
        summary = run(config, signals.poll)
    if distributed.is_first_process():
        print(summary, file=sys.stderr)
    if summary.stopped_by is None:
        return 0
    if distributed.is_first_process():
        print("stopped; the same command goes on", file=sys.stderr)
    return 128 + summary.stopped_by  # as a shell reports a signal


def cli() -> None:
    command.define_flags(batch_input.BatchConfig, batch_input.FLAG_GROUPS)
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()
