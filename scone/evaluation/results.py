"""Results of several models side by side: one form for every command that compares, and the report that it becomes.

write_report([RunResult("plain", "plain", {"WikiText": {"perplexity": 31.2}}), …], "results/")
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import scone
from scone.utils.files import atomic_path, write_json
from scone.utils.text import human_bytes, human_count

PLAIN = "plain"
STEM = "benchmark"


@dataclass
class RunResult:
    """What is known of one model; whatever is None or empty is left out of tables and plots.

    ``kind``: its input embedding in words, "plain" for a model without f-grams; models of one kind share a colour.
    ``perplexity``: per data set at least ``perplexity``, and where known what `PerplexityResult.to_dict` has
    (``perplexity_interval``, ``bits_per_byte`` …); ``perplexity_spread``, lowest and highest over seeds.
    ``num_f_grams``: S. ``f_gram_model_parameters``: size of the f-gram model, 0 without one.
    ``parameters``: ``resident`` (on the accelerator when it serves), ``training_only``, ``table`` (values off it).
    FLOPs: a multiply-add is two; ``training_flops`` are those of the whole training. ``speed``: one entry of
    `measure_speed` per ``batch_size`` and ``sequence_length``. ``facts``: anything else, for the JSON; ``served``
    ("live" or "table") is shown.
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
    training_flops: float | None = None
    training_tokens: int | None = None
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
        """A JSON-ready mapping."""
        return asdict(self)


def datasets_of(results: Sequence[RunResult]) -> list[str]:
    """Names of all data sets, in order of appearance."""
    return list(dict.fromkeys(name for result in results for name in result.perplexity))


def reference_of(results: Sequence[RunResult]) -> RunResult:
    """What costs are compared with: the first plain model, or the first of all."""
    return next((result for result in results if result.kind == PLAIN), results[0])


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

    ``facts`` go into the JSON as they are; of them the page shows ``machine`` (`measure.describe_machine`) and
    ``notes`` (sentences on how it was measured). ``missing``: what could not be measured (``what``) and ``why``.
    """
    from scone.evaluation.comparison_page import render_comparison

    folder = Path(output_dir)
    record = {
        "benchmark": "models",
        "title": title,
        "scone_version": scone.__version__,
        **(facts or {}),
        "records": [result.to_dict() for result in results],
        "missing": [dict(item) for item in missing],
    }
    texts = {
        f"{STEM}.csv": csv_text(results),
        f"{STEM}.md": markdown(results, title, missing, facts or {}),
        f"{STEM}.html": render_comparison(results, title, facts or {}, missing),
    }
    if any(result.speed for result in results):
        texts[f"{STEM}_speed.csv"] = speed_csv(results)
    write_json(folder / f"{STEM}.json", record)
    for name, text in texts.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / f"{STEM}.json", *(folder / name for name in texts)]


def csv_text(results: Sequence[RunResult]) -> str:
    """One line a model; columns name their units, a data set's begin with ``perplexity:``."""
    datasets = datasets_of(results)
    plain_fields = [
        name for name in RunResult.__dataclass_fields__ if name not in ("perplexity", "parameters", "speed", "facts")
    ]
    parameters = ("resident", "training_only", "table")
    head = [*plain_fields, *(f"{name}_parameters" for name in parameters)]
    per_dataset = ("perplexity", "perplexity_low", "perplexity_high", "bits_per_byte", "word_perplexity")
    head += [f"{value}:{name}" for name in datasets for value in per_dataset]
    rows = []
    for result in results:
        row: list[Any] = [getattr(result, name) for name in plain_fields]
        row += [(result.parameters or {}).get(name) for name in parameters]
        for name in datasets:
            found = result.perplexity.get(name, {})
            low, high = found.get("perplexity_interval") or (None, None)
            row += [found.get("perplexity"), low, high, found.get("bits_per_byte"), found.get("word_perplexity")]
        rows.append(row)
    return _csv(head, rows)


