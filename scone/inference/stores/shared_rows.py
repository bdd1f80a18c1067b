"""Rows in shared memory: one copy for all processes of a machine that read the same table."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from scone.inference.table_format import TableFile
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes

FOLDER = Path("/dev/shm")


def shared_rows(
    file: TableFile, first_row: int, num_rows: int, fill: Callable[[np.ndarray], object]
) -> tuple[np.ndarray, Callable[[], None]]:
    """The bytes of ``num_rows`` rows from ``first_row`` on, uint8, and what gives them back.

    Whoever comes first has them filled (``fill`` gets the array), the others wait for that, and the last one removes
    them. Each holds a lock, which ends with its process however that ends: so what nobody holds was left by processes
    that were killed, and the next one removes it. Raises SconeError where there is too little shared memory.
    """
    size, checksum = num_rows * file.layout.row_bytes, file.layout.rows_checksum
    remove_unused()
    path = FOLDER / f"scone-{os.getuid()}-{checksum[:32]}-{first_row}-{num_rows}"
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SconeError(
                f"cannot open shared memory {path}: {error.strerror}; use placement mmap, or ram for a copy of its own"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_full(descriptor, size):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not _is_full(descriptor, size):  # else somebody did while we waited for the lock
                    _fill(descriptor, path, size, fill)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            rows = np.frombuffer(mmap.mmap(descriptor, size + 1), np.uint8)[:size]
        except BaseException:
            _give_back(descriptor, path)
            raise
        if _is_at(descriptor, path):  # else its last reader removed it between two of our locks
            return rows, partial(_give_back, descriptor, path)
        os.close(descriptor)


def _is_full(descriptor: int, size: int) -> bool:
    """Whether rows were filled in to their end: a byte of 1 behind them says so."""
    return os.pread(descriptor, 1, size) == b"\1"


def _fill(descriptor: int, path: Path, size: int, fill: Callable[[np.ndarray], object]) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size + 1)  # else a page that is not there would kill the process
    except OSError as error:
        raise SconeError(
            f"found too little shared memory for {human_bytes(size)} of table rows in {path.parent}: {error.strerror}; "
            "give a container more (--ipc host or --shm-size), or use placement mmap"
        ) from error
    array = np.frombuffer(mmap.mmap(descriptor, size + 1), np.uint8)
    fill(array[:size])
    array[size] = 1


def _give_back(descriptor: int, path: Path) -> None:
    """End to hold it; remove it where nobody else does."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def remove_unused() -> None:
    """Those of this user that no process holds."""
    for path in FOLDER.glob(f"scone-{os.getuid()}-*"):
        with suppress(OSError):
            _give_back(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), path)
