"""Counting f-grams: ours against Counter, Polars, DuckDB, Spark on real tokens; memory and cost growth on Zipf tokens.

Real tokens: the English Wikipedia of the shared data with its GPT-2 tokenizer, or any array given by --tokens; without
either, synthetic ones. Every run is a process of its own; all engines must give the same: the S most frequent n-grams
of 2 … N tokens without separators, ranked. The ranking by gain is compared with that by frequency.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import REPOSITORY, PeakMemory, Report, has_peer, in_child
from workloads import SEPARATOR as GPT2_SEPARATOR
from workloads import VOCAB_SIZE as GPT2_SIZE
from workloads import gpt2_tokens

from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.files import fingerprint_of

MAX_N = 5
TOKENS_PER_F_GRAM = 43  # S = 1 M for the 43 M tokens of the full corpus, in proportion for the quick one


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside --quick and --json."""
    parser.add_argument("--tokens", type=Path, metavar="FILE.npy", help="GPT-2 tokens to count, separated by 50256")
    parser.add_argument("--work_dir", type=Path, help="where token arrays and temporary files go (default: system's)")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=["counter", "polars", "duckdb", "gain", "spark", "growth"]
    )


def main() -> None:
    """Measure, print the table, write the JSON; or be the process of one engine."""
    if sys.argv[1:2] == ["--engine"]:
        print(json.dumps(run_engine(Task(**json.loads(sys.argv[2])))))
        return
    report = Report.from_arguments("counting", __doc__, add_options=add_options)
    skip, work_dir = report.config["skip"], report.config["work_dir"]
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="bench-counting-") as folder:
        tokens, report.config["source"] = gpt2_tokens(1 if report.quick else None, report.config["tokens"])
        np.save(Path(folder) / "tokens.npy", tokens)
        compare(report, Path(folder) / "tokens.npy", skip)
        if "growth" not in skip:
            growth(report, Path(folder))
    report.finish()


