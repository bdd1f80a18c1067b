"""Reports: the files of a comparison, and the one page (report.html.j2) that every report becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

import scone
from scone.evaluation.figures import (
    PALETTE,
    PLAIN_COLOR,
    VARIABLES,
    Line,
    Point,
    line_figure,
    row_figure,
    scatter_figure,
)
from scone.evaluation.results import PLAIN, STEM, RunResult, Table, csv_text, datasets_of, speed_csv, tables
from scone.utils.files import atomic_path, write_json
from scone.utils.text import human_bytes, human_count, markdown_table

Part = dict[str, Any]
"""What a section holds, as the template knows it: a figure, table, list, or columns of parts."""


def write_report(
    results: Sequence[RunResult],
    output_dir: str | Path,
    *,
    title: str = "Benchmark",
    facts: Mapping[str, Any] | None = None,
    missing: Sequence[Mapping[str, str]] = (),
) -> list[Path]:
    """Write ``results`` to ``output_dir``: benchmark.json, .csv, .md, a self-contained .html, and benchmark_speed.csv
    where speeds were measured. Returns what was written.

    ``facts`` go into the JSON as they are; of them the page shows ``machine`` (`utils.environment.environment`) and
    ``notes`` (sentences on how it was measured). ``missing``: what could not be measured (``what``) and ``why``.
    """
    folder, facts = Path(output_dir), facts or {}
    record = {"benchmark": "models", "title": title, "scone_version": scone.__version__, **facts}
    record |= {"records": [result.to_dict() for result in results], "missing": [dict(item) for item in missing]}
    texts = {
        f"{STEM}.csv": csv_text(results),
        f"{STEM}.md": markdown(results, title, missing, facts),
        f"{STEM}.html": comparison_page(results, title, facts, missing),
    }
    if any(result.speed for result in results):
        texts[f"{STEM}_speed.csv"] = speed_csv(results)
    write_json(folder / f"{STEM}.json", record)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / f"{STEM}.json", *(folder / name for name in texts)]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def markdown(
    results: Sequence[RunResult],
    title: str,
    missing: Sequence[Mapping[str, str]] = (),
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The tables as Markdown; what is missing at the end."""
    parts = [f"# {title}", *([f"{machine_line(facts['machine'])}."] if facts and "machine" in facts else [])]
    for heading, (head, rows) in tables(results).items():
        parts += [f"## {heading}", markdown_table(head, rows)]
    if missing:
        parts += ["## Missing", "\n".join(f"- {item['what']}: {item['why']}" for item in missing)]
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """Processor or accelerators, and PyTorch."""
    processor = f"{machine['processor']}, {machine['threads']} threads"
    return f"{', '.join(dict.fromkeys(machine['accelerators'])) or processor}, PyTorch {machine['libraries']['torch']}"


