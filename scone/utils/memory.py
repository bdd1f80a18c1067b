"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD = -3  # glibc's name for the size, in malloc.h


def return_large_blocks(from_bytes: int = 1 << 20) -> bool:
    """Have blocks of ``from_bytes`` or more go back to the system when they are freed, in this process from now on.

    Otherwise glibc takes a large block that is freed as a sign that more will come, and keeps those of up to 32 MiB for
    the thread, between small ones that pin them: a job that works through many chunks grows for a while, though it
    holds no more. New pages take time: a quarter more with a small f-gram model. Programs should decide, not libraries.
    Returns False where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, from_bytes))
