"""The README's table, of docs/results/recipe.json; and how tables write changes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scone.utils.text import markdown_table

TEXTS = {"wikipedia_test": "Wikipedia", "novels": "novels", "wikitext103_test": "WikiText-103", "c4": "C4"}
SUMMARY = {
    "plain": "plain",
    "rows-100k": "learned rows, 100 k f-grams",
    "over-encoding-1M": "over-encoding (hashed n-grams), 1 M rows",
    "rows-1M": "**learned rows, 1 M f-grams** (default)",
    "rows-3M": "learned rows, 3 M f-grams",
    "plain-2x-flops": "plain with twice the FLOPs",
}
"""The six runs of the README, of screen 4, and what they are called there."""


def mean_perplexity(run: Mapping[str, Any]) -> float:
    """The geometric mean over the four texts."""
    return math.exp(sum(run["tests"][text]["loss"] for text in TEXTS) / len(TEXTS))


def runs_of(report: Mapping[str, Any], screen: str) -> dict[str, Any]:
    """The runs of a screen by name; several seeds of one are one, with the mean of each loss."""
    seeds: dict[str, list[Mapping[str, Any]]] = {}
    for name, run in report["screens"][screen]["runs"].items():
        seeds.setdefault(name.partition("-seed")[0], []).append(run)
    return {name: _mean(runs) for name, runs in seeds.items()}


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = {text: statistics.fmean(run["tests"][text]["loss"] for run in runs) for text in runs[0]["tests"]}
    tests = {text: {"loss": loss, "perplexity": math.exp(loss)} for text, loss in losses.items()}
    return {**runs[0], "tests": tests, "seeds": len(runs), "means": [mean_perplexity(run) for run in runs]}


def recipe_table(report: Mapping[str, Any]) -> str:
    """The README's runs: costs, perplexities, and the change of their mean from plain's."""
    runs = runs_of(report, "4")
    plain = runs["plain"]
    lines = []
    for run, name in SUMMARY.items():
        costs = ("inference_flops_per_token", "training_flops_per_token")
        cells = [f"{runs[run]['cost'][cost] / plain['cost'][cost]:.2f}×" for cost in costs]
        cells += [f"{runs[run]['tests'][text]['perplexity']:.1f}" for text in TEXTS]
        change = "–" if run == "plain" else percent(mean_perplexity(runs[run]) / mean_perplexity(plain) - 1)
        if run != "plain" and runs[run]["seeds"] > 1:
            change += f" ± {100 * statistics.stdev(runs[run]['means']) / mean_perplexity(plain):.1f}"
        lines.append([name, *cells, change])
    head = ["", "inference FLOPs", "training FLOPs", *TEXTS.values(), "mean of four, to plain"]
    seeds = f"one seed, or the mean of several where ± is their standard deviation (plain: {plain['seeds']})"
    note = f"Perplexity after {plain['tokens'] / 1e6:.0f} M training tokens; 4 layers × 256; {seeds}; 4 × H100."
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def percent(change: float) -> str:
    """A share as signed per cent, with a minus sign that is one."""
    return f"{100 * change:+.1f} %".replace("-", "−")


def nats(change: float) -> str:
    """A change of a loss; one that rounds to nothing has no sign."""
    text = f"{change:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text
