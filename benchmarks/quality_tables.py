"""Tables of perplexities: docs/results/ladder.json and epochs.json (experiments/ladder_fit.py), and of recipe.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ladder_fit import (
    DOUBLED,
    GAIN,
    OVER_ENCODING,
    PLAIN,
    ROWS,
    Rung,
    multipliers,
    rungs_of,
    savings,
    seed_spread,
    shown,
)

from scone.utils.text import markdown_table

NAMES = {
    "wikipedia_test": "Wikipedia",
    "novels": "novels",
    "wikitext103_test": "WikiText-103",
    "c4": "C4",
    "court_opinions": "court opinions",
    "arxiv_abstracts": "arXiv abstracts",
}
RECIPE_TEXTS = tuple(NAMES)[:4]
SUMMARY = {
    "plain": "plain",
    "rows-100k": "learned rows, 100 k f-grams",
    "over-encoding-1M": "over-encoding (hashed n-grams), 1 M rows",
    "rows-1M": "**learned rows, 1 M f-grams**",
    "rows-3M": "learned rows, 3 M f-grams",
    "plain-2x-flops": "plain with twice the FLOPs",
}
"""Runs of the recipe's screen 4, and what the README calls them."""


def quality_table(report: Mapping[str, Any], view: str) -> str:
    """``multipliers``: of each run that is not plain. ``texts``: perplexity of plain, and each kind's change from it.
    ``curves``: change of the mean loss to plain's after each tenth of the run. ``passes``: texts by passes over one
    text. ``summary``: the README's runs of the recipe.
    """
    return {
        "multipliers": _multipliers, "texts": _texts, "curves": _curves, "passes": _passes, "summary": _summary
    }[view](report)  # fmt: skip


def _multipliers(report: Mapping[str, Any]) -> str:
    rungs = _in_order(report)
    kinds = [kind for kind in (GAIN, ROWS, OVER_ENCODING, DOUBLED) if any(rung.kind == kind for rung in rungs)]
    own = [kind for kind in (GAIN, ROWS) if kind in kinds]
    found = {(*_place(each.rung), PLAIN): each for each in multipliers(rungs)}
    found |= {(*_place(each.rung), kind): each for kind in own for each in savings(rungs, kind)}
    lines = []
    for plain in (rung for rung in rungs if rung.kind == PLAIN):
        run = plain.size, plain.per_weight
        places = [*((*run, kind, PLAIN) for kind in kinds), *((*run, PLAIN, kind) for kind in own)]
        cells = [shown(found[place]) if place in found else "–" for place in places]
        lines.append([*_head(plain), f"{plain.loss:.3f}", *cells])
    head = ["weights", "tokens", "tokens per weight", "plain's loss"]
    head += [*(f"`{kind}`" for kind in kinds), *(f"`by {kind}`" for kind in own)]
    note = (
        "How many times its training FLOPs plain needs for the same loss (95 %: over windows and seeds). Below 1 plain "
        "uses them better. `by …`: plain's FLOPs, divided by those at which the other has its loss. Star: a curve "
        f"beyond its runs. Loss: nats a token, mean of {len(rungs[0].losses)} texts, their standard deviation over "
        f"seeds {seed_spread(rungs):.4f}."
    )
    return _table(head, lines, note)


def _texts(report: Mapping[str, Any]) -> str:
    rungs = _in_order(report)
    plain = {(rung.size, rung.per_weight): rung for rung in rungs if rung.kind == PLAIN}
    texts = list(rungs[0].losses)
    lines = []
    for rung in rungs:
        peer = plain.get((rung.size, rung.per_weight), rung)
        cells = _changes(list(rung.losses.values()), list(peer.losses.values()), rung is peer)
        lines.append([*_head(rung), f"`{rung.kind}`", rung.seeds, *cells])
    head = ["weights", "tokens", "tokens per weight", "", "seeds", *(NAMES.get(text, text) for text in texts), "mean"]
    return _table(head, lines, "Perplexity of plain, and the change from it.")


