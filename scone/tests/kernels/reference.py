"""Reference implementations of the kernels: short and slow, they say what is right; tests compare with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scone.kernels.dequantize import PAGE_BYTES, PIECE_PAGES
from scone.kernels.trie_batch import TrieBatch
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

# Counting


def count_n_grams(
    corpora: Iterable[Sequence[int]], max_n: int, separator_ids: Collection[int] = ()
) -> Counter[tuple[int, ...]]:
    """Occurrences of all n-grams of 2 … ``max_n`` tokens that stay inside a corpus and contain no separator."""
    counts: Counter[tuple[int, ...]] = Counter()
    separators = set(separator_ids)
    for corpus in corpora:
        tokens = [int(token) for token in corpus]
        for n in range(2, max_n + 1):
            grams = zip(*(tokens[start:] for start in range(n)), strict=False)
            counts.update(gram for gram in grams if separators.isdisjoint(gram))
    return counts


# Index and matching: `f_gram_trie`, `longest_match`


Gram = tuple[int, ...]


def ranked(counts: Mapping[Gram, int]) -> list[Gram]:
    """The f-grams of ``counts`` by (count descending, length ascending, tokens lexicographic)."""
    return sorted(counts, key=lambda gram: (-counts[gram], len(gram), gram))


def vocabulary_of(
    counts: Mapping[Gram, int],
    *,
    max_n: int | None = None,
    max_f_grams: int | None = None,
    min_freq: int = 1,
    separator_ids: Sequence[int] = (),
    **facts: Any,
) -> FGramVocabulary:
    """The first ``max_f_grams`` of ``counts`` that are frequent enough, no longer than N and without a separator."""
    kept = {
        gram: count
        for gram, count in counts.items()
        if count >= min_freq and 2 <= len(gram) <= (max_n or 255) and not set(separator_ids).intersection(gram)
    }
    first = ranked(kept)[:max_f_grams]
    kept_counts = np.array([kept[gram] for gram in first], np.uint64)
    return FGramVocabulary.from_ranked(first, kept_counts, max_n=max_n, separator_ids=separator_ids, **facts)


def gain_scores(counts: Mapping[Gram, int], token_counts: Sequence[int], max_n: int) -> dict[Gram, float]:
    """What every gram of at most N tokens among the candidates ``counts`` is worth in the ranking by gain.

    ``token_counts``: of all tokens, 0 for separators.
    """
    discount, unseen_weight, least_unseen, half_visits = 0.75, 0.7, 1e-3, 20
    next_counts: dict[Gram, list[int]] = {}
    for gram, count in counts.items():
        next_counts.setdefault(gram[:-1], []).append(count)

    def count_of(gram: Gram) -> int:
        return counts[gram] if len(gram) > 1 else int(token_counts[gram[0]])

    def unseen(gram: Gram) -> int:
        return count_of(gram) - sum(next_counts.get(gram, ()))

    def types(gram: Gram) -> int:
        return len(next_counts.get(gram, ()))

    def probability(gram: Gram) -> float:
        if len(gram) == 1:
            return (count_of(gram) + 0.5) / (int(np.sum(token_counts)) + 0.5 * len(token_counts))
        before = gram[:-1]
        others = max(count_of(before) - 1, 1)
        left = min(1, discount * (types(before) + unseen(before)) / others)
        return max(max(counts[gram] - 1 - discount, 0) / others + left * probability(gram[1:]), 1e-250)

    def score(gram: Gram) -> float:
        gain = sum(
            counts[longer] * math.log(probability(longer) / probability(longer[1:]))
            for longer in counts
            if longer[:-1] == gram
        )
        left = min(1, discount * (types(gram) + unseen(gram) - 1) / max(counts[gram] - 1, 1))
        gain += unseen_weight * unseen(gram) * math.log(max(left, least_unseen))
        return gain * counts[gram] / (counts[gram] + half_visits)

    worth = {gram: score(gram) for gram in counts if len(gram) <= max_n}
    for gram in sorted(worth, key=len, reverse=True):
        for part in (gram[:-1], gram[1:]):
            if len(part) > 1:
                worth[part] = max(worth[part], worth[gram])
    return worth


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


# Trie batches: `trie_batch`


def trie_batch(
    nodes: np.ndarray,
    keys: np.ndarray,
    suffixes: np.ndarray,
    vocab_size: int,
    max_n: int,
    num_rows: int = 0,
) -> TrieBatch:
    """What ``build_trie_batch`` returns, up to the order of the nodes within one depth."""

    def path(node: int) -> list[int]:
        return [node] if node < vocab_size else [*path(int(keys[node - vocab_size, 0])), node]

    def chain(node: int) -> list[int]:
        return [] if node < vocab_size else [node - vocab_size, *chain(int(suffixes[node - vocab_size]))]

    def rows_of(f_gram: int) -> list[int]:
        return [rank for rank in chain(f_gram) if rank < num_rows]

    f_grams = list(dict.fromkeys(int(node) for node in nodes.reshape(-1) if node >= vocab_size))
    f_grams.sort(key=lambda node: len(path(node)))
    positions = [f_grams.index(node) + 1 if node >= vocab_size else 0 for node in nodes.reshape(-1)]
    f_grams = f_grams or [vocab_size if len(keys) else 0]
    paths = {node: path(node) for f_gram in f_grams for node in path(f_gram)}
    ordered = sorted(paths, key=lambda node: len(paths[node]))
    place = {node: index for index, node in enumerate(ordered)}
    depths = np.array([len(paths[node]) - 1 for node in ordered])
    f_gram_depths = np.array([len(paths[f_gram]) - 1 for f_gram in f_grams])
    rows = list(dict.fromkeys(rank for f_gram in f_grams for rank in rows_of(f_gram)))
    row_chains = np.zeros((len(f_grams), max(max_n - 1, 1)), np.int64)
    for index, f_gram in enumerate(f_grams):
        links = [rows.index(rank) + 1 for rank in rows_of(f_gram)]
        row_chains[index, : len(links)] = links
    return TrieBatch(
        position_index=np.array(positions, np.int64).reshape(nodes.shape),
        f_grams=np.array(f_grams, np.int64),
        f_gram_index=np.array([place[f_gram] for f_gram in f_grams], np.int64),
        f_gram_offsets=[int(np.sum(f_gram_depths < depth)) for depth in range(max_n + 1)],
        tokens=np.array([n if n < vocab_size else int(keys[n - vocab_size, 1]) for n in ordered], np.int64),
        depths=depths,
        ancestors=np.array(
            [[place[node] for node in paths[n]] + [place[n]] * (max_n - len(paths[n])) for n in ordered], np.int64
        ),
        depth_offsets=[int(np.sum(depths < depth)) for depth in range(max_n + 1)],
        row_ids=np.array(rows, np.int64),
        row_chains=row_chains,
    )


def random_paths(rng: np.random.Generator, num_nodes: int, max_n: int) -> np.ndarray:
    """Ancestors [U, N] of a random forest, parents before children."""
    ancestors, depths = np.empty((num_nodes, max_n), np.int64), np.zeros(num_nodes, np.int64)
    for node in range(num_nodes):
        parent = int(rng.integers(-1, node)) if node else -1
        if parent >= 0 and depths[parent] < max_n - 1:
            depths[node] = depths[parent] + 1
            ancestors[node] = ancestors[parent]
        ancestors[node, depths[node] :] = node
    return ancestors


# Row-RMS of the learned rows: `row_rms`


def rms_rows(
    weight: np.ndarray,
    sums: np.ndarray,
    visits: np.ndarray,
    row_ids: np.ndarray,
    gradients: np.ndarray,
    columns: np.ndarray,
    *,
    mean: float,
    prior: float,
    learning_rate: float,
) -> None:
    """What ``update_rows`` does, one row after the other."""
    for row, gradient in zip(row_ids, gradients, strict=True):
        visits[row] += 1
        sums[row] += (gradient**2 / columns).mean()
        variance = (prior * mean + sums[row]) / (prior + visits[row])
        if variance > 0:
            weight[row] -= learning_rate * gradient / np.sqrt(columns * variance)


# Decoding table rows: `dequantize`


def reference_rows(raw: np.ndarray, row_type: str, width: int, group_size: int) -> np.ndarray:
    """Decode ``raw`` (uint8 [n, row_bytes]) into float32 [n, D], D = ``width``.

    The layout of a row is that of `docs/formats.md`: float types are D numbers; int8 and int4 are one bfloat16 scale
    per group of ``group_size`` numbers, then the codes (int4: two a byte, the even position in the low nibble).
    Raises ValueError for an unknown row type.
    """
    n = len(raw)
    if row_type == "fp32":
        return raw.view("<f4").reshape(n, width).copy()
    if row_type == "fp16":
        return raw.view("<f2").reshape(n, width).astype(np.float32)
    if row_type == "bf16":
        return _float32_of_bfloat16(raw.view("<u2").reshape(n, width))
    num_groups = -(-width // group_size)
    scales = _float32_of_bfloat16(np.ascontiguousarray(raw[:, : 2 * num_groups]).view("<u2"))
    codes = raw[:, 2 * num_groups :]
    if row_type == "int8":
        values = codes.view(np.int8)
    elif row_type == "int4":
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, -1)[:, :width]
        values = (nibbles ^ 8).astype(np.int8) - 8
    else:
        raise ValueError(f"unknown row type {row_type!r}")
    return values.astype(np.float32) * np.repeat(scales, group_size, axis=1)[:, :width]


def _float32_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    """A bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Planning reads: `dequantize`


def reference_pieces(ranks: np.ndarray, data_start: int, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """As `plan_pieces`: mark every page that holds a byte of a row, then walk over runs of marked pages."""
    pages: set[int] = set()
    for rank in ranks.tolist():
        start = data_start + rank * row_bytes
        pages.update(range(start // PAGE_BYTES, (start + row_bytes - 1) // PAGE_BYTES + 1))
    pieces: list[list[int]] = []
    place_of_page: dict[int, int] = {}
    for target, page in enumerate(sorted(pages)):
        place_of_page[page] = target * PAGE_BYTES
        previous = pieces[-1] if pieces else [-1, -1, 0]
        if sum(previous[:2]) == page * PAGE_BYTES and previous[1] < PIECE_PAGES * PAGE_BYTES:
            previous[1] += PAGE_BYTES
        else:
            pieces.append([page * PAGE_BYTES, PAGE_BYTES, target * PAGE_BYTES])
    starts = data_start + ranks * row_bytes
    places = [place_of_page[page] for page in (starts // PAGE_BYTES).tolist()]
    return np.array(pieces, dtype=np.int64).reshape(-1, 3), np.array(places, dtype=np.int64) + starts % PAGE_BYTES
