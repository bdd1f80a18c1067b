"""Results of several models in one form for every command that compares, and their tables.

write_report([RunResult("plain", "plain", {"WikiText": {"perplexity": 31.2}}), …], "results/")   # of report.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from scone.utils.text import human_bytes, human_count

PLAIN, MODEL, ROWS, OVER_ENCODING = "plain", "f-gram model", "learned rows", "over-encoding"
BOTH = f"{MODEL} + {ROWS}"
STEM = "benchmark"

SPEED_HEAD = ["model", "batch", "tokens", "prefill tokens/s", "decode tokens/s", "first token, ms"]
SPEED_HEAD += ["decode step, ms (p50 / p90 / p99)"]

Table = tuple[list[str], list[list[Any]]]
"""Heads, and rows of cells; on a page a cell may also be a mapping (``text``, ``more`` below it, ``style``)."""

Cell = Callable[["RunResult"], str]


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
