"""The compiled gather equals its plain reference, bit for bit, whatever the bytes are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.inference.row_types import ROW_TYPES, RowFormat
from scone.kernels.dequantize import ThreadTeam, gather_bytes, gather_rows
from scone.kernels.reference_rows import reference_rows


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.mark.parametrize("row_type", ROW_TYPES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 70),
    group_size=st.sampled_from([2, 6, 64]),
    num_rows=st.integers(1, 9),
    num_reads=st.integers(0, 40),
    shift=st.integers(0, 5),
)
def test_gather_equals_reference(
    row_type: str, seed: int, width: int, group_size: int, num_rows: int, num_reads: int, shift: int
) -> None:
    """Any bytes (finite as numbers), at any alignment, with repeats, into scattered targets."""
    random = np.random.default_rng(seed)
    row = RowFormat.of(row_type, width, group_size)
    scale = 10.0 ** random.integers(-9, 4)
    raw = row.encode(torch.from_numpy(random.standard_normal((num_rows, width)) * scale).float())
    source = np.concatenate([random.integers(0, 256, shift, dtype=np.uint8), raw.reshape(-1)])
    ranks = random.integers(0, num_rows, num_reads)
    targets = random.permutation(num_reads)
    offsets = shift + ranks * row.row_bytes

    out = np.full((num_reads, width), np.nan, dtype=np.float32)
    gather_rows(source, offsets, out, row_type, row.group_size, targets)
    expected = reference_rows(raw, row_type, width, row.group_size)
    np.testing.assert_array_equal(_bits(out[targets]), _bits(expected[ranks]))
    np.testing.assert_array_equal(_bits(row.decode(torch.from_numpy(raw)).numpy()), _bits(expected))

    copied = np.zeros((num_reads, row.row_bytes), dtype=np.uint8)
    gather_bytes(source, offsets, copied, targets)
    np.testing.assert_array_equal(copied[targets], raw[ranks])


def test_every_finite_half_is_decoded_exactly() -> None:
    """All 63,488 finite float16 numbers, subnormals and both zeros included."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))].reshape(-1, 32)
    out = np.empty(halves.shape, dtype=np.float32)
    gather_rows(halves.view(np.uint8).reshape(-1), np.arange(len(halves)) * 64, out, "fp16", 0)
    np.testing.assert_array_equal(_bits(out), _bits(halves.view(np.float16).astype(np.float32)))


def test_a_team_of_threads_gives_the_same_rows() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((3000, 256)).astype(np.float32)
    ranks = random.integers(0, len(rows), 5000)
    team, out = ThreadTeam(3), np.empty((5000, 256), dtype=np.float32)
    gather_rows(rows.view(np.uint8).reshape(-1), ranks * 1024, out, "fp32", 0, team=team)
    team.close()
    np.testing.assert_array_equal(out, rows[ranks])
