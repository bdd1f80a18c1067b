"""Results of several models in one form, their tables, and the one page (report.html.j2) that every report becomes.

write_report([RunResult("plain", "plain", {"WikiText": {"perplexity": 31.2}}), …], "results/")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

import scone
from scone.evaluation.figures import PALETTE, PLAIN_COLOR, VARIABLES, Point, scatter_figure
from scone.utils.files import atomic_path, write_json
from scone.utils.text import human_bytes, human_count, markdown_table

PLAIN, MODEL, ROWS, OVER_ENCODING = "plain", "f-gram model", "learned rows", "over-encoding"
BOTH = f"{MODEL} + {ROWS}"
STEM = "benchmark"

SPEED_HEAD = ["model", "batch", "tokens", "prefill tokens/s", "decode tokens/s", "first token, ms"]
SPEED_HEAD += ["decode step, ms (p50 / p90 / p99)"]

Table = tuple[list[str], list[list[Any]]]
"""Heads, and rows of cells; on a page a cell may also be a mapping (``text``, ``more`` below it, ``style``)."""

Cell = Callable[["RunResult"], str]
Part = dict[str, Any]
"""What a section holds, as the template knows it: a figure, table, list, or columns of parts."""
COSTS = {
    "inference_flops_per_token": ("inference FLOPs per token", "Down and to the left is better. Dotted: the front."),
    "training_flops_per_token": ("training FLOPs per token", "What the same quality costs to train."),
    "num_f_grams": ("number of f-grams S", "More f-grams: a larger table, the same inference FLOPs."),
}


@dataclass
class RunResult:
    """What is known of one model; whatever is None or empty is left out of tables and plots.

    ``kind``: its input embedding in words, "plain" for a model without f-grams; models of one kind share a colour.
    ``perplexity``: per data set at least ``perplexity``, and where known what `PerplexityResult.to_dict` has
    (``perplexity_interval``, ``bits_per_byte`` …).
    ``num_f_grams``: S. ``f_gram_model_parameters``: size of the f-gram model, 0 without one.
    ``parameters``: ``resident`` (on the accelerator when it serves), ``training_only``, ``table`` (values off it).
    FLOPs: a multiply-add is two. ``speed``: one entry of `measure_speed` per ``batch_size`` and ``sequence_length``.
    ``facts``: anything else, for the JSON; ``served`` ("live" or "table") is shown.
    """

    name: str
    kind: str
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_f_grams: int | None = None
    f_gram_model_parameters: int | None = None
    f_gram_model_size: str | None = None
    parameters: dict[str, int] | None = None
    inference_flops_per_token: float | None = None
    training_flops_per_token: float | None = None
    resident_bytes: int | None = None
    table_bytes: int | None = None
    table_memory_bytes: int | None = None
    peak_process_bytes: int | None = None
    peak_accelerator_bytes: int | None = None
    speed: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def perplexity_of(self, dataset: str) -> float | None:
        """Its perplexity on a data set, None where it was not measured or is not finite."""
        value = self.perplexity.get(dataset, {}).get("perplexity")
        return float(value) if value is not None and math.isfinite(value) else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; without the losses of single windows."""
        found = asdict(self)
        for perplexity in found["perplexity"].values():
            perplexity.pop("window_losses", None)
        return found


def kind_of_parts(f_gram_model: bool, learned_rows: bool) -> str:
    """The kind of a SCONE model that has these parts."""
    return BOTH if f_gram_model and learned_rows else MODEL if f_gram_model else ROWS


def datasets_of(results: Sequence[RunResult]) -> list[str]:
    """Names of all data sets, in order of appearance."""
    return list(dict.fromkeys(name for result in results for name in result.perplexity))


def tables(results: Sequence[RunResult]) -> dict[str, Table]:
    """The tables that have anything to show, by heading; a column that no model has a value for is left out."""
    base = next((result for result in results if result.kind == PLAIN), results[0])

    def sized(field: str, form: Callable[[float], str]) -> Cell:
        return lambda result: form(value) if (value := getattr(result, field)) else "–"

    def parameters(name: str) -> Cell:
        return lambda result: human_count(value) if (value := (result.parameters or {}).get(name)) else "–"

    def flops(field: str) -> Cell:
        """With the multiple of the first plain model's."""
        unit = getattr(base, field)
        return lambda result: (
            "–" if (value := getattr(result, field)) is None
            else human_count(value) + (f" ({value / unit:.2f}×)" if unit else "")
        )  # fmt: skip

    quality: dict[str, Cell] = {
        "input embedding": lambda result: result.kind + (", live" if result.facts.get("served") == "live" else "")
    }
    quality |= {name: partial(_perplexity, name) for name in datasets_of(results)}
    costs = {
        "f-grams": sized("num_f_grams", human_count),
        "parameters": parameters("resident"),
        "in the table": parameters("table"),
        "in training only": parameters("training_only"),
        "inference FLOPs/token": flops("inference_flops_per_token"),
        "training FLOPs/token": flops("training_flops_per_token"),
    }
    memory = {
        "model": sized("resident_bytes", human_bytes),
        "table on disk": sized("table_bytes", human_bytes),
        "table in RAM": sized("table_memory_bytes", human_bytes),
        "peak of the process": sized("peak_process_bytes", human_bytes),
        "peak on the accelerator": sized("peak_accelerator_bytes", human_bytes),
    }
    found = {}
    for heading, columns in {"Perplexity": quality, "Parameters and FLOPs": costs, "Memory": memory}.items():
        cells = {head: [cell(result) for result in results] for head, cell in columns.items()}
        kept = {head: column for head, column in cells.items() if set(column) != {"–"}}
        if len(kept) > (heading == "Perplexity"):
            rows = [[result.name, *row] for result, *row in zip(results, *kept.values(), strict=True)]
            found[heading] = (["model", *kept], rows)
    speeds = [[result.name, *_speed_cells(speed)] for result in results for speed in result.speed]
    return found | ({"Speed": (SPEED_HEAD, speeds)} if speeds else {})


def _perplexity(dataset: str, result: RunResult) -> str:
    """With its interval."""
    found = result.perplexity.get(dataset, {})
    if found.get("perplexity") is None:
        return "–"
    interval = found.get("perplexity_interval")
    return f"{found['perplexity']:.2f}" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")


def _speed_cells(speed: Mapping[str, Any]) -> list[str]:
    """Tokens a second, and latencies in milliseconds as p50 / p90 / p99."""
    rates = [speed.get(f"{name}_tokens_per_second") for name in ("prefill", "decode")]
    cells = [str(speed["batch_size"]), str(speed["sequence_length"])]
    cells += ["–" if rate is None else f"{rate:,.0f}" for rate in rates]
    for name in ("first_token", "decode_step"):
        values = [speed[key] for p in (50, 90, 99) if (key := f"{name}_seconds_p{p}") in speed]
        cells.append(" / ".join(f"{1000 * value:,.1f}" for value in values) or "–")
    return cells


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


# a model of bytes may write control characters, which no page may hold
_SHOWN = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF], "\ufffd")


def render(template: str, title: str, meta: Sequence[str], **values: Any) -> str:
    """The page that ``template`` makes. ``meta``: facts below the title."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"bytes": human_bytes, "count": human_count}
    return environment.get_template(template).render(title=title, meta=meta, **values).translate(_SHOWN)


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
