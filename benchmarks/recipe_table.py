"""Tables of docs/results/recipe.json: runs of a screen beside its plain run, and where each gains or loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TEXTS = {"wikipedia_test": "Wikipedia", "novels": "novels", "wikitext103_test": "WikiText-103", "c4": "C4"}
PLAIN = {"1": "plain", "2": "plain-modern-norm-muon"}
"""The run that a screen's changes are measured against; the second screen's was trained with the first."""
SUMMARY = {
    "plain-modern-norm-muon": "plain",
    "plain-lr4e-3": "plain at its better learning rate",
    "over-encoding-x0.1-nodecay": "over-encoding (hashed n-grams), 1 M rows",
    "rows-rms": "**learned rows, 1 M f-grams**",
    "plain-2x-flops": "plain with twice the FLOPs",
}
"""The five runs of the README, and what they are called there."""
GROUPS = {
    "1": ("plain", ("rows-x1", "rows-x0.1", "model-x1-stopped", "model-x1-own-tokens", "rows-x1-bare-gradient")),
    "2": (
        "plain-nodecay",
        ("rows-rms-nodecay", "rows-3M-rms-nodecay", "over-encoding-x0.1-nodecay", "both-own-tokens"),
    ),
}
"""By screen: the run to compare with, and those that are compared. Groups depend on the screen's f-grams, so on no
other's."""


CURVES = ("plain-lr4e-3", "plain-lr8e-3", "rows-rms", "rows-lr4e-3", "rows-lr4e-3-rows2e-3", "plain-2x-flops")


def recipe_table(report: Mapping[str, Any], view: str) -> str:
    """``summary``: the README's runs. ``screen_N``: all runs of a screen. ``groups_N``: change of loss by match.
    ``budgets``: the short runs of screen 3, each beside plain at its budget. ``curves``: validation losses on the way.
    """
    if view == "summary":
        return _comparison({**_runs(report, "1"), **_runs(report, "2")}, PLAIN["2"], SUMMARY)
    if view == "budgets":
        return _budgets(_runs(report, "3"))
    if view == "curves":
        return _curves({**_runs(report, "2"), **_runs(report, "3")}, CURVES)
    kind, _, screen = view.partition("_")
    runs = _runs(report, screen)
    if kind == "groups":
        return _groups(runs, *GROUPS[screen])
    plain = {PLAIN[screen]: _runs(report, "1")[PLAIN[screen]]}
    return _comparison({**plain, **runs}, PLAIN[screen], {name: f"`{name}`" for name in {**plain, **runs}})


def mean_perplexity(run: Mapping[str, Any]) -> float:
    """The geometric mean over the four texts."""
    return math.exp(sum(run["tests"][text]["loss"] for text in TEXTS) / len(TEXTS))


def _runs(report: Mapping[str, Any], screen: str) -> dict[str, Any]:
    return dict(report["screens"][screen]["runs"])


def _comparison(runs: Mapping[str, Any], plain: str, names: Mapping[str, str]) -> str:
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
        lines.append(f"| {name} | {' | '.join([*cost, *perplexities])} | {change} |")
    note = f"Perplexity after {base['tokens'] / 1e6:.0f} M training tokens; 4 layers × 256; one seed; 4 × H100."
    return "\n".join(lines) + f"\n\n*{note}*\n"


def _budgets(runs: Mapping[str, Any]) -> str:
    lines = [f"| tokens | | {' | '.join(TEXTS.values())} | mean of four |", "|---:|---|" + "---:|" * (len(TEXTS) + 1)]
    finished = [name for name, run in runs.items() if run.get("finished", True)]
    for name in sorted(finished, key=lambda name: (runs[name]["tokens"], "plain" not in name, name)):
        run, kind = runs[name], name.partition("-")[2]
        plain = next(runs[other] for other in finished if other.startswith(f"{name.partition('-')[0]}-plain"))
        if run is plain:
            cells = [f"{run['tests'][text]['perplexity']:.1f}" for text in TEXTS] + ["–"]
        else:
            cells = [percent(run["tests"][t]["perplexity"] / plain["tests"][t]["perplexity"] - 1) for t in TEXTS]
            cells.append(percent(mean_perplexity(run) / mean_perplexity(plain) - 1))
        lines.append(f"| {run['tokens'] / 1e6:.0f} M | `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n*Perplexity of plain, and the change from it; rate 4e-3, one seed, one H100.*\n"


def _curves(runs: Mapping[str, Any], names: tuple[str, ...]) -> str:
    steps = sorted({step for name in names for step, _ in runs[name]["validation_losses"]})
    lines = ["| | " + " | ".join(f"step {step:,}" for step in steps) + " |", "|---|" + "---:|" * len(steps)]
    for name in names:
        losses = dict(runs[name]["validation_losses"])
        lines.append(
            f"| `{name}` | " + " | ".join(f"{losses[s]:.3f}" if s in losses else "cut off" for s in steps) + " |"
        )
    return "\n".join(lines) + "\n\n*Validation loss, nats a token, of 5,000 steps.*\n"


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
