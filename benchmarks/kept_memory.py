"""A malloc that keeps freed memory, so that no timed call waits for the pages of fresh memory.

On a virtual machine those page faults cost as much as a quarter of the work, and two libraries that
are compared do not have equally many.
"""

import os
import sys

ENVIRONMENT = {
    # One arena, since only the main one can keep blocks of more than 64 MiB. XLA allocates in its
    # worker threads, wherever it computes: with an arena for each thread, every call of a program
    # maps all of its memory anew.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592:"
    "glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.arena_max=1",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
}


def start_again() -> None:
    """Start this process again with such a malloc, unless it has GLIBC_TUNABLES already."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ENVIRONMENT)
