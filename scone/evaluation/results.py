"""Results of several models in one form for every command that compares, and their tables.

write_report([RunResult("plain", "plain", {"WikiText": {"perplexity": 31.2}}), …], "results/")   # of report.py
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scone.utils.text import human_bytes, human_count

PLAIN, MODEL, ROWS, OVER_ENCODING = "plain", "f-gram model", "learned rows", "over-encoding"
BOTH = f"{MODEL} + {ROWS}"
STEM = "benchmark"

Table = tuple[list[str], list[list[Any]]]
"""Heads, and rows of cells; on a page a cell may also be a mapping (``text``, ``more`` below it, ``style``)."""


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


def tables(results: Sequence[RunResult]) -> dict[str, Table]:
    """The tables that have anything to show, by heading."""
    found = {
        "Perplexity": _quality_table(results),
        "Parameters and FLOPs": _cost_table(results),
        "Memory": _memory_table(results),
        "Speed": _speed_table(results),
    }
    return {
        heading: (head, rows)
        for heading, (head, rows) in found.items()
        if rows and len(head) > (2 if heading == "Perplexity" else 1)
    }


def _quality_table(results: Sequence[RunResult]) -> Table:
    """Perplexity on each data set, with its interval or its spread over seeds."""

    def cell(found: Mapping[str, Any] | None) -> str:
        if found is None or found.get("perplexity") is None:
            return "–"
        spread = found.get("perplexity_spread") or found.get("perplexity_interval")
        return f"{found['perplexity']:.2f}" + (f" ({spread[0]:.2f}–{spread[1]:.2f})" if spread else "")

    def kind(result: RunResult) -> str:
        return result.kind + (", live" if result.facts.get("served") == "live" else "")

    datasets = datasets_of(results)
    rows: list[list[Any]] = [
        [result.name, kind(result), *(cell(result.perplexity.get(name)) for name in datasets)] for result in results
    ]
    return ["model", "input embedding", *datasets], rows


def _cost_table(results: Sequence[RunResult]) -> Table:
    """f-grams, parameters and FLOPs, those as multiples of the first plain model's too."""
    reference = next((result for result in results if result.kind == PLAIN), results[0])

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


def _memory_table(results: Sequence[RunResult]) -> Table:
    """Bytes of model and table, and peaks."""
    fields = {
        "model": "resident_bytes",
        "table on disk": "table_bytes",
        "table in RAM": "table_memory_bytes",
        "peak of the process": "peak_process_bytes",
        "peak on the accelerator": "peak_accelerator_bytes",
    }
    columns = {
        head: [_shown(getattr(result, name), human_bytes) for result in results] for head, name in fields.items()
    }
    return _columns(results, columns)


def _columns(results: Sequence[RunResult], columns: Mapping[str, list[str]]) -> Table:
    """A table of those columns that some model has."""
    kept = {head: cells for head, cells in columns.items() if any(cell != "–" for cell in cells)}
    rows: list[list[Any]] = [
        [result.name, *(cells[index] for cells in kept.values())] for index, result in enumerate(results)
    ]
    return ["model", *kept], rows


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return form(value) if value else "–"


def _speed_table(results: Sequence[RunResult]) -> Table:
    """Tokens a second, and latencies in milliseconds as p50 / p90 / p99."""

    def latency(speed: Mapping[str, Any], name: str) -> str:
        values = [speed.get(f"{name}_seconds_p{p}") for p in (50, 90, 99)]
        return "–" if None in values else " / ".join(f"{1000 * value:,.1f}" for value in values if value is not None)

    def rate(speed: Mapping[str, Any], name: str) -> str:
        return f"{speed[name]:,.0f}" if name in speed else "–"

    head = ["model", "batch", "tokens", "prefill tokens/s", "decode tokens/s"]
    head += ["first token, ms", "decode step, ms (p50 / p90 / p99)"]
    rows: list[list[Any]] = [
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
