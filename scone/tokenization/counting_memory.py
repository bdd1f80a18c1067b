"""Large arrays whose memory goes back to the system the moment they are dropped.

The C allocator keeps freed pieces of up to 32 MiB for itself, so that the buffers of one pass would still be resident
while the next takes its own: a budget could not be kept.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np


def page_array(length: int, dtype: np.dtype | type) -> np.ndarray:
    """Zeros [length] on pages of their own, in large pages where the system has them."""
    dtype = np.dtype(dtype)
    if not length:
        return np.empty(0, dtype)
    pages = mmap.mmap(-1, length * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without large pages; small ones do as well, only slower
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype)
