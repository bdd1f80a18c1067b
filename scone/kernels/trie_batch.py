"""Trie batches: the distinct trie nodes that a batch of matched positions needs, parents before children.

The f-gram model is causal with positions counted from the f-gram's first token, so the hidden state of a prefix does
not depend on what follows it. Each distinct node of a batch is therefore computed once, attending to its own ancestors,
instead of each position running its own padded f-gram (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

EMPTY = np.int64(-1)
HOST_FIELDS = ("f_gram_offsets", "depth_offsets", "row_ids")
"""What cuts a computation that is queued on an accelerator, or is read in host memory: it must not wait for these."""


@dataclass(frozen=True)
class TrieBatch:
    """What the input embedding layer computes for one batch. U nodes, M distinct f-grams, P positions, R distinct rows.

    Nodes and f-grams are sorted by depth (a token alone has depth 0), so the nodes of depth ≥ j are
    ``depth_offsets[j]:``, and likewise the f-grams. There is always at least one node and one f-gram: a batch in which
    nothing matches still runs every parameter.
    """

    position_index: np.ndarray  # int64, shape of the nodes: 1 + index of the position's f-gram in 0..M-1; 0: no f-gram
    f_grams: np.ndarray  # int64 [M]: the distinct f-gram nodes, within a depth in order of first appearance
    f_gram_index: np.ndarray  # int64 [M], ascending: where each of them is among the U nodes
    f_gram_offsets: list[int]  # N + 1 numbers
    tokens: np.ndarray  # int64 [U]: last token of each node
    depths: np.ndarray  # int64 [U]: length - 1
    ancestors: np.ndarray  # int64 [U, N]: index of the node's prefix of length j + 1; the node itself beyond its depth
    depth_offsets: list[int]  # N + 1 numbers
    row_ids: np.ndarray  # int64 [R]: distinct ranks whose learned rows the batch reads
    row_chains: np.ndarray  # int64 [M, N - 1]: 1 + index into row_ids of the suffixes with a row; 0: none

    def fields(self, convert: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """The fields by name, as the data loader hands them to the model: arrays converted (to tensors), besides those
        that stay on the host (``HOST_FIELDS``).
        """
        return {name: value if name in HOST_FIELDS else convert(value) for name, value in vars(self).items()}


def build_trie_batch(
    nodes: np.ndarray, keys: np.ndarray, suffixes: np.ndarray, vocab_size: int, max_n: int, num_rows: int = 0
) -> TrieBatch:
    """The trie batch of ``nodes`` (any shape, integers in 0..V+S-1), the reference implementation of which is
    ``reference.trie_batch``.

    ``keys`` [S, 2] (prefix node, last token) and ``suffixes`` [S] (nodes) are the vocabulary's; learned rows exist for
    the f-grams of rank < ``num_rows``. Cost: O(P + U·N), serial, so that it is safe in forked data loader workers.
    """
    flat = np.ascontiguousarray(nodes, dtype=np.int64).reshape(-1)
    position_index, f_grams = _distinct_f_grams(flat, vocab_size)
    if not len(f_grams):
        # one unused f-gram, or a lone token where the vocabulary is empty, keeps every parameter in use
        f_grams = np.array([vocab_size if len(keys) else 0], dtype=np.int64)
    node_ids, depths, parents = _prefix_closure(f_grams, keys, vocab_size)
    order, offsets = _sort_by_depth(depths, max_n)
    ancestors, place = _ancestors(order, depths, parents, max_n)
    f_gram_order, f_gram_offsets = _sort_by_depth(depths[: len(f_grams)], max_n)
    f_grams = f_grams[f_gram_order]
    number = np.zeros(len(f_grams) + 1, np.int64)  # what each is called after they were put in order; 0 stays
    number[1 + f_gram_order] = np.arange(1, len(number))
    ids = node_ids[order]
    is_f_gram = ids >= vocab_size
    tokens = ids.copy()
    tokens[is_f_gram] = keys[ids[is_f_gram] - vocab_size, 1]
    row_ids, row_chains = _row_chains(f_grams, suffixes, vocab_size, max_n, num_rows)
    return TrieBatch(
        position_index=number[position_index].reshape(nodes.shape),
        f_grams=f_grams,
        f_gram_index=place[f_gram_order],
        f_gram_offsets=f_gram_offsets.tolist(),
        tokens=tokens,
        depths=depths[order],
        ancestors=ancestors,
        depth_offsets=offsets.tolist(),
        row_ids=row_ids,
        row_chains=row_chains,
    )


@njit(cache=True, inline="always")
def _slot(key, mask):
    """First slot to probe: Fibonacci hashing, which spreads the consecutive ids that frequent f-grams have."""
    return np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)) & mask


@njit(cache=True)
def _insert(keys, values, key, value):
    """The value stored for ``key``, after storing ``value`` where the key is new."""
    mask = len(keys) - 1
    slot = _slot(key, mask)
    while keys[slot] != EMPTY:
        if keys[slot] == key:
            return values[slot]
        slot = (slot + 1) & mask
    keys[slot] = key
    values[slot] = value
    return value


@njit(cache=True)
def _capacity(entries: int) -> int:
    """Power of two at a load of at most one half."""
    capacity = 16
    while capacity < 2 * entries:
        capacity *= 2
    return capacity


@njit(cache=True)
def _distinct_f_grams(nodes: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    matched = 0
    for node in nodes:
        matched += node >= vocab_size
    capacity = _capacity(matched)
    keys = np.full(capacity, EMPTY)
    values = np.empty(capacity, np.int64)
    position_index = np.zeros(len(nodes), np.int64)
    f_grams = np.empty(matched, np.int64)
    count = 0
    for position in range(len(nodes)):
        node = nodes[position]
        if node >= vocab_size:
            index = _insert(keys, values, node, count)
            if index == count:
                f_grams[count] = node
                count += 1
            position_index[position] = index + 1
    return position_index, f_grams[:count].copy()


@njit(cache=True)
def _prefix_closure(
    f_grams: np.ndarray, keys: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Node id, depth and parent index of every node on the paths to ``f_grams``, which come first, in their order."""
    total = 0
    for f_gram in f_grams:
        node = f_gram
        total += 1
        while node >= vocab_size:
            node = np.int64(keys[node - vocab_size, 0])
            total += 1
    capacity = _capacity(total)
    seen = np.full(capacity, EMPTY)
    values = np.empty(capacity, np.int64)
    node_ids = np.empty(total, np.int64)
    depths = np.zeros(total, np.int64)
    parents = np.full(total, EMPTY)
    count = len(f_grams)
    for index in range(count):
        node_ids[index] = f_grams[index]
        _insert(seen, values, f_grams[index], index)
    index = 0
    while index < count:  # the list grows while it is walked: a parent that is new is appended and visited later
        node = node_ids[index]
        if node >= vocab_size:
            parent = np.int64(keys[node - vocab_size, 0])
            parent_index = _insert(seen, values, parent, count)
            if parent_index == count:
                node_ids[count] = parent
                count += 1
            parents[index] = parent_index
        index += 1
    for index in range(count):
        ancestor = parents[index]
        while ancestor >= 0:
            depths[index] += 1
            ancestor = parents[ancestor]
    return node_ids[:count].copy(), depths[:count].copy(), parents[:count].copy()