def render(template: str, title: str, meta: Sequence[str], **values: Any) -> str:
    """The page that ``template`` makes. ``meta``: facts below the title."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"bytes": human_bytes, "count": human_count}
    return environment.get_template(template).render(title=title, meta=meta, **values)


def section(heading: str, parts: Sequence[Part | None], note: str = "") -> dict[str, Any]:
    """A heading and what stands below it; what is None is left out."""
    return {"heading": heading, "parts": [part for part in parts if part], "note": note}


def figure(title: str, svg: str, caption: str = "", keys: Mapping[str, str] | Sequence[Line] = ()) -> Part | None:
    """A figure with a legend: of points by name and colour, or of lines; None where there is nothing to see."""
    if not svg:
        return None
    named = (
        [(name, color, "dot") for name, color in keys.items()]
        if isinstance(keys, Mapping)
        else [(line.name, line.color, "dashed" if line.dashed else "") for line in keys]
    )
    legend = [{"name": name, "color": f"var({VARIABLES[color]})", "style": style} for name, color, style in named]
    return {"title": title, "svg": svg, "caption": caption, "keys": legend}


def table(found: Table, wide: bool = False) -> Part:
    """A table."""
    return {"head": found[0], "rows": found[1], "wide": wide}


def columns(*found: Part | Sequence[Part | None] | None, style: str = "") -> Part | None:
    """Parts, or lists of parts, side by side where there is room; None where all are empty."""
    lists = [[part for part in (each if isinstance(each, Sequence) else [each]) if part] for each in found]
    kept = [each for each in lists if each]
    return {"columns": kept, "style": style} if kept else None


def comparison_page(
    results: Sequence[RunResult], title: str, facts: Mapping[str, Any], missing: Sequence[Mapping[str, str]]
) -> str:
    """The page of a comparison: tables, and plots of quality against what it costs."""
    colors = colors_of_kinds(results)
    shown = {heading: section(heading, [table(content, wide=True)]) for heading, content in tables(results).items()}
    quality = [
        section(f"Quality on {name}", [_quality_figures(results, name, colors)]) for name in datasets_of(results)
    ]
    if "Perplexity" in shown:
        quality.insert(0, shown.pop("Perplexity") | {"note": "Lower is better. In brackets the 95 % interval."})
    if "Memory" in shown:
        shown["Memory"]["parts"] += filter(None, [_memory_figures(results)])
    if "Speed" in shown:
        shown["Speed"]["parts"][:0] = filter(None, [_speed_figures(results)])
    ends = {"Missing": missing, "How this was measured": facts.get("notes")}
    sections = [*quality, *shown.values()]
    sections += [section(heading, [{"list": list(entries)}]) for heading, entries in ends.items() if entries]
    meta = [f"{len(results)} models", *([machine_line(facts["machine"])] if "machine" in facts else [])]
    return render("report.html.j2", title, meta, sections=sections)


def colors_of_kinds(results: Sequence[RunResult]) -> dict[str, str]:
    """A colour for each kind of input embedding: plain is grey, the others in order of appearance."""
    others = [kind for kind in dict.fromkeys(result.kind for result in results) if kind != PLAIN]
    return {PLAIN: PLAIN_COLOR} | {kind: PALETTE[index % len(PALETTE)] for index, kind in enumerate(others)}


def _quality_figures(results: Sequence[RunResult], dataset: str, colors: Mapping[str, str]) -> Part | None:
    """Perplexity on a data set against what it costs, over S and over the size of the f-gram model."""
    measured = [(result, y) for result in results if (y := result.perplexity_of(dataset)) is not None]
    label = f"perplexity, {dataset}"

    def scatter(title: str, cost: str, x_label: str, caption: str) -> Part | None:
        points = []
        for result, y in measured:
            if x := getattr(result, cost):
                spread = result.perplexity[dataset].get("perplexity_spread")
                points.append(Point(result.name, x, y, colors[result.kind], tuple(spread) if spread else None))
        keys = {result.kind: colors[result.kind] for result, _ in measured}
        return figure(title, scatter_figure(points, x_label, label), caption, keys)

    def lines(title: str, cost: str, name_of: Callable[[RunResult], str], x_label: str, caption: str) -> Part | None:
        """A line for each name, plain as a level; a kind's first line has its colour of all plots."""
        found: dict[str, list[tuple[float, float]]] = {}
        drawn: list[Line] = []
        for result, y in measured:
            if result.num_f_grams and (x := getattr(result, cost)):
                found.setdefault(f"{result.kind}{name_of(result)}", []).append((float(x), y))
        xs = {x for points in found.values() for x, _ in points}
        if len(xs) < 2:
            return None
        for name, points in found.items():
            kind = next(kind for kind in sorted(colors, key=len, reverse=True) if name.startswith(kind))
            taken, free = {line.color for line in drawn}, [each for each in PALETTE if each not in colors.values()]
            color = next((each for each in (colors[kind], *free) if each not in taken), free[0])
            drawn.append(Line(name, sorted(points), color, markers=True))
        for plain, y in [each for each in measured if each[0].kind == PLAIN][:1]:
            drawn.insert(0, Line(plain.name, [(min(xs), y), (max(xs), y)], PLAIN_COLOR, dashed=True))
        return figure(title, line_figure(drawn, x_label, label, logarithmic=True), caption, drawn)

    def model_size(result: RunResult) -> str:
        size = result.f_gram_model_parameters
        return f", {result.f_gram_model_size or human_count(size)}" if size else ""

    whole = any(result.training_flops for result in results)
    parts = [
        scatter(
            "Against inference FLOPs",
            "inference_flops_per_token",
            "inference FLOPs per token",
            "Down and to the left is better. Dotted: the Pareto front; no model is below and left of it.",
        ),
        scatter(
            "Against training FLOPs",
            "training_flops" if whole else "training_flops_per_token",
            "training FLOPs" if whole else "training FLOPs per token",
            "What the same quality costs to train.",
        ),
    ]
    if dataset == datasets_of(results)[0]:
        caption = "The table, off the accelerator, is not part of it."
        x_label = "bytes of the model, on the accelerator"
        parts.append(scatter("Against memory of the model", "resident_bytes", x_label, caption))
    parts += [
        lines(
            "Against the number of f-grams",
            "num_f_grams",
            model_size,
            "number of f-grams S",
            "More f-grams: a larger table, the same inference FLOPs.",
        ),
        lines(
            "Against the size of the f-gram model",
            "f_gram_model_parameters",
            lambda result: f", S = {human_count(result.num_f_grams or 0)}",
            "parameters of the f-gram model",
            "A larger f-gram model costs training, and nothing at inference.",
        ),
    ]
    return columns(*parts)


