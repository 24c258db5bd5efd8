"""Runs a program that a model wrote, within limits. NOT A SECURITY BOUNDARY.

The runner keeps honest mistakes and simple mischief from harming a run. On Linux it limits:

  * time: CPU seconds of each process (rlimit), and wall-clock seconds of the whole program.
  * processes: all of them live in a pid namespace and die with it. They are counted every 20 ms.
    Behind that stands the kernel's own limit on tasks, threads included.
  * memory: the address space of each process (rlimit), and the sum of resident memory, which is
    measured every 20 ms.
  * output: cut while it is read.
  * files: the length of each file (rlimit), not the sum.
  * network: an empty network namespace, without even a loopback device.
  * /tmp, /var/tmp and /dev/shm: empty ones of the program's own, of `file_bytes` each, which end
    with it. A system that permits namespaces but no mounts leaves those of the machine.
  * writing: a caller that is root runs the program as a user of its own, who can write what
    everybody can write. The program of any other caller can write what the caller can. That
    includes a root inside a container with few user ids.

The runner does not stop a program from reading every file that the caller can read, from reading
the host's `/proc`, from using Unix sockets in the file system, from filling a disk with many files
in its own folder, or from attacking the kernel. Run hostile code in a remote sandbox (`remote`).

With `allow_network` there are no namespaces, and what they hide is open: the network, the shared
folders, and, unless the caller is root, the caller's other processes. The program can read their
environment, with all secrets in it, and can kill them.
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
    """What a program may use. Every limit is above 0."""

    cpu_secs: int = 10  # CPU time of each process, in whole seconds
    wall_secs: float = 20.0  # wall-clock time of the program
    memory_bytes: int = 2**30  # address space of each process, and resident memory of all together
    output_bytes: int = 2**20  # stdout and stderr together
    processes: int = 32  # processes alive at once
    file_bytes: int = 2**26  # length of each file that the program writes

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(
                    f"{field.name}: got {getattr(self, field.name)}; wanted more than 0"
                )


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a program ended."""

    stdout: str
    stderr: str
    exit_code: int | None  # minus the signal's number after a signal; None after a limit
    reason: str  # "exit", or the exceeded limit: "cpu", "wall", "memory", "output", "processes"


class RunnerUnavailable(RuntimeError):
    """The system permits no namespaces, or the command could not be started."""


