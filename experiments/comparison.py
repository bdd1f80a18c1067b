"""The table of an experiment's JSON: each run's perplexities, means over seeds, and what it computed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a run. FLOPs are those of the first run (plain) times; unfinished runs stand last."""
    tests = result["experiment"]["tests"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, run in result["runs"].items():
        if run.get("finished", True):
            groups.setdefault(run.get("run", name), []).append(run)
    head = ["run", "seeds", *tests, "inference FLOPs", "training FLOPs", "training s"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    reference = next(iter(groups.values()))[0]["cost"] if groups else {}
    for name, runs in groups.items():
        cells = [spread([run["tests"][test]["perplexity"] for run in runs]) for test in tests]
        cost = runs[0]["cost"]
        for kind in ("inference_flops_per_token", "training_flops"):
            cells.append(f"{cost[kind] / reference[kind]:.2f}×")
        cells.append(f"{statistics.mean(run['train_seconds'] for run in runs):.0f}")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    for name, run in result["runs"].items():
        if not run.get("finished", True):
            lines.append(f"\nunfinished: {name}, {run['steps']} of {run['max_steps']} steps, {last_losses(run)}")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """The mean, and ± half the range where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {(max(values) - min(values)) / 2:.2f}"


def last_losses(run: dict[str, Any]) -> str:
    """The newest validation loss of a run's log."""
    measured = [entry for entry in run["log"] if "eval_loss" in entry]
    return f"validation loss {measured[-1]['eval_loss']:.3f} at step {measured[-1]['step']}" if measured else "no loss"
