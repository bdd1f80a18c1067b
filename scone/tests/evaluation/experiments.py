"""A made-up experiment of the form that experiments/run.py writes: losses follow a formula, so answers are known."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
TESTS = ["validation", "novels", "news"]
BASE = {"model.hidden_size": 8, "model.f_gram.num_hidden_layers": 2, "model.learned_rows": 0, "data.max_f_grams": 1000}
PLAIN = {"model.use_f_gram_embeddings": False}
ROWS = {"model.f_gram.num_hidden_layers": 0, "model.learned_rows": 1000}


def module(name: str) -> Any:
    """One of the repository's own, from benchmarks/ or experiments/; skips where only the package is installed."""
    folders = [REPOSITORY / "benchmarks", REPOSITORY / "experiments"]
    if not folders[0].is_dir():
        pytest.skip("benchmarks/ and experiments/ are in the repository, and this is an installed package")
    sys.path[:0] = [str(folder) for folder in folders if str(folder) not in sys.path]
    return importlib.import_module(name)


def run(name, loss, changes, inference=1e6, training=1e12, seed=1, tokens=10_000) -> dict[str, Any]:
    """One run's JSON: ``loss`` on the first test, 0.1 and 0.2 more on the others."""
    losses = [(test, loss + index / 10) for index, test in enumerate(TESTS)]
    tests = {test: {"loss": each, "perplexity": math.exp(each), "num_predicted": 1000} for test, each in losses}
    cost = {"inference_flops_per_token": inference, "training_flops_per_token": training / tokens}
    log = [{"step": 5, "eval_loss": loss + 1.0}, {"step": 10, "eval_loss": loss + 0.5}]
    facts = {"run": name, "changes": changes, "finished": True, "seed": seed, "steps": 10, "tokens": tokens}
    facts |= {"train_seconds": 5.0, "parameters": {"resident": 100, "training_only": 8500, "table": 8000}}
    return facts | {"cost": cost | {"training_flops": training}, "tests": tests, "log": log}


def experiment() -> dict[str, Any]:
    """Plain falls by 0.1 nats with each doubling of its budget; ours, peers, a control and an unfinished run."""
    runs = {
        "plain-seed1": run("plain", 4.0 - 0.01, PLAIN),
        "plain-seed2": run("plain", 4.0 + 0.01, PLAIN | {"training.seed": 2}, seed=2),
        "plain-2x-steps": run("plain-2x-steps", 3.9, PLAIN, training=2e12, tokens=20_000),
        "plain-4x-steps": run("plain-4x-steps", 3.8, PLAIN, training=4e12, tokens=40_000),
        "plain-2x-deep": run("plain-2x-deep", 3.88, PLAIN, inference=2e6, training=2e12),
        "model-100": run("model-100", 3.95, {"data.max_f_grams": 100}, training=1.5e12),
        "model-1k": run("model-1k", 3.92, {}, training=2e12),
        "rows-100": run("rows-100", 3.9, ROWS | {"model.learned_rows": 100, "data.max_f_grams": 100}),
        "rows-1k": run("rows-1k", 3.86, ROWS),
        "both-1k": run("both-1k", 3.83, {"model.learned_rows": 1000}, training=2e12),
        "over-encoding-1k": run("over-encoding-1k", 3.89, {"model.over_encoding_rows": 1000}),
        "rows-1k-shuffled": run("rows-1k-shuffled", 3.7, ROWS | {"model.control": "shuffled"}),
        "late": {"run": "late", "changes": {}, "finished": False, "seed": 1, "steps": 3, "max_steps": 10, "log": []},
    }
    machine = {"processor": "P", "cores": 2, "accelerators": ["G"]}
    facts = {"experiment": {"tests": TESTS, "base": BASE}, "machine": machine, "commit": "0123456789abcdef"}
    return facts | {"runs": runs}
