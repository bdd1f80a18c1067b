"""The ranking by gain: the n-grams that say most about the next token, whose rows are read often enough to be learned.

The ranking by frequency needs nothing but counts (``counting.levels.rank_survivors``) and gives the candidates here.
What was measured: docs/decisions/0021-ranking.md.
"""

from __future__ import annotations

import numpy as np

from scone.kernels.gain import closed_scores
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

# The candidates are the first 16 M by frequency: of the million that all 22 M n-grams with two or more occurrences in
# 74 M tokens would choose (N = 5), they choose 93 %. They are the same for every S up to 4 M, so that the vocabulary
# of a million still begins with that of 100,000. Beyond there are four for each f-gram: those hold 0.60 of 0.67 nats,
# and 16 for each of ten million would ask for 29 GiB in place of 7.
FEWEST_CANDIDATES = 16_000_000
CANDIDATES_PER_F_GRAM = 4

DISCOUNT = 0.75  # of Kneser-Ney smoothing, its usual value
# Next tokens that make no candidate are charged to an f-gram as if each occurred once there, and an unseen one is not
# always alone: a candidate needs min_freq occurrences. Of a million f-grams as above, 0.7 and 1 share 92 %.
UNSEEN_WEIGHT = 0.7
LEAST_UNSEEN = 1e-3  # share of the next tokens that an f-gram leaves open at least: a finite price for what it misses
# A row that is visited c times learns c / (c + 20) of its gain. On 7 M weights and 74 M tokens: 12.2 % off plain's
# perplexity in place of 11.7 % without the factor.
HALF_VISITS = 20


def num_candidates(max_f_grams: int | None) -> int | None:
    """How many n-grams the ``max_f_grams`` are chosen from; None: all of them."""
    return max(FEWEST_CANDIDATES, CANDIDATES_PER_F_GRAM * max_f_grams) if max_f_grams else max_f_grams


def rank_by_gain(
    candidates: FGramVocabulary, token_counts: np.ndarray, max_n: int, max_f_grams: int | None = None
) -> FGramVocabulary:
    """The ``max_f_grams`` of 2 … ``max_n`` tokens that say most about the next token (None: all of them, ranked).

    An n-gram f gains, over the back-off to its suffix, the nats that its occurrences' next tokens cost less, each left
    out of what predicts it (Kneser and Ney's absolute discount); a share c / (c + 20) of that counts. An n-gram is
    worth the most of itself and of those that it is a prefix or suffix of, so the ranking (worth descending, length
    ascending, then as the candidates) is closed. Takes 28 bytes a candidate, and the same on every machine.

    Args:
        candidates: by frequency, of up to N + 1 tokens: the longest serve as next tokens of those of N.
        token_counts: [V] occurrences in the same corpus, 0 for separators.

    Raises:
        ValueError: another number of token counts than V, or candidates in another order.
    """
    if len(token_counts) != candidates.vocab_size:
        raise ValueError(f"{len(token_counts)} token counts for {candidates.vocab_size} tokens")
    if candidates.ranking != "frequency":
        raise ValueError(f"candidates are ranked by {candidates.ranking}; expected by frequency")
    worth = closed_scores(
        candidates.keys,
        candidates.suffixes,
        candidates.lengths,
        candidates.counts,
        np.ascontiguousarray(token_counts, np.int64),
        max_n,
        DISCOUNT,
        UNSEEN_WEIGHT,
        LEAST_UNSEEN,
        HALF_VISITS,
    )
    order = _first(worth, candidates.lengths, max_n, max_f_grams)
    new_rank = np.zeros(candidates.num_f_grams, candidates.keys.dtype)
    new_rank[order] = np.arange(len(order))
    prefixes = candidates.prefixes[order].astype(np.int64)
    longer = prefixes >= candidates.vocab_size
    prefixes[longer] = new_rank[prefixes[longer] - candidates.vocab_size].astype(np.int64) + candidates.vocab_size
    return FGramVocabulary.from_links(
        prefixes,
        candidates.last_tokens[order],
        candidates.counts[order],
        vocab_size=candidates.vocab_size,
        max_n=max_n,
        separator_ids=candidates.separator_ids,
        tokenizer_fingerprint=candidates.tokenizer_fingerprint,
        ranking="gain",
    )


def _first(worth: np.ndarray, lengths: np.ndarray, max_n: int, number: int | None) -> np.ndarray:
    """Ranks of the first ``number`` candidates by (worth descending, length ascending, rank ascending)."""
    allowed = lengths <= max_n
    if number is not None and number < int(allowed.sum()):
        # sorting 16 M takes seconds, finding the cut a fifth of one
        cut = np.partition(worth, len(worth) - number)[len(worth) - number] if number else np.inf
        allowed &= worth >= cut
    kept = np.flatnonzero(allowed)
    return kept[np.lexsort((lengths[kept], -worth[kept]))][:number]
