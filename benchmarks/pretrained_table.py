"""Tables of docs/results/pretrained.json (experiments/pretrained.yaml): each text's bits per byte, and changes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from ladder_table import NAMES
from recipe_table import percent

from scone.utils.text import markdown_table

PAIRS = {
    "tuned-rows-1e-4": "tuned-1e-4",
    "tuned-rows-3e-4": "tuned-3e-4",
    "lora-rows-3e-4": "lora-3e-4",
    "lora-rows-1e-3": "lora-1e-3",
    "frozen-rows-slower": "untouched",
    "frozen-rows": "untouched",
    "frozen-rows-faster": "untouched",
    "frozen-both": "untouched",
}
"""A run with rows → the run that differs from it in them alone."""


def pretrained_table(report: Mapping[str, Any], view: str) -> str:
    """``texts``: bits per byte and perplexity. ``changes``: of perplexity, to the model before it was trained.
    ``rows``: of perplexity, by the rows alone. ``course``: losses on the validation text, also of runs without a test.
    """
    if view == "course":
        return _course(report["runs"])
    runs = {name: run for name, run in report["runs"].items() if run.get("finished", True)}
    tests = report["experiment"]["tests"]
    head = ["", *(NAMES[test] for test in tests)]
    if view == "texts":
        lines = [[f"`{name}`", *(_level(run["tests"][test]) for test in tests)] for name, run in runs.items()]
        machine = f"{len(report['machine']['accelerators'])} × {report['machine']['accelerators'][0]}"
        tokens = max(run["tokens"] for run in runs.values()) / 1e6
        note = (
            f"Bits per byte (perplexity per token) after {tokens:.1f} M tokens of court opinions; one seed; {machine}."
        )
    else:
        pairs = PAIRS if view == "rows" else dict.fromkeys(runs, "untouched")
        lines = [
            [f"`{name}`", *(_change(runs[name], runs[base], test) for test in tests)]
            for name, base in pairs.items()
            if name in runs and base in runs and name != base
        ]
        note = "Change of perplexity, ± twice its standard error over the texts' windows."
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _course(runs: Mapping[str, Any]) -> str:
    losses = {
        name: {each["step"]: each["eval_loss"] for each in run["log"] if "eval_loss" in each}
        for name, run in runs.items()
    }
    before = next(iter(losses.pop("untouched").values()))
    steps = sorted({step for each in losses.values() for step in each})
    lines = [[f"`{name}`", *(_loss(each, step) for step in steps)] for name, each in losses.items()]
    note = f"Nats a token on other court opinions; `untouched`: {before:.3f}."
    return f"{markdown_table(['steps', *(f'{step:,}' for step in steps)], lines)}\n\n*{note}*\n"


def _level(test: Mapping[str, Any]) -> str:
    return f"{test['bits_per_byte']:.4f} ({test['perplexity']:.2f})"


def _loss(losses: Mapping[int, float], step: int) -> str:
    return f"{losses[step]:.3f}" if step in losses else ""


def _change(run: Mapping[str, Any], base: Mapping[str, Any], test: str) -> str:
    """The windows are the same, so what they differ in by themselves does not count."""
    mine, others = run["tests"][test], base["tests"][test]
    gaps = [a - b for a, b in zip(mine["block_losses"], others["block_losses"], strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{percent(math.exp(mine['loss'] - others['loss']) - 1)} ± {200 * error:.1f}"
