"""How much of a text f-grams cover, for many vocabulary sizes in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scone.kernels.longest_match import FRESH, count_match_lengths
from scone.tokenization.matcher import Matcher

_PIECE = 1 << 22


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
    """Match ``tokens`` as one sequence and report the matches for each vocabulary size.

    Works in pieces, so that a memory-mapped corpus needs little memory; costs little more than one matching.

    Args:
        tokens: integers [T], documents separated by separators.
        sizes: numbers of f-grams, in any order; more than the vocabulary has mean all of it.

    Returns:
        One entry per size, in the order given.

    Raises:
        SconeError: a token is not in the vocabulary.
    """
    vocabulary = matcher.vocabulary
    limits = np.array([min(size, vocabulary.num_f_grams) for size in sizes], np.int64)
    descending = np.argsort(-limits, kind="stable")
    histograms = np.zeros((len(limits), vocabulary.longest + 1), np.int64)
    state = FRESH
    for start in range(0, len(tokens), _PIECE):
        nodes = matcher.match(tokens[start : start + _PIECE], initial_states=state)
        count_match_lengths(
            nodes, vocabulary.suffixes, vocabulary.lengths, vocabulary.vocab_size, limits[descending], histograms
        )
        state = int(nodes[-1])
    by_size = dict(zip(descending.tolist(), histograms.tolist(), strict=True))
    return [MatchStatistics(int(limit), tuple(by_size[place])) for place, limit in enumerate(limits)]
