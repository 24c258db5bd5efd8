"""A lock for each directory or file that a run owns: two processes never write to the same one.

    with file_lock.hold_lock(workdir, "trains in"):
        ...

The operating system gives the lock back when its owner ends, however it ends, so a dead owner's
lock can be taken at once.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from absl import logging

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)


class LockError(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold_lock(path: pathlib.Path, verb: str) -> Iterator[None]:
    """Hold the lock of `path` while the context lasts. Where several processes run, process 0 does.

    The lock is a file beside it, `path`.lock, which names its owner and goes with the lock.

    Args:
      path: the directory or file. It need not exist, but its parent must.
      verb: what the owner does to it, as in "trains in". It is part of the error.

    Raises:
      LockError: another process holds it. The error names its host and its process id.
    """
    lock_path = path.with_name(path.name + ".lock")
    descriptor = _lock_file(lock_path, path, verb)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(
        descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode(), 0
    )
    try:
        yield
    finally:
        # While it is held: nobody else can have made a new file of this name yet.
        lock_path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock_file(lock_path: pathlib.Path, path: pathlib.Path, verb: str) -> int:
    """Return the descriptor of the lock's file, locked."""
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise LockError(
                f"{path}: {owner or 'another process'} {verb} it; wait until that has ended, or "
                "stop it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logging.warning("%s: this file system has no locks; start one process alone", path)
            return descriptor
        # The owner before may have deleted the file between our `open` and our lock. Then others
        # would lock a new file of this name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock_path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)
