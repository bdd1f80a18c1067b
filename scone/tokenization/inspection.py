"""Human-readable matches of a text, position by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scone.tokenization.matcher import Matcher


@dataclass(frozen=True)
class InspectedToken:
    """One position and the longest f-gram that ends at it."""

    position: int
    token: int
    node: int
    match_length: int
    """Tokens of the node; 1 where no f-gram ends."""
    f_gram: tuple[int, ...]
    """The node's tokens: the f-gram, or the one token."""
    rank: int | None
    count: int | None
    """Occurrences in the counted corpus; None, as ``rank``, where no f-gram ends."""


def inspect_tokens(tokens: np.ndarray, matcher: Matcher) -> list[InspectedToken]:
    """One record per position of ``tokens``, integers [T]. Raises SconeError for a token outside the vocabulary."""
    vocabulary = matcher.vocabulary
    records = []
    for position, (token, node) in enumerate(
        zip(np.asarray(tokens).tolist(), matcher.match(tokens).tolist(), strict=True)
    ):
        rank = node - vocabulary.vocab_size if node >= vocabulary.vocab_size else None
        f_gram = vocabulary.tokens(node)
        count = None if rank is None else int(vocabulary.counts[rank])
        records.append(InspectedToken(position, token, node, len(f_gram), f_gram, rank, count))
    return records
