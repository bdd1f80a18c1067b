"""The demo's page, made of its report.json alone, in words that fit whoever won (demo.html.j2 has most of them)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scone.evaluation.figures import PALETTE, PLAIN_COLOR, Line, bar_figure, line_figure
from scone.evaluation.report import Part, Table, columns, figure, machine_line, render, table
from scone.utils.text import human_bytes, human_count

NAMES = {"plain": "plain", "scone": "SCONE"}
COLORS = {"plain": PLAIN_COLOR, "scone": PALETTE[0]}
KEYS = {name: COLORS[key] for key, name in NAMES.items()}
LOSS = "loss, nats per token"
Report = Mapping[str, Any]


def render_demo(report: Report) -> str:
    """The whole page of what `scone.evaluation.demo` writes to report.json."""
    models = report["models"]
    matched = {group["length"]: group["num_predicted"] for group in models["plain"]["evaluation"]["by_match_length"]}
    examples = [[{"text": text, "style": "code"}, *numbers] for text, *numbers in report["f_grams"]["examples"]]
    meta = [report["created"], f"SCONE {report['scone_version']}", machine_line(report["machine"])]
    return render(
        "demo.html.j2",
        f"SCONE on {report['corpus']['name']}",
        [*meta, f"{report['total_seconds'] / 60:.1f} minutes in all"],
        **report,
        names=NAMES,
        verdict=verdict(report),
        perplexity={name: model["evaluation"]["perplexity"] for name, model in models.items()},
        flops_ratio=_ratio(report, "inference_flops_per_token"),
        match_rate=1 - matched.get(1, 0) / sum(matched.values()),
        quality=columns(_learning_curves(report), _loss_by_match_length(report)),
        examples=table((["f-gram", "tokens", "rank", "count"], examples)),
        costs=table(cost_table(report)),
        footer="Every number on this page is in report.json beside it and was measured by this run.",
    )


def verdict(report: Report) -> dict[str, str]:
    """Who won: ``kind`` (good, bad or even), ``headline``, ``detail`` (what it does and does not mean).

    Won means that the 95 % interval of the mean loss difference over held-out windows excludes zero. One seed: the
    interval covers the choice of text, not the luck of the initialisation.
    """
    perplexities = [report["models"][name]["evaluation"]["perplexity"] for name in NAMES]
    change = perplexities[1] / perplexities[0] - 1
    low, high = report["comparison"]["loss_difference_interval"]
    detail = (
        f"Both saw the same {human_count(report['training']['tokens'])} training tokens in the same order, with the "
        f"same trunk and schedule. SCONE takes {_ratio(report, 'inference_flops_per_token'):.2f}× the FLOPs a token at "
        f"inference, and took {_ratio(report, 'training_seconds'):.2f}× the time to train: in it plain would take "
        f"{steps_in_equal_time(report):,} steps in place of {report['models']['plain']['steps']:,}. (By the median "
        "step; one was trained after the other, so what else this machine did meanwhile is in that figure.) One run "
        "each of small models: a demonstration, not evidence for large ones."
    )
    numbers = f"perplexity {perplexities[1]:.2f} against {perplexities[0]:.2f} on held-out text"
    kind, headline = "even", f"No clear difference here: {numbers} ({change:+.1%})"
    if high < 0:
        kind, headline = "good", f"SCONE wins: {numbers} ({abs(change):.1%} lower)"
    if low > 0:
        kind, headline = "bad", f"The plain model wins here: SCONE's {numbers} ({change:.1%} higher)"
    return {"kind": kind, "headline": headline, "detail": detail}


def summary(report: Report) -> str:
    """The result as text, as measured, whoever won."""
    head, rows = cost_table(report)
    text = "\n".join(f"{name:<38}{plain:>16}{scone:>16}" for name, plain, scone in [head, *rows])
    return f"{text}\n\n{verdict(report)['headline']}  [{report['total_seconds'] / 60:.1f} minutes in all]"


def steps_in_equal_time(report: Report) -> int:
    """How many steps plain takes in the time that SCONE's training took."""
    return round(report["models"]["plain"]["steps"] * _ratio(report, "training_seconds"))


def _ratio(report: Report, fact: str) -> float:
    """SCONE's to plain's."""
    return float(report["models"]["scone"][fact] / report["models"]["plain"][fact])


def _learning_curves(report: Report) -> Part | None:
    lines = []
    for key, name in NAMES.items():
        model = report["models"][key]
        lines.append(Line(f"{name}, validation", model["validation_curve"], COLORS[key]))
        lines.append(Line(f"{name}, training", model["training_curve"], COLORS[key], dashed=True))
    caption = "Dots: validation text. Dashed: training batches, smoothed by the logging interval."
    return figure("Learning curves", line_figure(lines, "training tokens", LOSS), caption, KEYS)


def _loss_by_match_length(report: Report) -> Part | None:
    groups = {
        key: {group["length"]: group for group in report["models"][key]["evaluation"]["by_match_length"]}
        for key in NAMES
    }
    counts = {length: group["num_predicted"] for length, group in sorted(groups["plain"].items())}
    total = sum(counts.values())
    svg = bar_figure(
        [f"{'none' if length == 1 else length} ({count / total:.0%})" for length, count in counts.items()],
        [(name, COLORS[key], [groups[key][length]["loss"] for length in counts]) for key, name in NAMES.items()],
        "tokens of the longest f-gram at the position (share of positions)",
        LOSS,
    )
    caption = (
        "Loss of the next token after positions where the longest f-gram has this length. Both models are judged on "
        "the same positions."
    )
    return figure("Where the difference comes from", svg, caption, KEYS)


def cost_table(report: Report) -> Table:
    """Quality and costs side by side."""

    def row(name: str, fact: str, form: Callable[[Any], str]) -> list[str]:
        """``fact``: a key of the two models, or of their evaluations."""
        models = [report["models"][key] for key in NAMES]
        return [name, *(form(model[fact] if fact in model else model["evaluation"][fact]) for model in models)]

    steps = [f"{steps_in_equal_time(report):,}", f"{report['models']['scone']['steps']:,}"]
    rows = [
        row("Held-out perplexity (lower is better)", "perplexity", "{:.2f}".format),
        row("Loss, nats per token", "loss", "{:.4f}".format),
        row("Inference FLOPs per token", "inference_flops_per_token", human_count),
        row("Training FLOPs per token", "training_flops_per_token", human_count),
        row("Parameters resident at inference", "resident_parameters", human_count),
        row("Parameters trained", "trained_parameters", human_count),
        ["Embedding table, off the accelerator", "–", human_bytes(report["table_bytes"])],
        row("Training time of all steps, by the median", "training_seconds", "{:.0f} s".format),
        ["Steps in SCONE's training time", *steps],
        row("Generation, one sequence, tokens/s", "generation_tokens_per_second", "{:.0f}".format),
    ]
    return ["", *NAMES.values()], rows
