"""Losses summed by document, by length and by rank of the f-gram that made the prediction; intervals over documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scone.tokenization.matcher import Matcher

RANK_EDGES = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
"""Where rank buckets end: ranks below 100, 100 to 999, and so on."""
FEWEST_DOCUMENTS = 3
"""Fewer give no interval."""


@dataclass(frozen=True)
class LengthLoss:
    """Mean loss of the predictions made from positions whose longest f-gram has ``length`` tokens (1: no f-gram)."""

    length: int
    num_predicted: int
    loss: float


@dataclass(frozen=True)
class RankLoss:
    """Mean loss of the predictions made from positions whose f-gram has a rank of ``first_rank … last_rank`` (0 is the
    most frequent; None: no f-gram).
    """

    first_rank: int | None
    last_rank: int | None
    num_predicted: int
    loss: float


class LossSums:
    """Numbers of predictions and sums of their losses, in nats, for integer keys 0 … size − 1."""

    def __init__(self, size: int) -> None:
        self.counts = np.zeros(size, np.int64)
        self.sums = np.zeros(size, np.float64)

    def add(self, keys: np.ndarray, losses: np.ndarray) -> None:
        """Add one loss per key."""
        first = int(keys.min())
        counts = np.bincount(keys - first)  # costs the span of these keys, not all there are
        span = slice(first, first + len(counts))
        self.counts[span] += counts
        self.sums[span] += np.bincount(keys - first, weights=losses)

    def means(self) -> list[tuple[int, int, float]]:
        """(key, predictions, mean loss) of the keys that occurred."""
        return [
            (int(key), int(self.counts[key]), self.sums[key] / self.counts[key]) for key in self.counts.nonzero()[0]
        ]


class LossTally:
    """Everything that `perplexity` adds up, window by window, in one pass and without keeping single losses.

    ``separator_id`` ends documents (None: no documents); ``matcher`` finds the f-grams (None: no groups).
    """

    def __init__(self, tokens: np.ndarray, matcher: Matcher | None, separator_id: int | None) -> None:
        self.tokens = tokens
        self.matcher = matcher
        self.loss_sum = 0.0
        self.num_predicted = 0
        self.window_losses: list[float] = []
        self.documents: LossSums | None = None
        if separator_id is not None:
            ends = np.asarray(tokens) == separator_id
            self._document_of = np.cumsum(ends, dtype=np.int32) - ends  # a separator belongs to what it ends
            self.documents = LossSums(int(self._document_of[-1]) + 1)
        if matcher is not None:
            self._lengths = LossSums(matcher.vocabulary.max_n + 1)
            self._ranks = LossSums(len(RANK_EDGES) + 2)

    def add(self, start: int, first_target: int, end: int, losses: np.ndarray) -> None:
        """Add the ``losses`` [end − first_target] of tokens ``first_target … end − 1``, read from ``start`` on."""
        self.loss_sum += float(losses.sum())
        self.num_predicted += len(losses)
        self.window_losses.append(float(losses.mean()))
        if self.documents is not None:
            self.documents.add(self._document_of[first_target:end], losses)
        if self.matcher is None:
            return
        vocabulary = self.matcher.vocabulary
        # the position before a target predicts it; an f-gram there reaches back N − 1 places, not beyond the window
        reach = max(start, first_target - vocabulary.max_n)
        nodes = self.matcher.match(np.asarray(self.tokens[reach : end - 1]))[first_target - 1 - reach :]
        lengths, buckets = np.ones(len(nodes), np.int64), np.zeros(len(nodes), np.int64)
        matched = nodes >= vocabulary.vocab_size
        ranks = nodes[matched] - vocabulary.vocab_size
        lengths[matched] = vocabulary.lengths[ranks]
        buckets[matched] = 1 + np.searchsorted(RANK_EDGES, ranks, side="right")
        self._lengths.add(lengths, losses)
        self._ranks.add(buckets, losses)

    def by_match_length(self) -> list[LengthLoss]:
        """One entry for each length that occurred, shortest first."""
        return [LengthLoss(*entry) for entry in self._lengths.means()] if self.matcher is not None else []

    def by_rank(self) -> list[RankLoss]:
        """Positions without an f-gram, then one entry for each bucket of ranks that occurred."""
        if self.matcher is None:
            return []
        edges = (0, *RANK_EDGES, self.matcher.vocabulary.num_f_grams)
        entries = []
        for bucket, count, loss in self._ranks.means():
            last = min(edges[bucket], edges[-1]) - 1
            entries.append(RankLoss(edges[bucket - 1] if bucket else None, last if bucket else None, count, loss))
        return entries


def mean_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of Σ sums / Σ counts, where documents [n] are drawn at random; None for fewer than three.

    Normal over documents: the variance of a ratio, linearised (Cochran, Sampling Techniques, 6.4), with Student's
    factor for their number. It says how the value would change with other documents of the same kind, not with
    another training run.
    """
    drawn = counts > 0
    sums, counts = sums[drawn], counts[drawn]
    if len(sums) < FEWEST_DOCUMENTS:
        return None
    total = int(counts.sum())
    mean = float(sums.sum()) / total
    residuals = sums - mean * counts
    deviation = math.sqrt(float((residuals**2).sum()) * len(sums) / (len(sums) - 1)) / total
    half = students_factor(len(sums) - 1) * deviation
    return mean - half, mean + half


def students_factor(degrees: int) -> float:
    """The 97.5 % quantile of Student's distribution, within 4 % from two degrees on.

    Expansion 26.7.5 of Abramowitz and Stegun, Handbook of Mathematical Functions.
    """
    z = 1.959963985
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
