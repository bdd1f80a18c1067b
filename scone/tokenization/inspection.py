"""What f-grams match in a text: position by position for people, and how much for many vocabulary sizes in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scone.kernels.longest_match import FRESH
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


@dataclass(frozen=True)
class MatchStatistics:
    """What the first ``num_f_grams`` f-grams of a vocabulary match in a text."""

    num_f_grams: int
    positions_by_length: tuple[int, ...]
    """Entry n: positions at which the longest match has n tokens; entry 1: those that no f-gram ends at."""

    @property
    def num_positions(self) -> int:
        """All positions of the text."""
        return sum(self.positions_by_length)

    @property
    def num_matched(self) -> int:
        """Positions that an f-gram ends at."""
        return sum(self.positions_by_length[2:])

    @property
    def match_rate(self) -> float:
        """Share of positions that an f-gram ends at; 0 for an empty text."""
        return self.num_matched / self.num_positions if self.num_positions else 0.0

    @property
    def mean_match_length(self) -> float:
        """Mean tokens of the longest f-gram, over the positions that have one; 0 where none has."""
        tokens = sum(length * positions for length, positions in enumerate(self.positions_by_length) if length > 1)
        return tokens / self.num_matched if self.num_matched else 0.0


def match_statistics(matcher: Matcher, tokens: np.ndarray, sizes: Sequence[int]) -> list[MatchStatistics]:
    """The matches of ``tokens`` (integers [T], one sequence) for vocabularies of the first so many f-grams each, in the
    order of ``sizes``. In pieces, so that a memory-mapped corpus needs little memory.

    The longest match in the first S' f-grams is the first on the suffix chain with a rank below S': all shorter f-grams
    that end there are on the chain, and ranks fall along it. So one matching serves all sizes.
    Raises SconeError for a token outside the vocabulary.
    """
    vocabulary = matcher.vocabulary
    limits = [min(size, vocabulary.num_f_grams) for size in sizes]
    found = {limit: np.zeros(vocabulary.longest + 1, np.int64) for limit in sorted(limits, reverse=True)}
    state = FRESH
    for start in range(0, len(tokens), _PIECE):
        nodes = matcher.match(tokens[start : start + _PIECE], initial_states=state)
        state = int(nodes[-1])
        for limit, by_length in found.items():
            while len(beyond := np.flatnonzero(nodes >= vocabulary.vocab_size + limit)):
                nodes[beyond] = vocabulary.suffixes[nodes[beyond] - vocabulary.vocab_size]
            ranks = nodes[nodes >= vocabulary.vocab_size] - vocabulary.vocab_size
            by_length += np.bincount(vocabulary.lengths[ranks], minlength=len(by_length))
            by_length[1] += len(nodes) - len(ranks)
    return [MatchStatistics(limit, tuple(found[limit].tolist())) for limit in limits]
