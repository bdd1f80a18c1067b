"""The same count on a cluster: Apache Spark adds up what each slice of the corpus holds; the ranking is the local one.

Level by level as on one machine: every task keys the n-grams of its slice (it is handed the survivors of the levels
below), Spark sums equal keys, and the first S of the level come back to the driver, which raises the floor exactly as
the local engine does. The survivors of all levels (16 bytes each) must fit the driver and every executor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scone.configs.schema import DEFAULT_RANKING
from scone.tokenization.counting.blocks import file_offset
from scone.tokenization.counting.count import CountResult, result_of_levels
from scone.tokenization.counting.levels import CandidatePool, FrequentNGrams, RisingFloor
from scone.tokenization.counting.plan import CountTask
from scone.utils.errors import SconeError

if TYPE_CHECKING:
    import pyarrow
    from pyspark.sql import DataFrame, SparkSession

_COUNTS_SCHEMA = "key long, number long"
_MAX_IDS = 3_037_000_499  # their square is the largest that fits Spark's signed 64-bit integers


def count_f_grams_on_spark(
    spark: SparkSession,
    *,
    token_arrays: Sequence[np.memmap],
    vocab_size: int,
    max_n: int,
    min_freq: int = 1,
    max_f_grams: int | None = None,
    separator_ids: Iterable[int] = (),
    slice_tokens: int = 4_000_000,
    tokenizer_fingerprint: str = "",
    ranking: str = DEFAULT_RANKING,
) -> CountResult:
    """What ``counting.count_f_grams`` returns for the same tokens, counted by ``spark``.

    Args:
        token_arrays: memory-mapped token arrays (token files) under paths that all executors can read.
        slice_tokens: tokens of one task.

    Executors need this package and its requirements. Raises SconeError for tokens outside the vocabulary and arrays
    that are not files.
    """
    started = time.perf_counter()
    separators = sorted({int(separator) for separator in separator_ids})
    task = CountTask(vocab_size, max_n, min_freq, max_f_grams, tuple(separators), tokenizer_fingerprint, ranking)
    corpus = _sliced(spark, token_arrays, slice_tokens, task.longest)
    tokens, numbers = _collected(_summed(corpus, _token_counts))
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise SconeError(
            f"found token {outside[0]}; expected tokens 0 … {vocab_size - 1}; count with the vocab_size of "
            "the tokenizer that made the corpus"
        )
    token_of_id = np.sort(tokens[(numbers >= min_freq) & ~np.isin(tokens, separators)]).astype(np.uint32)
    levels = _levels(spark, corpus, task, token_of_id)
    token_counts = np.zeros(vocab_size, np.int64)
    token_counts[tokens] = numbers
    return result_of_levels(task, token_of_id, levels, token_counts, started)


def _levels(spark: SparkSession, corpus: DataFrame, task: CountTask, token_of_id: np.ndarray) -> list[FrequentNGrams]:
    """FrequentNGrams of lengths 2 … ``task.longest``, each counted by one Spark job."""
    from pyspark import StorageLevel

    levels: list[FrequentNGrams] = []
    floor = RisingFloor(task.min_freq, task.max_candidates)
    keys_below = [token_of_id.astype(np.int64)]
    for _length in range(2, task.longest + 1):
        num_ids = len(keys_below[-1])
        if num_ids == 0 or task.max_candidates == 0:
            break
        if num_ids > _MAX_IDS:
            raise SconeError(f"found {num_ids:,} n-grams of one length; expected at most {_MAX_IDS:,}; raise min_freq")
        known = spark.sparkContext.broadcast(keys_below)
        counted = _summed(corpus, partial(_n_gram_counts, known)).persist(StorageLevel.DISK_ONLY)
        num_candidates = counted.count()
        first = counted.where(counted["number"] >= floor.value)
        if task.max_candidates is not None:
            first = first.orderBy(counted["number"].desc(), counted["key"]).limit(task.max_candidates)
        found, numbers = _collected(first)
        counted.unpersist()
        known.unpersist()
        pool = CandidatePool(floor, task.max_candidates)
        pool.add(found.astype(np.uint64), numbers.astype(np.uint64), num_candidates)
        used_floor = floor.value
        keys, counts = pool.take()
        levels.append(FrequentNGrams(num_ids, keys, counts, floor.finish_level(counts), num_candidates, used_floor))
        keys_below.append(keys[levels[-1].id_indices()].astype(np.int64))
    return levels


def _summed(corpus: DataFrame, partial_counts: Any) -> DataFrame:
    """Columns ``key`` and ``number``: the partial counts of all tasks, added up by Spark."""
    return corpus.mapInArrow(partial_counts, _COUNTS_SCHEMA).groupBy("key").agg({"number": "sum"}).toDF("key", "number")


def _collected(counted: DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Keys and numbers int64 [K] of a frame of ``_summed``, on the driver."""
    table = counted.toArrow()
    return table["key"].to_numpy(), table["number"].to_numpy()


