"""The lookup of a step of continuous batching on the host: all requests in one line, each behind its own past."""

from __future__ import annotations

import numpy as np

from scone.models.table_lookup import Find


def looked_up_in_line(
    find: Find, tokens: np.ndarray, query_starts: np.ndarray, before: np.ndarray, vocab_size: int
) -> np.ndarray:
    """What ``find`` says of the new tokens of R requests, ``[E, …]``; one call, whatever their number.

    Args:
        find: as `table_lookup.looked_up` takes it; here all that it gets has one dimension.
        tokens: integers ``[P]``, one request behind another. One outside 0 … ``vocab_size`` − 1 is in no n-gram.
        query_starts: integers ``[R + 1]``, where each request begins, and where the last one ends, E ≤ P; what is
            behind it is padding.
        before: integers ``[R, C]``, the C tokens before each request's first new one, -1 where there are none.

    Reference implementation: ``find`` of each request's whole text.
    """
    lengths = np.diff(query_starts)
    num_requests, context = before.shape
    end = int(query_starts[-1])
    # request r is shifted by the context of its own and of those in front of it
    shifts = context * np.arange(1, num_requests + 1)
    places = np.arange(end) + np.repeat(shifts, lengths)
    line = np.empty(end + context * num_requests, np.int64)
    line[places] = tokens[:end]
    begins = query_starts[:-1] + shifts - context
    line[begins[:, None] + np.arange(context)] = before
    valid = (line >= 0) & (line < vocab_size)
    starts = np.zeros(len(line), bool)
    starts[begins[lengths > 0] if context == 0 else begins] = True
    return find(np.where(valid, line, 0), valid, starts)[places]
