"""The counters that `bench_counting.py` compares, each in a process of its own: ours, Counter, Polars, DuckDB, Spark.

    python benchmarks/counting_engines.py '{"engine": "polars", "tokens": "tokens.npy", …}'

prints one JSON object: seconds, peak_bytes (growth of resident memory), answer (a fingerprint of the ranked f-grams).
All give the same: the S most frequent n-grams of 2 … N tokens without separators, ranked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import PeakMemory

from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.files import fingerprint_of

Ranked = list[tuple[np.ndarray, np.ndarray]]  # for each length, tokens [K, n] and counts [K], a superset of the first S


@dataclass(frozen=True)
class Task:
    """What to count. ``limit`` is the number of tokens to take from the file (None: all)."""

    engine: str
    tokens: str
    vocab_size: int
    separator: int
    max_n: int
    max_f_grams: int
    limit: int | None = None
    memory_budget_bytes: int | None = None
    work_dir: str | None = None

    def array(self) -> np.ndarray:
        """The tokens, mapped."""
        return np.load(self.tokens, mmap_mode="r")[: self.limit]


def count_with_ours(task: Task) -> Callable[[], FGramVocabulary]:
    """The local engine on all cores; its compiled code is loaded before the clock starts."""
    options: dict[str, Any] = {
        "vocab_size": task.vocab_size,
        "max_n": task.max_n,
        "max_f_grams": task.max_f_grams,
        "separator_ids": [task.separator],
        "quiet": True,
    }
    tokens = task.array()
    for budget in (None, 2_000_000):  # both ways of working
        count_f_grams([np.array(tokens[:20_000])], **(options | {"max_f_grams": 100}), memory_budget_bytes=budget)
    budget = task.memory_budget_bytes
    if budget is None:
        tokens = np.array(tokens)
    return lambda: count_f_grams([tokens], memory_budget_bytes=budget, work_dir=task.work_dir, **options).vocabulary


def count_with_counter(task: Task) -> Callable[[], Ranked]:
    """`collections.Counter`, one length after another (all at once do not fit in memory)."""
    tokens = task.array().tolist()

    def run() -> Ranked:
        found = []
        for n in range(2, task.max_n + 1):
            counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
            numbers = np.fromiter(counts.values(), np.int64, len(counts))
            floor = _floor(numbers, task.max_f_grams + _with_separator(counts, task.separator))
            kept = [(g, c) for g, c in counts.items() if c >= floor and task.separator not in g]
            found.append((np.array([g for g, _ in kept]).reshape(-1, n), np.array([c for _, c in kept])))
        return found

    return run


def _with_separator(counts: Counter[tuple[int, ...]], separator: int) -> int:
    return sum(separator in gram for gram in counts)


def _floor(numbers: np.ndarray, wanted: int) -> int:
    """The count of the ``wanted``-th most frequent, or 0."""
    return int(np.partition(numbers, len(numbers) - wanted)[len(numbers) - wanted]) if len(numbers) > wanted else 0


def _columns(task: Task, tokens: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """For each length the n-grams without separators, packed four tokens to a 64-bit column: the peers' best form."""
    assert task.vocab_size <= 2**16
    tokens = np.array(tokens, np.uint64)
    whole = tokens != task.separator
    packed, good = tokens, whole
    for n in range(2, task.max_n + 1):
        good = good[:-1] & whole[n - 1 :]
        if n <= 4:
            packed = (packed[:-1] << np.uint64(16)) | tokens[n - 1 :]
            yield n, {"a": packed[good]}
        else:
            assert n == 5, "five tokens are the most that two columns are made for"
            yield n, {"a": packed[:-1][good], "b": tokens[4:][good].astype(np.uint16)}


