"""A recording of some steps of a run, for xprof."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def record_trace(
    trace: tuple[int, int] | None, directory: pathlib.Path
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call before each step. It starts and ends the recording for xprof.

    Args:
      trace: first step and number of steps to record. None records nothing.
      directory: directory of the recording.
    """
    first_step, num_steps = trace or (-1, 0)  # no step has the number -1
    recording = False

    def trace_step(step: int) -> None:
        nonlocal recording
        if step == first_step:
            jax.profiler.start_trace(str(directory))
            recording = True
        elif recording and step >= first_step + num_steps:
            jax.profiler.stop_trace()
            recording = False

    yield trace_step
    if recording:  # the run ended within the steps to record
        jax.profiler.stop_trace()
