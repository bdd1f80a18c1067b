"""Reports: the files of a comparison, and the one page (report.html.j2) that every report becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

import scone
from scone.evaluation.figures import PALETTE, PLAIN_COLOR, VARIABLES, Point, scatter_figure
from scone.evaluation.results import PLAIN, STEM, RunResult, Table, datasets_of, tables
from scone.utils.files import atomic_path, write_json
from scone.utils.text import human_bytes, human_count, markdown_table

Part = dict[str, Any]
"""What a section holds, as the template knows it: a figure, table, list, or columns of parts."""
COSTS = {
    "inference_flops_per_token": ("inference FLOPs per token", "Down and to the left is better. Dotted: the front."),
    "training_flops_per_token": ("training FLOPs per token", "What the same quality costs to train."),
    "num_f_grams": ("number of f-grams S", "More f-grams: a larger table, the same inference FLOPs."),
}


def write_report(
    results: Sequence[RunResult],
    output_dir: str | Path,
    *,
    title: str = "Benchmark",
    facts: Mapping[str, Any] | None = None,
    missing: Sequence[Mapping[str, str]] = (),
) -> list[Path]:
    """Write ``results`` to ``output_dir``: benchmark.json, .md and a self-contained .html. Returns what was written.

    ``facts`` go into the JSON as they are; of them the page shows ``machine`` (`utils.environment.environment`) and
    ``notes`` (sentences on how it was measured). ``missing``: what could not be measured (``what``) and ``why``.
    """
    folder, facts = Path(output_dir), facts or {}
    record = {"benchmark": "models", "title": title, "scone_version": scone.__version__, **facts}
    record |= {"records": [result.to_dict() for result in results], "missing": [dict(item) for item in missing]}
    texts = {
        f"{STEM}.md": markdown(results, title, missing, facts),
        f"{STEM}.html": comparison_page(results, title, facts, missing),
    }
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


def figure(title: str, svg: str, caption: str, keys: Mapping[str, str], style: str = "") -> Part | None:
    """A figure with a legend of names and colours, lines or another ``style``; None where there is nothing to see."""
    if not svg:
        return None
    legend = [{"name": name, "color": f"var({VARIABLES[color]})", "style": style} for name, color in keys.items()]
    return {"title": title, "svg": svg, "caption": caption, "keys": legend}


def table(found: Table, wide: bool = False) -> Part:
    """A table."""
    return {"head": found[0], "rows": found[1], "wide": wide}


def columns(*found: Part | None) -> Part | None:
    """Parts side by side where there is room; None where all are empty."""
    kept = [part for part in found if part]
    return {"columns": kept} if kept else None


def comparison_page(
    results: Sequence[RunResult], title: str, facts: Mapping[str, Any], missing: Sequence[Mapping[str, str]]
) -> str:
    """The page of a comparison: tables, and plots of quality against what it costs."""
    shown = {heading: section(heading, [table(content, wide=True)]) for heading, content in tables(results).items()}
    quality = [section(f"Quality on {name}", [_quality_figures(results, name)]) for name in datasets_of(results)]
    if "Perplexity" in shown:
        quality.insert(0, shown.pop("Perplexity") | {"note": "Lower is better. In brackets the 95 % interval."})
    ends = {"Missing": missing, "How this was measured": facts.get("notes")}
    sections = [*quality, *shown.values()]
    sections += [section(heading, [{"list": list(entries)}]) for heading, entries in ends.items() if entries]
    meta = [f"{len(results)} models", *([machine_line(facts["machine"])] if "machine" in facts else [])]
    return render("report.html.j2", title, meta, sections=sections)


def _quality_figures(results: Sequence[RunResult], dataset: str) -> Part | None:
    """Perplexity on a data set against what it costs; plain is grey."""
    others = [kind for kind in dict.fromkeys(result.kind for result in results) if kind != PLAIN]
    colors = {PLAIN: PLAIN_COLOR} | {kind: PALETTE[index % len(PALETTE)] for index, kind in enumerate(others)}
    measured = [(result, y) for result in results if (y := result.perplexity_of(dataset)) is not None]
    figures = []
    for cost, (label, caption) in COSTS.items():
        points, keys = [], {}
        for result, y in measured:
            if x := getattr(result, cost):
                keys[result.kind] = colors[result.kind]
                points.append(Point(result.name, x, y, colors[result.kind]))
        svg = scatter_figure(points, label, f"perplexity, {dataset}")
        figures.append(figure(f"Against {label}", svg, caption, keys, "dot"))
    return columns(*figures)
