"""Decoding table rows, plainly: what `dequantize.py` computes, in a few lines of numpy each."""

from __future__ import annotations

import numpy as np


def reference_rows(raw: np.ndarray, row_type: str, width: int, group_size: int) -> np.ndarray:
    """Decode ``raw`` (uint8 [n, row_bytes]) into float32 [n, D], D = ``width``.

    The layout of a row is that of `docs/formats.md`: float types are D numbers; int8 and int4 are one bfloat16 scale
    per group of ``group_size`` numbers, then the codes (int4: two a byte, the even position in the low nibble).
    Raises ValueError for an unknown row type.
    """
    n = len(raw)
    if row_type == "fp32":
        return raw.view("<f4").reshape(n, width).copy()
    if row_type == "fp16":
        return raw.view("<f2").reshape(n, width).astype(np.float32)
    if row_type == "bf16":
        return _float32_of_bfloat16(raw.view("<u2").reshape(n, width))
    num_groups = -(-width // group_size)
    scales = _float32_of_bfloat16(np.ascontiguousarray(raw[:, : 2 * num_groups]).view("<u2"))
    codes = raw[:, 2 * num_groups :]
    if row_type == "int8":
        values = codes.view(np.int8)
    elif row_type == "int4":
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, -1)[:, :width]
        values = (nibbles ^ 8).astype(np.int8) - 8
    else:
        raise ValueError(f"unknown row type {row_type!r}")
    return values.astype(np.float32) * np.repeat(scales, group_size, axis=1)[:, :width]


def _float32_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    """A bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
