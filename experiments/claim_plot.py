"""The main claim as one picture: perplexity against inference FLOPs and against training FLOPs, from an experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiment_results import (
    BOTH,
    MODEL,
    OURS,
    OVER_ENCODING,
    PLAIN,
    ROWS,
    best_of,
    family,
    mean_loss,
    plain_of_equal_inference,
    run_results,
    same_tokens,
)

from scone.evaluation.figures import HEIGHT, INK, SERIES, TOP, Point, draw_points, new_figure, svg_of
from scone.evaluation.results import RunResult

COLORS = dict(zip((PLAIN, BOTH, ROWS, MODEL, OVER_ENCODING), SERIES, strict=False))
NAMES = {MODEL: "f-gram model", ROWS: "learned rows", BOTH: "model + rows", OVER_ENCODING: "over-encoding"}
HEADS = 56.0
"""Height of the lines above the axes, in pixels."""
STYLE = """
svg { --card: #ffffff; --ink: #1c1e21; --soft: #5f6670; --grid: #ebedf0; --series-1: #7a8594; --series-2: #c2410c;
  --series-3: #0f766e; --series-4: #1d4ed8; --series-5: #7c3aed; background: var(--card);
  font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --card: #16191c; --ink: #e8eaed; --soft: #9aa3ad; --grid: #272b30; --series-1: #9aa6b5; --series-2: #fb8a4c;
    --series-3: #2dd4bf; --series-4: #60a5fa; --series-5: #a78bfa; }
}
text { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
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
    title = (
        f"{_size(shown)}f-grams, {base.training_tokens or 0:,} training tokens; perplexity: mean of {', '.join(tests)}"
    )
    figure, (left, right) = new_figure(2, height=HEIGHT + HEADS, top=TOP + HEADS)
    points = [_point(result, base, "inference_flops_per_token", tests) for result in shown]
    draw_points(left, points, "inference FLOPs per token (plain = 1)", "perplexity")
    longer = [result for result in plain if result.name != base.name]
    points = [_point(result, base, "training_flops", tests) for result in [*shown, *longer]]
    trend = [(_ratio(result, base, "training_flops"), math.exp(mean_loss(result, tests))) for result in plain]
    draw_points(right, points, "training FLOPs (plain = 1)", "perplexity", trend=trend)
    bold: Any = {"fontweight": "bold", "color": INK}
    figure.text(0.01, 0.93, title.replace("_", " "), fontsize=16, **bold)
    for axes, head in ((left, "At equal tokens"), (right, "By training FLOPs; dashed: plain trained longer")):
        axes.annotate(head, (0, 1), (0, 12), xycoords="axes fraction", textcoords="offset pixels", fontsize=15, **bold)
    svg = svg_of(figure, "Perplexity against inference and training FLOPs")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f"<svg {names} ", 1).replace(">", f">\n<style>{STYLE}</style>", 1) + "\n"


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
    y, color = math.exp(mean_loss(result, tests)), COLORS[family(result.kind)]
    return Point(label_of(result), _ratio(result, base, field), y, color, spread)


def label_of(result: RunResult) -> str:
    """A plain run by its own name; others by kind, and the f-gram model's size where it has one."""
    if result.kind == PLAIN:
        return result.name
    return NAMES[family(result.kind)] + (f" {result.f_gram_model_size}" if result.f_gram_model_size else "")
