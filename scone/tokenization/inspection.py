"""What f-grams match in a text: position by position for people, and how much in all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scone.tokenization.matcher import Matcher

_PIECE = 1 << 22


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
    for position, node in enumerate(matcher.match(tokens).tolist()):
        f_gram = vocabulary.tokens(node)
        rank = node - vocabulary.vocab_size if len(f_gram) > 1 else None
        count = None if rank is None else int(vocabulary.counts[rank])
        records.append(InspectedToken(position, f_gram[-1], node, len(f_gram), f_gram, rank, count))
    return records


def match_lengths(matcher: Matcher, tokens: np.ndarray) -> np.ndarray:
    """How many positions of ``tokens`` (integers [T], one sequence) have a longest match of n tokens, int64 [N + 1]; entry
    1: those that no f-gram ends at. In pieces, so that a memory-mapped corpus needs little memory.

    Raises SconeError for a token outside the vocabulary.
    """
    vocabulary = matcher.vocabulary
    found, reach = np.zeros(vocabulary.longest + 1, np.int64), vocabulary.longest - 1
    for start in range(0, len(tokens), _PIECE):
        first = max(start - reach, 0)  # what an f-gram that ends in this piece may begin with
        nodes = matcher.match(tokens[first : start + _PIECE])[start - first :]
        ranks = nodes[nodes >= vocabulary.vocab_size] - vocabulary.vocab_size
        found += np.bincount(vocabulary.lengths[ranks], minlength=len(found))
        found[1] += len(nodes) - len(ranks)
    return found
