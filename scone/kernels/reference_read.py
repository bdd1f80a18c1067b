"""Reading the pages of many rows, plainly: what `direct_read.py` does, in numpy and Python."""

from __future__ import annotations

import numpy as np

from scone.kernels.direct_read import PAGE_BYTES, PIECE_PAGES


def reference_pieces(ranks: np.ndarray, data_start: int, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """As `plan_pieces`: mark every page that holds a byte of a row, then walk over runs of marked pages."""
    pages: set[int] = set()
    for rank in ranks.tolist():
        start = data_start + rank * row_bytes
        pages.update(range(start // PAGE_BYTES, (start + row_bytes - 1) // PAGE_BYTES + 1))
    pieces: list[list[int]] = []
    place_of_page: dict[int, int] = {}
    for target, page in enumerate(sorted(pages)):
        place_of_page[page] = target * PAGE_BYTES
        previous = pieces[-1] if pieces else [-1, -1, 0]
        if sum(previous[:2]) == page * PAGE_BYTES and previous[1] < PIECE_PAGES * PAGE_BYTES:
            previous[1] += PAGE_BYTES
        else:
            pieces.append([page * PAGE_BYTES, PAGE_BYTES, target * PAGE_BYTES])
    starts = data_start + ranks * row_bytes
    places = [place_of_page[page] for page in (starts // PAGE_BYTES).tolist()]
    return np.array(pieces, dtype=np.int64).reshape(-1, 3), np.array(places, dtype=np.int64) + starts % PAGE_BYTES