def _unpacked(n: int, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens int64 [K, n] of packed columns."""
    last = [columns["b"].astype(np.int64)] if "b" in columns else []
    in_first = n - len(last)
    first = [
        (columns["a"] >> np.uint64(16 * place) & np.uint64(0xFFFF)).astype(np.int64)
        for place in reversed(range(in_first))
    ]
    return np.stack(first + last, axis=1)


def count_with_polars(task: Task) -> Callable[[], Ranked]:
    """Polars group-by, streaming over all cores."""
    import polars

    tokens = np.array(task.array())

    def run() -> Ranked:
        found = []
        for n, columns in _columns(task, tokens):
            names = list(columns)
            counted = polars.LazyFrame(columns).group_by(names).agg(polars.len().alias("n")).collect(engine="streaming")
            floor = _floor(counted["n"].to_numpy(), task.max_f_grams)
            kept = counted.filter(polars.col("n") >= floor)
            found.append((_unpacked(n, {c: kept[c].to_numpy() for c in names}), kept["n"].to_numpy()))
        return found

    return run


def count_with_duckdb(task: Task) -> Callable[[], Ranked]:
    """DuckDB group-by on all cores."""
    import duckdb
    import pyarrow

    tokens = np.array(task.array())

    def run() -> Ranked:
        found = []
        with duckdb.connect() as connection:
            for n, columns in _columns(task, tokens):
                names = ", ".join(columns)
                connection.register("grams", pyarrow.table(columns))
                connection.execute(
                    f"CREATE OR REPLACE TEMP TABLE t AS SELECT {names}, count(*) n FROM grams GROUP BY ALL"
                )
                limit = f"SELECT n FROM t ORDER BY n DESC LIMIT {task.max_f_grams}"
                kept = connection.execute(f"SELECT * FROM t WHERE n >= (SELECT min(n) FROM ({limit}))").fetchnumpy()
                found.append((_unpacked(n, {c: kept[c] for c in columns}), kept["n"]))
        return found

    return run


def count_with_spark(task: Task) -> Callable[[], FGramVocabulary]:
    """Spark in local mode with our tasks, already started."""
    from common import REPOSITORY
    from pyspark.sql import SparkSession

    from scone.tokenization.counting.spark import count_f_grams_on_spark

    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    spark = SparkSession.builder.master("local[*]").config("spark.ui.enabled", "false").getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    spark.range(1).count()
    tokens = task.array()
    assert isinstance(tokens, np.memmap)
    return lambda: (
        count_f_grams_on_spark(
            spark,
            token_arrays=[tokens],
            vocab_size=task.vocab_size,
            max_n=task.max_n,
            max_f_grams=task.max_f_grams,
            separator_ids=[task.separator],
            slice_tokens=1_000_000,
        ).vocabulary
    )


ENGINES: dict[str, Callable[[Task], Callable[[], FGramVocabulary | Ranked]]] = {
    "ours": count_with_ours,
    "counter": count_with_counter,
    "polars": count_with_polars,
    "duckdb": count_with_duckdb,
    "spark": count_with_spark,
}


def _ranked(task: Task, found: Ranked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, lengths and counts of the first f-grams, in rank order."""
    tokens = np.full((sum(len(counts) for _, counts in found), task.max_n), -1, np.int64)
    start = 0
    for grams, counts in found:
        tokens[start : start + len(counts), : grams.shape[1]] = grams
        start += len(counts)
    counts = np.concatenate([counts for _, counts in found]).astype(np.int64)
    lengths = (tokens >= 0).sum(axis=1)
    order = np.lexsort((*tokens.T[::-1], lengths, -counts))[: task.max_f_grams]
    return tokens[order], lengths[order], counts[order]


def main() -> None:
    """Run the task that the first argument describes; the clock stops when the f-grams are ranked."""
    task = Task(**json.loads(sys.argv[1]))
    run = ENGINES[task.engine](task)
    with PeakMemory() as peak:
        start = time.perf_counter()
        found = run()
        ranked = _ranked(task, found) if isinstance(found, list) else None
        seconds = time.perf_counter() - start
    if ranked is not None:  # made into a vocabulary to be compared, which no engine's time has to pay for
        tokens, lengths, counts = ranked
        grams = [tuple(gram[:length]) for gram, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        sizes = {"vocab_size": task.vocab_size, "max_n": task.max_n}
        found = FGramVocabulary.from_ranked(grams, counts, **sizes, separator_ids=[task.separator])
    answer = fingerprint_of(found.fingerprint, np.ascontiguousarray(found.counts))
    print(json.dumps({"seconds": seconds, "peak_bytes": peak.growth_bytes, "answer": answer}))


if __name__ == "__main__":
    main()
