"""Draw docs/results/recipe.svg from the JSON beside it: ``python experiments/plot_recipe.py``.

One bar a run: how far its perplexity lies below the plain model's, by the geometric mean of four held-out texts; one
dot a text. Colours are CSS variables, so that the picture suits light and dark pages.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from recipe_table import TEXTS, mean_perplexity, percent, runs_of  # noqa: E402

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
"""Name, run of screen 4, colour."""


def draw(report: dict[str, Any]) -> Figure:
    """The picture; a point is a pixel."""
    runs = runs_of(report, "4")
    plain = runs["plain"]
    figure = Figure(figsize=(760 / 72, 292 / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0.28, 0.09, 0.60, 0.72), facecolor="none")
    for place, (name, run, color) in enumerate(RUNS):
        change = 100 * (mean_perplexity(runs[run]) / mean_perplexity(plain) - 1)
        by_text = [
            100 * (runs[run]["tests"][text]["perplexity"] / plain["tests"][text]["perplexity"] - 1) for text in TEXTS
        ]
        axes.barh(place, change, height=0.62, color=color)
        axes.plot(by_text, [place] * len(by_text), "o", markersize=5, markerfacecolor=CARD, markeredgecolor=INK)
        line = axes.get_yaxis_transform()
        axes.text(-0.02, place, name, transform=line, color=INK, fontsize=14, ha="right", va="center")
        axes.text(
            1.02, place, percent(change / 100), transform=line, color=INK, fontsize=14, va="center", fontweight="bold"
        )
    axes.set(xlim=(4, -25), ylim=(len(RUNS) - 0.45, -0.55), yticks=[], xticks=range(0, -26, -5))
    axes.tick_params(length=0, labelsize=12, colors=SOFT)
    axes.set_xticklabels(["plain", *(f"−{tick} %" for tick in range(5, 26, 5))])
    axes.grid(axis="x", color=GRID)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    title = "Perplexity against the plain model: further right is better"
    caveats = "bars: mean of four texts, dots: each text; all at plain's inference FLOPs except the last"
    figure.text(0.012, 0.93, title, fontsize=17, fontweight="bold", color=INK)
    figure.text(0.012, 0.855, caveats, fontsize=13, color=SOFT)
    return figure


def save(figure: Figure, path: Path, description: str) -> None:
    """As a picture of its own, for light and dark pages; ``description`` is for screen readers."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    svg = svg_of(figure, description)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    names += f' width="{width:g}pt" height="{height:g}pt"'
    svg = svg.replace("<svg ", f"<svg {names} ", 1).replace(">", f">\n<style>{STYLE}</style>", 1)
    with atomic_path(path) as temporary:
        temporary.write_text(svg + "\n", encoding="utf-8")


def main() -> int:
    results = REPOSITORY / "docs" / "results"
    figure = draw(read_json(results / "recipe.json"))
    save(figure, results / "recipe.svg", "Change of perplexity against a plain model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
