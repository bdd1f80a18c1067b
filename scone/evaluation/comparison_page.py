"""The comparison as one self-contained HTML page: tables, and plots of quality against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from scone.evaluation.plots import Series, legend, line_chart
from scone.evaluation.results import (
    PLAIN,
    RunResult,
    Table,
    cost_table,
    datasets_of,
    machine_line,
    memory_table,
    quality_table,
    speed_table,
)
from scone.evaluation.row_chart import row_chart
from scone.evaluation.scatter import Point, scatter_chart
from scone.utils.text import human_bytes, human_count

PALETTE = tuple(f"var(--series-{number})" for number in range(2, 9))
PLAIN_COLOR = "var(--series-1)"


def render_comparison(
    results: Sequence[RunResult], title: str, facts: Mapping[str, Any], missing: Sequence[Mapping[str, str]]
) -> str:
    """The whole page, of what `write_report` is given. Sections without anything to show are left out."""
    css = files("scone.evaluation").joinpath("report_style.css").read_text(encoding="utf-8")
    colors = colors_of_kinds(results)
    sections = [
        _header(results, title, facts),
        _section("Perplexity", _table(quality_table(results)), "Lower is better. In brackets the 95 % interval."),
        *(_quality_plots(results, dataset, colors) for dataset in datasets_of(results)),
        _section("Parameters and FLOPs", _rows(cost_table(results))),
        _section("Memory", _rows(memory_table(results)) + _memory_plots(results)),
        _section(
            "Speed", _speed_plots(results) + (_table(speed_table(results)) if any(r.speed for r in results) else "")
        ),
        _missing(missing),
        _notes(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def colors_of_kinds(results: Sequence[RunResult]) -> dict[str, str]:
    """A colour for each kind of input embedding: plain is grey, the others in order of appearance."""
    others = [kind for kind in dict.fromkeys(result.kind for result in results) if kind != PLAIN]
    return {PLAIN: PLAIN_COLOR} | {kind: PALETTE[index % len(PALETTE)] for index, kind in enumerate(others)}


def _header(results: Sequence[RunResult], title: str, facts: Mapping[str, Any]) -> str:
    parts = [f"{len(results)} models", *([machine_line(facts)] if "machine" in facts else [])]
    return f"<header><h1>{escape(title)}</h1><div class='meta'>{escape(' · '.join(parts))}</div></header>"


def _section(heading: str, content: str, note: str = "") -> str:
    if not content:
        return ""
    return f"<h2>{escape(heading)}</h2>{f'<p class=note>{escape(note)}</p>' if note else ''}{content}"


def _table(table: Table) -> str:
    head, rows = table
    cells = "".join(
        "<tr>"
        + "".join(f"<td{_side(name)}>{escape(cell)}</td>" for name, cell in zip(head, row, strict=True))
        + "</tr>"
        for row in rows
    )
    heads = "".join(f"<th{_side(name)}>{escape(name)}</th>" for name in head)
    return (
        f"<div class='scroll'><table class='wide'><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>"
    )


def _rows(table: Table) -> str:
    """The table, where it says more than the models' names."""
    return _table(table) if len(table[0]) > 1 else ""


def _side(column: str) -> str:
    """Words left, numbers right; the first column is left by the style sheet."""
    return " class=words" if column == "input embedding" else ""


def figure(title: str, plot: str, keys: str = "", caption: str = "") -> str:
    """A plot with its heading, legend and caption; empty where there is no plot."""
    if not plot:
        return ""
    return (
        f"<figure><h3>{escape(title)}</h3>{keys}{plot}"
        f"{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"
    )


