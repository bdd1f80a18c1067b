"""Sizes that fit a count into a memory budget: blocks, partitions, groups; and what it needs of the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from scone.configs.schema import DEFAULT_RANKING, RANKINGS
from scone.tokenization.f_gram_file import MAX_F_GRAM_LENGTH, MAX_VOCAB_SIZE
from scone.tokenization.ranking import num_candidates
from scone.utils.errors import SconeError
from scone.utils.progress import available_cores
from scone.utils.text import human_bytes

_MAX_PARTITION_BITS = 15  # a partition is named by 16 bits, of which one value means "none"
_WIDE_PARTITION_BITS = 12  # up to here a level may take more partitions than planned to keep remainders at 32 bits
_MIN_BLOCK_POSITIONS = 256
_MAX_BLOCK_POSITIONS = 1 << 22
_LEAST_IN_MEMORY_BLOCK = 1 << 18  # below this, files with larger blocks are faster
_POSITIONS_PER_PARTITION = 1 << 18  # about 50,000 different n-grams of real text: a table that fits in an L2 cache
# One surviving n-gram of a level while it is counted: the pool twice over (32 each), what finds the cut in it (32) and
# what is kept (16); and, for each level that is full, its key and count (16).
_BYTES_PER_F_GRAM = 32 + 32 + 32 + 16
_BYTES_PER_F_GRAM_AND_LEVEL = 16
_BYTES_PER_TOKEN_TYPE = 12  # its count (8) and its id (4), and 8 more for each thread that counts
_BYTES_PER_TOKEN_TYPE_RANKED = 20  # its count (8), id (4) and node (8); by gain a copy (8) and what scores need (20)
_TABLE_FACTOR = 6  # a table under way from capacity C to 2 C holds 3 C entries and at least C / 2 n-grams
_LEVELS_OVERHEAD_BYTES = 1 << 16  # names and headers in the files of the levels
_USABLE = 0.95  # of what is left for buffers; the rest is for thread stacks, file handles and the allocator


@dataclass(frozen=True)
class CountTask:
    """What is wanted of a count, whatever engine does it. Raises SconeError for a number that is out of range."""

    vocab_size: int
    max_n: int
    min_freq: int
    max_f_grams: int | None
    separator_ids: tuple[int, ...] = ()
    tokenizer_fingerprint: str = ""
    ranking: str = DEFAULT_RANKING

    def __post_init__(self) -> None:
        limits = {"vocab_size": (1, MAX_VOCAB_SIZE), "max_n": (1, MAX_F_GRAM_LENGTH), "min_freq": (1, None)}
        for name, (least, most) in (limits | {"max_f_grams": (0, None)}).items():
            value = getattr(self, name)
            if value is not None and (value < least or (most is not None and value > most)):
                expected = f"at least {least}" if most is None else f"{least} … {most}"
                raise SconeError(f"found {name} = {value}; expected {expected}; choose a value in that range")
        if self.ranking not in RANKINGS:
            raise SconeError(f"found ranking = {self.ranking!r}; expected {' or '.join(RANKINGS)}; choose one of them")
        if self.longest > MAX_F_GRAM_LENGTH:
            raise SconeError(
                f"found max_n = {self.max_n}; expected at most {MAX_F_GRAM_LENGTH - 1}, since the ranking by gain "
                "counts one token further; choose a smaller max_n, or the ranking frequency"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest n-grams that are counted: by gain N + 1, whose last is a next token of N."""
        return self.max_n + (self.ranking == "gain")

    @property
    def max_candidates(self) -> int | None:
        """How many n-grams are kept of a count, the most frequent: the f-grams, or what they are chosen from."""
        return num_candidates(self.max_f_grams) if self.ranking == "gain" else self.max_f_grams


