"""The process's memory allocator: freed memory is kept for the next chunk."""

import ctypes
from functools import cache

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc, malloc.h
LARGEST = 32 << 20  # bytes; the greatest threshold that glibc accepts
KEPT = 256 << 20


@cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 32 MiB. Says whether it could; other C libraries are left as they are.

    By default every temporary of a chunk (a MiB and more) is returned to the system and faulted in again page by page,
    which costs up to ten times as much as the arithmetic on it. What is kept is what a chunk needs at once.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