def compare(report: Report, tokens: Path, skip: list[str]) -> None:
    """Ours against each peer on the same tokens, in turn."""
    limit = min(len(np.load(tokens, mmap_mode="r")), 1_500_000 if report.quick else 1 << 62)
    task = {
        "tokens": str(tokens),
        "limit": limit,
        "vocab_size": GPT2_SIZE,
        "separator": GPT2_SEPARATOR,
        "max_n": MAX_N,
        "max_f_grams": limit // TOKENS_PER_F_GRAM,
    }
    report.config |= {"num_tokens": limit, "max_n": MAX_N, "max_f_grams": task["max_f_grams"]}
    peers = [name for name in ("polars", "duckdb") if name not in skip and has_peer(name)]
    peers += [] if "counter" in skip else ["counter"]
    rounds = 1 if report.quick else 3
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *peers)}
    for turn in range(rounds):
        for name in runs:
            if turn == 0 or name != "counter":
                runs[name].append(measured(name, task))
    ours = _median(runs["ours"], limit)
    report.add("tokens_per_second", "tokens/s", ours, ratio=None)
    report.add("peak_bytes_in_memory", "B", runs["ours"][0]["peak_bytes"], ratio=None)
    for name in peers:
        same_answer(runs["ours"][0], runs[name][0], name)
        peer = _median(runs[name], limit)
        target = 50.0 if name == "counter" else 3.0
        report.add(f"speed_vs_{name}", "tokens/s", ours, peer, name, target=target)
        report.add(f"peak_bytes_{name}", "B", runs["ours"][0]["peak_bytes"], peer=runs[name][0]["peak_bytes"])
    if "gain" not in skip:
        by_gain(report, task)
    if "spark" not in skip and has_peer("pyspark") and shutil.which("java"):
        piece = min(limit, 300_000 if report.quick else 10_000_000)
        task |= {"limit": piece, "max_f_grams": piece // TOKENS_PER_F_GRAM}
        here, spark = measured("ours", task), measured("spark", task)
        same_answer(here, spark, "spark")
        speeds = (piece / here["seconds"], piece / spark["seconds"])
        report.add("speed_vs_spark_local", "tokens/s", *speeds, "spark local", target=3.0)


def by_gain(report: Report, task: dict[str, Any]) -> None:
    """What the ranking by gain costs beside that by frequency, in turn, of n-grams that occur three times."""
    task = task | {"min_freq": 3}
    runs: dict[str, list[dict[str, Any]]] = {"gain": [], "frequency": []}
    for _ in range(1 if report.quick else 3):
        for ranking, found in runs.items():
            found.append(measured("ours", task | {"ranking": ranking}))
    for name, unit, most in (("seconds", "s", 5.0), ("peak_bytes", "B", 2.0)):
        ours, peer = (statistics.median(run[name] for run in runs[ranking]) for ranking in runs)
        report.add(f"{name}_by_gain", unit, ours, peer, "by frequency", most=most)


def growth(report: Report, folder: Path) -> None:
    """The cost of a token and the peak memory as a corpus outgrows the memory budget."""
    large, small = (10_000_000, 1_000_000) if report.quick else (1_000_000_000, 40_000_000)
    budget = (40 << 20) if report.quick else (2 << 30)
    task = {
        "tokens": str(zipf_tokens(folder / "zipf.npy", large)),
        "vocab_size": GPT2_SIZE,
        "separator": GPT2_SEPARATOR,
        "max_n": MAX_N,
        "max_f_grams": 50_000 if report.quick else 1_000_000,
        "memory_budget_bytes": budget,
        "work_dir": str(folder / "work"),
    }
    report.config |= {"growth_tokens": [small, large], "growth_budget_bytes": budget}
    smaller = [measured("ours", task | {"limit": small}) for _ in range(2)]
    larger = measured("ours", task)
    smaller.append(measured("ours", task | {"limit": small}))
    seconds_small, seconds_large = 1 / _median(smaller, small), larger["seconds"] / large
    report.add("tokens_per_second_zipf_large", "tokens/s", 1 / seconds_large, ratio=None)
    peer = (seconds_small, f"ours at {small / 1e6:.0f} M")
    report.add("cost_growth", "s/token", seconds_large, *peer, most=1.5)
    report.add("memory_vs_budget", "B", larger["peak_bytes"], budget, "budget", most=1.05)


def measured(engine: str, task: dict[str, Any]) -> dict[str, Any]:
    """One run of one engine in its own process."""
    result = in_child(Path(__file__), ["--engine", json.dumps(task | {"engine": engine})])
    seconds, peak = result["seconds"], result["peak_bytes"] / 2**20
    print(f"  {engine:8} {seconds:8.2f} s  {peak:8.0f} MiB", file=sys.stderr, flush=True)
    return result


def same_answer(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    """A comparison of different answers would mean nothing."""
    assert ours["answer"] == theirs["answer"], f"{name} found other f-grams: {theirs['answer']} != {ours['answer']}"


def _median(runs: list[dict[str, Any]], num_tokens: int) -> float:
    """Tokens per second."""
    return num_tokens / statistics.median(run["seconds"] for run in runs)


def zipf_tokens(path: Path, length: int) -> Path:
    """Independent tokens with probabilities ∝ 1 / rank over GPT-2's vocabulary; the same at every call."""
    probabilities = 1 / np.arange(1, GPT2_SIZE)
    edges = np.cumsum(probabilities) / probabilities.sum()
    token_of = np.searchsorted(edges, (np.arange(1 << 22) + 0.5) / (1 << 22)).astype(np.uint16)
    generator = np.random.default_rng(0)
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(length,))
    for start in range(0, length, 1 << 24):
        stop = min(start + (1 << 24), length)
        tokens[start:stop] = token_of[generator.integers(0, 1 << 22, stop - start, np.uint32)]
    tokens.flush()
    return path


# ---------------------------------------------------------------------- the engines, each in a process of its own

Ranked = list[tuple[np.ndarray, np.ndarray]]  # for each length, tokens [K, n] and counts [K], a superset of the first S


@dataclass(frozen=True)
class Task:
    """What an engine counts. ``limit`` is the number of tokens to take from the file (None: all)."""

    engine: str
    tokens: str
    vocab_size: int
    separator: int
    max_n: int
    max_f_grams: int
    limit: int | None = None
    memory_budget_bytes: int | None = None
    work_dir: str | None = None
    ranking: str = "frequency"  # what the other engines do
    min_freq: int = 1

    def array(self) -> np.ndarray:
        return np.load(self.tokens, mmap_mode="r")[: self.limit]


def count_with_ours(task: Task) -> Callable[[], FGramVocabulary]:
    """The local engine on all cores; its compiled code is loaded before the clock starts."""
    options: dict[str, Any] = {
        "vocab_size": task.vocab_size,
        "max_n": task.max_n,
        "max_f_grams": task.max_f_grams,
        "separator_ids": [task.separator],
        "ranking": task.ranking,
        "min_freq": task.min_freq,
        "quiet": True,
    }
    tokens = task.array()
    for budget in (None, 2_000_000)[: 1 if task.ranking == "gain" else 2]:  # both ways of working
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
            floor = _floor(numbers, task.max_f_grams + sum(task.separator in gram for gram in counts))
            kept = [(g, c) for g, c in counts.items() if c >= floor and task.separator not in g]
            found.append((np.array([g for g, _ in kept]).reshape(-1, n), np.array([c for _, c in kept])))
        return found

    return run


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
            ranking="frequency",
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


def run_engine(task: Task) -> dict[str, Any]:
    """``seconds`` until the f-grams are ranked, ``peak_bytes`` (growth of resident memory), a hash ``answer``."""
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
    return {"seconds": seconds, "peak_bytes": peak.growth_bytes, "answer": answer}


def _ranked(task: Task, found: Ranked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, lengths and counts of the first f-grams, in rank order."""
    tokens = np.concatenate(
        [np.pad(grams, ((0, 0), (0, task.max_n - grams.shape[1])), constant_values=-1) for grams, _ in found]
    )
    counts = np.concatenate([counts for _, counts in found]).astype(np.int64)
    lengths = (tokens >= 0).sum(axis=1)
    order = np.lexsort((*tokens.T[::-1], lengths, -counts))[: task.max_f_grams]
    return tokens[order], lengths[order], counts[order]


if __name__ == "__main__":
    main()