def speed_csv(results: Sequence[RunResult]) -> str:
    """One line for each model, batch size and sequence length."""
    values = list(dict.fromkeys(name for result in results for speed in result.speed for name in speed))
    rows = [[result.name, *(speed.get(name) for name in values)] for result in results for speed in result.speed]
    return _csv(["name", *values], rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


Table = tuple[list[str], list[list[str]]]
"""Heads, and rows of cells."""


def quality_table(results: Sequence[RunResult]) -> Table:
    """Perplexity on each data set, with its interval or its spread over seeds."""
    datasets = datasets_of(results)
    return ["model", "input embedding", *datasets], [
        [result.name, _described(result), *(_perplexity_cell(result.perplexity.get(name)) for name in datasets)]
        for result in results
    ]


def _described(result: RunResult) -> str:
    """The input embedding, and where it runs live what others have precomputed."""
    return result.kind + (", live" if result.facts.get("served") == "live" else "")


def _perplexity_cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found.get("perplexity") is None:
        return "–"
    spread = found.get("perplexity_spread") or found.get("perplexity_interval")
    return f"{found['perplexity']:.2f}" + (f" ({spread[0]:.2f}–{spread[1]:.2f})" if spread else "")


def cost_table(results: Sequence[RunResult]) -> Table:
    """f-grams, parameters and FLOPs; columns that no model has are left out."""
    reference = reference_of(results)

    def flops(name: str) -> list[str]:
        base, values = getattr(reference, name), [getattr(result, name) for result in results]
        if base is None:
            return [_shown(value, human_count) for value in values]
        return ["–" if value is None else f"{human_count(value)} ({value / base:.2f}×)" for value in values]

    def parameters(name: str) -> list[str]:
        return [_shown((result.parameters or {}).get(name), human_count) for result in results]

    columns = {
        "f-grams": [_shown(result.num_f_grams, human_count) for result in results],
        "parameters": parameters("resident"),
        "in the table": parameters("table"),
        "in training only": parameters("training_only"),
        "inference FLOPs/token": flops("inference_flops_per_token"),
        "training FLOPs/token": flops("training_flops_per_token"),
        "training FLOPs": flops("training_flops"),
    }
    return _columns(results, columns)


def memory_table(results: Sequence[RunResult]) -> Table:
    """Bytes of model and table, and peaks; columns that no model has are left out."""
    fields = {
        "model": "resident_bytes",
        "table on disk": "table_bytes",
        "table in RAM": "table_memory_bytes",
        "peak of the process": "peak_process_bytes",
        "peak on the accelerator": "peak_accelerator_bytes",
    }
    return _columns(
        results,
        {head: [_shown(getattr(result, name), human_bytes) for result in results] for head, name in fields.items()},
    )


def _columns(results: Sequence[RunResult], columns: Mapping[str, list[str]]) -> Table:
    kept = {head: cells for head, cells in columns.items() if any(cell != "–" for cell in cells)}
    rows = [[result.name, *(cells[index] for cells in kept.values())] for index, result in enumerate(results)]
    return ["model", *kept], rows


def _shown(value: float | None, form: Any) -> str:
    return form(value) if value else "–"


def speed_table(results: Sequence[RunResult]) -> Table:
    """Tokens a second, and latencies in milliseconds as p50 / p90 / p99."""

    def latency(speed: Mapping[str, Any], name: str) -> str:
        values = [speed.get(f"{name}_seconds_p{p}") for p in (50, 90, 99)]
        return "–" if None in values else " / ".join(f"{1000 * value:,.1f}" for value in values if value is not None)

    def rate(speed: Mapping[str, Any], name: str) -> str:
        return f"{speed[name]:,.0f}" if name in speed else "–"

    head = ["model", "batch", "tokens", "prefill tokens/s", "decode tokens/s"]
    head += ["first token, ms", "decode step, ms (p50 / p90 / p99)"]
    rows = [
        [
            result.name,
            str(speed["batch_size"]),
            str(speed["sequence_length"]),
            rate(speed, "prefill_tokens_per_second"),
            rate(speed, "decode_tokens_per_second"),
            latency(speed, "first_token"),
            latency(speed, "decode_step"),
        ]
        for result in results
        for speed in result.speed
    ]
    return head, rows


def markdown(
    results: Sequence[RunResult],
    title: str,
    missing: Sequence[Mapping[str, str]] = (),
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The results as Markdown tables: quality, cost, speed; what is missing at the end."""
    parts = [f"# {title}", *([f"{machine_line(facts)}."] if facts and "machine" in facts else [])]
    sections = {
        "Perplexity": quality_table,
        "Parameters and FLOPs": cost_table,
        "Memory": memory_table,
        "Speed": speed_table,
    }
    for heading, make in sections.items():
        head, rows = make(results)
        if rows and len(head) > (2 if heading == "Perplexity" else 1):
            parts += [f"## {heading}", markdown_table(head, rows)]
    if missing:
        parts += ["## Missing", "\n".join(f"- {item['what']}: {item['why']}" for item in missing)]
    return "\n\n".join(parts) + "\n"


def machine_line(facts: Mapping[str, Any]) -> str:
    """Processor or accelerator, and PyTorch."""
    machine = facts["machine"]
    device = machine.get("accelerator") or f"{machine['processor']}, {machine['num_threads']} threads"
    return f"{device}, PyTorch {machine['torch']}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers right, the first column left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
