"""Tables of the benchmarks on a GPU: what was measured for many models and sizes, side by side."""

from __future__ import annotations

import itertools
import re
from collections import Counter
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
    "compiled_decode": "ms a decoding step, compiled by transformers",
    "queued_decode": "ms a decoding step, each step one CUDA graph, choices stay on the GPU",
    "engine": "ms a new token from the engine, not compiled",
}
VARIANTS = {
    "plain": "plain",
    "shared": "f-gram model, shared prefixes",
    "shared_half": "f-gram model of half the layers",
    "shared_double": "f-gram model of twice the layers",
    "rows": "learned rows",
    "both": "f-gram model + learned rows",
    "padded": "f-gram model, padded as in the paper",
    "model": "f-gram model",
}
STRATEGIES = {"ddp": "DDP", "fsdp": "FSDP, full_shard"}


def generation_tables(report: Mapping[str, Any], view: str = "") -> str:
    """Milliseconds by placement and batch size, with plain's time ÷ theirs; bold where that misses its target.

    ``view``: "graphs", only steps that are CUDA graphs; "trunk_graphs", all, of a time when they held the trunk alone.
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
        if view == "trunk_graphs":
            title = title.replace("each step one CUDA graph", "the trunk as a CUDA graph")
        if kind in found and (view != "graphs" or "_" in kind):
            batches = sorted({batch for records in found[kind].values() for batch in records})
            head = [title, *(f"batch {batch}" for batch in batches)]
            rows = [
                [PLACES[name], *(_time(found[kind][name].get(batch)) for batch in batches)]
                for name in PLACES
                if name in found[kind]
            ]
            parts.append(_table(head, rows))
            if kind == "engine":
                parts[-1] += "\nHere in brackets: how many times as fast as the engine without graphs.\n"
    if memory and view != "graphs":
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


def scaling_table(report: Mapping[str, Any]) -> str:
    """Tokens a second on one GPU and on more of each variant and strategy, efficiency and memory; then precomputing."""
    found: Mapping[str, Record] = {record["metric"]: record for record in report["records"]}
    several = [count for count in report["config"]["gpus"] if count > 1]
    head = ["input embedding", "strategy", "tokens/s on 1 GPU"]
    for count in several:
        head += [f"on {count}", "efficiency"]
    head += ["peak memory of a GPU, on 1", *(f"on {count}" for count in several)]
    rows = []
    for strategy, variant in itertools.product(STRATEGIES, VARIANTS):
        speeds = [found.get(f"{strategy}_efficiency_{variant}_{count}") for count in several]
        if any(speeds):
            memory = [found.get(f"peak_memory_{variant}_1")]
            memory += [found.get(f"{strategy}_peak_memory_{variant}_{count}") for count in several]
            cells = [VARIANTS[variant], STRATEGIES[strategy], _figure(found.get(f"tokens_per_second_{variant}_1"))]
            for speed in speeds:
                cells += [_figure(speed), _efficiency(speed)]
            rows.append([*cells, *(_figure(record, ".1f", " GiB") for record in memory)])
    lines = [_table(head, rows)]
    if one := found.get("f_grams_per_second_table_1"):
        lines.append(f"Precomputing: {_figure(one)} f-grams/s on 1 GPU{_precomputed(found, several)}.\n")
    if failed := report["config"]["failed"]:
        lines.append(f"Failed: {', '.join(f'`{name}`' for name in failed)}.\n")
    config = report["config"]
    of_its_own = f"{config['positions']:,} positions for each GPU, {'' if config['compile'] else 'not '}compiled"
    note = f"Efficiency: tokens/s ÷ what as many single GPUs do; bold: below 0.9. {of_its_own}. {_where(report)}"
    return "\n".join(lines) + f"\n*{note}*\n"


def _precomputed(found: Mapping[str, Record], several: Sequence[int]) -> str:
    """What more GPUs do, and whether their tables have the rows of one GPU's."""
    text = ""
    for count in several:
        speed, difference = (found.get(f"precompute_{what}_{count}") for what in ("efficiency", "difference"))
        if speed is not None:
            text += f", {_figure(speed)} on {count} (efficiency {_efficiency(speed)}"
            if difference is not None:
                text += ", same rows" if difference["ours"] == 0 else f", rows differ by up to {difference['ours']:.2g}"
            text += ")"
    return text


def _figure(record: Record | None, form: str = ",.0f", unit: str = "") -> str:
    return "–" if record is None else f"{record['ours']:{form}}{unit}"


def _efficiency(record: Record | None) -> str:
    if record is None or record["ratio"] is None:
        return "–"
    return f"**{record['ratio']:.2f}**" if record["met"] is False else f"{record['ratio']:.2f}"


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


def accelerators(machine: Mapping[str, Any]) -> str:
    """The accelerators of a machine, equal ones counted; empty where there are none."""
    cards = Counter(machine.get("accelerators") or [])
    return ", ".join(f"{count} × {card}" if count > 1 else card for card, count in cards.items())


def _where(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine['libraries'][name]}" for name in ("torch", "transformers"))
    where = accelerators(machine) or machine["processor"]
    return f"Measured on {where}, {machine['cores']} cores, {versions}, at commit {report['commit'][:10]}."
