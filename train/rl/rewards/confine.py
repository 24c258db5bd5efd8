"""Confines one command. `runner` starts this file by its path, so it imports the standard library
alone.

Two processes stand between the caller and the command. The outer process makes the namespaces and
waits. The inner process is the first one of the new pid namespace. It starts the command, collects
orphans, reports how the command ended, and dies, whereupon the kernel kills all processes that
remain in the namespace. Without namespaces, the outer process adopts orphans, and the caller kills
its descendants.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Any

# From <sched.h>.
CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_NAMESPACES = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS
# From <sys/mount.h>.
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
# Folders that everybody can write into.
_SHARED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
# From <sys/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
# From <linux/capability.h>.
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 2
# Programs of a root caller run under user ids from here on, which no other process has: the kernel
# counts a user's processes, and the limit must count those of one program alone.
FIRST_PROGRAM_UID = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


def _call_libc(function: str, *arguments: Any) -> None:
    """Call a function that returns 0 on success, and raise OSError otherwise."""
    if getattr(_libc, function)(*arguments):
        error_code = ctypes.get_errno()
        raise OSError(error_code, f"{function}: {os.strerror(error_code)}")


def _prctl(option: int, *values: int) -> None:
    # The kernel refuses some options unless the arguments that they do not use are 0.
    _call_libc("prctl", option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]))


def unshare_namespaces() -> None:
    """Move to new namespaces of processes, mounts, network and IPC.

    Raises:
      OSError: the system does not permit new namespaces.
    """
    flags, uid, gid = _NAMESPACES, os.getuid(), os.getgid()
    if uid == 0:
        _call_libc("unshare", flags)
        return
    # An ordinary user may make a user namespace, and has the right to make the others inside it.
    # Map the user's own ids and no others. The kernel demands that setgroups is denied before an
    # unprivileged process writes its gid_map.
    _call_libc("unshare", flags | CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)
    with open("/proc/self/gid_map", "w") as out:
        out.write(f"{gid} {gid} 1")


def hide_shared_folders(command: str, max_bytes: int) -> None:
    """Mount an empty file system over each folder that everybody can write into.

    What the program writes there is gone with it. The current folder and the command's interpreter
    stay where they are. A system that permits namespaces but no mounts leaves the folders open.

    Args:
      command: the program to run, a path or a name.
      max_bytes: size of each of the file systems.
    """
    program = os.path.realpath(shutil.which(command) or command)
    kept = {os.getcwd(), sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(program))}
    if os.path.isabs(command):
        # The folder of a virtual environment, whose interpreter is a link.
        kept.add(os.path.dirname(os.path.dirname(command)))
    working_folder = os.getcwd()
    try:
        # Otherwise the caller would see the mounts, too.
        _mount(None, "/", None, MS_REC | MS_PRIVATE)
        for folder in filter(os.path.isdir, _SHARED_FOLDERS):
            # What begins with the folder itself cannot be kept and hidden.
            if folder not in kept and os.path.realpath(folder) == folder:
                _hide_folder(folder, sorted(kept), max_bytes)
    except PermissionError:
        pass
    os.chdir(working_folder)


def _hide_folder(folder: str, kept: Sequence[str], max_bytes: int) -> None:
    inner = [path for path in kept if path.startswith(folder + "/") and os.path.isdir(path)]
    # Open before they are hidden. A folder within another one comes with it.
    inner = [path for path in inner if not any(path.startswith(f"{p}/") for p in inner)]
    descriptors = {path: os.open(path, os.O_PATH) for path in inner}
    try:
        _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={max_bytes},mode=1777")
        for path, descriptor in descriptors.items():
            os.makedirs(path)
            _mount(f"/proc/self/fd/{descriptor}", path, None, MS_BIND | MS_REC)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = (text.encode() if text is not None else None for text in (source, target, kind))
    _call_libc("mount", *texts, ctypes.c_ulong(flags), data.encode())


def _drop_root(uid: int) -> None:
    """Become a user without other processes, who may read everything and write this folder alone.

    The kernel applies no limit on processes to root. Root's right to read is kept, because
    interpreters may lie in root's home.
    """
    try:
        for folder, _, files in os.walk("."):
            for name in (".", *files):
                os.chown(os.path.join(folder, name), uid, uid)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A container without this user id. Its root is an ordinary user outside.
        return
    # A change of user clears the capabilities, and so does exec. Keep them over the first, then
    # raise the one for reading to an ambient capability, which survives the second.
    _prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    bit = 1 << CAP_DAC_READ_SEARCH
    try:
        _call_libc(
            "capset",
            (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0),
            (ctypes.c_uint32 * 6)(bit, bit, bit),
        )
    except PermissionError:
        # A container's root may lack this capability. Everybody can read interpreters there.
        return
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH)


def _set_rlimits(options: dict) -> None:
    limits = {
        resource.RLIMIT_CPU: options["cpu_secs"],
        resource.RLIMIT_AS: options["memory_bytes"],
        resource.RLIMIT_FSIZE: options["file_bytes"],
        resource.RLIMIT_CORE: 0,
    }
    # The limit counts all processes of the user: outside a pid namespace, an ordinary user's other
    # processes would count as well.
    if options["namespaces"] or os.getuid() >= FIRST_PROGRAM_UID:
        limits[resource.RLIMIT_NPROC] = options["tasks"]
    for limit, value in limits.items():
        # At the soft limit the kernel sends SIGXCPU, which a program can ignore. One second later,
        # at the hard limit, it sends SIGKILL.
        spare_secs = 1 if limit == resource.RLIMIT_CPU else 0
        resource.setrlimit(limit, (value, value + spare_secs))


def _exec_command(options: dict, uid: int, report_fd: int) -> None:
    """Become the command, or report to the caller why that failed."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # should memory run out, the kernel kills the command first
        if os.getuid() == 0:
            _drop_root(uid)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # without a namespace: die with the parent
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _set_rlimits(options)
        # Python ignores these signals at start, and exec hands ignored signals on.
        for signal_number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signal_number, signal.SIG_DFL)
        os.execvpe(options["command"][0], options["command"], options["environment"])
    except OSError as error:
        os.write(report_fd, json.dumps({"failed": str(error)}).encode() + b"\n")
    os._exit(127)


def main() -> None:
    """Run the command that the first argument describes, report its end, and wait to be killed."""
    options = json.loads(sys.argv[1])
    report_fd = options["report"]
    os.set_inheritable(report_fd, False)  # the command must not write reports
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    uid = FIRST_PROGRAM_UID + os.getpid()
    if options["namespaces"]:
        try:
            unshare_namespaces()
        except OSError as error:
            os.write(report_fd, json.dumps({"refused": str(error)}).encode() + b"\n")
            signal.pause()
        hide_shared_folders(options["command"][0], options["file_bytes"])
    # The process that calls unshare stays in its old pid namespace: its first child enters the new
    # one as process 1, with which the namespace ends.
    if os.fork():
        while True:  # collect orphans, which come here without a namespace, until killed
            try:
                os.wait()
            except ChildProcessError:
                signal.pause()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    command = os.fork()
    if not command:
        _exec_command(options, uid, report_fd)
    while True:
        pid, status = os.wait()
        if pid == command:
            break
    report = {"exit_code": os.waitstatus_to_exitcode(status)}
    os.write(report_fd, json.dumps(report).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
