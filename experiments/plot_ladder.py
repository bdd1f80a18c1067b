"""Draw docs/results/ladder.svg from the JSON beside it: ``python experiments/plot_ladder.py``.

Loss against training FLOPs, the mean over the held-out texts; a line is one kind of input embedding at one size, a
point a run to its end. Colours are CSS variables, so that the picture suits light and dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "experiments")]

from ladder_fit import DOUBLED, OVER_ENCODING, PLAIN, ROWS, Rung, rungs_of  # noqa: E402
from plot_recipe import save  # noqa: E402

from scone.evaluation.figures import GRID, INK, SERIES, SOFT  # noqa: E402
from scone.utils.files import read_json  # noqa: E402

KINDS = {
    PLAIN: ("plain", SERIES[0], "-"),
    DOUBLED: ("plain, 2× the FLOPs a token", SERIES[0], ":"),
    OVER_ENCODING: ("over-encoding, 1 M rows", SERIES[4], "-"),
    ROWS: ("learned rows, 1 M f-grams", SERIES[2], "-"),
}
"""Kind → its name, colour and stroke."""


def draw(rungs: Sequence[Rung]) -> Figure:
    """The picture; a point is a pixel."""
    figure = Figure(figsize=(760 / 72, 400 / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0.075, 0.13, 0.90, 0.68), facecolor="none")
    for size in dict.fromkeys(rung.size for rung in rungs):
        for kind, (name, color, stroke) in KINDS.items():
            line = sorted(
                (rung for rung in rungs if (rung.size, rung.kind) == (size, kind)), key=lambda rung: rung.flops
            )
            if not line:
                continue
            flops, losses = [rung.flops for rung in line], [rung.loss for rung in line]
            axes.plot(flops, losses, stroke, color=color, linewidth=2.5, marker="o", markersize=7, label=name)
    axes.set_xscale("log")
    ticks = sorted({rung.flops for rung in rungs if rung.kind == PLAIN})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops / 1e15:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0, which="both", labelsize=12, colors=SOFT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("training FLOPs, 10¹⁵", fontsize=13, color=SOFT)
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    axes.legend(first.values(), first, frameon=False, fontsize=13, labelcolor=INK)
    texts = len(rungs[0].losses)
    figure.text(0.012, 0.94, "Loss after a training budget: lower and further left is better", fontsize=17,
                fontweight="bold", color=INK)  # fmt: skip
    figure.text(0.012, 0.875, f"nats a token, mean of {texts} held-out texts; each point is a run of its own",
                fontsize=13, color=SOFT)  # fmt: skip
    return figure


def main() -> int:
    results = REPOSITORY / "docs" / "results"
    figure = draw(rungs_of(read_json(results / "ladder.json")))
    save(figure, results / "ladder.svg", "Loss against training FLOPs of plain models, over-encoding and learned rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