def _bars(
    results: Sequence[RunResult],
    title: str,
    caption: str,
    series: Mapping[str, Callable[[RunResult], float | None]],
    label: str,
    form: Callable[[float], str],
) -> Part | None:
    """Horizontal bars for each model; series that no model has are left out."""
    values = {name: [value_of(result) or None for result in results] for name, value_of in series.items()}
    colors = {name: (PLAIN_COLOR, *PALETTE)[place % 8] for place, name in enumerate(series) if any(values[name])}
    bars = [(name, color, values[name]) for name, color in colors.items()]
    return figure(title, row_figure([result.name for result in results], bars, label, form), caption, colors)


def _memory_figures(results: Sequence[RunResult]) -> Part | None:
    lies = {"model": "resident_bytes", "table in RAM": "table_memory_bytes", "table on disk": "table_bytes"}
    peaks = {"process": "peak_process_bytes", "accelerator": "peak_accelerator_bytes"}
    charts = {
        ("Model and table", "The table lies in RAM or on disk, not on the accelerator."): lies,
        ("Peaks while it was measured", "The process's peak holds libraries and everything else too."): peaks,
    }
    return columns(
        *(
            _bars(results, *words, {name: attrgetter(field) for name, field in fields.items()}, "bytes", human_bytes)
            for words, fields in charts.items()
        )
    )


def _speed_figures(results: Sequence[RunResult]) -> Part | None:
    """Tokens a second at the longest sequences that all models can read."""
    lengths = [{speed["sequence_length"] for speed in result.speed} for result in results if result.speed]
    if not (common := set.intersection(*lengths)):
        return None
    longest, batches = max(common), sorted({speed["batch_size"] for result in results for speed in result.speed})

    def rate_of(rate: str, batch: int) -> Callable[[RunResult], float | None]:
        where = {"batch_size": batch, "sequence_length": longest}
        return lambda result: next((speed.get(rate) for speed in result.speed if where.items() <= speed.items()), None)

    charts = {"Prefill": "Reading the prompt", "Decode": "Writing new tokens"}
    return columns(
        *(
            _bars(
                results,
                kind,
                f"{what}; all sequences of the batch together.",
                {f"batch {batch}": rate_of(f"{kind.lower()}_tokens_per_second", batch) for batch in batches},
                f"tokens per second, {longest:,} tokens",
                human_count,
            )
            for kind, what in charts.items()
        )
    )
