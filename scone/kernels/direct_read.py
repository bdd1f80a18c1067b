"""Read many pieces of a file into one buffer without holding Python's lock, so that threads keep the disk busy."""

from __future__ import annotations

import os

import numpy as np
from numba import njit, types

# The C library's pread, found by name when the compiled code is loaded (a ctypes pointer could not be cached on disk).
_pread = types.ExternalFunction("pread", types.intp(types.intc, types.intp, types.uintp, types.int64))


@njit(cache=True, nogil=True)
def read_pieces(descriptor, address, offsets, sizes, targets, needed):  # type: ignore[no-untyped-def]
    """Read ``sizes[i]`` bytes at ``offsets[i]`` of ``descriptor`` to ``address + targets[i]``; all int64 [m].

    A piece may come back short where the file ends; ``needed[i]`` says how many bytes must come. Returns the index of
    the first piece that came back shorter than that, or -1 when all came: the caller reads that piece again with
    `reference_read`, which says why. Slow equal: `reference_read`.
    """
    for i in range(len(offsets)):
        if _pread(descriptor, address + targets[i], sizes[i], offsets[i]) < needed[i]:
            return i
    return -1


def reference_read(
    descriptor: int,
    buffer: memoryview,
    offsets: np.ndarray,
    sizes: np.ndarray,
    targets: np.ndarray,
    needed: np.ndarray,
) -> None:
    """The same in Python, into ``buffer``. Raises OSError from the disk, EOFError where the file ends early."""
    for offset, size, target, need in zip(
        offsets.tolist(), sizes.tolist(), targets.tolist(), needed.tolist(), strict=True
    ):
        got = os.preadv(descriptor, [buffer[target : target + size]], offset)
        if got < need:
            raise EOFError(f"{got} of {need} bytes at {offset}")