def run_program(
    files: Mapping[str, str],
    command: Sequence[str],
    limits: RunnerLimits = RunnerLimits(),
    *,
    stdin: str = "",
    allow_network: bool = False,
) -> RunResult:
    """Run `command` in a fresh folder that holds `files`, and kill every process that it started.

    Args:
      files: the files' texts by relative path.
      command: program and arguments. The program is searched for along the caller's PATH.
      limits: what the program may use.
      stdin: the program's input.
      allow_network: run without namespaces, for systems that permit none and programs that are
        trusted. The network is then open, the caller's secrets and processes are within reach (see
        the module), and if the caller is killed, processes of the program may live on.

    Raises:
      RunnerUnavailable: namespaces are not permitted and `allow_network` is false, or the command
        cannot be started.
      ValueError: a file's path is absolute, or leads out of the folder.
    """
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as folder:
        _write_files(pathlib.Path(folder), files)
        # From a file rather than a pipe: nobody needs to feed it while the program runs.
        with tempfile.TemporaryFile() as stdin_file:
            stdin_file.write(stdin.encode())
            stdin_file.seek(0)
            return _RunningProgram(
                folder, command, limits, not allow_network, stdin_file.fileno()
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
    """A program that runs behind `confine.py`, which reports its end over a pipe."""

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
        self._report_fd, report_write_fd = os.pipe()
        self._deadline = time.monotonic() + limits.wall_secs
        options = dataclasses.asdict(limits) | {
            "command": list(command),
            "namespaces": namespaces,
            "report": report_write_fd,
            # The kernel counts threads as well as processes, so its limit is looser.
            "tasks": 4 * limits.processes + 16,
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
                # Isolated, and without site-packages, whose import takes time.
                [sys.executable, "-I", "-S", str(_CONFINE_SCRIPT), json.dumps(options)],
                cwd=folder,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(report_write_fd,),
                start_new_session=True,
            )
        finally:
            os.close(report_write_fd)  # so that a dead child ends the pipe

    def finish(self) -> RunResult:
        """Wait for the end or an exceeded limit, kill what remains, and return the result."""
        try:
            with selectors.DefaultSelector() as selector:
                reason, report = self._watch(selector)
                # Kill first: a process that the program left behind could write on for ever.
                self._kill()
                if reason == "exit":
                    reason = self._drain(selector) or reason
        finally:
            self._kill()
            os.close(self._report_fd)
            for stream in (self._process.stdout, self._process.stderr):
                assert stream is not None  # Popen was given PIPE
                stream.close()
        if "refused" in report:
            raise RunnerUnavailable(
                f"runner: got {report['refused']!r}; wanted namespaces that cut off the network. "
                "Use a remote sandbox, or allow_network=True for programs you trust: it opens the "
                "network, and the caller's secrets and processes to them."
            )
        if "failed" in report:
            raise RunnerUnavailable(
                f"runner: got {report['failed']!r}; wanted a command that can be started"
            )
        exit_code = report.get("exit_code")
        if exit_code == -signal.SIGXCPU:  # sent by the kernel at the limit of CPU time
            reason, exit_code = "cpu", None
        texts = {name: bytes(data).decode(errors="replace") for name, data in self._output.items()}
        return RunResult(texts["stdout"], texts["stderr"], exit_code, reason)

    def _watch(self, selector: selectors.BaseSelector) -> tuple[str, dict]:
        """Return the reason of the end, and the report of `confine.py` (empty after a limit)."""
        for name in self._output:
            stream = getattr(self._process, name)
            os.set_blocking(stream.fileno(), False)
            selector.register(stream.fileno(), selectors.EVENT_READ, name)
        selector.register(self._report_fd, selectors.EVENT_READ, "report")
        report = b""
        next_check = time.monotonic()
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
            if now >= next_check:
                reason = self._find_exceeded_limit()
                if reason:
                    return reason, {}
                # The check reads /proc and takes longer the more processes the machine has. Spend
                # at most a fifth of the time on it.
                check_secs = time.monotonic() - now
                next_check = now + max(_POLL_SECS, 5 * check_secs)

    def _drain(self, selector: selectors.BaseSelector) -> str | None:
        """Read what remains in the pipes, and return "output" if it exceeds the limit."""
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
        """Keep what the limit permits of `data`, and return whether the limit is exceeded."""
        room = self._limits.output_bytes - sum(map(len, self._output.values()))
        self._output[name] += data[:room]
        return len(data) > room

    def _find_exceeded_limit(self) -> str | None:
        """Return the limit that the processes exceed together, or None."""
        tree = find_descendants(self._process.pid)
        if len(tree) > self._limits.processes + 1:  # confine.py's inner process
            return "processes"
        # Pages that processes share count once for each: the limit is too strict, never too loose.
        if sum(tree.values()) > self._limits.memory_bytes:
            return "memory"
        return None

    def _kill(self) -> None:
        """Kill all descendants, then the outermost process."""
        if self._process.returncode is not None:
            return
        deadline = time.monotonic() + _KILL_TIMEOUT_SECS
        while tree := find_descendants(self._process.pid):
            if time.monotonic() > deadline:
                raise RunnerUnavailable(f"runner: got {len(tree)} processes that survive SIGKILL")
            # Parents come first. The first is process 1 of the namespace, and the kernel kills the
            # others with it.
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        self._process.kill()
        self._process.wait()


def find_descendants(pid: int) -> dict[int, int]:
    """Return the resident bytes of each live descendant by its pid, parents first."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The second field is the program's name in parentheses, which may hold spaces and
                # parentheses of its own.
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Counted after the name: 0 is the state (Z and X are dead), 1 the parent, 21 the resident
        # pages.
        if fields[0] not in (b"Z", b"X"):
            children.setdefault(int(fields[1]), []).append(
                (int(name), int(fields[21]) * _PAGE_BYTES)
            )
    descendants: dict[int, int] = {}
    pending = [pid]
    while pending:
        for child, size in children.get(pending.pop(), ()):
            descendants[child] = size
            pending.append(child)
    return descendants
