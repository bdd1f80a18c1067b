"""Tables of the benchmarks on a GPU: what was measured for many models and sizes, side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

PLACES = {
    "plain": "plain",
    "doubled": "plain, twice the layers",
    "gpu": "table on the GPU",
    "ram": "in page-locked RAM",
    "tiered": "tiers: GPU, RAM, disk",
    "mmap": "memory-mapped",
    "direct": "on disk, read directly",
    "live": "no table: f-gram model at every step",
}
TIMES = {
    "decode": "ms a decoding step",
    "prefill": "ms a prefill",
    "captured_decode": "ms a decoding step, each step one CUDA graph",
    "queued_decode": "ms a decoding step, each step one CUDA graph, choices stay on the GPU",
}
VARIANTS = {
    "plain": "plain",
    "shared": "f-gram model, shared prefixes",
    "shared_half": "f-gram model of half the layers",
    "shared_double": "f-gram model of twice the layers",
    "rows": "learned rows",
    "both": "f-gram model + learned rows",
    "padded": "f-gram model, padded as in the paper",
}


def generation_tables(report: Mapping[str, Any], summary: bool = False) -> str:
    """Milliseconds by placement and batch size, with plain's time ÷ theirs; bold where that misses its target.

    ``summary``: only steps and prefills without graphs.
    """
    found: dict[str, dict[str, dict[int, Record]]] = {}
    memory: dict[str, dict[str, float]] = {}
    for record in report["records"]:
        if match := re.fullmatch(r"(\w+)_ms_b(\d+)_(\w+)", record["metric"]):
            found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = record
        elif match := re.fullmatch(r"(accelerator|host)_bytes_(\w+)", record["metric"]):
            memory.setdefault(match[2], {})[match[1]] = record["ours"]
    parts = []
    for kind, title in TIMES.items():
        if kind in found and not (summary and "_" in kind):
            batches = sorted({batch for records in found[kind].values() for batch in records})
            head = [title, *(f"batch {batch}" for batch in batches)]
            rows = [
                [PLACES[name], *(_time(found[kind][name].get(batch)) for batch in batches)]
                for name in PLACES
                if name in found[kind]
            ]
            parts.append(_table(head, rows))
    if memory and not summary:
        rows = [
            [PLACES[name], *(f"{memory[name].get(where, 0):,.0f} MiB" for where in ("accelerator", "host"))]
            for name in PLACES
            if name in memory
        ]
        parts.append(_table(["memory for weights, rows and index", "accelerator", "host"], rows))
    target = next((record["target"] for record in report["records"] if record["target"]), None)
    note = f"In brackets plain's time ÷ this one's; bold: below the target of {target}. {_where(report)}"
    return "\n".join(parts) + f"\n*{note}*\n"


def training_table(report: Mapping[str, Any], summary: bool = False) -> str:
    """Tokens a second, steps in plain steps beside what their FLOPs predict, utilisation and memory of each variant.

    ``summary``: only the largest batches.
    """
    largest = max(report["config"]["positions"])
    found: dict[tuple[str, str, int], dict[str, Record]] = {}
    speedups = []
    metrics = "tokens_per_second|utilisation|peak_memory|tokens_per_position|step_vs_flops|loader_hidden"
    for record in report["records"]:
        if match := re.fullmatch(rf"([^_]+)_(\w+?)(?:_(\d+))?_({metrics})", record["metric"]):
            found.setdefault((match[1], match[2], int(match[3] or largest)), {})[match[4]] = record
        elif "speedup" in record["metric"]:
            speedups.append(f"`{record['metric']}` {record['ratio']:.3g}")
    head = [
        "trunk",
        "input embedding",
        "positions",
        "tokens/s",
        "step, in plain steps",
        "its FLOPs say",
        "÷",
        "of peak",
    ]
    rows = []
    for (trunk, variant, positions), records in found.items():
        if summary and positions < largest:
            continue
        step = records.get("step_vs_flops")
        cells = ["1", "1", ""] if variant == "plain" else ["", "", ""]
        if step is not None:
            missed = step["met"] is False
            ratio = f"{step['ratio']:.2f}"
            cells = [f"{step['ours']:.2f}", f"{step['peer']:.2f}", f"**{ratio}**" if missed else ratio]
        rows.append(
            [
                *(trunk, VARIANTS[variant], f"{positions:,}", f"{records['tokens_per_second']['ours']:,.0f}", *cells),
                f"{records['utilisation']['ours']:.2f}",
                f"{records['peak_memory']['ours']:.0f} GiB",
                _hidden(records),
            ]
        )
    lines = _table([*head, "peak memory", "loader ÷ batches at hand"], rows)
    note = f"Bold: above the target, 1.15 for steps and 1.05 for the loader. {_where(report)}"
    more = f"\nFaster than padded: {', '.join(speedups)}.\n" if speedups and not summary else ""
    return f"{lines}{more}\n*{note}*\n"


def _hidden(records: Mapping[str, Record]) -> str:
    record = records.get("loader_hidden")
    if record is None:
        return ""
    return f"**{record['ratio']:.2f}**" if record["met"] is False else f"{record['ratio']:.2f}"


def _time(record: Record | None) -> str:
    if record is None:
        return "–"
    text = f"{record['ours']:.3g}"
    if record["ratio"] is not None:
        text += f" ({record['ratio']:.2f})"
    return f"**{text}**" if record["met"] is False else text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _where(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine['libraries'][name]}" for name in ("torch", "transformers"))
    where = ", ".join(machine["accelerators"])
    return f"Measured on {where}, {machine['cores']} cores, {versions}, at commit {report['commit'][:10]}."
