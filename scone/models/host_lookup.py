"""Looking n-grams up on the host: the tokens of a batch and of its cache come down, answers are put in their place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scone.kernels.longest_match import FIRST_BIT
from scone.models.token_history import check_count

Find = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Takes tokens int64 ``[B, L]``, which are no padding, and which begin an example, both bool; gives ``[B, L, …]``."""


def looked_up(
    find: Find,
    tokens: Tensor,
    context: int,
    past: Tensor | None = None,
    places: Tensor | None = None,
    count: Tensor | None = None,
) -> np.ndarray:
    """What ``find`` says of new positions, ``[B, T, …]``, when it sees at most ``context`` tokens before them.

    Args:
        tokens: int64 ``[B, T]``, as `token_history.marked` writes them.
        past: int64 ``[B, P]``, the tokens before those, likewise.
        places, count: int64 ``[]``, of a static history (whose ``past`` has unused places): positions that the cache
            holds, and how many of them came with tokens.

    Raises ValueError for a static cache without the tokens of all its positions.
    """
    new = tokens.shape[1]
    if past is None:
        return _answers(find, tokens.cpu().numpy(), np.zeros((len(tokens), 0), np.int64), context)
    if places is None or count is None:
        length = past.shape[1]
        window = torch.cat([past[:, max(length - context, 0) :], tokens], dim=1).cpu().numpy()
    else:
        # one transfer from an accelerator: the two counts, the last tokens, the new ones
        at = torch.arange(-context, 0, device=tokens.device) + places
        counts = torch.stack([places, count]).expand(len(tokens), 2)
        fetched = torch.cat([counts, past[:, at.clamp(min=0)], tokens], dim=1).cpu().numpy()
        length, known = (int(fetched[0, 0]), int(fetched[0, 1])) if len(fetched) else (0, 0)
        check_count(length, known)
        window = fetched[:, 2 + max(context - length, 0) :]
    last, fresh = np.split(window, [window.shape[1] - new], axis=1)
    if length > context and (last < 0).any():  # further back there may be tokens that padding kept away
        last = past[:, :length].cpu().numpy()
    return _answers(find, fresh, last, context)


def _answers(find: Find, tokens: np.ndarray, before: np.ndarray, context: int) -> np.ndarray:
    """As `looked_up`, of tokens ``[B, T]`` and all that may matter of those ``before`` them."""
    if (before < 0).any():
        before = _padding_first(before)[0]
    before = before[:, max(before.shape[1] - context, 0) :]
    whole = np.concatenate([before, tokens], axis=1)
    if (whole >= 0).all():
        return find(whole & (FIRST_BIT - 1), whole >= 0, whole >= FIRST_BIT)[:, before.shape[1] :]
    whole, order = _padding_first(whole)
    valid = whole >= 0
    found = find(np.where(valid, whole, ~whole) & (FIRST_BIT - 1), valid, whole >= FIRST_BIT)
    in_place = np.empty_like(found)
    in_place[np.arange(len(order))[:, None], order] = found
    return in_place[:, before.shape[1] :]


def _padding_first(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence of ``tokens`` [B, L] with its padding moved to the front, and the columns that they came from."""
    order = np.argsort(tokens >= 0, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1), order
