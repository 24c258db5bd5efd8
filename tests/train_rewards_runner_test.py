"""The code runner: what it returns, and that bombs, floods and network use are stopped."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from train.rl.rewards import runner

LIMITS = runner.RunnerLimits(
    cpu_secs=5, wall_secs=15, memory_bytes=2**28, output_bytes=10_000, processes=12
)


def _can_isolate():
    try:
        return runner.run_program({}, ["true"], LIMITS).reason == "exit"
    except runner.RunnerUnavailable:
        return False


CAN_ISOLATE = _can_isolate()
# As the runner isolates: with namespaces, and as on a system that permits none.
BOTH_WAYS = pytest.mark.parametrize(
    "isolated",
    [
        pytest.param(
            True, marks=pytest.mark.skipif(not CAN_ISOLATE, reason="no namespaces permitted")
        ),
        False,
    ],
)


def _python(source, limits=LIMITS, allow_network=not CAN_ISOLATE):
    command = [sys.executable, "main.py"]
    return runner.run_program({"main.py": source}, command, limits, allow_network=allow_network)


def _alive(mark):
    """Return the processes whose command line holds the mark."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if mark.encode() in file.read():
                    found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_output_input_and_files():
    source = "import sys, lib.two\nprint(input(), lib.two.X)\nprint('e', file=sys.stderr)\nexit(3)"
    files = {"main.py": source, "lib/two.py": "X = 2"}
    result = runner.run_program(
        files, [sys.executable, "main.py"], LIMITS, stdin="hé\n", allow_network=not CAN_ISOLATE
    )
    assert result == runner.RunResult("hé 2\n", "e\n", 3, "exit")


def test_folder_is_fresh_writable_and_removed():
    source = "import os\nopen('new', 'w').write('x')\nprint(os.getcwd(), sorted(os.listdir()))"
    first, second = (_python(source).stdout.split(" ", 1) for _ in range(2))
    assert first[1] == second[1] == "['main.py', 'new']\n"
    assert first[0] != second[0]
    assert not os.path.exists(first[0])


@pytest.mark.skipif(not CAN_ISOLATE, reason="no namespaces permitted")
@pytest.mark.parametrize("folder", ["/tmp", "/var/tmp", "/dev/shm"])
def test_shared_folders_are_the_programs_own(folder):
    name = f"left-{os.getpid()}-{time.monotonic_ns()}"
    outside = pathlib.Path(folder, f"outside-{name}")
    outside.touch()
    source = f"""
import os, tempfile
path = {folder!r} + "/" + {name!r}
with open(path, "wb") as file:
    file.write(b"x" * 1000)
print({outside.name!r} in os.listdir({folder!r}), os.path.getsize(path))
try:
    for number in range(9):
        with open(path + str(number), "wb") as file:
            file.write(b"x" * 2**15)
except OSError as error:
    print(error.strerror)
os.makedirs(os.path.join(os.environ["HOME"], "own"))
print(os.path.samefile(os.getcwd(), os.environ["HOME"]))
"""
    try:
        result = _python(source, runner.RunnerLimits(file_bytes=2**16))
    finally:
        outside.unlink()
    assert result.stdout == "False 1000\nNo space left on device\nTrue\n", result
    assert not os.path.exists(f"{folder}/{name}")


@pytest.mark.skipif(not CAN_ISOLATE, reason="no namespaces permitted")
def test_an_interpreter_in_a_shared_folder_is_found(tmp_path):
    link = tmp_path / "env" / "bin" / "tool"
    link.parent.mkdir(parents=True)
    link.write_text("#!/bin/sh\necho $0\n")
    link.chmod(0o755)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(0o755)
    assert runner.run_program({}, [str(link)], LIMITS).stdout == f"{link}\n"


