"""The main claim as one picture: perplexity against inference FLOPs and against training FLOPs, from an experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scone.evaluation import plots
from scone.evaluation.experiment_results import (
    BOTH,
    MODEL,
    OURS,
    OVER_ENCODING,
    ROWS,
    best_of,
    family,
    mean_loss,
    plain_of_equal_inference,
    run_results,
    same_tokens,
)
from scone.evaluation.results import PLAIN, RunResult
from scone.evaluation.scatter import Point, scatter_chart

COLORS = {PLAIN: 1, BOTH: 2, ROWS: 3, MODEL: 4, OVER_ENCODING: 5}
NAMES = {MODEL: "f-gram model", ROWS: "learned rows", BOTH: "model + rows", OVER_ENCODING: "over-encoding"}
TOP, GAP, MARGIN = 64, 8, 10
CHARACTER_WIDTH = 7.7
STYLE = """
svg { --card: #ffffff; --ink: #1c1e21; --soft: #5f6670; --grid: #ebedf0; --c1: #7a8594; --c2: #c2410c; --c3: #0f766e;
  --c4: #1d4ed8; --c5: #7c3aed; font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --card: #16191c; --ink: #e8eaed; --soft: #9aa3ad; --grid: #272b30; --c1: #9aa6b5; --c2: #fb8a4c; --c3: #2dd4bf;
    --c4: #60a5fa; --c5: #a78bfa; }
}
.page { fill: var(--card); }
text { fill: var(--soft); font-size: 14px; font-variant-numeric: tabular-nums; }
.title { fill: var(--ink); font-size: 17px; font-weight: 600; }
.head { fill: var(--ink); font-size: 15px; font-weight: 600; }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.point { stroke: var(--card); stroke-width: 1.5; }
.point-label { fill: var(--ink); font-size: 14px; paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.leader { stroke: var(--soft); stroke-width: 0.8; opacity: 0.7; }
.trend { fill: none; stroke: var(--c1); stroke-width: 1.6; stroke-dasharray: 6 4; }
.whisker { stroke-width: 1.6; }
"""


def claim_svg(experiment: Mapping[str, Any]) -> str:
    """The picture, a file of its own that follows the reader's light or dark.

    Left: models that saw equally many tokens. Right: the same by training FLOPs, with plain at several budgets as a
    line: what lies below it is better than plain at equal training FLOPs. Perplexity is the geometric mean of the
    experiment's test texts; whiskers span the seeds. Of ours and its peers those with the most f-grams are shown.

    Raises ValueError when no plain run is finished.
    """
    results = run_results(experiment)
    tests = list(experiment["experiment"]["tests"])
    plain = plain_of_equal_inference(results)
    if not plain:
        raise ValueError("the experiment has no finished plain run")
    shown = shown_results(results)
    base = shown[0]
    inference, training = (
        scatter_chart(
            [_point(result, base, field, tests) for result in chosen],
            label,
            "perplexity",
            x_logarithmic=False,
            front=False,
            trend=trend,
            character_width=CHARACTER_WIDTH,
        )
        for field, chosen, label, trend in (
            ("inference_flops_per_token", shown, "inference FLOPs per token (plain = 1)", ()),
            (
                "training_flops",
                [*shown, *(result for result in plain if result.name != base.name)],
                "training FLOPs (plain = 1)",
                [(_ratio(result, base, "training_flops"), math.exp(mean_loss(result, tests))) for result in plain],
            ),
        )
    )
    width, height = 2 * plots.WIDTH + GAP + 2 * MARGIN, plots.HEIGHT + TOP + MARGIN
    title = (
        f"{_size(shown)}f-grams, {base.training_tokens or 0:,} training tokens; perplexity: mean of {', '.join(tests)}"
    )
    right = MARGIN + plots.WIDTH + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Perplexity against inference and training FLOPs">\n<style>{STYLE}</style>\n'
        f'<rect class="page" width="{width}" height="{height}" rx="8"/>\n'
        + plots.text_at("title", MARGIN + 14, 26, "start", title.replace("_", " "))
        + plots.text_at("head", MARGIN + plots.LEFT, 52, "start", "At equal tokens")
        + plots.text_at("head", right + plots.LEFT, 52, "start", "By training FLOPs; dashed: plain trained longer")
        + _placed(inference, MARGIN)
        + _placed(training, right)
        + "\n</svg>\n"
    )


def shown_results(results: Sequence[RunResult]) -> list[RunResult]:
    """Plain, plain of more inference FLOPs at equal tokens, and each kind's runs with the most f-grams.

    Of runs that differ in their settings alone, the one of lowest validation loss.
    """
    plain = plain_of_equal_inference(results)[:1]
    base = next(result for result in results if result.kind == PLAIN)
    larger: dict[Any, list[RunResult]] = {}
    for result in results:
        if result.kind == PLAIN and same_tokens(result, base):
            flops, resident = result.inference_flops_per_token or 0, (result.parameters or {}).get("resident")
            if flops > 1.5 * (base.inference_flops_per_token or 1):
                larger.setdefault((flops, resident), []).append(result)
    peers = [result for result in results if family(result.kind) in (*OURS, OVER_ENCODING)]
    most = max((result.num_f_grams or 0 for result in peers), default=0)
    kinds: dict[str, list[RunResult]] = {}
    for result in peers:
        if result.num_f_grams == most:
            kinds.setdefault(label_of(result), []).append(result)
    return [*(plain or [base]), *map(best_of, larger.values()), *map(best_of, kinds.values())]


def _size(shown: Sequence[RunResult]) -> str:
    most = max((result.num_f_grams or 0 for result in shown), default=0)
    return f"{most:,} " if most else ""


def _ratio(result: RunResult, base: RunResult, field: str) -> float:
    return float(getattr(result, field)) / float(getattr(base, field))


def _point(result: RunResult, base: RunResult, field: str, tests: Sequence[str]) -> Point:
    losses = [result.perplexity[test] for test in tests]
    spread = None
    if all("perplexity_spread" in found for found in losses):
        ends = [[math.log(found["perplexity_spread"][end]) for found in losses] for end in (0, 1)]
        spread = (math.exp(sum(ends[0]) / len(tests)), math.exp(sum(ends[1]) / len(tests)))
    color = f"var(--c{COLORS[family(result.kind)]})"
    return Point(label_of(result), _ratio(result, base, field), math.exp(mean_loss(result, tests)), color, spread)


def label_of(result: RunResult) -> str:
    """A plain run by its own name; others by kind, and the f-gram model's size where it has one."""
    if result.kind == PLAIN:
        return result.name
    return NAMES[family(result.kind)] + (f" {result.f_gram_model_size}" if result.f_gram_model_size else "")


def _placed(svg: str, left: float) -> str:
    """A chart as a part of the picture."""
    if not svg:
        return ""
    inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    return f'\n<g transform="translate({left:g} {TOP - plots.TOP / 2:g})">{inner}</g>'
