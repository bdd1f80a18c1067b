"""Plain Python equals of the index and matching kernels: slow, short, and the measure of what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Gram = tuple[int, ...]


def ranked(counts: Mapping[Gram, int]) -> list[Gram]:
    """The f-grams of ``counts`` by (count descending, length ascending, tokens lexicographic)."""
    return sorted(counts, key=lambda gram: (-counts[gram], len(gram), gram))


def closed(counts: Mapping[Gram, int]) -> bool:
    """Whether the prefix and the suffix of every gram longer than two are there too."""
    return all(part in counts for gram in counts if len(gram) > 2 for part in (gram[:-1], gram[1:]))


def depth_first(f_grams: Sequence[Gram]) -> list[int]:
    """Ranks in trie preorder: subtrees by first token, children in rank order."""
    rank_of = {gram: rank for rank, gram in enumerate(f_grams)}

    def path(gram: Gram) -> list[int]:
        return [gram[0], *(rank_of[gram[:length]] for length in range(2, len(gram) + 1))]

    return [rank_of[gram] for gram in sorted(f_grams, key=path)]


def longest_matches(
    tokens: Sequence[int],
    f_grams: Sequence[Gram],
    vocab_size: int,
    mask: Sequence[bool] | None = None,
    starts: Sequence[bool] | None = None,
) -> list[int]:
    """Node of the longest f-gram that ends at each position of one sequence, by trying every length.

    Reference implementation of `longest_match.match_positions`. A masked position is its own token, and no f-gram
    contains it. No f-gram contains one of ``starts`` and what is before it.
    """
    rank_of = {gram: rank for rank, gram in enumerate(f_grams)}
    longest = max(map(len, f_grams), default=1)
    nodes = []
    for end in range(1, len(tokens) + 1):
        node = tokens[end - 1]
        for start in range(max(0, end - longest), end - 1):
            gram = tuple(tokens[start:end])
            is_whole = (mask is None or all(mask[start:end])) and not (
                starts is not None and any(starts[start + 1 : end])
            )
            if gram in rank_of and is_whole:
                node = vocab_size + rank_of[gram]
                break
        nodes.append(node)
    return nodes
