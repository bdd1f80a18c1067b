"""Draw docs/results/recipe.svg from the JSON beside it: ``python experiments/plot_recipe.py``.

One bar a run: how far its perplexity lies below the plain model's, by the geometric mean of four held-out texts; one
dot a text. Colours are CSS variables, so that the picture suits light and dark pages.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from recipe_table import TEXTS, mean_perplexity, percent, runs_of  # noqa: E402

from scone.utils.files import atomic_path, read_json  # noqa: E402

INK, SOFT, GRID, CARD = "#1c1e21", "#5f6670", "#ebedf0", "#ffffff"
GREY, OURS, PEER = "#7a8594", "#0f766e", "#7c3aed"
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", CARD: "--card"}
VARIABLES |= {GREY: "--plain", OURS: "--ours", PEER: "--peer"}
STYLE = """
svg { --card: #ffffff; --ink: #1c1e21; --soft: #5f6670; --grid: #ebedf0; --plain: #7a8594; --ours: #0f766e;
  --peer: #7c3aed; background: var(--card); font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --card: #16191c; --ink: #e8eaed; --soft: #9aa3ad; --grid: #272b30; --plain: #9aa6b5; --ours: #2dd4bf;
    --peer: #a78bfa; }
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


def svg_of(figure: Figure) -> str:
    """The figure as SVG text: words stay text, colours become variables, the same figure has the same bytes."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scone", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    for color, name in VARIABLES.items():
        svg = svg.replace(color, f"var({name})")
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's own
    head, _, rest = svg.partition(">")
    label = 'role="img" aria-label="Change of perplexity against a plain model"'
    return f"{head} {label}>\n<style>{STYLE}</style>{rest}"


def main() -> int:
    results = REPOSITORY / "docs" / "results"
    with atomic_path(results / "recipe.svg") as temporary:
        temporary.write_text(svg_of(draw(read_json(results / "recipe.json"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
