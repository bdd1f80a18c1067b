"""What makes ranked f-grams a vocabulary: their keys, suffix links, lengths and index, made and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scone.kernels import child_index, f_gram_trie

MAX_VOCAB_SIZE = 2**32 - 1
MAX_F_GRAM_LENGTH = 255

_FAULTS = {
    f_gram_trie.BAD_TOKEN: "has a token outside 0 … V − 1",
    f_gram_trie.SEPARATOR_INSIDE: "contains a separator",
    f_gram_trie.PREFIX_MISSING: "has a prefix that is not an f-gram of lower rank",
    f_gram_trie.SUFFIX_MISSING: "has a suffix that is not an f-gram of lower rank",
    f_gram_trie.DUPLICATE: "occurs at a lower rank already",
    f_gram_trie.WRONG_ORDER: "is out of order (count descending, length ascending, tokens ascending)",
    f_gram_trie.TOO_LONG: "is longer than max_n",
}


@dataclass(frozen=True)
class ChildIndex:
    """What `child_index.find_child` needs beside the keys: the slots, and how they are read."""

    slots: np.ndarray
    rank_bits: int
    max_probes: int

    @classmethod
    def build(cls, keys: np.ndarray) -> ChildIndex:
        """Index ``keys`` [S, 2] (about 0.1 µs an f-gram)."""
        bits = child_index.rank_bits(len(keys))
        slots = _empty_slots(len(keys))
        max_probes = int(child_index.build_child_index(keys, slots, bits))
        return cls(frozen(slots), bits, max_probes)

    def __reduce__(self) -> tuple:
        return _restored_index, (self.slots, self.rank_bits, self.max_probes)


def _restored_index(slots: np.ndarray, rank_bits: int, max_probes: int) -> ChildIndex:
    return ChildIndex(frozen(slots), rank_bits, max_probes)


def check_limits(vocab_size: int, max_n: int, separator_ids: Sequence[int]) -> None:
    """Raise ValueError unless 1 ≤ V < 2³², 1 ≤ N ≤ 255 and every separator is a token."""
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; expected 1 … {MAX_VOCAB_SIZE}")
    if not 1 <= max_n <= MAX_F_GRAM_LENGTH:
        raise ValueError(f"max_n is {max_n}; expected 1 … {MAX_F_GRAM_LENGTH}")
    for separator in separator_ids:
        if not 0 <= separator < vocab_size:
            raise ValueError(f"separator {separator} is no token; expected 0 … {vocab_size - 1}")


def node_dtype(vocab_size: int, num_f_grams: int) -> np.dtype:
    """uint32 where all V + S nodes fit it, else uint64."""
    return np.dtype(np.uint32 if vocab_size + num_f_grams <= 2**32 else np.uint64)


def renumbered(nodes: np.ndarray, vocab_size: int, new_vocab_size: int) -> np.ndarray:
    """``nodes``, in any shape, over ``vocab_size`` tokens, when there are ``new_vocab_size``; tokens stay."""
    is_f_gram = nodes >= vocab_size
    moved = nodes.astype(np.int64) + is_f_gram * (new_vocab_size - vocab_size)
    return moved.astype(node_dtype(new_vocab_size, len(nodes)))


def link(
    keys: np.ndarray, counts: np.ndarray, vocab_size: int, max_n: int, separator_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, ChildIndex]:
    """Suffixes [S], lengths [S] and index of ranked ``keys`` [S, 2] with ``counts`` [S].

    Raises ValueError when they are no vocabulary (`f_gram_trie.link_f_grams` says what makes one); names the rank.
    """
    suffixes = np.empty(len(keys), keys.dtype)
    lengths = np.empty(len(keys), np.uint8)
    slots = _empty_slots(len(keys))
    bits = child_index.rank_bits(len(keys))
    separators = np.array(sorted(separator_ids), np.int64)
    outcome, rank, max_probes = f_gram_trie.link_f_grams(
        frozen(keys), frozen(counts), vocab_size, max_n, separators, suffixes, lengths, slots, bits
    )
    if outcome != f_gram_trie.VALID:
        raise ValueError(f"the f-gram of rank {rank} {_FAULTS[outcome]}")
    return suffixes, lengths, ChildIndex(frozen(slots), bits, int(max_probes))


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view: vocabularies are shared, and kernels compile once for loaded and for made ones."""
    view = array.view()
    view.flags.writeable = False
    return view


def _empty_slots(num_f_grams: int) -> np.ndarray:
    """Zeroed slots that begin on a cache line, so that a bucket is one."""
    size = child_index.num_slots(num_f_grams)
    room = np.zeros(size + child_index.BUCKET, np.uint32)
    skipped = -room.ctypes.data % (4 * child_index.BUCKET) // 4
    return room[skipped : skipped + size]
