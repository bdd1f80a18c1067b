"""Decode quantised table rows to float32, and gather rows from a buffer of file pages."""

from __future__ import annotations

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
