"""The pool of workers: results, and workers that hang, die, flood or talk nonsense."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from train.rl import sample as sample_lib
from train.rl.rewards import pool

# In a worker: no module of tests is importable, so functions come from a folder on sys.path.
_FUNCTIONS = '''
import os, re, signal, subprocess, sys, time

def length(sample): return len(sample.text)
def add(a, b): return a + b
async def later(x): return {"x": x}
def modules(): return sorted(sys.modules)
def pid(): return os.getpid()
def fail(): raise KeyError("no such thing")
def leave(): os._exit(0)
def segfault(): os.kill(os.getpid(), signal.SIGSEGV)
def nap(secs): time.sleep(secs)
def hang():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)
def stop(): os.kill(os.getpid(), signal.SIGSTOP)
def spin(): re.match("(a+)+$", "a" * 40 + "b")
def huge(): return "x" * (2 ** 21)
def thing(): return object()
def nan(): return float("nan")
def child(mark):
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(1000)  # {mark}"])
    time.sleep(1000)
def forge():
    """Write to every descriptor, the channel among them."""
    for fd in range(3, 64):
        try: os.write(fd, b"garbage garbage garbage")
        except OSError: pass
    time.sleep(1000)
def shut():
    for fd in range(3, 64):
        try: os.close(fd)
        except OSError: pass
def leave_child():
    """Die, while a child keeps the channel open."""
    if os.fork(): os._exit(1)
    time.sleep(1000)
def shout(): print("x" * 100_000); return 1
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "pool_functions.py").write_text(_FUNCTIONS)
    sys.path.append(str(folder))
    yield "pool_functions:"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def one(functions):
    """One worker: whatever a call leaves behind, the next one meets."""
    workers = pool.WorkerPool(1, limit_secs=1.5)
    yield workers
    workers.close()


def _value(workers, path, *arguments):
    return workers.submit(path, *arguments).result(20)


def test_calls_return_and_reuse_the_worker(one, functions):
    assert _value(one, functions + "add", 2, 3) == 5
    assert _value(one, functions + "later", 1.5) == {"x": 1.5}
    assert _value(one, functions + "shout") == 1
    assert _value(one, functions + "pid") == _value(one, functions + "pid") != os.getpid()


def test_worker_never_imports_jax(one, functions):
    _value(one, "train.rl.rewards.mathematics:grade_answer", "Answer: 1", "1")
    task = sample_lib.Task("1", (), "s")
    sample = sample_lib.Sample(task, (1,), text="x")
    assert (
        _value(one, "train.rl.rewards.adapters:call_reward", functions + "length", {}, sample) == 1
    )
    loaded = _value(one, functions + "modules")
    assert "math_verify" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("jax", "jaxlib", "flax", "grain")]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("fail", pool.WorkerError, "KeyError: 'no such thing'"),
        ("missing", pool.WorkerError, "wanted a function"),
        ("thing", pool.WorkerError, "got a object"),
        ("leave", pool.WorkerCrash, "closed"),
        ("segfault", pool.WorkerCrash, "closed"),
        ("shut", pool.WorkerCrash, "shut"),
        ("hang", pool.WorkerTimeout, "1.5 s"),
        ("stop", pool.WorkerTimeout, "1.5 s"),
        ("spin", pool.WorkerTimeout, "1.5 s"),
        ("leave_child", pool.WorkerTimeout, "1.5 s"),
        ("huge", pool.WorkerGarbage, "2097"),
        ("forge", pool.WorkerGarbage, "forge"),
    ],
)
def test_failure_is_named_and_the_next_call_works(one, functions, name, error, says):
    start = time.monotonic()
    with pytest.raises(error, match=says):
        _value(one, functions + name)
    assert time.monotonic() - start < 8
    assert _value(one, functions + "add", 1, 1) == 2


def test_children_of_a_worker_die_with_it(one, functions):
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    future = one.submit(functions + "child", mark)
    while not _alive(mark):
        assert not future.done()
        time.sleep(0.02)
    with pytest.raises(pool.WorkerTimeout):
        future.result(20)
    deadline = time.monotonic() + 5
    while _alive(mark):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(mark):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in pathlib.Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_arguments_that_do_not_pickle(one, functions):
    with pytest.raises(pool.WorkerError, match="do not pickle"):
        _value(one, functions + "add", 1, threading.Lock())


def test_waiting_for_a_worker_is_no_time_of_the_call(one, functions):
    futures = [one.submit(functions + "nap", 0.6) for _ in range(4)]  # 2.4 s, over the limit
    assert [future.result(20) for future in futures] == [None] * 4


def test_hanging_call_stops_no_other(functions):
    workers = pool.WorkerPool(2, limit_secs=3)
    try:
        stuck = workers.submit(functions + "hang")
        assert [_value(workers, functions + "add", i, i) for i in range(20)] == list(
            range(0, 40, 2)
        )
        assert not stuck.done()
    finally:
        workers.close()
    with pytest.raises((pool.WorkerCrash, concurrent.futures.CancelledError)):
        stuck.result(1)


def test_close_kills_what_runs_and_cancels_what_waits(functions):
    workers = pool.WorkerPool(1, limit_secs=60)
    pid = _value(workers, functions + "pid")
    running, waiting = (workers.submit(functions + "hang") for _ in range(2))
    while not running.running():
        time.sleep(0.01)
    workers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(pool.WorkerCrash):
        running.result(1)
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(1)
    with pytest.raises(RuntimeError, match="after close"):
        workers.submit(functions + "pid")


def test_workers_die_with_the_trainer(functions, tmp_path):
    source = (
        f"import sys; sys.path.append({sys.path[-1]!r})\n"
        "from train.rl.rewards import pool\n"
        "workers = pool.WorkerPool(1, 60)\n"
        f"print(workers.submit('{functions}pid').result(), flush=True)\n"
        f"workers.submit('{functions}hang').result()\n"
    )
    repo = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    trainer = subprocess.Popen([sys.executable, "-c", source], cwd=repo, stdout=subprocess.PIPE)
    with trainer:
        pid = int(trainer.stdout.readline())
        time.sleep(0.1)
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while pathlib.Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("workers", "secs"), [(0, 1), (1, 0), (1, float("nan"))])
def test_pool_checks_its_numbers(workers, secs):
    with pytest.raises(ValueError, match="wanted at least 1"):
        pool.WorkerPool(workers, secs)
