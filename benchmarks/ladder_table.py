"""Tables of docs/results/ladder.json (experiments/ladder_fit.py): multipliers, texts, and curves over a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from ladder_fit import PLAIN, Rung, multipliers, rungs_of, savings, seed_spread, shown
from recipe_table import nats, percent

from scone.utils.text import markdown_table

NAMES = {
    "wikipedia_test": "Wikipedia",
    "novels": "novels",
    "wikitext103_test": "WikiText-103",
    "c4": "C4",
    "court_opinions": "court opinions",
    "arxiv_abstracts": "arXiv abstracts",
}


def ladder_table(report: Mapping[str, Any], view: str) -> str:
    """``multipliers``: of each run that is not plain. ``texts``: perplexity of plain, and each kind's change from it.
    ``curves``: change of the mean loss to plain's after each tenth of the run. ``passes``: texts of
    docs/results/epochs.json (experiments/epochs.yaml).
    """
    if view == "passes":
        return _passes(report["runs"])
    if not rungs_of(report):
        return "*Not run yet.*\n"
    return {"multipliers": _multipliers, "texts": _texts, "curves": _curves}[view](report)


def _multipliers(report: Mapping[str, Any]) -> str:
    rungs = _in_order(report)
    found = {_place(each.rung): each for each in [*multipliers(rungs), *savings(rungs)]}
    kinds = [*dict.fromkeys(rung.kind for rung in rungs if rung.kind != PLAIN), PLAIN]
    lines = []
    for plain in (rung for rung in rungs if rung.kind == PLAIN):
        places = [(plain.size, plain.per_weight, kind) for kind in kinds]
        cells = [shown(found[place]) if place in found else "–" for place in places]
        lines.append([*_head(plain), f"{plain.loss:.3f}", *cells])
    head = [
        "weights",
        "tokens",
        "tokens per weight",
        "plain's loss",
        *(f"`{kind}`" for kind in kinds[:-1]),
        "`by rows`",
    ]
    note = (
        "How many times its training FLOPs plain needs for the same loss (95 %: over windows and seeds). Below 1 plain "
        "uses them better. `by rows`: plain's FLOPs, divided by those at which rows have its loss. Star: a curve "
        f"beyond its runs. Loss: nats a token, mean of {len(rungs[0].losses)} texts, their standard deviation over "
        f"seeds {seed_spread(rungs):.4f}."
    )
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _texts(report: Mapping[str, Any]) -> str:
    rungs = _in_order(report)
    plain = {(rung.size, rung.per_weight): rung for rung in rungs if rung.kind == PLAIN}
    texts = list(rungs[0].losses)
    lines = []
    for rung in rungs:
        peer = plain.get((rung.size, rung.per_weight))
        if peer is None or rung is peer:
            cells = [f"{math.exp(rung.losses[text]):.1f}" for text in texts] + ["–"]
        else:
            changes = [rung.losses[text] - peer.losses[text] for text in texts]
            cells = [percent(math.expm1(change)) for change in [*changes, statistics.fmean(changes)]]
        lines.append([*_head(rung), f"`{rung.kind}`", rung.seeds, *cells])
    head = ["weights", "tokens", "tokens per weight", "", "seeds", *(NAMES.get(text, text) for text in texts), "mean"]
    return f"{markdown_table(head, lines)}\n\n*Perplexity of plain, and the change from it.*\n"


def _curves(report: Mapping[str, Any]) -> str:
    """Of all seeds, the mean; at equal steps, so at equal rates too. Runs that were cut off show what they reached."""
    curves: dict[tuple[str, str, str], list[list[float]]] = {}
    for run in report["runs"].values():
        size, per_weight, kind = [*run["run"].split("-", 2), "", ""][:3]
        points = [statistics.fmean(point["texts"].values()) for point in run["curve"] if point["texts"]]
        if per_weight.isdigit() and points:
            curves.setdefault((size, per_weight, kind), []).append(points)
    means = {}
    for place, seeds in curves.items():
        longest = max(map(len, seeds))
        ends = [points for points in seeds if len(points) == longest]
        means[place] = [statistics.fmean(points) for points in zip(*ends, strict=True)]
    lines = []
    for size, per_weight, kind in sorted(means, key=lambda place: (_number(place[0]), int(place[1]))):
        peer = means.get((size, per_weight, PLAIN))
        if kind != PLAIN and peer:
            changes = [nats(own - plain) for own, plain in zip(means[size, per_weight, kind], peer, strict=False)]
            cut = [""] * (10 - len(changes))
            lines.append([size.replace("m", " M"), per_weight, f"`{kind}`", *changes, *cut])
    head = ["weights", "tokens per weight", "", *(f"{10 * tenth} %" for tenth in range(1, 11))]
    note = (
        "Change of the mean loss to plain's at the same step, nats a token, on the first 32,768 tokens of each text. "
        "Lines that end early are runs that were cut off."
    )
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _passes(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Perplexity of plain after so many passes over one text, and each kind's change from it."""
    lines, texts = [], list(next(iter(runs.values()))["tests"])
    places = {tuple(name.removeprefix("epochs").split("-", 1)): run for name, run in runs.items()}
    for (passes, kind), run in sorted(places.items(), key=lambda item: int(item[0][0])):
        plain = places[passes, PLAIN]
        losses, others = ([each["tests"][text]["loss"] for text in texts] for each in (run, plain))
        if kind == PLAIN:
            cells = [f"{math.exp(loss):.1f}" for loss in losses] + ["–"]
        else:
            changes = [own - other for own, other in zip(losses, others, strict=True)]
            cells = [percent(math.expm1(change)) for change in [*changes, statistics.fmean(changes)]]
        lines.append([passes, f"{run['tokens'] / 1e6:.0f} M", f"`{kind}`", *cells])
    head = ["passes", "tokens", "", *(NAMES.get(text, text) for text in texts), "mean"]
    return f"{markdown_table(head, lines)}\n\n*Perplexity of plain, and the change from it; one seed, H100.*\n"


def _in_order(report: Mapping[str, Any]) -> list[Rung]:
    """By size, then budget; kinds as the experiment has them."""
    rungs = rungs_of(report)
    kinds = list(dict.fromkeys(rung.kind for rung in rungs))
    return sorted(rungs, key=lambda rung: (_number(rung.size), int(rung.per_weight), kinds.index(rung.kind)))


def _number(size: str) -> int:
    """``27m``: 27."""
    return int("".join(filter(str.isdigit, size)) or 0)


def _place(rung: Rung) -> tuple[str, str, str]:
    return rung.size, rung.per_weight, rung.kind


def _head(rung: Rung) -> list[str]:
    return [rung.size.replace("m", " M"), f"{rung.tokens / 1e6:.0f} M", rung.per_weight]
