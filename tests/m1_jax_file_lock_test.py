"""Locks of what a run owns."""

import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from m1_jax import file_lock

HOLD = """
import pathlib, sys, time
from m1_jax import file_lock
with file_lock.hold_lock(pathlib.Path(sys.argv[1]), "writes to"):
    print("held", flush=True)
    time.sleep(60)
"""


def start_owner(path):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    return owner


def test_the_second_process_is_refused_and_a_dead_owners_lock_is_taken(tmp_path):
    path = tmp_path / "run"
    with start_owner(path) as owner:
        named = rf"run: process {owner.pid} on {socket.gethostname()} since .* writes to it; wait"
        with (
            pytest.raises(file_lock.LockError, match=named),
            file_lock.hold_lock(path, "writes to"),
        ):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    # The file of the dead owner is still there.
    assert (tmp_path / "run.lock").exists()
    with file_lock.hold_lock(path, "writes to"):
        assert f"process {os.getpid()} " in (tmp_path / "run.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_an_error_gives_the_lock_back(tmp_path):
    with pytest.raises(KeyError), file_lock.hold_lock(tmp_path / "a", "writes to"):
        raise KeyError
    with file_lock.hold_lock(tmp_path / "a", "writes to"):
        pass


def take_often(path: pathlib.Path, counter: pathlib.Path, results) -> None:
    taken = 0
    end = time.monotonic() + 2
    while time.monotonic() < end:
        try:
            with file_lock.hold_lock(path, "writes to"):
                value = int(counter.read_text())
                counter.write_text(str(value + 1))
                taken += 1
        except file_lock.LockError:
            pass
    results.put(taken)


def test_locks_that_come_and_go_are_never_held_twice(tmp_path):
    """A lost update would show that two processes were inside together."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=take_often, args=(tmp_path / "a", counter, results))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    taken = sum(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert taken > 10
    assert int(counter.read_text()) == taken


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    with file_lock.hold_lock(tmp_path / "a", "writes to"):
        assert "has no locks" in caplog.text
