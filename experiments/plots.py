"""Draw docs/results/recipe.svg and ladder.svg from the JSON beside them: ``python experiments/plots.py recipe ladder``.

The recipe: a bar a run, how far its perplexity lies below the plain model's by the geometric mean of four held-out
texts, and a dot a text. The ladder: loss against training FLOPs, the mean over the held-out texts; a line is one kind
of input embedding at one size, a point a run to its end. Colours are CSS variables, so that the pictures suit light and
dark pages; a point is a pixel.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "experiments")]

from ladder_fit import DOUBLED, GAIN, OVER_ENCODING, PLAIN, ROWS, Rung, rungs_of  # noqa: E402
from quality_tables import percent, recipe_runs  # noqa: E402

from scone.evaluation.figures import CARD, GRID, INK, SERIES, SOFT, svg_of  # noqa: E402
from scone.utils.files import atomic_path, read_json  # noqa: E402

GREY, OURS, PEER = SERIES[0], SERIES[2], SERIES[4]
STYLE = """
svg { --card: #ffffff; --ink: #1c1e21; --soft: #5f6670; --grid: #ebedf0; --series-1: #7a8594; --series-3: #0f766e;
  --series-5: #7c3aed; background: var(--card);
  font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --card: #16191c; --ink: #e8eaed; --soft: #9aa3ad; --grid: #272b30; --series-1: #9aa6b5; --series-3: #2dd4bf;
    --series-5: #a78bfa; }
}
"""
RUNS = (
    ("learned rows, 10 k f-grams", "rows-10k", OURS),
    ("learned rows, 100 k f-grams", "rows-100k", OURS),
    ("over-encoding, 1 M rows", "over-encoding-1M", PEER),
    ("learned rows, 1 M f-grams", "rows-1M", OURS),
    ("learned rows, 3 M f-grams", "rows-3M", OURS),
    ("plain, 2× inference FLOPs", "plain-2x-flops", GREY),
)
"""Of the recipe: name, run of screen 4, colour."""
KINDS = {
    PLAIN: ("plain", GREY, "-"),
    DOUBLED: ("plain, 2× the FLOPs a token", GREY, ":"),
    OVER_ENCODING: ("over-encoding, 1 M rows", PEER, "-"),
    ROWS: ("learned rows, the 1 M most frequent f-grams", OURS, ":"),
    GAIN: ("learned rows, 1 M f-grams that say most", OURS, "-"),
}
"""Of the ladder: kind → its name, colour and stroke."""


def picture(height: float, place: tuple[float, float, float, float], lines: Sequence[tuple[float, str]]) -> Axes:
    """Axes at ``place`` without a frame, below a title and a line of caveats, each (place, text)."""
    figure = Figure(figsize=(760 / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes(place, facecolor="none")
    axes.tick_params(length=0, which="both", labelsize=12, colors=SOFT)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (y, text), look in zip(lines, ({"fontsize": 17, "fontweight": "bold"}, {"fontsize": 13}), strict=True):
        figure.text(0.012, y, text, color=INK if "fontweight" in look else SOFT, **look)
    return axes


def draw_recipe(report: dict[str, Any]) -> Figure:
    runs = recipe_runs(report)
    plain = runs["plain"]
    caveats = "bars: mean of four texts, dots: each text; all at plain's inference FLOPs except the last"
    lines = ((0.93, "Perplexity against the plain model: further right is better"), (0.855, caveats))
    axes = picture(292, (0.28, 0.09, 0.60, 0.72), lines)
    for place, (name, run, color) in enumerate(RUNS):
        change = 100 * (runs[run]["mean"] / plain["mean"] - 1)
        axes.barh(place, change, height=0.62, color=color)
        by_text = [100 * math.expm1(loss - plain["losses"][text]) for text, loss in runs[run]["losses"].items()]
        axes.plot(by_text, [place] * len(by_text), "o", markersize=5, markerfacecolor=CARD, markeredgecolor=INK)
        look = {"transform": axes.get_yaxis_transform(), "color": INK, "fontsize": 14, "va": "center"}
        axes.text(-0.02, place, name, ha="right", **look)
        axes.text(1.02, place, percent(change / 100), fontweight="bold", **look)
    axes.set(xlim=(4, -25), ylim=(len(RUNS) - 0.45, -0.55), yticks=[], xticks=range(0, -26, -5))
    axes.set_xticklabels(["plain", *(f"−{tick} %" for tick in range(5, 26, 5))])
    axes.grid(axis="x", color=GRID)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    return axes.figure


def draw_ladder(report: dict[str, Any]) -> Figure:
    rungs: Sequence[Rung] = rungs_of(report)
    caveats = f"nats a token, mean of {len(rungs[0].losses)} held-out texts; each point is a run of its own"
    title = "Loss after a training budget: lower and further left is better"
    axes = picture(400, (0.075, 0.13, 0.90, 0.68), ((0.94, title), (0.875, caveats)))
    for size in dict.fromkeys(rung.size for rung in rungs):
        for kind, (name, color, stroke) in KINDS.items():
            line = [rung for rung in rungs if (rung.size, rung.kind) == (size, kind)]
            points = sorted((rung.flops, rung.loss) for rung in line)
            if points:
                look = {"color": color, "linewidth": 2.5, "marker": "o", "markersize": 7, "label": name}
                axes.plot(*zip(*points, strict=True), stroke, **look)
            if points and kind == PLAIN:
                place = {
                    "xytext": (0, 11),
                    "textcoords": "offset points",
                    "fontsize": 13,
                    "color": SOFT,
                    "ha": "center",
                }
                axes.annotate(size.replace("m", " M weights"), points[0], **place)
    axes.set_xscale("log")
    ticks: list[float] = []
    for flops in sorted({rung.flops for rung in rungs if rung.kind == PLAIN}):
        if not ticks or flops > 1.3 * ticks[-1]:  # nearer ones would be written over each other
            ticks.append(flops)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops / 1e15:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.09, y=0.1)
    axes.grid(color=GRID)
    axes.set_xlabel("training FLOPs, 10¹⁵", fontsize=13, color=SOFT)
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    axes.legend(first.values(), first, frameon=False, fontsize=13, labelcolor=INK)
    return axes.figure


def save(figure: Figure, path: Path, description: str) -> None:
    """As a picture of its own, for light and dark pages; ``description`` is for screen readers."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    svg = svg_of(figure, description)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    names += f' width="{width:g}pt" height="{height:g}pt"'
    svg = svg.replace("<svg ", f"<svg {names} ", 1).replace(">", f">\n<style>{STYLE}</style>", 1)
    with atomic_path(path) as temporary:
        temporary.write_text(svg + "\n", encoding="utf-8")


PICTURES = {
    "recipe": (draw_recipe, "Change of perplexity against a plain model"),
    "ladder": (draw_ladder, "Loss against training FLOPs of plain models, over-encoding and learned rows"),
}

if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        draw, what = PICTURES[chosen]
        save(draw(read_json(RESULTS / f"{chosen}.json")), RESULTS / f"{chosen}.svg", what)