@dataclass(frozen=True)
class CountingPlan:
    """Sizes that decide speed and memory, and never the answer."""

    num_positions: int
    num_threads: int
    on_disk: bool
    block_positions: int
    partition_bits: int
    remainder_bytes: int
    """4 where every level's keys, shuffled and without their partition, fit 32 bits; else 8."""
    group_bytes: int
    """Remainders that are in memory at a time while one level is counted."""
    saved_n_grams: int
    """Most survivors that the saved levels hold together."""

    @property
    def num_blocks(self) -> int:
        """Blocks of ``block_positions`` positions, the last one perhaps shorter."""
        return -(-self.num_positions // self.block_positions)

    def span(self, block: int) -> tuple[int, int]:
        """Where a block starts, and how many positions it has."""
        start = block * self.block_positions
        return start, min(self.block_positions, self.num_positions - start)

    @property
    def temporary_bytes(self) -> int:
        """Upper bound of what lies on disk at any moment; 0 where the count stays in memory."""
        if not self.on_disk:
            return 0
        offsets_bytes = 8 * ((1 << max(self.partition_bits, _WIDE_PARTITION_BITS)) + 1)
        block_bytes = self.block_positions * (2 + self.remainder_bytes) + offsets_bytes + 3 * 128
        return self.num_blocks * block_bytes + 16 * self.saved_n_grams + _LEVELS_OVERHEAD_BYTES

    def level_bits(self, num_keys: int) -> tuple[int, int]:
        """Bits of a key at a level with keys below ``num_keys``; and how many of them are stored as the remainder."""
        key_bits = max(2, (num_keys - 1).bit_length())
        wide = min(key_bits - 32, _WIDE_PARTITION_BITS)
        return key_bits, key_bits - min(key_bits - 1, max(self.partition_bits, wide))

    def remainder_dtype(self, remainder_bits: int) -> np.dtype:
        """uint32 where remainders, and counts of as many positions, fit; else uint64."""
        small = remainder_bits <= 32 and self.num_positions < 2**32
        return np.dtype(np.uint32 if small else np.uint64)


def plan_count(
    task: CountTask, num_positions: int, memory_budget_bytes: int | None, num_threads: int | None
) -> CountingPlan:
    """Choose sizes for a count within ``memory_budget_bytes`` (None: half of the free memory, and no refusal).

    Counting and ranking follow each other: the budget is for the larger, and buffers are for counting alone. Raises
    SconeError when the budget cannot hold even the f-grams that were asked for; says how much would do.
    """
    threads = num_threads or available_cores()
    vocab_size, longest = task.vocab_size, task.longest
    most_ids = num_positions // task.min_freq
    most_n_grams = most_ids if task.max_candidates is None else min(most_ids, task.max_candidates)
    fixed_bytes = most_n_grams * (_BYTES_PER_F_GRAM + _BYTES_PER_F_GRAM_AND_LEVEL * max(1, longest - 1))
    fixed_bytes += vocab_size * (_BYTES_PER_TOKEN_TYPE + 8 * threads)
    ranking_bytes = _ranking_bytes(task, most_n_grams)
    budget = memory_budget_bytes
    if budget is None:
        free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        budget = max(free_bytes // 2, fixed_bytes + (256 << 20), ranking_bytes)
    buffer_bytes = int((budget - fixed_bytes) * _USABLE)
    least_bytes = _least_buffer_bytes(threads, num_positions)
    if buffer_bytes < least_bytes or budget < ranking_bytes:
        candidates = " (what the ranking by gain chooses from; that by frequency needs less)" * (task.ranking == "gain")
        raise SconeError(
            f"found a memory budget of {human_bytes(budget)}; expected at least "
            f"{human_bytes(max(fixed_bytes + least_bytes / _USABLE + 1, ranking_bytes))} for {most_n_grams:,} n-grams "
            f"of up to {longest} tokens from this corpus{candidates}; raise the budget, or ask for fewer f-grams"
        )
    wide_ids = max(min(vocab_size, most_ids), most_n_grams).bit_length()
    fits = 2 * wide_ids <= 32 + _WIDE_PARTITION_BITS and num_positions < 2**32
    return _cut(num_positions, threads, buffer_bytes, 4 if fits else 8, most_n_grams * longest)


def _ranking_bytes(task: CountTask, most_n_grams: int) -> int:
    """Most that is held at once when all levels are counted, each with ``most_n_grams``, and blocks are gone.

    A text that occurs twice, whole, has as many n-grams of every length: the levels together hold several times what
    one of them does.
    """
    saved = most_n_grams * max(1, task.longest - 1)
    ranked = saved if task.max_candidates is None else min(saved, task.max_candidates)
    # fewer than S occur more often than the cut; as often, at most S of one length and fewer than S of all shorter ones
    sortable = saved if task.max_candidates is None else min(saved, 3 * task.max_candidates)
    f_grams = ranked if task.max_f_grams is None else min(ranked, task.max_f_grams)
    # what is sorted (8) and its ranks (4), the counts in order (8), and what of one level goes in (16)
    sorting = 12 * sortable + 8 * ranked + 16 * most_n_grams
    # the ranks (4), keys, suffixes, lengths and counts (24), and one level's ranks, last tokens, nodes and keys (64)
    placing = 4 * sortable + 24 * ranked + 64 * most_n_grams
    # What was placed (24) and the vocabulary (24) with its index (18); by gain the candidates (24), their scores (28)
    # and what finds the cut (14), and the f-grams in order (40), linked and indexed (40). 24 are 21 and what the
    # allocator keeps: at the least budget 800,000 tokens, a text twice, took 6 % more without.
    by_gain = task.ranking == "gain"
    choosing = 66 * ranked + 80 * f_grams * by_gain
    token_bytes = task.vocab_size * (_BYTES_PER_TOKEN_TYPE_RANKED + 28 * by_gain)
    return max(16 * saved + max(sorting, placing), choosing) + token_bytes


def _cut(num_positions: int, threads: int, buffer_bytes: int, remainder_bytes: int, saved_n_grams: int) -> CountingPlan:
    """Blocks, partitions and groups for ``buffer_bytes`` of buffers."""
    stored_bytes = 2 + remainder_bytes
    in_memory_block = min(_MAX_BLOCK_POSITIONS, max(_MIN_BLOCK_POSITIONS, -(-num_positions // threads)))
    partition_bits = max(1, (num_positions // _POSITIONS_PER_PARTITION).bit_length())
    table_entry_bytes = 2 * remainder_bytes * _TABLE_FACTOR
    while threads * table_entry_bytes * (num_positions >> partition_bits) > buffer_bytes // 3:
        partition_bits += 1
    partition_bits = min(partition_bits, _MAX_PARTITION_BITS)
    table_bytes = threads * table_entry_bytes * (num_positions >> partition_bits)
    scratch_bytes = max(threads * in_memory_block * 8, table_bytes)
    while num_positions * stored_bytes + scratch_bytes > buffer_bytes and in_memory_block > _LEAST_IN_MEMORY_BLOCK:
        in_memory_block //= 2
        scratch_bytes = max(threads * in_memory_block * 8, table_bytes)
    on_disk = num_positions * stored_bytes + scratch_bytes > buffer_bytes
    block_positions = in_memory_block
    if on_disk:
        # a thread that advances a block holds it as it was and as it becomes, and two arrays of ids
        fitting = buffer_bytes // (threads * (2 * stored_bytes + 8))
        block_positions = max(_MIN_BLOCK_POSITIONS, min(fitting, _MAX_BLOCK_POSITIONS, -(-num_positions // threads)))
    group_bytes = max(buffer_bytes - table_bytes, block_positions * remainder_bytes) if on_disk else 1 << 62
    return CountingPlan(
        num_positions, threads, on_disk, block_positions, partition_bits, remainder_bytes, group_bytes, saved_n_grams
    )


def _least_buffer_bytes(threads: int, num_positions: int) -> int:
    """Below this, tables of the smallest partitions and blocks of the smallest size would not fit."""
    tables = 3 * threads * 2 * 8 * _TABLE_FACTOR * (num_positions >> _MAX_PARTITION_BITS)
    return max(tables, threads * _MIN_BLOCK_POSITIONS * 28)