def test_signal_is_a_negative_code():
    result = _python("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    assert (result.exit_code, result.reason) == (-15, "exit")


@pytest.mark.parametrize("path", ["/tmp/x", "../x", "a/../../x", ""])
def test_path_out_of_the_folder_is_refused(path):
    with pytest.raises(ValueError, match="wanted a relative one"):
        runner.run_program({path: ""}, ["true"], LIMITS)


def test_missing_program_is_an_error():
    with pytest.raises(runner.RunnerUnavailable, match="No such file"):
        runner.run_program({}, ["no-such-program"], LIMITS, allow_network=not CAN_ISOLATE)


@BOTH_WAYS
def test_sleeper_that_ignores_signals_is_killed(isolated):
    source = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
time.sleep(1000)
"""
    start = time.monotonic()
    limits = runner.RunnerLimits(wall_secs=1)
    result = _python(source, limits, allow_network=not isolated)
    assert (result.exit_code, result.reason) == (None, "wall")
    assert time.monotonic() - start < 6


def test_cpu_time_ends():
    result = _python("while True: pass", runner.RunnerLimits(cpu_secs=1))
    assert (result.exit_code, result.reason) == (None, "cpu")


def test_endless_output_is_cut():
    result = _python("while True: print('x' * 1000)")
    assert result.reason == "output"
    assert len(result.stdout) == LIMITS.output_bytes


def test_last_burst_of_output_counts():
    assert _python("print('x' * 9_999, end='')").reason == "exit"
    assert _python("print('x' * 10_001, end='')").reason == "output"


def test_memory_bomb_of_one_process():
    result = _python("x = bytearray(2**30)")
    assert result.exit_code == 1
    assert "MemoryError" in result.stderr


def test_memory_bomb_of_many_processes():
    source = """
import os, time
for _ in range(6):
    if not os.fork():
        x = b'x' * (60 * 2**20)
        break
time.sleep(60)
"""
    assert _python(source).reason == "memory"


def test_long_file_is_cut():
    source = "open('big', 'wb').write(b'x' * 2**20)"
    result = _python(source, runner.RunnerLimits(file_bytes=2**16))
    assert (result.exit_code, "File too large" in result.stderr) == (1, True)


@BOTH_WAYS
def test_fork_bomb_is_stopped_and_nothing_is_left(isolated):
    source = """
import os
import pathlib
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "main.py", mark]
    files = {"main.py": source}
    result = runner.run_program(files, command, LIMITS, allow_network=not isolated)
    assert (result.exit_code, result.reason) == (None, "processes")
    assert not _alive(mark)


_LEAVES_A_CHILD = """
import os, time
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(1), os.close(2)
    time.sleep(1000)
print('done')
"""


@BOTH_WAYS
def test_daemon_is_killed(isolated):
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "main.py", mark]
    files = {"main.py": _LEAVES_A_CHILD}
    result = runner.run_program(files, command, LIMITS, allow_network=not isolated)
    assert result == runner.RunResult("done\n", "", 0, "exit")
    assert not _alive(mark)


def test_many_processes_without_namespaces_are_stopped():
    source = "import os, time\nfor _ in range(40):\n  if not os.fork(): time.sleep(99)\nos.wait()"
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "main.py", mark]
    result = runner.run_program({"main.py": source}, command, LIMITS, allow_network=True)
    assert result.reason == "processes"
    assert not _alive(mark)


@BOTH_WAYS
def test_network_is_cut(isolated):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)"
        result = _python(source, allow_network=not isolated)
        if isolated:
            assert "Network is unreachable" in result.stderr
            with pytest.raises(TimeoutError):
                listener.accept()
        else:
            assert result.exit_code == 0
            listener.accept()[0].close()


def test_refuses_where_namespaces_are_not_permitted(monkeypatch, tmp_path):
    source = runner._CONFINE_SCRIPT.read_text()
    broken = tmp_path / "confine.py"
    # As in a container: the flag is one that no kernel knows.
    broken.write_text(source.replace("flags, uid, gid = ", "flags, uid, gid = 1 | "))
    monkeypatch.setattr(runner, "_CONFINE_SCRIPT", broken)
    with pytest.raises(runner.RunnerUnavailable, match="allow_network=True"):
        _python("print(1)", allow_network=False)
    assert _python("print(1)", allow_network=True).stdout == "1\n"


def test_root_gives_up_its_rights():
    if os.getuid():
        pytest.skip("the caller is not root")
    source = "import os\nprint(os.getuid())\nos.open('/etc/new', os.O_CREAT | os.O_WRONLY)"
    result = _python(source)
    assert int(result.stdout) >= 1_000_000_000
    assert "PermissionError" in result.stderr


@pytest.mark.skipif(not CAN_ISOLATE, reason="only a namespace dies with its first process")
def test_program_dies_with_its_caller(tmp_path):
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    source = (
        "from train.rl.rewards import runner\n"
        f"runner.run_program({{}}, ['sh', '-c', 'sleep 1000; : {mark}'], "
        "runner.RunnerLimits(wall_secs=60))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=runner._CONFINE_SCRIPT.parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # a killed caller leaves its folder
    )
    wait = time.monotonic() + 10
    while len(_alive(mark)) < 4:  # the caller, two processes that confine, the shell
        assert time.monotonic() < wait
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    while _alive(mark):
        assert time.monotonic() < wait
        time.sleep(0.02)


def test_limits_are_checked():
    with pytest.raises(ValueError, match="wall_secs: got 0; wanted more than 0"):
        runner.RunnerLimits(wall_secs=0)
