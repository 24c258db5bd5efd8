"""Runs a program that a model wrote, within limits. NOT A SECURITY BOUNDARY.

It keeps honest mistakes and plain mischief from harming a run. What stops what, on Linux:

  * time: CPU seconds per process (rlimit) and wall seconds of the whole, then SIGKILL to all;
  * processes: all live in a pid namespace and die with it; a count of them every 20 ms, and the
    kernel's own limit on tasks, threads included, behind it;
  * memory: address space per process (rlimit) and the sum of resident memory, looked at every
    20 ms; output: cut while it is read; files: the length of each (rlimit), not their sum;
  * network: an empty network namespace, without even a loopback device;
  * writing: a caller that is root runs the program as a user of its own, who can write what
    everybody can; any other caller's program (that of a container's root with few user ids, too)
    can write what the caller can.

Not stopped: reading every file that the caller can read, `/proc` of the host, Unix sockets in the
file system, filling a disk with many files, attacks on the kernel. For hostile code use a remote
sandbox (`remote`).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

_CONFINE_SCRIPT = pathlib.Path(__file__).with_name("confine.py")
_POLL_SECS = 0.02
_KILL_TIMEOUT_SECS = 10.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class RunnerLimits:
    """What a program may use.

    cpu_secs: whole seconds, per process. wall_secs: of the whole. memory_bytes: address space of
    each process, resident memory of all. output_bytes: of stdout and stderr together.
    processes: alive at once. file_bytes: of each file.
    """

    cpu_secs: int = 10
    wall_secs: float = 20.0
    memory_bytes: int = 2**30
    output_bytes: int = 2**20
    processes: int = 32
    file_bytes: int = 2**26

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(
                    f"{field.name}: got {getattr(self, field.name)}; wanted more than 0"
                )


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a program ended.

    exit_code: negative for a signal; None where it was killed for a limit of ours.
    reason: "exit", or the limit: "cpu", "wall", "memory", "output", "processes".
    """

    stdout: str
    stderr: str
    exit_code: int | None
    reason: str


class RunnerUnavailable(RuntimeError):
    """The system does not permit to cut off the network, or the command could not be started."""


def run_program(
    files: Mapping[str, str],
    command: Sequence[str],
    limits: RunnerLimits = RunnerLimits(),
    *,
    stdin: str = "",
    allow_network: bool = False,
) -> RunResult:
    """Run `command` in a fresh folder that holds `files`, and kill all that it started.

    Args:
      files: text by relative path.
      command: program and arguments; the program is found as the caller's PATH says.
      allow_network: do without namespaces, on systems that permit none: the network is open, and
        should the caller be killed, what the command started may live on.

    Raises:
      Unavailable: namespaces are not permitted and `allow_network` is false; or the program does
        not exist.
      ValueError: an absolute path, or one out of the folder.
    """
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as folder:
        _write_files(pathlib.Path(folder), files)
        with tempfile.TemporaryFile() as source:
            source.write(stdin.encode())
            source.seek(0)
            return _RunningProgram(
                folder, command, limits, not allow_network, source.fileno()
            ).finish()


def _write_files(folder: pathlib.Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"files: got the path {name!r}; wanted a relative one inside")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