def _sliced(spark: SparkSession, arrays: Sequence[np.memmap], slice_tokens: int, max_n: int) -> DataFrame:
    rows = []
    for array in arrays:
        offset_bytes = file_offset(array)
        if offset_bytes is None or array.ndim != 1:
            raise SconeError(
                "found a token array that is not a whole memory-mapped file; expected 1-D numpy.memmap arrays; open "
                "the token files under a path that all executors share"
            )
        path = str(Path(str(array.filename)).resolve())
        for start in range(0, len(array), slice_tokens):
            stop = min(start + slice_tokens, len(array))
            rows.append((path, array.dtype.str, offset_bytes, start, stop, min(start, max_n - 1)))
    schema = "path string, dtype string, offset_bytes long, start long, stop long, lead long"
    slices = spark.createDataFrame(rows, schema)
    return slices.repartition(max(1, len(rows)), "path", "start")


# What runs on the executors


def _slices(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[tuple[np.ndarray, int]]:
    """The tokens of each slice, int64 [L]; and how many at the front are only context."""
    for batch in batches:
        for row in batch.to_pylist():
            first, path = row["start"] - row["lead"], row["path"]
            offset = row["offset_bytes"] + first * np.dtype(row["dtype"]).itemsize
            tokens = np.fromfile(path, row["dtype"], row["stop"] - first, offset=offset)
            if len(tokens) != row["stop"] - first:
                raise SconeError(
                    f"found {path} with too few tokens for {row['start']} … {row['stop']}; expected the file that the "
                    "driver sees; put token files on storage that all executors share"
                )
            yield tokens.astype(np.int64), row["lead"]


def _batch(keys: np.ndarray, numbers: np.ndarray) -> pyarrow.RecordBatch:
    import pyarrow

    columns = [pyarrow.array(keys.astype(np.int64)), pyarrow.array(numbers.astype(np.int64))]
    return pyarrow.RecordBatch.from_arrays(columns, names=["key", "number"])


def _token_counts(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    for tokens, lead in _slices(batches):
        yield _batch(*np.unique(tokens[lead:], return_counts=True))


def _n_gram_counts(known: Any, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Keys and counts of the level above ``known.value``, the keys (ascending, int64) of all levels that have ids."""
    for tokens, lead in _slices(batches):
        ids = _ids_of(tokens, known.value[0])
        for keys_of_level, keys_below in zip(known.value[1:], known.value, strict=False):
            ids = _ids_of(_keys(ids, len(keys_below)), keys_of_level)
        keys = _keys(ids, len(known.value[-1]))[lead:]
        yield _batch(*np.unique(keys[keys >= 0], return_counts=True))


def _keys(ids: np.ndarray, num_ids: int) -> np.ndarray:
    """The key of the n-gram that ends at each position, int64 [L]; -1 where prefix or suffix has no id."""
    keys = np.full(len(ids), -1, np.int64)
    whole = (ids[:-1] >= 0) & (ids[1:] >= 0)
    keys[1:][whole] = ids[:-1][whole] * num_ids + ids[1:][whole]
    return keys


def _ids_of(keys: np.ndarray, survivors: np.ndarray) -> np.ndarray:
    """The index of each key in ``survivors`` (ascending), int64 [L]; -1 where it is not there."""
    places = np.minimum(np.searchsorted(survivors, keys), len(survivors) - 1)
    return np.where(survivors[places] == keys, places, -1)
