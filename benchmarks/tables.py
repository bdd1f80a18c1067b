"""The Markdown tables of README.md and docs/: one function for each form of result, numbers from the JSON alone."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scone.utils.text import markdown_table

Record = Mapping[str, Any]
Report = Mapping[str, Any]

PLACES = {
    "plain": "plain",
    "doubled": "plain, twice the layers",
    "gpu": "table on the GPU",
    "ram": "in pinned memory",
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


# ---------------------------------------------------------------------- words that all tables share


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1, note: str = "") -> str:
    """A table whose first ``words`` columns are left, the others right; and a note below it in italics."""
    return markdown_table(head, rows, words) + "\n" + (f"\n*{note}*\n" if note else "")


def accelerators(machine: Mapping[str, Any]) -> str:
    """The accelerators of a machine, equal ones counted; empty where there are none."""
    cards = Counter(machine.get("accelerators") or [])
    return ", ".join(f"{count} × {card}" if count > 1 else card for card, count in cards.items())


def _commit(report: Report) -> str:
    return f"at commit {report['commit'][:10]}"


def _on_processor(report: Report) -> str:
    return f"{report['machine']['processor']}, {report['machine']['cores']} cores"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _bold_if_missed(text: str, record: Record) -> str:
    return f"**{text}**" if record["met"] is False else text


# ---------------------------------------------------------------------- benchmarks


def benchmark_table(report: Report, summary: bool = False) -> str:
    """Metric, ours, peer, ratio, target; a missed target says so. ``summary``: only what has a target."""
    rows = []
    for record in report["records"]:
        if summary and record.get("target") is None:
            continue
        name = f" ({record['peer_name']})" if record.get("peer_name") else ""
        peer = f"{_number(record['peer'])}{name}" if record.get("peer") is not None else name[2:-1]
        met = {True: "met", False: "**missed**", None: ""}[record.get("met")]
        ours = f"{_number(record['ours'])} {record['unit']}".strip() if record.get("ours") is not None else ""
        numbers = [_number(record.get("ratio")), _number(record.get("target"))]
        rows.append([f"`{record['metric']}`", ours, peer, *numbers, met])
    machine = report["machine"]
    cores = f"{machine['cores']} cores" if machine.get("cores") else None
    where = ", ".join(str(part) for part in (machine.get("processor"), cores, machine.get("accelerators")) if part)
    size = "Quick size, m" if report["config"].get("quick") else "M"
    table = markdown(["metric", "ours", "peer", "ratio", "target", ""], rows)
    table = table.replace("|---:|\n", "|---|\n", 1)  # whether it was met is a word
    return f"{table}\n*{size}easured on {where} {_commit(report)}.*\n"


def fault_tables(report: Report) -> str:
    """Kills by job, then the scenarios, and what was lost."""
    summary, rows = report["summary"], []
    for job, counted in summary["by_job"].items():
        lost = sum(len(batch["failures"]) for batch in report["batches"] if batch["job"] == job)
        rows.append([job, counted["before"], counted["while"], counted["trials"], lost])
    kills = f"{summary['kills']} kills (another {summary['came_too_late']} came after the end)"
    others = f"{summary['scenarios_survived']} of {len(report['scenarios'])} other scenarios survived"
    head = ["job", "kills before its first file", "kills at work", "runs to the end", "lost"]
    return markdown(head, rows, note=f"{kills}; {others}. On {_on_processor(report)}, {_commit(report)}.")


def bad_input_table(report: Report) -> str:
    """By reader: inputs tried, read, refused, and what else happened."""
    summary = report["summary"]
    rows = [[reader, *(f"{counted[key]:,}" for key in counted)] for reader, counted in summary["by_reader"].items()]
    limits = f"{summary['seconds_limit']} s and {summary['memory_limit_bytes'] >> 20} MiB"
    note = f"{summary['inputs']:,} different inputs, each within {limits}; {len(summary['failures'])} had any other end"
    head = ["reader of", "bad inputs", "read", "refused in one line", "anything else"]
    return markdown(head, rows, note=f"{note}. On {_on_processor(report)}, {_commit(report)}.")


def demo_table(report: Report) -> str:
    """A demo's two models side by side."""
    models, training, table = report["models"], report["training"], report["table"]

    def row(name: str, key: str, form: str) -> list[str]:
        return [name, *(format(models[model][key], form) for model in ("plain", "scone"))]

    rows = [
        ["held-out perplexity", *(f"{models[name]['evaluation']['perplexity']:.2f}" for name in ("plain", "scone"))],
        row("inference FLOPs per token", "inference_flops_per_token", ".4g"),
        row("parameters at inference", "resident_parameters", ","),
        row("training FLOPs per token", "training_flops_per_token", ".4g"),
        row("training seconds", "training_seconds", ",.0f"),
        row("generation tokens/s", "generation_tokens_per_second", ",.0f"),
        ["table", "–", f"{table['num_rows']:,} rows, {table['file_bytes'] / 2**20:,.0f} MiB"],
    ]
    low, high = report["comparison"]["loss_difference_interval"]
    machine = report["machine"]
    threads = machine.get("threads") or machine.get("num_threads")  # the latter in reports of an earlier form
    note = (
        f"{report['corpus']['name']}: {training['steps']:,} steps of {training['batch_size']} × "
        f"{training['max_length']} tokens each, {training['trunk']}; loss difference {low:+.3f} to {high:+.3f} nats "
        f"(95 % over windows), {report['total_seconds'] / 60:.1f} minutes in all on {machine['processor']}, "
        f"{threads} threads; one seed."
    )
    return markdown(["", "plain", "SCONE, from the table"], rows, note=note)


