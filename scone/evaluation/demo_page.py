"""The demo's page, made of its report.json alone, in words that fit whoever won."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scone.evaluation.figures import PALETTE, PLAIN_COLOR, Line, bar_figure, line_figure
from scone.evaluation.report import Part, columns, figure, machine_line, render, table
from scone.evaluation.results import Table
from scone.utils.text import human_bytes, human_count

NAMES = {"plain": ("plain", PLAIN_COLOR), "scone": ("SCONE", PALETTE[0])}
KEYS = [Line(name, [], color) for name, color in NAMES.values()]
Report = Mapping[str, Any]


def render_demo(report: Report) -> str:
    """The whole page of what `scone.evaluation.demo` writes to report.json; its words are in demo.html.j2."""
    plain, scone = _models(report)
    meta = [report["created"], f"SCONE {report['scone_version']}", machine_line(report["machine"])]
    return render(
        "demo.html.j2",
        f"SCONE on {report['corpus']['name']}",
        [*meta, f"{report['total_seconds'] / 60:.1f} minutes in all"],
        **report,
        names={key: name for key, (name, _) in NAMES.items()},
        verdict=verdict(report),
        perplexity={"plain": plain["evaluation"]["perplexity"], "scone": scone["evaluation"]["perplexity"]},
        flops_ratio=_flops_ratio(report),
        quality=columns(_learning_curves(report), _loss_by_match_length(report)),
        matches=columns(_match_curve(report), _examples(report)),
        costs=columns(table(cost_table(report)), [_loss_by_time(report), _steps(report)], style="top"),
        footer="Every number on this page is in report.json beside it and was measured by this run.",
    )


def verdict(report: Report) -> dict[str, str]:
    """Who won: ``kind`` (good, bad or even), ``headline``, ``detail`` (what it does and does not mean).

    Won means that the 95 % interval of the mean loss difference over held-out windows excludes zero. One seed: the
    interval covers the choice of text, not the luck of the initialisation.
    """
    plain, scone = _models(report)
    perplexities = [model["evaluation"]["perplexity"] for model in (plain, scone)]
    change = perplexities[1] / perplexities[0] - 1
    low, high = report["comparison"]["loss_difference_interval"]
    training = report["training"]
    detail = (
        f"Both saw the same {human_count(training['tokens'])} training tokens in the same order, with the same trunk "
        f"and schedule. SCONE takes {_flops_ratio(report):.2f}× the FLOPs a token at inference, and "
        f"{scone['seconds_a_step'] / plain['seconds_a_step']:.2f}× the time a training step: in SCONE's training time "
        f"plain would take {steps_in_equal_time(report):,} steps in place of {training['steps']:,}. One run each of "
        "small models: a demonstration, not evidence for large ones."
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
    lines = [[cell["text"] if isinstance(cell, dict) else cell for cell in row] for row in [head, *rows]]
    text = "\n".join(f"{name:<38}{plain:>16}{scone:>16}" for name, plain, scone in lines)
    return f"{text}\n\n{verdict(report)['headline']}  [{report['total_seconds'] / 60:.1f} minutes in all]"


def steps_in_equal_time(report: Report) -> int:
    """How many steps plain takes in the time that SCONE's training takes, at the seconds a step of each."""
    plain, scone = (model["seconds_a_step"] for model in _models(report))
    return round(report["training"]["steps"] * scone / plain)


def _models(report: Report) -> list[Mapping[str, Any]]:
    return [report["models"][name] for name in NAMES]


def _flops_ratio(report: Report) -> float:
    plain, scone = (model["inference_flops_per_token"] for model in _models(report))
    return float(scone / plain)


def _two_decimals(value: float) -> str:
    return f"{value:.2f}"


def _curves(title: str, x_label: str, caption: str, lines: Sequence[Line]) -> Part | None:
    return figure(title, line_figure(lines, x_label, "loss, nats per token", y_format=_two_decimals), caption, KEYS)


def _learning_curves(report: Report) -> Part | None:
    lines = []
    for key, (name, color) in NAMES.items():
        model = report["models"][key]
        lines.append(Line(f"{name}, validation", model["validation_curve"], color, markers=True))
        lines.append(Line(f"{name}, training", model["training_curve"], color, dashed=True))
    caption = "Solid: validation text. Dashed: training batches, smoothed by the logging interval."
    return _curves("Learning curves", "training tokens", caption, lines)


