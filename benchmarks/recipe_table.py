"""Tables of docs/results/recipe.json: runs of a screen beside its plain run, and where each gains or loses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

TEXTS = {"wikipedia_test": "Wikipedia", "novels": "novels", "wikitext103_test": "WikiText-103", "c4": "C4"}
PLAIN = {
    "1": ("1", "plain"),
    "2": ("1", "plain-modern-norm-muon"),
    "4": ("4", "plain"),
    "5": ("5", "epochs4-plain"),
    "6": ("6", "plain"),
}
"""The run that a screen's changes are measured against, after the screen that it was trained in."""
SUMMARY = {
    "plain": "plain",
    "rows-100k": "learned rows, 100 k f-grams",
    "over-encoding-1M": "over-encoding (hashed n-grams), 1 M rows",
    "rows-1M": "**learned rows, 1 M f-grams** (default)",
    "rows-3M": "learned rows, 3 M f-grams",
    "plain-2x-flops": "plain with twice the FLOPs",
}
"""The six runs of the README, of screen 4, and what they are called there."""
GROUPS = {
    "1": ("rows-x1", "rows-x0.1", "model-x1-stopped", "model-x1-own-tokens", "rows-x1-bare-gradient"),
    "4": ("rows-1M", "rows-3M", "over-encoding-1M", "both-own-tokens-1M"),
    "5": ("epochs4-rows", "epochs4-start-again", "epochs4-model-own-tokens"),
    "6": ("rows-1M", "rows-1M-classes", "counts-1M", "rows-1M-counts"),
}
"""By screen, the runs whose losses are shown by group. Groups depend on the screen's f-grams: compare within one."""


def recipe_table(report: Mapping[str, Any], view: str) -> str:
    """``summary``: the README's runs. ``screen_N``: all runs of a screen. ``groups_N``: change of loss by match.
    ``budgets``: the short runs of screen 3, each beside plain at its budget; ``passes``: those of screen 5.
    ``validation_N``: losses on the validation text in the course of the runs of screen N, the first of which is plain.
    """
    if view == "summary":
        return _comparison(runs_of(report, "4"), "plain", SUMMARY)
    kind, _, screen = view.partition("_")
    if kind == "validation":
        return _validation(report["screens"][screen]["runs"])
    if view in ("budgets", "passes"):
        return _budgets(runs_of(report, {"budgets": "3", "passes": "5"}[view]))
    first, plain = PLAIN[screen]
    runs = {plain: runs_of(report, first)[plain]} | runs_of(report, screen)
    if kind == "groups":
        return _groups(runs, plain, GROUPS[screen])
    machine = report["screens"][screen]["machine"]
    return _comparison(runs, plain, {name: f"`{name}`" for name in runs}, len(machine["accelerators"]))


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
    tests = {}
    for text, first in runs[0]["tests"].items():
        groups = [run["tests"][text]["by_match_length"] for run in runs]
        loss = sum(run["tests"][text]["loss"] for run in runs) / len(runs)
        tests[text] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "by_match_length": [
                group | {"loss": sum(each[place]["loss"] for each in groups) / len(runs)}
                for place, group in enumerate(first["by_match_length"])
            ],
        }
    return {**runs[0], "tests": tests, "seeds": len(runs), "means": [mean_perplexity(run) for run in runs]}


def _comparison(runs: Mapping[str, Any], plain: str, names: Mapping[str, str], num_gpus: int = 4) -> str:
    base = runs[plain]
    lines = [
        f"| | inference FLOPs | training FLOPs | {' | '.join(TEXTS.values())} | mean of four, to {names[plain]} |",
        "|---|---:|---:|" + "---:|" * (len(TEXTS) + 1),
    ]
    for run, name in names.items():
        cost = [
            f"{runs[run]['cost'][key] / base['cost'][key]:.2f}×"
            for key in ("inference_flops_per_token", "training_flops_per_token")
        ]
        perplexities = [f"{runs[run]['tests'][text]['perplexity']:.1f}" for text in TEXTS]
        change = "–" if run == plain else percent(mean_perplexity(runs[run]) / mean_perplexity(base) - 1)
        if run != plain and runs[run]["seeds"] > 1:
            spread = statistics.stdev(runs[run]["means"]) / mean_perplexity(base)
            change += f" ± {100 * spread:.1f}"
        lines.append(f"| {name} | {' | '.join([*cost, *perplexities])} | {change} |")
    seeds = "one seed"
    if base["seeds"] > 1:
        seeds += f", or the mean of several where ± is their standard deviation (plain: {base['seeds']})"
    note = f"Perplexity after {base['tokens'] / 1e6:.0f} M training tokens; 4 layers × 256; {seeds}; {num_gpus} × H100."
    return "\n".join(lines) + f"\n\n*{note}*\n"


