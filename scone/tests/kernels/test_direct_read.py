"""Planned reads cover every row with whole pages once, and every way of reading them fills the same buffer."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels.dequantize import (
    PAGE_BYTES,
    PIECE_PAGES,
    close_queue,
    open_queue,
    plan_pieces,
    read_pieces,
    read_pieces_queued,
)
from scone.tests.kernels.reference import reference_pieces


@settings(max_examples=150, deadline=None)
@given(
    ranks=st.sets(st.integers(0, 400), max_size=60),
    row_bytes=st.one_of(st.integers(1, 20_000), st.sampled_from([4096, 8192, 300_000])),
    start_page=st.integers(1, 3),
)
def test_plan_equals_reference(ranks: set[int], row_bytes: int, start_page: int) -> None:
    wanted = np.array(sorted(ranks), dtype=np.int64)
    pieces, rows = plan_pieces(wanted, start_page * PAGE_BYTES, row_bytes)
    expected_pieces, expected_rows = reference_pieces(wanted, start_page * PAGE_BYTES, row_bytes)
    np.testing.assert_array_equal(pieces, expected_pieces)
    np.testing.assert_array_equal(rows, expected_rows)
    assert (pieces[:, :] % PAGE_BYTES == 0).all()
    assert (pieces[:, 1] <= PIECE_PAGES * PAGE_BYTES).all()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 300 * PAGE_BYTES + 100, dtype=np.uint8).tobytes())
    return path


@pytest.mark.parametrize("polls", [0, 2, 100_000])
@pytest.mark.parametrize("depth", [1, 3, 32])
def test_queued_reads_fill_the_same_buffer(file: Path, depth: int, polls: int) -> None:
    """Also the short piece at the end of the file."""
    descriptor, end = os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size
    queue = open_queue(depth)
    assert queue, "this system has no asynchronous reads"

    @settings(max_examples=30, deadline=None)
    @given(ranks=st.sets(st.integers(0, 1198), min_size=1, max_size=200))
    def check(ranks: set[int]) -> None:
        pieces, rows = plan_pieces(np.array(sorted(ranks)), PAGE_BYTES, 1021)
        size = int(pieces[:, 1].sum())
        buffers = [np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8) for _ in range(2)]
        read_pieces(descriptor, buffers[0].data, pieces, end)
        assert read_pieces_queued(queue, depth, polls, descriptor, buffers[1].ctypes.data, pieces, end) == -1
        np.testing.assert_array_equal(buffers[1], buffers[0])
        content = np.fromfile(file, dtype=np.uint8)
        for rank, row in zip(sorted(ranks), rows.tolist(), strict=True):
            start = PAGE_BYTES + rank * 1021
            np.testing.assert_array_equal(buffers[0][row : row + 1021], content[start : start + 1021])

    check()
    close_queue(queue)
    os.close(descriptor)


def test_a_piece_that_does_not_come_is_named(file: Path) -> None:
    """A file that ends before it should: the first such piece, whichever way it is read."""
    descriptor, end = os.open(file, os.O_RDONLY | os.O_DIRECT), 400 * PAGE_BYTES
    pieces, _ = plan_pieces(np.array([0, 50, 320, 350, 390]), PAGE_BYTES, PAGE_BYTES)
    buffer = np.frombuffer(mmap.mmap(-1, 5 * PAGE_BYTES), dtype=np.uint8)
    queue = open_queue(8)
    assert read_pieces_queued(queue, 8, 100, descriptor, buffer.ctypes.data, pieces, end) == 2
    with pytest.raises(EOFError, match=f"0 of 4096 bytes at {321 * PAGE_BYTES}"):
        read_pieces(descriptor, buffer.data, pieces, end)
    close_queue(queue)
    assert read_pieces_queued(queue, 8, 100, descriptor, buffer.ctypes.data, pieces, end) == 0  # no such queue any more
    os.close(descriptor)