def _passes(report: Mapping[str, Any]) -> str:
    runs = report["runs"]
    lines, texts = [], list(next(iter(runs.values()))["tests"])
    places = {tuple(name.removeprefix("epochs").split("-", 1)): run for name, run in runs.items()}
    for (passes, kind), run in sorted(places.items(), key=lambda item: int(item[0][0])):
        losses, others = ([each["tests"][text]["loss"] for text in texts] for each in (run, places[passes, PLAIN]))
        cells = _changes(losses, others, kind == PLAIN)
        lines.append([passes, f"{run['tokens'] / 1e6:.0f} M", f"`{kind}`", *cells])
    head = ["passes", "tokens", "", *(NAMES.get(text, text) for text in texts), "mean"]
    return _table(head, lines, "Perplexity of plain, and the change from it; one seed, H100.")


def _changes(losses: Sequence[float], plain: Sequence[float], is_plain: bool) -> list[str]:
    """Of each text and their mean the perplexity's change to plain's; of plain its perplexity."""
    if is_plain:
        return [*(f"{math.exp(loss):.1f}" for loss in losses), "–"]
    changes = [own - other for own, other in zip(losses, plain, strict=True)]
    return [percent(math.expm1(change)) for change in [*changes, statistics.fmean(changes)]]


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
    return _table(head, lines, note)


def _summary(report: Mapping[str, Any]) -> str:
    runs = recipe_runs(report)
    plain, lines = runs["plain"], []
    for name, title in SUMMARY.items():
        run, costs = runs[name], ("inference_flops_per_token", "training_flops_per_token")
        cells = [f"{run['cost'][cost] / plain['cost'][cost]:.2f}×" for cost in costs]
        cells += [f"{math.exp(loss):.1f}" for loss in run["losses"].values()]
        change = "–" if run is plain else percent(run["mean"] / plain["mean"] - 1)
        if run is not plain and len(run["means"]) > 1:
            change += f" ± {100 * statistics.stdev(run['means']) / plain['mean']:.1f}"
        lines.append([title, *cells, change])
    head = ["", "inference FLOPs", "training FLOPs", *map(NAMES.get, RECIPE_TEXTS), "mean of four, to plain"]
    base = report["screens"]["4"]["base"]
    note = (
        f"Perplexity after {plain['tokens'] / 1e6:.0f} M training tokens; {base['model.num_hidden_layers']} layers × "
        f"{base['model.hidden_size']}; one seed, or the mean of several where ± is their standard deviation (plain: "
        f"{len(plain['means'])}); 4 × H100."
    )
    return _table(head, lines, note)


def recipe_runs(report: Mapping[str, Any]) -> dict[str, Any]:
    """The runs of the recipe's screen 4, seeds taken together: ``losses`` by text, the geometric ``mean`` of their
    perplexities, and ``means`` of it by seed.
    """
    seeds: dict[str, list[Mapping[str, Any]]] = {}
    for name, run in report["screens"]["4"]["runs"].items():
        seeds.setdefault(name.partition("-seed")[0], []).append(run)
    found = {}
    for name, runs in seeds.items():
        by_seed = [[run["tests"][text]["loss"] for text in RECIPE_TEXTS] for run in runs]
        losses = [statistics.fmean(each) for each in zip(*by_seed, strict=True)]
        mean, *means = (math.exp(statistics.fmean(each)) for each in [losses, *by_seed])
        found[name] = {**runs[0], "losses": dict(zip(RECIPE_TEXTS, losses, strict=True)), "mean": mean, "means": means}
    return found


def _table(head: Sequence[str], lines: Sequence[Sequence[object]], note: str) -> str:
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


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


def percent(change: float) -> str:
    """A share as signed per cent, with a minus sign that is one."""
    return f"{100 * change:+.1f} %".replace("-", "−")


def nats(change: float) -> str:
    """A change of a loss; one that rounds to nothing has no sign."""
    text = f"{change:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text