def _quality_plots(results: Sequence[RunResult], dataset: str, colors: Mapping[str, str]) -> str:
    measured = [result for result in results if result.perplexity_of(dataset) is not None]
    if not measured:
        return ""
    keys = _dots({kind: colors[kind] for kind in dict.fromkeys(result.kind for result in measured)})
    label = f"perplexity, {dataset}"
    plots = [
        figure(title, _scatter(measured, dataset, value, colors, x_label, label), keys, caption)
        for title, value, x_label, caption in (
            (
                "Against inference FLOPs",
                lambda result: result.inference_flops_per_token,
                "inference FLOPs per token",
                "Down and to the left is better. Dotted: the Pareto front; no model is below and left of it.",
            ),
            (
                "Against training FLOPs",
                lambda result: result.training_flops or _per_token(results, result),
                "training FLOPs" if any(r.training_flops for r in results) else "training FLOPs per token",
                "What the same quality costs to train.",
            ),
            (
                "Against memory of the model",
                _memory,
                "bytes of the model, on the accelerator",
                "The table, off the accelerator, is not part of it.",
            ),
        )
        if value is not _memory or dataset == datasets_of(results)[0]
    ]
    plots += [lines(measured, dataset, label, colors) for lines in (_lines_over_f_grams, _lines_over_model_size)]
    content = "".join(plots)
    return f"<h2>Quality on {escape(dataset)}</h2><div class='plots'>{content}</div>" if content else ""


def _memory(result: RunResult) -> float | None:
    return result.resident_bytes


def _per_token(results: Sequence[RunResult], result: RunResult) -> float | None:
    """FLOPs per token, where no model has the FLOPs of its whole training: the two do not fit one axis."""
    return None if any(other.training_flops for other in results) else result.training_flops_per_token


def _scatter(
    results: Sequence[RunResult],
    dataset: str,
    value: Callable[[RunResult], float | None],
    colors: Mapping[str, str],
    x_label: str,
    y_label: str,
) -> str:
    points = []
    for result in results:
        x, found = value(result), result.perplexity[dataset]
        if x:
            spread = found.get("perplexity_spread")
            spread = (float(spread[0]), float(spread[1])) if spread else None
            points.append(Point(result.name, float(x), float(found["perplexity"]), colors[result.kind], spread))
    return scatter_chart(points, x_label, y_label) if len(points) > 1 else ""


def _dots(colors: Mapping[str, str]) -> str:
    """A legend of points."""
    items = "".join(
        f'<span class="key"><span class="swatch dot" style="--c:{color}"></span>{escape(name)}</span>'
        for name, color in colors.items()
    )
    return f'<div class="legend">{items}</div>'


Line = tuple[str, str]
"""What a line is of: kind, and the rest of its name."""


def _lines_over_f_grams(results: Sequence[RunResult], dataset: str, y_label: str, colors: Mapping[str, str]) -> str:
    """Perplexity over S, a line for each kind and size of f-gram model."""
    groups: dict[Line, list[tuple[float, float]]] = {}
    for result in results:
        if result.num_f_grams:
            size = ""
            if result.f_gram_model_parameters:
                size = f", {result.f_gram_model_size or human_count(result.f_gram_model_parameters)}"
            point = (float(result.num_f_grams), float(result.perplexity[dataset]["perplexity"]))
            groups.setdefault((result.kind, size), []).append(point)
    chart = _lines(groups, results, dataset, "number of f-grams S", y_label, colors)
    return figure("Against the number of f-grams", *chart, "More f-grams: a larger table, the same inference FLOPs.")


def _lines_over_model_size(results: Sequence[RunResult], dataset: str, y_label: str, colors: Mapping[str, str]) -> str:
    """Perplexity over the f-gram model's parameters, a line for each kind and S."""
    groups: dict[Line, list[tuple[float, float]]] = {}
    for result in results:
        if result.num_f_grams and result.f_gram_model_parameters:
            point = (float(result.f_gram_model_parameters), float(result.perplexity[dataset]["perplexity"]))
            groups.setdefault((result.kind, f", S = {human_count(result.num_f_grams)}"), []).append(point)
    chart = _lines(groups, results, dataset, "parameters of the f-gram model", y_label, colors)
    caption = "A larger f-gram model costs training, and nothing at inference."
    return figure("Against the size of the f-gram model", *chart, caption)


