"""Confines one command; `runner` starts this file by its path. Standard library alone.

Two processes stand between the caller and the command. The outer one makes the namespaces and
waits; the inner one, the first of the new pid namespace, starts the command, collects orphans,
reports how the command ended and dies, whereupon the kernel kills all that is left of the
namespace. Where there are no namespaces, orphans come to the outer process, and the caller kills
its descendants.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys

# From <sched.h>, <sys/prctl.h> and <linux/capability.h>.
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = (
    1,
    8,
    36,
    38,
    47,
)
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 2
FIRST_PROGRAM_UID = 1_000_000_000  # nobody's: a limit on a user's processes must count ours alone

_libc = ctypes.CDLL(None, use_errno=True)


def _call_libc(function: str, *arguments) -> None:
    if getattr(_libc, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _prctl(option: int, *values: int) -> None:
    _call_libc("prctl", option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]))


def unshare_namespaces() -> None:
    """Leave the namespaces of processes, network and IPC.

    Raises:
      OSError: the system does not permit it.
    """
    flags, uid, gid = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET, os.getuid(), os.getgid()
    if uid == 0:
        _call_libc("unshare", flags)
        return
    _call_libc("unshare", flags | CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)
    with open("/proc/self/gid_map", "w") as out:
        out.write(f"{gid} {gid} 1")


def _drop_root(uid: int) -> None:
    """Become a user of no other process, who may read everything and write the folder alone.

    The kernel does not count root's processes. Reading stays: interpreters lie in root's home.
    """
    try:
        for folder, _, names in os.walk("."):
            for name in (".", *names):
                os.chown(os.path.join(folder, name), uid, uid)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return  # a container that does not have this id: its root is an ordinary user outside
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
        return  # a container's root may not have it; its interpreters are for everybody
    _prctl(PR_CAP_AMBIENT, 2, CAP_DAC_READ_SEARCH)


def _set_rlimits(options: dict) -> None:
    hard = {
        resource.RLIMIT_CPU: options["cpu_secs"],
        resource.RLIMIT_AS: options["memory_bytes"],
        resource.RLIMIT_FSIZE: options["file_bytes"],
        resource.RLIMIT_CORE: 0,
    }
    if (
        options["namespaces"] or os.getuid() >= FIRST_PROGRAM_UID
    ):  # else the user's others count as well
        hard[resource.RLIMIT_NPROC] = options["tasks"]
    for which, value in hard.items():
        # The signal that tells of too much CPU time can be ignored, the one a second later cannot.
        spare = 1 if which == resource.RLIMIT_CPU else 0
        resource.setrlimit(which, (value, value + spare))


def _exec_command(options: dict, uid: int, report_fd: int) -> None:
    """Become the command; what fails on the way is told to the caller."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # should memory run out, this goes first, not the caller
        if os.getuid() == 0:
            _drop_root(uid)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # for where there is no namespace to die with
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _set_rlimits(options)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(options["command"][0], options["command"], options["environment"])
    except OSError as error:
        os.write(report_fd, json.dumps({"failed": str(error)}).encode() + b"\n")
    os._exit(127)


def main() -> None:
    """Read the options from the first argument, run the command, report, and wait to be killed."""
    options = json.loads(sys.argv[1])
    report = options["report"]
    os.set_inheritable(report, False)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    uid = FIRST_PROGRAM_UID + os.getpid()
    if options["namespaces"]:
        try:
            unshare_namespaces()
        except OSError as error:
            os.write(report, json.dumps({"refused": str(error)}).encode() + b"\n")
            signal.pause()
    if os.fork():
        while True:  # orphans, where there is no namespace; the caller ends it
            try:
                os.wait()
            except ChildProcessError:
                signal.pause()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    command = os.fork()
    if not command:
        _exec_command(options, uid, report)
    while True:
        pid, status = os.wait()
        if pid == command:
            break
    ended = {"exit_code": os.waitstatus_to_exitcode(status)}
    os.write(report, json.dumps(ended).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
