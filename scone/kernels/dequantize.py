"""Gather table rows by byte offset and decode them to float32 in the same pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit, types

# Below this many bytes of output, handing work to other threads costs more than it saves.
_BYTES_PER_THREAD = 1 << 20


class ThreadTeam:
    """Threads that share the work of one large gather; none are started before the first."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[int, int], None], num_rows: int, num_bytes: int) -> None:
        """Call ``work(low, high)`` on ranges that cover ``num_rows``, side by side where ``num_bytes`` are many."""
        parts = max(1, min(self.num_threads, num_bytes // _BYTES_PER_THREAD))
        if parts == 1:
            work(0, num_rows)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="scone-gather")
        cuts = [num_rows * part // parts for part in range(parts + 1)]
        tasks = [self._pool.submit(work, cuts[part], cuts[part + 1]) for part in range(1, parts)]
        work(cuts[0], cuts[1])
        for task in tasks:
            task.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def gather_rows(
    source: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    row_type: str,
    group_size: int,
    targets: np.ndarray | None = None,
    team: ThreadTeam | None = None,
) -> None:
    """Decode the row that starts at ``source[offsets[i]]`` into ``out[targets[i]]`` (``out[i]`` without targets).

    ``source``: uint8 [any], contiguous; ``offsets``, ``targets``: int64 [n], every row lies inside ``source`` and
    ``out`` (not checked here: the stores check ranks); ``out``: float32 [m, D], contiguous. Large batches are split
    over the threads of ``team``. Slow equal: `reference_rows` of the rows stacked to uint8 [n, row_bytes].
    """
    kernel, bits = _KERNELS[row_type], out.view(np.uint32)
    where = np.arange(len(offsets), dtype=np.int64) if targets is None else targets
    source = _read_only(source)

    def work(low: int, high: int) -> None:
        kernel(source, offsets[low:high], where[low:high], out, bits, group_size)

    (team or _ALONE).run(work, len(offsets), len(offsets) * out.shape[1] * out.itemsize)


def gather_bytes(
    source: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    targets: np.ndarray | None = None,
    team: ThreadTeam | None = None,
) -> None:
    """The same without decoding: ``out`` is uint8 [m, row_bytes].

    Slow equal: ``out[targets] = np.stack([source[at : at + row_bytes] for at in offsets])``.
    """
    where = np.arange(len(offsets), dtype=np.int64) if targets is None else targets
    source = _read_only(source)

    def work(low: int, high: int) -> None:
        _copy_rows(source, offsets[low:high], where[low:high], out)

    (team or _ALONE).run(work, len(offsets), len(offsets) * out.shape[1])


def _read_only(source: np.ndarray) -> np.ndarray:
    """Numba compiles once for arrays that may be written and once for those that may not; this makes it once."""
    view = source.view()
    view.flags.writeable = False
    return view


_ALONE = ThreadTeam(1)
# The C library's memcpy: twice as fast as a compiled loop over slices.
_memcpy: Any = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))


@njit(cache=True, nogil=True)
def _copy_rows(source, offsets, targets, out):  # type: ignore[no-untyped-def]
    row_bytes = out.shape[1]
    for i in range(len(offsets)):
        _memcpy(out.ctypes.data + targets[i] * row_bytes, source.ctypes.data + offsets[i], row_bytes)


# Numba on CPUs knows neither float16 nor bfloat16, so numbers are built from their bits: `bits` is `out`
# seen as uint32. Storing bits and reading the float back is the reinterpretation.


@njit(cache=True, nogil=True)
def _gather_fp32(source, offsets, targets, out, bits, group_size):  # type: ignore[no-untyped-def]
    row_bytes = 4 * out.shape[1]
    for i in range(len(offsets)):
        _memcpy(out.ctypes.data + targets[i] * row_bytes, source.ctypes.data + offsets[i], row_bytes)


@njit(cache=True, nogil=True)
def _gather_bf16(source, offsets, targets, out, bits, group_size):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    for i in range(len(offsets)):
        row = targets[i]
        halves = source[offsets[i] : offsets[i] + 2 * width].view(np.uint16)
        for j in range(width):
            bits[row, j] = np.uint32(halves[j]) << np.uint32(16)


@njit(cache=True, nogil=True)
def _gather_fp16(source, offsets, targets, out, bits, group_size):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    for i in range(len(offsets)):
        row = targets[i]
        halves = source[offsets[i] : offsets[i] + 2 * width].view(np.uint16)
        num_subnormal = 0
        for j in range(width):
            half = np.uint32(halves[j])
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            # Move exponent and mantissa into place and change the exponent's bias from 15 to 127.
            bits[row, j] = sign | (((half & np.uint32(0x7FFF)) << np.uint32(13)) + np.uint32(112 << 23))
            num_subnormal += (half & np.uint32(0x7C00)) == 0
        if num_subnormal:
            for j in range(width):
                half = np.uint32(halves[j])
                if (half & np.uint32(0x7C00)) == 0:
                    out[row, j] = np.float32(half & np.uint32(0x3FF)) * np.float32(2.0**-24)
                    bits[row, j] |= (half & np.uint32(0x8000)) << np.uint32(16)


@njit(cache=True, nogil=True)
def _gather_int8(source, offsets, targets, out, bits, group_size):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    num_groups = (width + group_size - 1) // group_size
    for i in range(len(offsets)):
        row = targets[i]
        scales = source[offsets[i] : offsets[i] + 2 * num_groups].view(np.uint16)
        first_code = offsets[i] + 2 * num_groups
        codes = source[first_code : first_code + width].view(np.int8)
        for group in range(num_groups):
            low = group * group_size
            high = min(low + group_size, width)
            bits[row, low] = np.uint32(scales[group]) << np.uint32(16)
            scale = out[row, low]
            for j in range(low, high):
                out[row, j] = scale * np.float32(codes[j])


@njit(cache=True, nogil=True)
def _gather_int4(source, offsets, targets, out, bits, group_size):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    num_groups = (width + group_size - 1) // group_size
    for i in range(len(offsets)):
        row = targets[i]
        scales = source[offsets[i] : offsets[i] + 2 * num_groups].view(np.uint16)
        first_code = offsets[i] + 2 * num_groups
        codes = source[first_code : first_code + (width + 1) // 2]
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


_KERNELS: dict[str, Callable[..., None]] = {
    "fp32": _gather_fp32,
    "fp16": _gather_fp16,
    "bf16": _gather_bf16,
    "int8": _gather_int8,
    "int4": _gather_int4,
}
