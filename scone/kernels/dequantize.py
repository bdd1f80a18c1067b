"""Rows on the host: pages of a file read without Python's lock, rows gathered from them, quantised ones decoded."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numba import njit, types

from scone.kernels.common import run_in_parts

# Below this many bytes of output, handing work to other threads costs more than it saves.
_BYTES_PER_THREAD = 1 << 20


def dequantize_rows(raw: np.ndarray, out: np.ndarray, row_type: str, group_size: int, num_threads: int = 1) -> None:
    """Decode rows ``raw`` (uint8 [n, row_bytes], int8 or int4 with their scales) into ``out``: float32 [n, D].

    Large batches are split over threads. Reference implementation: `reference_rows`.
    """
    arguments = (raw, out, out.view(np.uint32), group_size)
    run_in_parts(_KERNELS[row_type], arguments, len(raw), min(num_threads, out.nbytes // _BYTES_PER_THREAD))


def gather_bytes(
    source: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    targets: np.ndarray,
    num_threads: int = 1,
    pool: Executor | None = None,
) -> None:
    """Copy the row that starts at ``source[offsets[i]]`` (uint8 [any]) to ``out[targets[i]]``: uint8 [m, row_bytes].

    ``offsets`` and ``targets``, int64 [n], are not checked here. Large batches are split over threads (of ``pool``).
    Reference implementation: ``out[targets] = np.stack([source[at : at + row_bytes] for at in offsets])``.
    """
    parts = min(num_threads, len(offsets) * out.shape[1] // _BYTES_PER_THREAD)
    run_in_parts(_copy_rows, (source, offsets, targets, out), len(offsets), parts, pool)


# The C library's memcpy: twice as fast as a compiled loop over slices.
_memcpy: Any = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))


@njit(cache=True, nogil=True)
def _copy_rows(source, offsets, targets, out, first, last):  # type: ignore[no-untyped-def]
    row_bytes = out.shape[1]
    for i in range(first, last):
        _memcpy(out.ctypes.data + targets[i] * row_bytes, source.ctypes.data + offsets[i], row_bytes)


# Numba on CPUs does not know bfloat16, so a scale is built from its bits: `bits` is `out` seen as uint32. Storing bits
# and reading the float back is the reinterpretation.


@njit(cache=True, nogil=True)
def _dequantize_int8(raw, out, bits, group_size, first, last):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    num_groups = (width + group_size - 1) // group_size
    for row in range(first, last):
        scales = raw[row, : 2 * num_groups].view(np.uint16)
        codes = raw[row, 2 * num_groups :].view(np.int8)
        for group in range(num_groups):
            low = group * group_size
            high = min(low + group_size, width)
            bits[row, low] = np.uint32(scales[group]) << np.uint32(16)
            scale = out[row, low]
            for j in range(low, high):
                out[row, j] = scale * np.float32(codes[j])


@njit(cache=True, nogil=True)
def _dequantize_int4(raw, out, bits, group_size, first, last):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    num_groups = (width + group_size - 1) // group_size
    for row in range(first, last):
        scales = raw[row, : 2 * num_groups].view(np.uint16)
        codes = raw[row, 2 * num_groups :]
        for group in range(num_groups):
            low = group * group_size
            high = min(low + group_size, width)
            bits[row, low] = np.uint32(scales[group]) << np.uint32(16)
            scale = out[row, low]
            # group_size is even, so a byte never holds codes of two groups.
            for pair in range(low // 2, high // 2):
                code = np.int32(codes[pair])
                out[row, 2 * pair] = scale * np.float32(((code & 15) ^ 8) - 8)
                out[row, 2 * pair + 1] = scale * np.float32(((code >> 4) ^ 8) - 8)
            if high % 2:
                out[row, high - 1] = scale * np.float32(((np.int32(codes[high // 2]) & 15) ^ 8) - 8)


_KERNELS: dict[str, Callable[..., None]] = {"int8": _dequantize_int8, "int4": _dequantize_int4}


PAGE_BYTES = 4096
PIECE_PAGES = 32  # longest single read, in pages: long enough for full bandwidth, short enough to run side by side

# Found by name in the C library when compiled code is loaded (a ctypes pointer could not be cached on disk).
_syscall: Any = types.ExternalFunction("syscall", types.intp(*[types.intp] * 6))
# Linux's asynchronous reads: io_setup, io_destroy, io_submit, io_getevents. No C library wraps them.
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
_SETUP, _DESTROY, _SUBMIT, _GETEVENTS = _CALLS.get(platform.machine(), (-1, -1, -1, -1))


@njit(cache=True, nogil=True)
def plan_pieces(ranks, data_start, row_bytes):  # type: ignore[no-untyped-def]
    """The whole pages that hold the rows ``ranks`` (int64 [n], strictly ascending) of a file whose row 0 is at
    ``data_start``: (offset, size, target) of each piece, int64 [m, 3], and each row's place in the buffer, int64 [n].

    Rows on the same or neighbouring pages share a run; a run is cut into pieces of at most 32 pages. Pieces lie in the
    buffer one after the other. Reference implementation: `reference_pieces`.
    """
    n = len(ranks)
    rows = np.empty(n, dtype=np.int64)
    most = n + ((row_bytes - 1) // PAGE_BYTES + 2) * n // PIECE_PAGES + 1
    pieces = np.empty((most, 3), dtype=np.int64)
    count = 0
    target = 0  # bytes of the buffer that earlier runs take
    i = 0
    while i < n:
        run_first = (data_start + ranks[i] * row_bytes) // PAGE_BYTES
        run_end = run_first  # page behind the run
        while i < n:
            start = data_start + ranks[i] * row_bytes
            if start // PAGE_BYTES > run_end:
                break
            run_end = (start + row_bytes - 1) // PAGE_BYTES + 1
            rows[i] = target + start - run_first * PAGE_BYTES
            i += 1
        for page in range(run_first, run_end, PIECE_PAGES):
            pieces[count, 0] = page * PAGE_BYTES
            pieces[count, 1] = min(PIECE_PAGES, run_end - page) * PAGE_BYTES
            pieces[count, 2] = target
            target += pieces[count, 1]
            count += 1
    return pieces[:count], rows


def read_pieces(descriptor: int, buffer: memoryview, pieces: np.ndarray, end: int) -> None:
    """Read ``pieces`` (int64 [m, 3]: offset, size, target) one after the other to ``buffer[target:]``.

    A piece comes back short where the file ends (at byte ``end``). Raises OSError from the disk, EOFError where the
    file ends before ``end``.
    """
    for offset, size, target in pieces.tolist():
        got = os.preadv(descriptor, [buffer[target : target + size]], offset)
        if got < min(size, end - offset):
            raise EOFError(f"{got} of {min(size, end - offset)} bytes at {offset}")


@njit(cache=True, nogil=True)
def open_queue(depth):  # type: ignore[no-untyped-def]
    """A queue of ``depth`` reads under way for `read_pieces_queued`; 0 where the system offers none."""
    queue = np.zeros(1, dtype=np.int64)
    if _SETUP < 0 or _syscall(_SETUP, depth, queue.ctypes.data, 0, 0, 0) != 0:
        return np.int64(0)
    return queue[0]


@njit(cache=True, nogil=True)
def close_queue(queue):  # type: ignore[no-untyped-def]
    """Give a queue back to the system."""
    _syscall(_DESTROY, queue, 0, 0, 0, 0)


@njit(cache=True, nogil=True)
def read_pieces_queued(queue, depth, polls, descriptor, address, pieces, end):  # type: ignore[no-untyped-def]
    """As `read_pieces`, but up to ``depth`` reads are under way at a time; ``descriptor`` must be open for O_DIRECT.

    Returns the index of the first piece that did not come, or -1: the caller reads it again by `read_pieces`, which
    says why.
    Once all are under way it asks up to ``polls`` times whether some came, before it waits for them: waking up takes a
    large part of a short batch's time. Returns only when no read is under way any more, so that the buffer may be
    reused whatever happened.
    """
    requests = np.zeros((depth, 8), dtype=np.int64)  # struct iocb, 64 bytes: data, key, opcode and descriptor, …
    events = np.zeros((depth, 4), dtype=np.int64)  # struct io_event: data, request, result, second result
    pointers = np.zeros(depth, dtype=np.int64)
    free = np.arange(depth)
    num_free, started, failed = depth, 0, np.int64(len(pieces))
    while True:
        batch = min(num_free, len(pieces) - started) if failed == len(pieces) else 0
        for k in range(batch):
            slot, i = free[num_free - 1 - k], started + k
            requests[slot, 0] = i * depth + slot
            requests[slot, 2] = np.int64(descriptor) << 32
            requests[slot, 3] = address + pieces[i, 2]
            requests[slot, 4] = pieces[i, 1]
            requests[slot, 5] = pieces[i, 0]
            pointers[k] = requests.ctypes.data + 64 * slot
        if batch:
            submitted = _syscall(_SUBMIT, queue, batch, pointers.ctypes.data, 0, 0)
            if submitted > 0:
                started += submitted
                num_free -= submitted
            elif num_free == depth:  # refused with nothing under way
                failed = min(failed, np.int64(started))
        under_way = depth - num_free
        if under_way == 0:
            break
        if started < len(pieces) and failed == len(pieces):
            enough = max(1, under_way // 8)  # waiting for several saves system calls
        elif polls > 0:
            enough = 0
            polls -= 1
        else:
            enough = under_way
        done = _syscall(_GETEVENTS, queue, enough, under_way, events.ctypes.data, 0)
        for k in range(max(0, done)):
            i, slot = events[k, 0] // depth, events[k, 0] % depth
            free[num_free] = slot
            num_free += 1
            if events[k, 2] < min(pieces[i, 1], end - pieces[i, 0]):
                failed = min(failed, i)
    return np.int64(-1) if failed == len(pieces) else failed
