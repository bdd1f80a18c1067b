"""The passes of a count: read the tokens, then for each length key the n-grams, count them, and name the survivors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from scone.kernels import ngram_count
from scone.kernels.ngram_count import NO_ID
from scone.tokenization.counting_levels import CandidatePool, IdTable, KeySpace, RisingFloor, Survivors
from scone.tokenization.counting_memory import page_array
from scone.tokenization.counting_plan import CountingPlan
from scone.tokenization.counting_store import BlockStore, FileStore, MemoryStore, Piece, block_length
from scone.tokenization.counting_tokens import TokenStream
from scone.tokenization.counting_work import CountJournal
from scone.utils.progress import Progress

_FIRST_TABLE_SIZE = 1 << 13


class CountEngine:
    """One count. Use as a context (it owns threads): ``read_tokens``, then ``count``.

    Levels are lengths: level 2 holds the bigrams. Level 1 goes through the same machinery only where the vocabulary is
    too large for an array of its counts.
    """

    def __init__(
        self,
        stream: TokenStream,
        plan: CountingPlan,
        max_n: int,
        min_freq: int,
        max_f_grams: int | None,
        separators: tuple[int, ...],
        bar: Progress,
    ) -> None:
        self._stream, self._plan, self._max_n, self._min_freq = stream, plan, max_n, min_freq
        self._max_f_grams = max_f_grams
        self._separators = np.array([s for s in separators if 0 <= s < stream.vocab_size], np.uint32)
        self._bar = bar
        self._token_counts = np.zeros(stream.vocab_size if plan.token_table else 0, np.int64)
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(plan.num_threads, thread_name_prefix="count")
        self.checksum = 0

    def __enter__(self) -> CountEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    # The first pass

    def read_tokens(self) -> None:
        """Check every token, count tokens where the plan has an array for it, and sum the input up in ``checksum``."""
        lock = threading.Lock()

        def read(block: int) -> int:
            counts = np.zeros_like(self._token_counts)
            start, length = self._span(block)
            total = 0
            for position, tokens in self._stream.read(start, start + length):
                bad = self._first_outside(tokens, counts)
                if bad >= 0:
                    self._stream.refuse(position + bad)
                total += int(ngram_count.checksum_words(tokens, position))
            with lock:
                np.add(self._token_counts, counts, out=self._token_counts)
                self.checksum = (self.checksum + total) % 2**64
            return length

        self._each(read, range(self._plan.num_blocks))

    def _first_outside(self, tokens: np.ndarray, counts: np.ndarray) -> int:
        if self._plan.token_table:
            return int(ngram_count.histogram_tokens(tokens, counts))
        outside = tokens >= self._stream.vocab_size
        return int(outside.argmax()) if outside.any() else -1

    # All lengths

    def count(self, journal: CountJournal, folder: Path | None) -> tuple[np.ndarray, list[Survivors]]:
        """Tokens by id uint32 [K], and what survived of lengths 2 … N (fewer where nothing is left to extend)."""
        if not self._stream.num_positions or self._max_f_grams == 0:
            return np.empty(0, np.uint32), []
        store: BlockStore = FileStore(self._plan, folder) if self._plan.on_disk and folder else MemoryStore(self._plan)
        levels: list[Survivors] = []
        if self._plan.token_table:
            token_of_id = self._tokens_of_table()
        else:
            space = KeySpace.of(self._plan, 0, self._stream.vocab_size)
            tokens = self._level(1, space, store, journal, RisingFloor(self._min_freq, None), None)
            token_of_id = tokens.keys.astype(np.uint32)
        floor = RisingFloor(self._min_freq, self._max_f_grams)
        space_below = None if self._plan.token_table else space
        ids_below = token_of_id.astype(np.uint64)
        for length in range(2, self._max_n + 1):
            if not len(ids_below):
                break
            space = KeySpace.of(self._plan, len(ids_below), self._stream.vocab_size)
            below = (space_below, ids_below) if space_below else None
            level = self._level(length, space, store, journal, floor, below)
            levels.append(level)
            ids_below, space_below = level.keys[level.id_indices()], space
        return token_of_id, levels

    def _tokens_of_table(self) -> np.ndarray:
        kept = self._token_counts >= self._min_freq
        kept[self._separators] = False
        return np.flatnonzero(kept).astype(np.uint32)

    def _level(
        self,
        length: int,
        space: KeySpace,
        store: BlockStore,
        journal: CountJournal,
        floor: RisingFloor,
        below: tuple[KeySpace, np.ndarray] | None,
    ) -> Survivors:
        """Bring all blocks to level ``length`` and count it, or take what an interrupted count left of either."""
        last = length == self._max_n
        finished = journal.level(length)
        if not (finished and last):
            if below is None:
                self._fill(length, space, store)
            else:
                self._advance(length, space, store, journal, *below)
        if finished is None:
            finished = self._count_level(length, space, store, journal, floor)
            journal.save_level(length, finished)
        elif length > 1:
            floor.finish_level(finished.counts)
        return finished

    # Keys from tokens

    def _fill(self, length: int, space: KeySpace, store: BlockStore) -> None:
        id_of_token = None
        if space.num_ids:
            id_of_token = np.full(self._stream.vocab_size, NO_ID, np.uint32)
            id_of_token[self._tokens_of_table()] = np.arange(space.num_ids, dtype=np.uint32)

        def fill(block: int) -> int:
            start, size = self._span(block)
            ids = self._scratch("ids", size)
            self._ids_of_tokens(start, ids, id_of_token)
            carry = np.full(1, NO_ID, np.uint32)
            if start and space.num_ids:
                self._ids_of_tokens(start - 1, carry, id_of_token)
            self._write_keys(length, space, store, block, ids, carry[0])
            return size

        self._each(fill, self._blocks_below(length, store))

    def _blocks_below(self, length: int, store: BlockStore) -> list[int]:
        """The blocks that an interrupted count has not brought to level ``length``; the others count as progress."""
        blocks = [block for block in range(self._plan.num_blocks) if store.level_of(block) < length]
        self._bar.update(self._plan.num_positions - sum(block_length(self._plan, block) for block in blocks))
        return blocks

    def _ids_of_tokens(self, start: int, ids: np.ndarray, id_of_token: np.ndarray | None) -> None:
        """Write the ids of the positions from ``start`` on into ``ids`` uint32 [L]; without a table, the tokens."""
        ids[:] = NO_ID
        for position, tokens in self._stream.read(start, start + len(ids)):
            target = ids[position - start : position - start + len(tokens)]
            if id_of_token is not None:
                ngram_count.map_tokens(tokens, id_of_token, target)
            else:
                target[:] = tokens
                target[np.isin(tokens, self._separators)] = NO_ID

    def _write_keys(
        self, length: int, space: KeySpace, store: BlockStore, block: int, ids: np.ndarray, carry: np.uint32
    ) -> None:
        content = store.room(block, space.num_partitions, space.dtype)
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
        store.write(length, block, content)

    # Keys from the level below

    def _advance(
        self,
        length: int,
        space: KeySpace,
        store: BlockStore,
        journal: CountJournal,
        below: KeySpace,
        ids_below: np.ndarray,
    ) -> None:
        """Replace every block's keys of the level below by its keys of level ``length``."""
        blocks = self._blocks_below(length, store)
        if not blocks:
            return
        table = IdTable.build(ids_below, below)
        carries = journal.carries(length)
        if carries is None:
            carries = self._carries(length - 1, store, below, table)
            journal.save_carries(length, carries)

        def advance(block: int) -> int:
            content = store.read(length - 1, block, below.dtype)
            in_order = self._scratch("in order of partitions", len(content.parts))
            ngram_count.ids_of_remainders(content.remainders, content.offsets, table.slot_bits, table.slots, in_order)
            ids = self._scratch("ids", len(content.parts))
            ngram_count.restore_positions(in_order, content.offsets, content.parts, ids)
            self._write_keys(length, space, store, block, ids, carries[block])
            return len(ids)

        self._each(advance, blocks)

    def _carries(self, length: int, store: BlockStore, space: KeySpace, table: IdTable) -> np.ndarray:
        """For each block, the id of the n-gram that ends just before it."""
        carries = np.full(self._plan.num_blocks, NO_ID, np.uint32)
        for block in range(self._plan.num_blocks - 1):
            found = store.last_remainder(length, block, space.dtype)
            if found is not None:
                carries[block + 1] = table.look_up(*found)
        return carries

    # Counting

    def _count_level(
        self, length: int, space: KeySpace, store: BlockStore, journal: CountJournal, floor: RisingFloor
    ) -> Survivors:
        self._local = threading.local()  # the passes over blocks are over: their buffers go
        store.release_buffers()
        pool = CandidatePool(floor, self._max_f_grams if length > 1 else None)
        sizes = store.partition_sizes(length, space.num_partitions)
        self._bar.update(self._plan.num_positions - int(sizes.sum()))  # positions where no candidate ends
        first = 0
        for last, size in _groups(sizes, space, self._plan):
            saved = journal.group(length, first)
            if saved is not None:
                pool.add(*saved)
                self._bar.update(size)
            elif self._plan.on_disk:
                of_group = CandidatePool(floor, self._max_f_grams if length > 1 else None)
                self._count_group(length, first, last, space, store, of_group)
                found = (*of_group.take(), of_group.num_candidates)
                journal.save_group(length, first, *found)
                pool.add(*found, raise_floor=False)
            else:
                self._count_group(length, first, last, space, store, pool)
            first = last
        self._local = threading.local()
        used_floor = floor.value
        keys, counts = pool.take()
        cut = floor.finish_level(counts) if length > 1 else 0
        return Survivors(space.num_ids, keys, counts, cut, pool.num_candidates, used_floor)

    def _count_group(
        self, length: int, first: int, last: int, space: KeySpace, store: BlockStore, pool: CandidatePool
    ) -> None:
        """Count partitions ``first:last`` into the pool."""

        def count(piece: Piece, row: int) -> int:
            table, distinct = self._fresh_table(space.dtype), 0
            table, distinct = self._add_to_table(piece, row, table, distinct)
            self._collect(piece.first + row, table, distinct, space, pool)
            return int((piece.stops[row] - piece.starts[row]).sum())

        table, distinct = None, 0
        for piece in store.pieces(length, first, last, space.num_partitions, space.dtype):
            if piece.complete:
                self._each(partial(count, piece), range(len(piece.starts)))
            else:  # one partition, with so many occurrences of something that it comes in pieces
                table = self._fresh_table(space.dtype) if table is None else table
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

    def _add_to_table(self, piece: Piece, row: int, table: np.ndarray, distinct: int) -> tuple[np.ndarray, int]:
        table, distinct = ngram_count.count_partition(
            piece.remainders, piece.starts[row], piece.stops[row], table, distinct
        )
        self._local.table = table
        return table, distinct

    def _collect(self, partition: int, table: np.ndarray, distinct: int, space: KeySpace, pool: CandidatePool) -> None:
        remainders, counts = ngram_count.collect_counts(table, pool.floor)
        keys = ngram_count.keys_of_remainders(
            remainders, partition, space.inverse, space.key_bits, space.remainder_bits
        )
        pool.add(keys, counts, distinct)

    # Threads

    def _span(self, block: int) -> tuple[int, int]:
        return block * self._plan.block_positions, block_length(self._plan, block)

    def _scratch(self, name: str, size: int) -> np.ndarray:
        """uint32 [size] of this thread, the same memory for every block."""
        buffer = getattr(self._local, name, None)
        if buffer is None:
            buffer = page_array(self._plan.block_positions, np.uint32)
            setattr(self._local, name, buffer)
        return buffer[:size]

    def _each(self, work: Callable[[int], int], items: Iterable[int]) -> None:
        """Run ``work`` on every item, on all threads; it returns how many positions it did. Stops at an error."""
        running: set[Future[int]] = set()
        try:
            for item in items:
                running.add(self._pool.submit(work, item))
                if len(running) >= 2 * self._plan.num_threads:
                    running = self._reap(running, FIRST_COMPLETED)
            self._reap(running, "ALL_COMPLETED")
        except BaseException:
            for future in running:
                future.cancel()
            wait(running)
            raise

    def _reap(self, running: set[Future[int]], when: str) -> set[Future[int]]:
        done, pending = wait(running, return_when=when)
        for future in done:
            self._bar.update(future.result())
        return pending


def _groups(sizes: np.ndarray, space: KeySpace, plan: CountingPlan) -> Iterable[tuple[int, int]]:
    """Ends and sizes of runs of neighbouring partitions that are in memory together."""
    total, first = 0, 0
    for partition, size in enumerate(sizes.tolist()):
        if partition > first and (total + size) * space.dtype.itemsize > plan.group_bytes:
            yield partition, total
            total, first = 0, partition
        total += size
    yield len(sizes), total
