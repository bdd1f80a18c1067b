"""Add the counts of separate corpora, and keep exactly what their sum proves.

A vocabulary that lists every n-gram of its corpus (counted with min_freq 1 and no limit) has exact counts for
everything, so sums are exact. One that was cut leaves n-grams out: of those it only says that they occurred at most as
often as its cut allows. The sum of a cut vocabulary with another is therefore known exactly for n-grams that both list,
and only bounded for the rest. ``merge_vocabularies`` keeps the longest ranking of which nothing is in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError


@dataclass(frozen=True)
class MergeResult:
    """The merged vocabulary; whether all of the union is in it; and one line that says what it is."""

    vocabulary: FGramVocabulary
    complete: bool
    note: str


def merge_vocabularies(
    vocabularies: Sequence[FGramVocabulary],
    *,
    most_missing: Sequence[int] | None = None,
    max_f_grams: int | None = None,
) -> MergeResult:
    """The f-grams of all corpora together, with exact counts: as many of the first ranks as the inputs prove.

    Args:
        vocabularies: of the same tokenizer, V, separators and max_n, counted from disjoint corpora.
        most_missing: for each vocabulary, the most occurrences that an n-gram which it does not list can have: 0 when
            it lists everything, ``min_freq - 1`` when only ``min_freq`` cut it, the count of its last f-gram when
            ``max_f_grams`` cut it. None takes the count of the last f-gram: right for all three, but the loosest.
        max_f_grams: keep at most so many.

    Raises:
        SconeError: vocabularies that do not belong together, or of which nothing can be proved.
    """
    _check_alike(vocabularies)
    missing = list(most_missing) if most_missing is not None else [_last_count(v) for v in vocabularies]
    tokens, which, counts = _rows(vocabularies)
    order = np.lexsort(tokens.T[::-1])
    tokens, which, counts = tokens[order], which[order], counts[order]
    new = np.ones(len(tokens), bool)
    new[1:] = (tokens[1:] != tokens[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    sums = np.add.reduceat(counts, starts) if len(starts) else counts
    listed = np.add.reduceat(np.array(missing, np.uint64)[which], starts) if len(starts) else counts
    doubt = np.uint64(sum(missing)) - listed  # how much more an n-gram may have than its sum
    tokens = tokens[starts]
    # what is not known exactly, listed or not, has at most `reach` occurrences: above that, nothing is missing
    reach = max(int(sum(missing)), int((sums + doubt)[doubt > 0].max(initial=0)))
    proved = (doubt == 0) & (sums > reach)
    merged = _ranked(tokens[proved], sums[proved], vocabularies[0], max_f_grams)
    complete = bool(proved.all())
    if len(starts) and not proved.any():
        raise SconeError(
            f"found vocabularies that leave out n-grams of up to {reach:,} occurrences together; expected at least one "
            "f-gram above that in all; count the corpora together, or merge counts made with min_freq 1 and no limit"
        )
    return MergeResult(merged, complete, _note(merged, len(starts), complete, reach))


def _note(merged: FGramVocabulary, union: int, complete: bool, reach: int) -> str:
    if complete:
        return f"merged {union:,} n-grams; every count is exact"
    return (
        f"kept the {merged.num_f_grams:,} f-grams with more than {reach:,} occurrences, of {union:,} in the union: "
        "their counts and ranks are exact; the inputs were cut, so rarer ones cannot be known; for more, count them "
        "together, or merge counts made with min_freq 1 and no limit"
    )


def _check_alike(vocabularies: Sequence[FGramVocabulary]) -> None:
    if not vocabularies:
        raise SconeError("found no vocabularies to merge; expected at least one; give their paths")
    first = vocabularies[0]
    for number, other in enumerate(vocabularies[1:], start=2):
        for name in ("vocab_size", "separator_ids", "tokenizer_fingerprint", "max_n"):
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise SconeError(
                    f"found {name} {two} in vocabulary {number}, {one} in the first; expected the same; merge counts "
                    "of one tokenizer and one set of options"
                )


def _last_count(vocabulary: FGramVocabulary) -> int:
    """No n-gram that is not listed occurred more often than the last that is. Raises SconeError when none is."""
    if not vocabulary.num_f_grams:
        raise SconeError(
            "found a vocabulary without f-grams, which does not show what it left out; expected at least one f-gram; "
            "leave it out of the merge, or count the corpora together"
        )
    return int(vocabulary.counts[-1])


def _rows(vocabularies: Sequence[FGramVocabulary]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int64 [R, N] padded with -1, the vocabulary of each row, and its count, of all vocabularies."""
    width = max(vocabulary.longest for vocabulary in vocabularies)
    total = sum(vocabulary.num_f_grams for vocabulary in vocabularies)
    tokens = np.full((total, width), -1, np.int64)
    start = 0
    for vocabulary in vocabularies:
        rows = slice(start, start + vocabulary.num_f_grams)
        tokens[rows, : vocabulary.longest] = vocabulary.token_matrix(np.arange(vocabulary.num_f_grams))
        start += vocabulary.num_f_grams
    sizes = [vocabulary.num_f_grams for vocabulary in vocabularies]
    which = np.repeat(np.arange(len(vocabularies)), sizes)
    counts = np.concatenate([np.asarray(vocabulary.counts, np.uint64) for vocabulary in vocabularies])
    return tokens, which, counts


def _ranked(tokens: np.ndarray, counts: np.ndarray, like: FGramVocabulary, max_f_grams: int | None) -> FGramVocabulary:
    """``tokens`` int64 [R, N] are in lexicographic order; sorts them by (count, length) without disturbing that."""
    lengths = (tokens >= 0).sum(axis=1)
    order = np.lexsort((lengths, np.iinfo(np.uint64).max - counts))[:max_f_grams]
    return FGramVocabulary.from_ranked(
        np.maximum(tokens[order], 0),
        counts[order],
        lengths=lengths[order],
        vocab_size=like.vocab_size,
        max_n=like.max_n,
        separator_ids=like.separator_ids,
        tokenizer_fingerprint=like.tokenizer_fingerprint,
    )
