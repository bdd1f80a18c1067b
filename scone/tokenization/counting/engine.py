"""The passes of a count: read the tokens, then for each length key the n-grams, count them, and name the survivors."""

from __future__ import annotations

import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from scone.kernels import ngram_count
from scone.kernels.f_gram_trie import check_number_of_f_grams
from scone.kernels.ngram_count import NO_ID
from scone.tokenization.counting.blocks import FileBlocks, MemoryBlocks, PartitionChunk, TokenStream, page_array
from scone.tokenization.counting.levels import CandidatePool, FrequentNGrams, IdTable, KeySpace, RisingFloor
from scone.tokenization.counting.plan import CountingPlan, CountTask
from scone.utils.files import atomic_path
from scone.utils.progress import Progress, map_in_order

_FIRST_TABLE_SIZE = 1 << 13
_NO_KEY = np.uint64(2**64 - 1)  # of a position where no n-gram ends; no pair of ids has this key


class CountEngine:
    """One count: ``read_tokens``, then ``count``.

    Levels are lengths: level 2 holds the bigrams. Single tokens are counted in an array.
    """

    def __init__(self, stream: TokenStream, plan: CountingPlan, task: CountTask, bar: Progress) -> None:
        self._stream, self._plan, self._task, self._bar = stream, plan, task, bar
        self.token_counts = np.zeros(stream.vocab_size, np.int64)  # of all tokens, separators too
        self._local = threading.local()  # what a thread keeps from one item to the next; it ends with the pass
        self.checksum = 0

    # The first pass

    def read_tokens(self) -> None:
        """Check and count every token, and sum the input up in ``checksum``."""
        lock = threading.Lock()

        def read(block: int) -> int:
            counts = np.zeros_like(self.token_counts)
            start, length = self._plan.span(block)
            total = 0
            for position, tokens in self._stream.read(start, start + length):
                bad = int(ngram_count.histogram_tokens(tokens, counts))
                if bad >= 0:
                    self._stream.refuse(position + bad)
                total += int(ngram_count.checksum_words(tokens, position))
            with lock:
                np.add(self.token_counts, counts, out=self.token_counts)
                self.checksum = (self.checksum + total) % 2**64
            return length

        self._each(read, range(self._plan.num_blocks))

    # All lengths

    def count(self, folder: Path | None) -> tuple[np.ndarray, list[FrequentNGrams]]:
        """Tokens by id uint32 [K], and what survived of lengths 2 … ``task.longest`` (fewer where none can be longer).

        ``folder``: where finished levels are kept and found again, and blocks that do not fit into memory.
        """
        if not self._stream.num_positions or self._task.max_candidates == 0:
            return np.empty(0, np.uint32), []
        self._blocks = self._empty_blocks(folder)
        self._last_keys = np.full(self._plan.num_blocks, _NO_KEY, np.uint64)
        levels: list[FrequentNGrams] = []
        below: tuple[KeySpace, np.ndarray] | None = None
        kept = self.token_counts >= self._task.min_freq
        kept[[token for token in self._task.separator_ids if 0 <= token < len(kept)]] = False
        token_of_id = np.flatnonzero(kept).astype(np.uint32)
        self._id_of_token = np.full(self._stream.vocab_size, NO_ID, np.uint32)
        self._id_of_token[token_of_id] = np.arange(len(token_of_id), dtype=np.uint32)
        floor = RisingFloor(self._task.min_freq, self._task.max_candidates)
        num_ids = len(token_of_id)
        for length in range(2, self._task.longest + 1):
            if not num_ids:
                break
            space = KeySpace.of(self._plan, num_ids)
            level = self._level(length, space, below, floor, folder)
            levels.append(level)
            below = (space, level.keys[level.id_indices()])
            num_ids = len(below[1])
            check_number_of_f_grams(num_ids)
        del self._blocks, self._id_of_token  # ranking starts when their memory is free
        return token_of_id, levels

    def _empty_blocks(self, folder: Path | None) -> MemoryBlocks | FileBlocks:
        if folder is None or not self._plan.on_disk:
            return MemoryBlocks(self._plan)
        blocks = folder / "blocks"
        shutil.rmtree(blocks, ignore_errors=True)  # of a count that was interrupted
        blocks.mkdir()
        return FileBlocks(self._plan, blocks)

    def _level(
        self,
        length: int,
        space: KeySpace,
        below: tuple[KeySpace, np.ndarray] | None,
        floor: RisingFloor,
        folder: Path | None,
    ) -> FrequentNGrams:
        """Bring all blocks to level ``length``; count it, or take what an interrupted count found."""
        finished = _load_level(folder, length)
        if finished is None or length < self._task.longest:
            if below is None:
                self._fill(space)
            else:
                self._advance(space, *below)
        if finished is None:
            finished = self._count_level(space, floor)
            _save_level(folder, length, finished)
        else:
            self._bar.update(self._plan.num_positions)
            floor.finish_level(finished.counts)
        return finished

    # Keys from tokens

    def _fill(self, space: KeySpace) -> None:
        def fill(block: int) -> int:
            start, size = self._plan.span(block)
            ids, carry = self._scratch("ids", size), np.full(1, NO_ID, np.uint32)
            self._ids_of_tokens(start, ids)
            if start:
                self._ids_of_tokens(start - 1, carry)
            self._write_keys(space, block, ids, carry[0])
            return size

        self._each(fill, range(self._plan.num_blocks))

    def _ids_of_tokens(self, start: int, ids: np.ndarray) -> None:
        """Write the ids of the positions from ``start`` on into ``ids`` uint32 [L]."""
        ids[:] = NO_ID
        for position, tokens in self._stream.read(start, start + len(ids)):
            place = position - start
            ngram_count.map_tokens(tokens, self._id_of_token, ids[place : place + len(tokens)])

    def _write_keys(self, space: KeySpace, block: int, ids: np.ndarray, carry: np.uint32) -> None:
        """Store the n-grams whose prefix and suffix ids stand at neighbouring positions of ``ids`` uint32 [L]."""
        content = self._blocks.room(block, space.num_partitions, space.dtype)
        ngram_count.partition_keys(
            ids,
            carry,
            space.num_ids,
            space.multiplier,
            space.key_bits,
            space.remainder_bits,
            content.parts,
            content.remainders,
            content.offsets,
        )
        self._blocks.write(block, content)
        prefix, suffix = (ids[-2] if len(ids) > 1 else carry), ids[-1]
        known = NO_ID not in (prefix, suffix)
        self._last_keys[block] = int(prefix) * space.num_ids + int(suffix) if known else _NO_KEY

    # Keys from the level below

    def _advance(self, space: KeySpace, below: KeySpace, keys_below: np.ndarray) -> None:
        """Replace every block's keys of the level below, of which ``keys_below`` have ids, by those of this level."""
        table = IdTable.build(keys_below, below)
        places = np.minimum(np.searchsorted(keys_below, self._last_keys), len(keys_below) - 1)
        last_ids = np.where(keys_below[places] == self._last_keys, places.astype(np.uint32), NO_ID)
        boundary_ids = np.concatenate([[NO_ID], last_ids[:-1]])  # the id just before each block

        def advance(block: int) -> int:
            content = self._blocks.read(block, below.num_partitions, below.dtype)
            in_order = self._scratch("in order of partitions", len(content.parts))
            ngram_count.ids_of_remainders(content.remainders, content.offsets, table.slot_bits, table.slots, in_order)
            ids = self._scratch("ids", len(content.parts))
            ngram_count.restore_positions(in_order, content.offsets, content.parts, ids)
            self._write_keys(space, block, ids, boundary_ids[block])
            return len(ids)

        self._each(advance, range(self._plan.num_blocks))

    # Counting

    def _count_level(self, space: KeySpace, floor: RisingFloor) -> FrequentNGrams:
        pool = CandidatePool(floor, self._task.max_candidates)
        sizes = self._blocks.partition_sizes(space.num_partitions)
        self._bar.update(self._plan.num_positions - int(sizes.sum()))  # positions where no candidate ends
        first = 0
        for last in _groups(sizes, space, self._plan):
            self._count_group(first, last, space, pool)
            first = last
        used_floor = floor.value
        keys, counts = pool.take()
        return FrequentNGrams(space.num_ids, keys, counts, floor.finish_level(counts), pool.num_candidates, used_floor)

    def _count_group(self, first: int, last: int, space: KeySpace, pool: CandidatePool) -> None:
        """Count partitions ``first:last`` into the pool."""

        def count(piece: PartitionChunk, row: int) -> int:
            table, distinct = self._add_to_table(piece, row, self._fresh_table(space.dtype), 0)
            self._collect(piece.first + row, table, distinct, space, pool)
            return int((piece.stops[row] - piece.starts[row]).sum())

        table, distinct = None, 0
        for piece in self._blocks.pieces(first, last, space.num_partitions, space.dtype):
            if piece.complete:
                self._each(partial(count, piece), range(len(piece.starts)))
            else:  # one partition, with so many occurrences of something that it comes in pieces
                table = np.zeros(_FIRST_TABLE_SIZE, space.dtype) if table is None else table
                table, distinct = self._add_to_table(piece, 0, table, distinct)
                self._bar.update(len(piece.remainders))
        if table is not None:
            self._collect(first, table, distinct, space, pool)

    def _fresh_table(self, dtype: np.dtype) -> np.ndarray:
        """This thread's table, emptied; it has grown to the size that the level's partitions need."""
        table = getattr(self._local, "table", None)
        if table is None or table.dtype != dtype:
            return np.zeros(_FIRST_TABLE_SIZE, dtype)
        table[:] = 0
        return table

    def _add_to_table(
        self, piece: PartitionChunk, row: int, table: np.ndarray, distinct: int
    ) -> tuple[np.ndarray, int]:
        table, distinct = ngram_count.count_partition(
            piece.remainders, piece.starts[row], piece.stops[row], table, distinct
        )
        if piece.complete:
            self._local.table = table
        return table, distinct

    def _collect(self, partition: int, table: np.ndarray, distinct: int, space: KeySpace, pool: CandidatePool) -> None:
        remainders, counts = ngram_count.collect_counts(table, pool.floor)
        keys = ngram_count.keys_of_remainders(
            remainders, partition, space.inverse, space.key_bits, space.remainder_bits
        )
        pool.add(keys, counts, distinct)

    # Threads

    def _scratch(self, name: str, size: int) -> np.ndarray:
        """uint32 [size] of this thread, the same memory for every block."""
        buffer = getattr(self._local, name, None)
        if buffer is None:
            buffer = page_array(self._plan.block_positions, np.uint32)
            setattr(self._local, name, buffer)
        return buffer[:size]

    def _each(self, work: Callable[[int], int], items: Iterable[int]) -> None:
        """Run ``work``, which returns how many positions it did, on every item on all threads. Stops at an error."""
        for positions in map_in_order(work, items, self._plan.num_threads):
            self._bar.update(positions)


def _groups(sizes: np.ndarray, space: KeySpace, plan: CountingPlan) -> Iterator[int]:
    """Ends of runs of neighbouring partitions that are in memory together."""
    total, first = 0, 0
    for partition, size in enumerate(sizes.tolist()):
        if partition > first and (total + size) * space.dtype.itemsize > plan.group_bytes:
            yield partition
            total, first = 0, partition
        total += size
    yield len(sizes)


# Finished levels


def _save_level(folder: Path | None, length: int, level: FrequentNGrams) -> None:
    if folder is not None:
        with atomic_path(_level_path(folder, length)) as temporary, temporary.open("wb") as file:
            np.savez(file, **vars(level))


def _load_level(folder: Path | None, length: int) -> FrequentNGrams | None:
    """The survivors of a level that was counted to its end; None where they are not there or damaged (checksums)."""
    if folder is None:
        return None
    try:
        # opened here: of a file that is no archive, NumPy would leave the descriptor open
        with _level_path(folder, length).open("rb") as file, np.load(file, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in FrequentNGrams.__annotations__}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return FrequentNGrams(**{name: array if array.ndim else array.item() for name, array in arrays.items()})


def _level_path(folder: Path, length: int) -> Path:
    return folder / f"level-{length:03d}.npz"
