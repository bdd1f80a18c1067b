"""The Markdown tables of README.md and docs/: one function for each form of result, numbers from the JSON alone."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from claim_plot import shown_results
from experiment_results import best_of, mean_loss, perplexity_text, run_results, same_tokens

from scone.evaluation.results import PLAIN, RunResult
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


def _measured(report: Report) -> str:
    where = accelerators(report["machine"]) or report["machine"].get("processor", "")
    return f"Measured on {where} {_commit(report)}."


def _on_processor(report: Report) -> str:
    return f"{report['machine']['processor']}, {report['machine']['cores']} cores"


def _minus(text: str) -> str:
    return text.replace("-", "−")


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
        peer = f"{_number(record['peer'])}{name}" if record.get("peer") is not None else ""
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


def retrofit_table(report: Report) -> str:
    """A pretrained model before and after it was given f-grams, on text that neither was trained on."""
    parts = {"the pretrained trunk": report["before"], "with f-grams, the trunk frozen": report["after"]}
    rows = [[name, f"{part['perplexity']:.3f}", f"{part['loss']:.4f}"] for name, part in parts.items()]
    seconds = f"{report['train_seconds']:,.0f} s"
    note = f"{report['train_tokens']:,} training tokens in {seconds} on {_on_processor(report)}, other work beside it"
    held_out = f"{report['before']['num_predicted']:,} held-out tokens"
    return markdown(["", "perplexity", "loss, nats"], rows, note=f"{note}; {held_out}; {_commit(report)}.")


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


def cost_tables(report: Report) -> str:
    """What the f-gram model computes per position, by batch size; and training steps in plain steps."""
    columns = ("match_rate", "padded", "exact_lengths", "distinct_f_grams", "nodes")
    head = ["f-grams", "positions of a batch", *(name.replace("_", " ") for name in columns)]
    rows = [
        [f"{batch['f_grams']:,}", f"{batch['positions']:,}", *(f"{batch[name]:.2f}" for name in columns)]
        for batch in report["batches"]
    ]
    first = markdown(head, rows, words=0)
    sizes = sorted({line["positions"] for line in report["costs"]})
    head = ["trunk + f-gram model, f-grams", "padded", "exact lengths", *(f"shared, {size:,}" for size in sizes)]
    groups: dict[tuple[str, str, int], dict[int, dict[str, float]]] = {}
    for line in report["costs"]:
        groups.setdefault((line["trunk"], line["f_gram_model"], line["f_grams"]), {})[line["positions"]] = line
    rows = []
    for (trunk, f_gram_model, f_grams), by_size in groups.items():
        largest = by_size[max(by_size)]
        shared = [f"{by_size[size]['shared']:.2f}" if size in by_size else "" for size in sizes]
        cells = [f"{largest['padded']:.2f}", f"{largest['exact_lengths']:.2f}", *shared]
        rows.append([f"{trunk} + {f_gram_model}, {f_grams:,}", *cells])
    config = report["config"]
    note = f"{config['num_tokens']:,} tokens ({config['tokens']}), N = {config['max_n']}"
    return first + "\n" + markdown(head, rows, note=f"Counted on {note}, {_commit(report)}.")


def transcript(report: Report) -> str:
    """Each command with what it printed."""
    blocks = [
        f"```console\n$ {done['command']}\n{done['output'].strip()}\n```\n\n*{done['seconds']:,.0f} s*\n"
        for done in report["commands"]
    ]
    return "\n".join(blocks) + f"\n*Run on {report['machine']['processor']} {_commit(report)}.*\n"


# ---------------------------------------------------------------------- benchmarks on GPUs


def generation_tables(report: Report, view: str = "") -> str:
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


# ---------------------------------------------------------------------- experiments


def experiment_table(report: Report) -> str:
    """Validation loss of each run after so many steps, and its distance to the first run's."""
    runs = report["runs"]
    first = next(iter(runs))
    steps = [step for step, _ in runs[first]["validation_loss"]]
    base = runs[first]["final_validation_loss"]
    rows = [
        [name, *(f"{loss:.3f}" for _, loss in run["validation_loss"]), f"{run['final_validation_loss'] - base:+.3f}"]
        for name, run in runs.items()
    ]
    head = ["validation loss after steps", *(f"{step:,}" for step in steps), f"to {first}"]
    return markdown(head, rows, note=f"Measured on {accelerators(report['machine'])} {_commit(report)}.")