@njit(cache=True)
def _sort_by_depth(depths: np.ndarray, max_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Stable counting sort; the offsets give the first place of each depth."""
    offsets = np.zeros(max_n + 1, np.int64)
    for depth in depths:
        offsets[depth + 1] += 1
    for depth in range(max_n):
        offsets[depth + 1] += offsets[depth]
    fill = offsets.copy()
    order = np.empty(len(depths), np.int64)
    for index in range(len(depths)):
        order[fill[depths[index]]] = index
        fill[depths[index]] += 1
    return order, offsets


@njit(cache=True)
def _ancestors(order: np.ndarray, depths: np.ndarray, parents: np.ndarray, max_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ancestors of the nodes in their new order, and the new place of each node of the old order."""
    place = np.empty(len(order), np.int64)
    for new in range(len(order)):
        place[order[new]] = new
    ancestors = np.empty((len(order), max_n), np.int64)
    for new in range(len(order)):
        old = order[new]
        depth = depths[old]
        if depth > 0:
            ancestors[new, :depth] = ancestors[place[parents[old]], :depth]
        ancestors[new, depth:] = new
    return ancestors, place


@njit(cache=True)
def _row_chains(
    f_grams: np.ndarray, suffixes: np.ndarray, vocab_size: int, max_n: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    chains = np.zeros((len(f_grams), max(max_n - 1, 1)), np.int64)
    limit = len(f_grams) * chains.shape[1] if num_rows > 0 else 0
    capacity = _capacity(limit)
    keys = np.full(capacity, EMPTY)
    values = np.empty(capacity, np.int64)
    row_ids = np.empty(limit, np.int64)
    count = 0
    if num_rows > 0:
        for index in range(len(f_grams)):
            node = f_grams[index]
            link = 0
            while node >= vocab_size:
                rank = node - vocab_size
                if rank < num_rows:
                    row = _insert(keys, values, rank, count)
                    if row == count:
                        row_ids[count] = rank
                        count += 1
                    chains[index, link] = row + 1
                    link += 1
                node = np.int64(suffixes[rank])
    return row_ids[:count].copy(), chains
