"""One of several processes that fail, fall silent or are asked to stop.

watch_worker.py PORT PROCESSES INDEX FAULT CULPRIT WAIT

The process CULPRIT has the FAULT, while the others WAIT.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.experimental import multihost_utils

from m1_jax import multihost, process_watch
from train import workdir

LIMITS = process_watch.WatchLimits(contact_secs=0.2, silent_secs=5, closing_secs=2)
# Shorter than a start: only the fault that is about a deadlock has it.
SHORT_STALL = dataclasses.replace(LIMITS, stalled_secs=5)


def wait_for_others(kind):
    if kind == "object":
        multihost.broadcast_object(None)
        multihost.gather_objects(None)
        multihost.broadcast_object(None)
    elif kind == "devices":
        np.asarray(multihost_utils.process_allgather(np.ones(4)))
    time.sleep(1000)


def fail(fault):
    time.sleep(1)
    if fault in ("error", "closing"):
        raise ValueError("row 7: got nothing;\nwanted a row")
    if fault == "hang":  # its threads are well
        time.sleep(1000)
    if fault == "bug":
        raise KeyError("a name")
    os.kill(os.getpid(), {"silent": signal.SIGSTOP, "killed": signal.SIGKILL}[fault])
    time.sleep(1000)


def stop_together(index):
    """Print the step after which a signal stopped this process."""
    request = workdir.StopRequest("ending")
    with request.handle_signals():
        print("ready", flush=True)
        for step in range(100_000):
            if request.should_stop():
                print(f"stopped {step} {request.signal_number}", flush=True)
                return
            # The main thread of one process is inside of a device's program.
            if index == 1:
                np.asarray(jax.jit(lambda x: x + 1)(np.ones(4)))
            time.sleep(0.01)


def broadcast_all(index):
    """Check objects and arrays of many sizes."""
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.integers(0, 200_064, 1_000_003).astype(np.int32),
        "routes": rng.integers(0, 32, (12_345, 3, 2)).astype(np.int8),
        "none": np.zeros((0, 3), np.float32),
        "one": np.float64(1.5).reshape(1),
    }
    for some in (arrays, {"one": arrays["one"]}, {}):
        received = multihost.broadcast_arrays(some if index == 0 else {})
        assert received.keys() == some.keys()
        for name, array in some.items():
            assert received[name].dtype == array.dtype
            np.testing.assert_array_equal(received[name], array)
    for number in range(200):  # more than a group of keys
        value = {"number": number, "pages": [0] * 50_000 * (number % 7 == 0)}  # some compressed
        if number % 100 == 0:
            value = np.random.default_rng(number).bytes(9 << 20)  # several values
        received_value = multihost.broadcast_object(value if index == 0 else None)
        assert received_value == value
        gathered = multihost.gather_objects((index, number))
        wanted = [(process, number) for process in range(jax.process_count())]
        assert gathered == ([] if index else wanted)
    print("equal", flush=True)


def main(port, processes, index, fault, culprit, wait):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", processes, index)
    try:
        limits = SHORT_STALL if fault == "hang" else LIMITS
        with process_watch.watch_processes(limits), contextlib.ExitStack() as stack:
            if fault == "late" and index == culprit:
                stack.callback(fail, "error")
            if fault == "closing":
                stack.callback(time.sleep, 1000)
            with process_watch.announce_errors():
                if fault == "stop":
                    return stop_together(index)
                if fault == "none":
                    return broadcast_all(index)
                if fault == "late":
                    return None
                if index == culprit:
                    fail(fault)
                wait_for_others(wait)
    except Exception as error:
        process_watch.exit_with_error(error)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4], int(sys.argv[5]), sys.argv[6])