class _RunningProgram:
    """One program that runs."""

    def __init__(
        self,
        folder: str,
        command: Sequence[str],
        limits: RunnerLimits,
        namespaces: bool,
        stdin: int,
    ):
        self._limits = limits
        self._output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._report_fd, write = os.pipe()
        self._deadline = time.monotonic() + limits.wall_secs
        options = dataclasses.asdict(limits) | {
            "command": list(command),
            "namespaces": namespaces,
            "report": write,
            "tasks": 4 * limits.processes + 16,  # threads count, too
            "environment": {
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": folder,
                "TMPDIR": folder,
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CONFINE_SCRIPT), json.dumps(options)],
                cwd=folder,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(write,),
                start_new_session=True,
            )
        finally:
            os.close(write)

    def finish(self) -> RunResult:
        """Wait for the end, or bring it about."""
        try:
            with selectors.DefaultSelector() as selector:
                reason, report = self._watch(selector)
                self._kill()
                if reason == "exit":  # what lies in the pipes is the program's
                    reason = self._drain(selector) or reason
        finally:
            self._kill()
            os.close(self._report_fd)
            for stream in (self._process.stdout, self._process.stderr):
                assert stream is not None  # they were asked for
                stream.close()
        if "refused" in report:
            raise RunnerUnavailable(
                f"runner: got {report['refused']!r}; wanted namespaces that cut off the network. "
                "Use a remote sandbox, or allow_network=True for programs you trust."
            )
        if "failed" in report:
            raise RunnerUnavailable(
                f"runner: got {report['failed']!r}; wanted a command that can be started"
            )
        code = report.get("exit_code")
        if code == -signal.SIGXCPU:
            reason, code = "cpu", None
        texts = {name: bytes(data).decode(errors="replace") for name, data in self._output.items()}
        return RunResult(texts["stdout"], texts["stderr"], code, reason)

    def _watch(self, selector: selectors.BaseSelector) -> tuple[str, dict]:
        """Return the reason of the end and the report, if there is one."""
        for name in self._output:
            stream = getattr(self._process, name)
            os.set_blocking(stream.fileno(), False)
            selector.register(stream.fileno(), selectors.EVENT_READ, name)
        selector.register(self._report_fd, selectors.EVENT_READ, "report")
        report = b""
        look = time.monotonic()
        while True:
            for key, _ in selector.select(_POLL_SECS):
                data = os.read(key.fd, 2**16)
                if key.data == "report":
                    report += data
                    if report.endswith(b"\n"):
                        return "exit", json.loads(report.splitlines()[0])
                    if not data:
                        raise RunnerUnavailable("runner: got no report; wanted one. Was it killed?")
                elif not data:
                    selector.unregister(key.fd)
                elif self._append_output(key.data, data):
                    return "output", {}
            now = time.monotonic()
            if now >= self._deadline:
                return "wall", {}
            if now >= look:
                reason = self._find_exceeded_limit()
                if reason:
                    return reason, {}
                took = time.monotonic() - now  # it grows with the processes of the whole machine
                look = now + max(_POLL_SECS, 5 * took)

    def _drain(self, selector: selectors.BaseSelector) -> str | None:
        """Read what is left; return "output" when it is too much."""
        for key in list(selector.get_map().values()):
            while key.data != "report":
                try:
                    data = os.read(key.fd, 2**16)
                except BlockingIOError:
                    break
                if not data:
                    break
                if self._append_output(key.data, data):
                    return "output"
        return None

    def _append_output(self, name: str, data: bytes) -> bool:
        room = self._limits.output_bytes - sum(map(len, self._output.values()))
        self._output[name] += data[:room]
        return len(data) > room

    def _find_exceeded_limit(self) -> str | None:
        """Return the limit that the processes together exceed."""
        tree = find_descendants(self._process.pid)
        if len(tree) > self._limits.processes + 1:  # the inner one of ours
            return "processes"
        # Shared pages count once per process: too strict rather than too lax.
        if sum(tree.values()) > self._limits.memory_bytes:
            return "memory"
        return None

    def _kill(self) -> None:
        """Kill all descendants, then the outermost process."""
        if self._process.returncode is not None:
            return
        until = time.monotonic() + _KILL_TIMEOUT_SECS
        while tree := find_descendants(self._process.pid):
            if time.monotonic() > until:
                raise RunnerUnavailable(f"runner: got {len(tree)} processes that survive SIGKILL")
            # The first is the namespace's first, with which the kernel kills all others.
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        self._process.kill()
        self._process.wait()


def find_descendants(pid: int) -> dict[int, int]:
    """Return the resident bytes of each live descendant by pid, parents first."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in (b"Z", b"X"):
            children.setdefault(int(fields[1]), []).append(
                (int(name), int(fields[21]) * _PAGE_BYTES)
            )
    found: dict[int, int] = {}
    waiting = [pid]
    while waiting:
        for child, size in children.get(waiting.pop(), ()):
            found[child] = size
            waiting.append(child)
    return found
