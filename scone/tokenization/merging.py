"""Several counted vocabularies as one: the counts of equal f-grams are added, and all are ranked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError


@dataclass(frozen=True)
class Merged:
    """The merged vocabulary, and by how much a count may be too small.

    A part whose rarest f-gram occurs c times may miss up to c occurrences of an f-gram that fell below its cut;
    ``largest_error`` adds these up. A part down to c = 1 is taken to hold all n-grams of its corpus: then it is 0.
    """

    vocabulary: FGramVocabulary
    largest_error: int


def merge_vocabularies(
    parts: Sequence[FGramVocabulary], *, min_freq: int = 1, max_f_grams: int | None = None
) -> Merged:
    """Add up vocabularies of disjoint corpora and keep the first ``max_f_grams`` of count ≥ ``min_freq``.

    The result does not depend on the order of ``parts``, and is closed: a part that has an f-gram has its sub-grams at
    least as often. Slow equal: `FGramVocabulary.from_counts` of the summed counts. Raises SconeError when the parts are
    not of one tokenizer, separator set and max_n.
    """
    first = parts[0]
    for part in parts[1:]:
        _check_alike(first, part)
    width = max(part.longest for part in parts)
    matrices, counts = [], []
    for part in parts:
        matrix = np.full((part.num_f_grams, width), -1, np.int64)
        matrix[:, : part.longest] = part.token_matrix(np.arange(part.num_f_grams))
        matrices.append(matrix)
        counts.append(np.asarray(part.counts))
    tokens, totals = _sum_of_equal_rows(np.concatenate(matrices), np.concatenate(counts))
    lengths = (tokens >= 0).sum(axis=1)
    kept = np.flatnonzero(totals >= min_freq)
    # lexsort: the last key counts most
    by_rank = np.lexsort((*tokens[kept].T[::-1], lengths[kept], -totals[kept].astype(np.int64)))[:max_f_grams]
    ranked = kept[by_rank]
    vocabulary = FGramVocabulary.from_ranked(
        tokens[ranked],
        totals[ranked],
        lengths=lengths[ranked],
        vocab_size=first.vocab_size,
        max_n=first.max_n,
        separator_ids=first.separator_ids,
        tokenizer_fingerprint=next((part.tokenizer_fingerprint for part in parts if part.tokenizer_fingerprint), ""),
    )
    cuts = sorted(int(part.counts[-1]) if part.num_f_grams else 0 for part in parts)
    return Merged(vocabulary, sum(cut for cut in cuts[1:] if cut > 1))


def _sum_of_equal_rows(rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows [n, N], and the sum of ``counts`` (uint64) over each."""
    if not len(rows):
        return rows, counts
    order = np.lexsort(rows.T)
    rows, counts = rows[order], counts[order]
    starts = np.flatnonzero(np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1))))
    return rows[starts], np.add.reduceat(counts, starts)


def _check_alike(first: FGramVocabulary, other: FGramVocabulary) -> None:
    for what, have, want in (
        ("tokens", other.vocab_size, first.vocab_size),
        ("max_n", other.max_n, first.max_n),
        ("separators", other.separator_ids, first.separator_ids),
        ("tokenizer", other.tokenizer_fingerprint[:12], first.tokenizer_fingerprint[:12]),
    ):
        if have != want and (what != "tokenizer" or (have and want)):
            raise SconeError(
                f"found {what} {want} in {first.path or 'the first vocabulary'} and {have} in "
                f"{other.path or 'another'}; expected the same; count both with one tokenizer and one --max_n"
            )