# ---------------------------------------------------------------------- benchmarks on GPUs


def generation_tables(report: Report, view: str = "") -> str:
    """Milliseconds by placement and batch size, with plain's time ÷ theirs; bold where that misses its target.

    ``view``: "graphs", only steps that are CUDA graphs.
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
        if kind in found and (view != "graphs" or "_" in kind):
            batches = sorted({batch for records in found[kind].values() for batch in records})
            rows = [
                [PLACES[name], *(_time(found[kind][name].get(batch)) for batch in batches)]
                for name in PLACES
                if name in found[kind]
            ]
            parts.append(markdown([title, *(f"batch {batch}" for batch in batches)], rows))
            if kind == "engine":
                parts[-1] += "\nHere in brackets: how many times as fast as the engine without graphs.\n"
    if memory and view != "graphs":
        rows = [
            [PLACES[name], *(f"{memory[name].get(where, 0):,.0f} MiB" for where in ("accelerator", "host"))]
            for name in PLACES
            if name in memory
        ]
        parts.append(markdown(["memory for weights, rows and index", "accelerator", "host"], rows))
    target = next((record["target"] for record in report["records"] if record["target"]), None)
    note = f"In brackets plain's time ÷ this one's; bold: below the target of {target}. {_where(report)}"
    return "\n".join(parts) + f"\n*{note}*\n"


def training_table(report: Report, summary: bool = False) -> str:
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
        cells = ["1", "1", ""] if variant == "plain" else ["", "", ""]
        if (step := records.get("step_vs_flops")) is not None:
            cells = [f"{step['ours']:.2f}", f"{step['peer']:.2f}", _bold_if_missed(f"{step['ratio']:.2f}", step)]
        hidden = records.get("loader_hidden")
        rows.append(
            [
                *(trunk, VARIANTS[variant], f"{positions:,}", f"{records['tokens_per_second']['ours']:,.0f}", *cells),
                f"{records['utilisation']['ours']:.2f}",
                f"{records['peak_memory']['ours']:.0f} GiB",
                "" if hidden is None else _bold_if_missed(f"{hidden['ratio']:.2f}", hidden),
            ]
        )
    lines = markdown([*head, "peak memory", "loader ÷ batches at hand"], rows)
    more = f"\nFaster than padded: {', '.join(speedups)}.\n" if speedups and not summary else ""
    return f"{lines}{more}\n*Bold: above the target, 1.15 for steps and 1.05 for the loader. {_where(report)}*\n"


def scaling_table(report: Report) -> str:
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
    lines = [markdown(head, rows)]
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
    return "–" if record is None or record["ratio"] is None else _bold_if_missed(f"{record['ratio']:.2f}", record)


def _time(record: Record | None) -> str:
    if record is None:
        return "–"
    ratio = "" if record["ratio"] is None else f" ({record['ratio']:.2f})"
    return _bold_if_missed(f"{record['ours']:.3g}{ratio}", record)


def _where(report: Report) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine['libraries'][name]}" for name in ("torch", "transformers"))
    where = accelerators(machine) or machine["processor"]
    return f"Measured on {where}, {machine['cores']} cores, {versions}, {_commit(report)}."