def _budgets(runs: Mapping[str, Any]) -> str:
    lines = [f"| tokens | | {' | '.join(TEXTS.values())} | mean of four |", "|---:|---|" + "---:|" * (len(TEXTS) + 1)]
    for name in runs:
        run, kind = runs[name], name.partition("-")[2]
        plain = next(runs[other] for other in runs if other.startswith(f"{name.partition('-')[0]}-plain"))
        if run is plain:
            cells = [f"{run['tests'][text]['perplexity']:.1f}" for text in TEXTS] + ["–"]
        else:
            cells = [percent(run["tests"][t]["perplexity"] / plain["tests"][t]["perplexity"] - 1) for t in TEXTS]
            cells.append(percent(mean_perplexity(run) / mean_perplexity(plain) - 1))
        lines.append(f"| {run['tokens'] / 1e6:.0f} M | `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n*Perplexity of plain, and the change from it; rate 4e-3, one seed, H100.*\n"


def _validation(runs: Mapping[str, Any]) -> str:
    plain = next(iter(runs.values()))
    steps = [step for step, _ in plain["validation_losses"]]
    tokens = plain["tokens"] / plain["steps"]
    lines = [
        "| | training FLOPs | "
        + " | ".join(f"{step * tokens / 1e6:.0f} M" for step in steps)
        + " | perplexity, to plain |",
        "|---|---:|" + "---:|" * (len(steps) + 1),
    ]
    for name, run in runs.items():
        losses = dict(run["validation_losses"])
        cost = run["cost"]["training_flops_per_token"] / plain["cost"]["training_flops_per_token"]
        change = losses[steps[-1]] - plain["validation_losses"][-1][1]
        cells = [f"{losses[step]:.3f}" for step in steps]
        end = "–" if run is plain else percent(math.exp(change) - 1)
        lines.append(f"| `{name}` | {cost:.2f}× | {' | '.join(cells)} | {end} |")
    return (
        "\n".join(lines)
        + "\n\n*Loss on the validation text (Wikipedia) after so many training tokens; one seed, H100.*\n"
    )


def _groups(runs: Mapping[str, Any], plain: str, others: tuple[str, ...]) -> str:
    texts = ("wikipedia_test", "c4", "wikitext103_test")
    found = {text: runs[plain]["tests"][text]["by_match_length"] for text in texts}
    lengths = [group["length"] for group in found[texts[0]]]
    lines = ["| | text | none ends | " + " | ".join(f"{length} tokens" for length in lengths[1:]) + " |"]
    lines.append("|---|---|" + "---:|" * len(lengths))
    for text in texts:
        total = sum(group["num_predicted"] for group in found[text])
        shares = [f"{100 * group['num_predicted'] / total:.0f} %" for group in found[text]]
        lines.append(f"| *share of positions* | {TEXTS[text]} | {' | '.join(shares)} |")
    for run in others:
        for text in texts:
            pairs = zip(runs[run]["tests"][text]["by_match_length"], found[text], strict=True)
            changes = [nats(mine["loss"] - base["loss"]) for mine, base in pairs]
            lines.append(f"| `{run}` | {TEXTS[text]} | {' | '.join(changes)} |")
    return "\n".join(lines) + f"\n\n*Change of the loss to `{plain}`, in nats a token.*\n"


def percent(change: float) -> str:
    """A share as signed per cent, with a minus sign that is one."""
    return f"{100 * change:+.1f} %".replace("-", "−")


def nats(change: float) -> str:
    """A change of a loss; one that rounds to nothing has no sign."""
    text = f"{change:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text