def _lines(
    groups: Mapping[Line, list[tuple[float, float]]],
    results: Sequence[RunResult],
    dataset: str,
    x_label: str,
    y_label: str,
    colors: Mapping[str, str],
) -> tuple[str, str]:
    """The chart and its legend, with the plain model as a level; a kind's first line has its colour of all plots."""
    xs = [x for points in groups.values() for x, _ in points]
    if len(set(xs)) < 2:
        return "", ""
    free = [color for color in PALETTE if color not in colors.values()] or list(PALETTE)
    series: list[Series] = []
    for (kind, rest), points in groups.items():
        taken = {line.color for line in series}
        color = colors[kind] if colors[kind] not in taken else next((c for c in free if c not in taken), free[0])
        series.append(Series(kind + rest, sorted(points), color, markers=True))
    plain = next((result for result in results if result.kind == PLAIN), None)
    if plain is not None:
        level = float(plain.perplexity[dataset]["perplexity"])
        series.insert(0, Series(plain.name, [(min(xs), level), (max(xs), level)], PLAIN_COLOR, dashed=True))
    keys = legend([(line.name, line.color, line.dashed) for line in series])
    return line_chart(series, x_label, y_label, x_logarithmic=True), keys


def _memory_plots(results: Sequence[RunResult]) -> str:
    names = [result.name for result in results]

    def chart(title: str, caption: str, series: Mapping[str, tuple[str, str]]) -> str:
        bars = [
            (name, color, [float(size) if (size := getattr(result, field)) else None for result in results])
            for name, (color, field) in series.items()
        ]
        shown = {name: color for name, color, values in bars if any(values)}
        return figure(title, row_chart(names, bars, "bytes", human_bytes), _dots(shown), caption)

    content = chart(
        "Model and table",
        "The table lies in RAM or on disk, not on the accelerator.",
        {
            "model": (PLAIN_COLOR, "resident_bytes"),
            "table in RAM": (PALETTE[0], "table_memory_bytes"),
            "table on disk": (PALETTE[1], "table_bytes"),
        },
    ) + chart(
        "Peaks while it was measured",
        "The process's peak holds libraries and everything else too.",
        {
            "process": (PLAIN_COLOR, "peak_process_bytes"),
            "accelerator": (PALETTE[0], "peak_accelerator_bytes"),
        },
    )
    return f"<div class='plots below'>{content}</div>" if content else ""


def _speed_plots(results: Sequence[RunResult]) -> str:
    lengths = [{speed["sequence_length"] for speed in result.speed} for result in results if result.speed]
    common = set.intersection(*lengths) if lengths else set()
    if not common:
        return ""
    length = max(common)
    batches = sorted({speed["batch_size"] for result in results for speed in result.speed})
    names = [result.name for result in results]

    def chart(title: str, field: str, caption: str) -> str:
        bars = []
        for index, batch in enumerate(batches):
            found = [
                next(
                    (
                        speed.get(field)
                        for speed in result.speed
                        if (speed["batch_size"], speed["sequence_length"]) == (batch, length)
                    ),
                    None,
                )
                for result in results
            ]
            bars.append((f"batch {batch}", (PLAIN_COLOR, *PALETTE)[index % 8], found))
        plot = row_chart(names, bars, f"tokens per second, {length:,} tokens")
        return figure(title, plot, _dots({name: color for name, color, _ in bars}), caption)

    content = chart(
        "Prefill", "prefill_tokens_per_second", "Reading the prompt; all sequences of the batch together."
    ) + chart("Decode", "decode_tokens_per_second", "Writing new tokens; all sequences of the batch together.")
    return f"<div class='plots above'>{content}</div>"


def _missing(missing: Sequence[Mapping[str, str]]) -> str:
    items = "".join(f"<li><strong>{escape(item['what'])}</strong>: {escape(item['why'])}</li>" for item in missing)
    return f"<h2>Missing</h2><ul>{items}</ul>" if items else ""


def _notes(facts: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in facts.get("notes", ()))
    return f"<h2>How this was measured</h2><ul>{notes}</ul>" if notes else ""
