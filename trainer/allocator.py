"""The C library's allocator, told to keep what it has."""

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Freed memory stays with this process, where glibc would give each large block back.

    Every step frees and takes the same activations. Blocks above 32 MB would be mapped anew each
    time, and their pages filled with zeros by the kernel one by one. Does nothing without glibc.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
