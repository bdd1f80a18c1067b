"""Counting f-grams: ours against Counter, Polars, DuckDB, Spark on real tokens; memory and cost growth on Zipf tokens.

Real tokens: the English Wikipedia of the shared data with its GPT-2 tokenizer, or any array given by --tokens; without
either, synthetic ones. Every run is a process of its own; all engines must give the same ranked f-grams.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Report, has_peer, in_child
from workloads import SEPARATOR as GPT2_SEPARATOR
from workloads import VOCAB_SIZE as GPT2_SIZE
from workloads import gpt2_tokens

ENGINES = Path(__file__).with_name("counting_engines.py")
MAX_N = 5
TOKENS_PER_F_GRAM = 43  # S = 1 M for the 43 M tokens of the full corpus, in proportion for the quick one


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside --quick and --json."""
    parser.add_argument("--tokens", type=Path, metavar="FILE.npy", help="GPT-2 tokens to count, separated by 50256")
    parser.add_argument("--work_dir", type=Path, help="where token arrays and temporary files go (default: system's)")
    parser.add_argument("--skip", nargs="+", default=[], choices=["counter", "polars", "duckdb", "spark", "growth"])


def main() -> None:
    """Measure, print the table, write the JSON."""
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
    if "spark" not in skip and has_peer("pyspark") and shutil.which("java"):
        piece = min(limit, 300_000 if report.quick else 10_000_000)
        task |= {"limit": piece, "max_f_grams": piece // TOKENS_PER_F_GRAM}
        here, spark = measured("ours", task), measured("spark", task)
        same_answer(here, spark, "spark")
        speeds = (piece / here["seconds"], piece / spark["seconds"])
        report.add("speed_vs_spark_local", "tokens/s", *speeds, "spark local", target=3.0)


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
    result = in_child(ENGINES, [json.dumps(task | {"engine": engine})])
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


if __name__ == "__main__":
    main()