def comparison_table(report: Report, summary: bool = False) -> str:
    """Each run's perplexities (± half the range over seeds) beside its FLOPs and its change to the first's.

    Bold: the lowest of each text at plain's inference FLOPs and tokens. ``summary``: what the picture shows, and
    changes to its plain run, which has the best settings.
    """
    tests = report["experiment"]["tests"]
    results = run_results(report)
    base = shown_results(results)[0] if summary else reference(results)
    own = mean_loss(base, tests)

    def multiple(result: RunResult, field: str) -> float:
        return getattr(result, field) / getattr(base, field)

    equal = [
        result
        for result in results
        if multiple(result, "inference_flops_per_token") < 1.02 and same_tokens(result, base)
    ]
    best = {test: min(result.perplexity_of(test) or math.inf for result in equal) for test in tests}
    rows = []
    for result in shown_results(results) if summary else results:
        cells = [_perplexity(result, test, best if result in equal else {}) for test in tests]
        change = math.exp(mean_loss(result, tests) - own) - 1
        flops = [f"{multiple(result, field):.2f}×" for field in ("inference_flops_per_token", "training_flops")]
        f_grams = f"{result.num_f_grams:,}" if result.num_f_grams else "–"
        last = "–" if result is base else _minus(f"{100 * change:+.1f} %")
        rows.append([result.name, result.kind, f_grams, *flops, *cells, last])
    unfinished = sum(not run.get("finished", True) for run in report["runs"].values())
    counts = sorted({len(result.facts["seeds"]) for result in results} - {1})
    seeds = " or ".join(map(str, counts))
    note = f"{base.training_tokens:,} training tokens; FLOPs as multiples of {base.name}'s" + (
        f"; {seeds} seeds where a ± stands" if seeds else "; one seed"
    )
    note += f"; {unfinished} runs unfinished" if unfinished else ""
    names = [test.replace("_", " ") for test in tests]
    head = ["run", "input embedding", "f-grams", "inference FLOPs", "training FLOPs", *names, f"mean, to {base.name}"]
    return markdown(head, rows, words=2, note=f"{note}. {_measured(report)}")


def reference(results: Sequence[RunResult]) -> RunResult:
    """The first run; where it saw other tokens than most (a model as it was before), the best plain one of theirs."""
    usual, _ = Counter(result.training_tokens for result in results).most_common(1)[0]
    if results[0].training_tokens == usual:
        return results[0]
    return best_of([result for result in results if result.training_tokens == usual and result.kind == PLAIN])


def _perplexity(result: RunResult, test: str, best: Mapping[str, float]) -> str:
    text = perplexity_text(result, test)
    return f"**{text}**" if best.get(test) == result.perplexity_of(test) else text


def budget_table(report: Report) -> str:
    """Perplexity of each kind after so many tokens, and its distance to plain's of as many tokens."""
    tests = report["experiment"]["tests"]
    results = run_results(report)
    kinds = sorted({result.kind for result in results}, key=lambda kind: (kind != PLAIN, len(kind), kind))
    rows = []
    for tokens in sorted({result.training_tokens or 0 for result in results}):
        losses = {result.kind: mean_loss(result, tests) for result in results if result.training_tokens == tokens}
        cells = ["–" if kind not in losses else f"{math.exp(losses[kind]):,.1f}" for kind in kinds]
        for place, kind in enumerate(kinds):
            if kind in losses and kind != PLAIN:
                cells[place] += _minus(f" ({100 * (math.exp(losses[kind] - losses[PLAIN]) - 1):+.1f} %)")
        rows.append([f"{tokens:,}", *cells])
    texts = " and ".join(test.replace("_", " ") for test in tests)
    note = f"Geometric mean of the perplexities of {texts}; one seed. {_measured(report)}"
    return markdown(["training tokens", *kinds], rows, words=0, note=note)


def groups_table(report: Report, test: str, names: Mapping[str, str]) -> str:
    """Loss in nats by the length of the longest f-gram that ends at a position, and by its rank.

    ``names``: the run of each column and what the column is called; the first is what the others are compared with.
    Several seeds of a run are averaged.
    """
    found = {column: _groups_of(report, run, test) for run, column in names.items()}
    first, *others = found
    rows = []
    for group, (count, base) in found[first].items():
        losses = [found[other][group][1] for other in others]
        changes = [_minus(f"{loss:.3f} ({loss - base:+.3f})") for loss in losses]
        rows.append([group, f"{count:,}", _minus(f"{base:.3f}"), *changes])
    note = f"Nats a token on {test.replace('_', ' ')}, and the distance to {first}'s."
    return markdown(["the longest f-gram has", "positions", *found], rows, note=note)


def _groups_of(report: Report, run: str, test: str) -> dict[str, tuple[int, float]]:
    """Positions and mean loss of every group, by what it is called."""
    tests = [result["tests"][test] for result in report["runs"].values() if result["run"] == run]
    groups: dict[str, tuple[int, float]] = {}
    for kind in ("by_match_length", "by_rank"):
        for place, group in enumerate(tests[0][kind]):
            if kind == "by_match_length":
                name = "1 token: none ends here" if group["length"] == 1 else f"{group['length']} tokens"
            elif group["first_rank"] is not None:
                name = f"rank {group['first_rank']:,} to {group['last_rank']:,}"
            else:
                continue
            losses = [each[kind][place]["loss"] for each in tests]
            groups[name] = group["num_predicted"], sum(losses) / len(losses)
    return groups
