"""Decoding equals its plain reference, bit for bit, whatever the bytes are; so does gathering from a buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.inference.table_format import ROW_TYPES, RowFormat
from scone.kernels.dequantize import dequantize_rows, gather_bytes
from scone.tests.kernels.reference import reference_rows


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.mark.parametrize("row_type", ROW_TYPES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 70),
    group_size=st.sampled_from([2, 6, 64]),
    num_rows=st.integers(1, 9),
)
def test_decoding_equals_reference(row_type: str, seed: int, width: int, group_size: int, num_rows: int) -> None:
    """Any rows (finite as numbers), by the compiled loops and by PyTorch."""
    random = np.random.default_rng(seed)
    row = RowFormat.of(row_type, width, group_size)
    scale = 10.0 ** random.integers(-9, 4)
    raw = row.encode(torch.from_numpy(random.standard_normal((num_rows, width)) * scale).float())
    expected = reference_rows(raw, row_type, width, row.group_size)
    np.testing.assert_array_equal(_bits(row.decode(torch.from_numpy(raw)).numpy()), _bits(expected))
    if row.group_size:
        out = np.full((num_rows, width), np.nan, dtype=np.float32)
        dequantize_rows(raw, out, row_type, row.group_size)
        np.testing.assert_array_equal(_bits(out), _bits(expected))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), row_bytes=st.integers(1, 70), num_reads=st.integers(0, 40))
def test_gathering_takes_rows_at_any_alignment_to_scattered_targets(seed: int, row_bytes: int, num_reads: int) -> None:
    random = np.random.default_rng(seed)
    source = random.integers(0, 256, 500, dtype=np.uint8)
    offsets, targets = random.integers(0, 500 - row_bytes, num_reads), random.permutation(num_reads)
    out = np.zeros((num_reads, row_bytes), dtype=np.uint8)
    gather_bytes(source, offsets, out, targets)
    for target, offset in zip(targets, offsets, strict=True):
        np.testing.assert_array_equal(out[target], source[offset : offset + row_bytes])


def test_every_finite_half_is_decoded_exactly() -> None:
    """All 63,488 finite float16 numbers, subnormals and both zeros included."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))].reshape(-1, 32)
    found = RowFormat("fp16", 32).decode(torch.from_numpy(halves.view(np.uint8)))
    np.testing.assert_array_equal(_bits(found.numpy()), _bits(halves.view(np.float16).astype(np.float32)))


@pytest.mark.parametrize("row_type", ["int8", "int4"])
def test_several_threads_give_the_same_rows(row_type: str) -> None:
    row = RowFormat.of(row_type, 256)
    raw = row.encode(torch.randn(5000, 256))
    out = np.empty((5000, 256), dtype=np.float32)
    dequantize_rows(raw, out, row_type, row.group_size, num_threads=3)
    np.testing.assert_array_equal(out, reference_rows(raw, row_type, 256, row.group_size))
    copied = np.empty_like(raw)
    order = np.random.default_rng(0).permutation(5000)
    gather_bytes(raw.reshape(-1), order * row.row_bytes, copied, np.arange(5000), num_threads=3)
    np.testing.assert_array_equal(copied, raw[order])
