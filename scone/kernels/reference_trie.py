"""The plain equal of kernels/trie_batch.py: dictionaries and paths as tuples."""

from __future__ import annotations

import numpy as np

from scone.kernels.trie_batch import TrieBatch


def trie_batch(
    nodes: np.ndarray,
    keys: np.ndarray,
    suffixes: np.ndarray,
    vocab_size: int,
    max_n: int,
    num_rows: int = 0,
    backoff: bool = True,
) -> TrieBatch:
    """What ``build_trie_batch`` returns, up to the order of the nodes within one depth."""

    def path(node: int) -> list[int]:
        return [node] if node < vocab_size else [*path(int(keys[node - vocab_size, 0])), node]

    def chain(node: int) -> list[int]:
        return [] if node < vocab_size else [node - vocab_size, *chain(int(suffixes[node - vocab_size]))]

    def rows_of(f_gram: int) -> list[int]:
        ranks = [rank for rank in chain(f_gram) if rank < num_rows]
        return ranks if backoff else ranks[:1]

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