def _loss_by_time(report: Report) -> Part | None:
    """Validation loss over training time at each model's seconds a step: what equal tokens leave out."""
    lines, tokens_a_step = [], report["training"]["tokens"] / report["training"]["steps"]
    for model, (name, color) in zip(_models(report), NAMES.values(), strict=True):
        seconds_a_token = model["seconds_a_step"] / tokens_a_step
        points = [(tokens * seconds_a_token, loss) for tokens, loss in model["validation_curve"]]
        lines.append(Line(name, points, color, markers=True))
    caption = (
        "The same runs over time, at each one's seconds a step. The schedules end at different times: only the last "
    )
    return _curves(
        "Validation loss by training time", "training time, seconds", caption + "points are finished models.", lines
    )


def _loss_by_match_length(report: Report) -> Part | None:
    groups = {
        key: {group["length"]: group for group in report["models"][key]["evaluation"]["by_match_length"]}
        for key in NAMES
    }
    counts = {length: group["num_predicted"] for length, group in sorted(groups["plain"].items())}
    total = sum(counts.values())
    svg = bar_figure(
        [f"{'none' if length == 1 else length} ({count / total:.0%})" for length, count in counts.items()],
        [
            (name, color, [groups[key][length]["loss"] if length in groups[key] else None for length in counts])
            for key, (name, color) in NAMES.items()
        ],
        "tokens of the longest f-gram at the position (share of positions)",
        "loss, nats per token",
    )
    caption = (
        "Loss of the next token after positions where the longest f-gram has this length. Both models are judged on "
        "the same positions."
    )
    return figure("Where the difference comes from", svg, caption, KEYS)


def _match_curve(report: Report) -> Part | None:
    svg = line_figure(
        [Line("held-out positions matched", report["f_grams"]["match_rate_by_size"], PALETTE[0], markers=True)],
        "number of f-grams S (most frequent first)",
        "positions matched",
        logarithmic=True,
        from_zero=True,
        y_format=lambda value: f"{value:.0%}",
    )
    caption = "Share of held-out positions at which some f-gram of the S most frequent ends."
    return figure("More f-grams match more of the text", svg, caption)


def _examples(report: Report) -> Part:
    rows = [
        [{"text": entry["text"], "style": "code"}, entry["length"], f"{entry['rank']:,}", f"{entry['count']:,}"]
        for entry in report["f_grams"]["examples"]
    ]
    return table((["f-gram", "tokens", "rank", "count"], rows))


def cost_table(report: Report) -> Table:
    """Quality and costs side by side; the better of two values that differ is bold."""
    models, two = _models(report), _two_decimals

    def row(name: str, path: str, form: Callable[[Any], str], bold: bool = False) -> list[Any]:
        """``path``: a key of the two models, or of their evaluations ("evaluation.KEY")."""
        of, key = [model["evaluation"] if "." in path else model for model in models], path.rpartition(".")[2]
        values, better = [each[key] for each in of], None
        if bold and abs(values[0] - values[1]) >= 1e-3 * abs(values[0]):
            better = int(values[1] < values[0])
        styles = ["winner" if place == better else "" for place in range(len(values))]
        return [name, *({"text": form(value), "style": style} for value, style in zip(values, styles, strict=True))]

    rows = [
        row("Held-out perplexity (lower is better)", "evaluation.perplexity", two, bold=True),
        row("Loss, nats per token", "evaluation.loss", "{:.4f}".format, bold=True),
    ]
    if all(model["evaluation"]["bits_per_byte"] for model in models):
        rows.append(row("Bits per byte of text", "evaluation.bits_per_byte", "{:.4f}".format, bold=True))
    rows += [
        row("Inference FLOPs per token", "inference_flops_per_token", human_count),
        row("Training FLOPs per token", "training_flops_per_token", human_count),
        row("Parameters resident at inference", "resident_parameters", human_count),
        row("Parameters trained", "trained_parameters", human_count),
        row("Model in memory at inference", "resident_bytes", human_bytes),
        ["Embedding table, off the accelerator", "–", human_bytes(report["table"]["file_bytes"])],
        row("Training time, evaluations included", "training_seconds", "{:.0f} s".format),
        row("A training step, timed in turn", "seconds_a_step", "{:.3f} s".format, bold=True),
        ["Steps in SCONE's training time", f"{steps_in_equal_time(report):,}", f"{report['training']['steps']:,}"],
        row("Evaluation speed", "evaluation.tokens_per_second", lambda speed: f"{human_count(speed)} tokens/s"),
        row("Generation, one sequence", "generation_tokens_per_second", "{:.0f} tokens/s".format),
    ]
    return ["", "plain", "SCONE"], rows


def _steps(report: Report) -> Part:
    rows = [[{"text": step["name"], "more": step["note"]}, f"{step['seconds']:.1f} s"] for step in report["steps"]]
    return table((["Step of this run", "Time"], rows))
