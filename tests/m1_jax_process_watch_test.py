"""Processes that fail, fall silent or are asked to stop: all of them end, or stop together."""

import itertools
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from turns_support import take_turns

from m1_jax import process_watch

WORKER = pathlib.Path(__file__).with_name("watch_worker.py")
NUM_PROCESSES = 3
# Of a busy machine. The watch's own limits are 0.2, 2 and 5 s (`watch_worker.LIMITS`).
MAX_SECS = 60


def _start(fault, culprit=0, wait="sleep"):
    with socket.socket() as free_socket:
        free_socket.bind(("localhost", 0))
        port = free_socket.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(port), str(NUM_PROCESSES), str(index)]
            + [fault, str(culprit), wait],
            cwd=WORKER.parents[1],
            env={"PYTHONPATH": ".", "PATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(NUM_PROCESSES)
    ]


def _finish(processes):
    """Return the exit status, stdout and stderr of each process."""
    deadline = time.monotonic() + MAX_SECS
    results = []
    try:
        for process in processes:
            output = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            results.append((process.returncode, *output))
    finally:
        for process in processes:
            process.kill()
    return results


# Three processes start for each case here, which takes eight seconds of a core.
@pytest.mark.parametrize(
    ("culprit", "wait"),
    take_turns(*itertools.product(range(NUM_PROCESSES), ["object", "devices", "sleep"])),
)
def test_an_error_ends_all_processes_with_its_line(culprit, wait):
    line = "row 7: got nothing; wanted a row"
    for index, (status, _, err) in enumerate(_finish(_start("error", culprit, wait))):
        wanted = line if index == culprit else f"process {culprit}: {line}"
        assert (status, f"error: {wanted}" in err.splitlines()) == (1, True), err
        assert "Traceback" not in err


@pytest.mark.parametrize("fault", take_turns("bug", "closing"))
def test_an_error_ends_all_processes_whatever_its_own_process_does(fault):
    results = _finish(_start(fault, 1))
    line = {"bug": "KeyError: 'a name'", "closing": "row 7: got nothing; wanted a row"}[fault]
    assert [status for status, _, _ in results] == [1] * NUM_PROCESSES
    assert f"error: process 1: {line}" in results[0][2]
    assert f"error: {line}" in results[1][2]


@pytest.mark.parametrize(
    ("fault", "culprit"), take_turns(("silent", 0), ("killed", 1), ("silent", 2), ("killed", 0))
)
def test_a_silent_process_ends_the_others(fault, culprit):
    processes = _start(fault, culprit, "object")
    others = [process for index, process in enumerate(processes) if index != culprit]
    try:
        results = _finish(others)
    finally:
        processes[culprit].kill()
        processes[culprit].communicate()
    assert all(status != 0 for status, _, _ in results), results
    if fault == "silent":
        assert all("has not answered for" in err for _, _, err in results), results


@pytest.mark.parametrize("culprit", take_turns(0, 1))
def test_an_error_in_closing_ends_the_processes_that_are_done(culprit):
    results = _finish(_start("late", culprit))
    assert [status for status, _, _ in results] == [1] * NUM_PROCESSES, results
    assert all("row 7: got nothing; wanted a row" in err for _, _, err in results), results


@pytest.mark.slow
def test_a_deadlock_ends_all_processes():
    results = _finish(_start("hang", 1, "object"))
    assert [status for status, _, _ in results] == [1] * NUM_PROCESSES
    assert all("no process has made progress for" in err for _, _, err in results), results


@pytest.mark.parametrize("culprit", take_turns(0, 2))
def test_a_signal_to_one_process_stops_all_after_the_same_step(culprit):
    processes = _start("stop")
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[culprit].send_signal(signal.SIGTERM)
    results = _finish(processes)
    lines = {out.splitlines()[-1] for _, out, _ in results}
    assert [status for status, _, _ in results] == [0] * NUM_PROCESSES, results
    assert len(lines) == 1
    assert lines.pop().split()[2] == str(int(signal.SIGTERM))


@pytest.mark.slow
def test_objects_and_arrays_arrive_as_they_are():
    for status, out, err in _finish(_start("none")):
        assert (status, out.splitlines()[-1]) == (0, "equal"), err


def test_a_pause_of_the_machine_is_no_silence(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(process_watch.time, "monotonic", lambda: now[0])
    silence = process_watch._Silence(process_watch.WatchLimits(contact_secs=1.0))
    silence.look("a")
    now[0] = 1000.0
    assert silence.look("a") == 2.0
    now[0] = 1001.0
    assert silence.look("a") == 3.0
    assert silence.look("b") == 0.0
