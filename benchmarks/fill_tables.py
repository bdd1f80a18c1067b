"""Fill the tables of README.md and docs/ from the JSON of real runs, so that no number is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is made from ``docs/results/NAME.json``:
a benchmark's report (``benchmarks/common.py``), a demo's ``report.json`` or an experiment (``experiments/run.py``).
``NAME__summary`` gives of a benchmark's records those that have a target, and of an experiment's runs the plain ones
and those with the most f-grams; ``NAME__groups_PLAIN_ROWS_BOTH`` losses of three runs by the f-grams that end at a
position; ``NAME__graphs`` and ``NAME__trunk_graphs`` see `gpu_tables.generation_tables`.

    python benchmarks/fill_tables.py            fill them
    python benchmarks/fill_tables.py --check    exit 1 if one is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from experiment_tables import budget_table, comparison_table, experiment_table, groups_table  # noqa: E402
from gpu_tables import generation_tables, scaling_table, training_table  # noqa: E402
from recipe_table import recipe_table  # noqa: E402

_TABLE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    stale = []
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]:
        before = page.read_text(encoding="utf-8")
        after = _TABLE.sub(lambda match: match[1] + table(match["name"]) + match[3], before)
        if after != before:
            stale.append(page.relative_to(REPOSITORY))
            if not check:
                page.write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{'out of date' if check else 'filled'}: {page}")
    return 1 if check and stale else 0


def table(name: str) -> str:
    """The Markdown of one table, with the machine and commit that it was measured on."""
    base, _, view = name.partition("__")
    path = RESULTS / f"{base}.json"
    if not path.exists():
        return f"*Not measured yet: no {path.relative_to(REPOSITORY)}.*\n"
    report = json.loads(path.read_text(encoding="utf-8"))
    if "screens" in report:
        return recipe_table(report, view)
    if view.startswith("groups"):  # __groups_PLAIN_ROWS_BOTH: the runs of these kinds
        columns = dict(zip(view.split("_")[1:], ("plain", "learned rows", "f-gram model + learned rows"), strict=True))
        return groups_table(report, report["experiment"]["tests"][0], columns)
    if report.get("benchmark") == "gpu_generation":
        return generation_tables(report, view)
    if report.get("benchmark") == "gpu_training":
        return training_table(report, view == "summary")
    if report.get("benchmark") == "gpu_scaling":
        return scaling_table(report)
    if "records" in report:
        return benchmark_table(report, view == "summary")
    if "comparison" in report:
        return demo_table(report)
    if "commands" in report:
        return transcript(report)
    if "costs" in report:
        return cost_tables(report)
    if report.get("experiment", {}).get("by_budget"):
        return budget_table(report)
    if "runs" in report and any("cost" in run for run in report["runs"].values()):
        return comparison_table(report, view == "summary")
    if "before" in report and "after" in report:
        return retrofit_table(report)
    if "bad_inputs" in report:
        return bad_input_table(report)
    if "batches" in report:
        return fault_tables(report)
    if "runs" in report:
        return experiment_table(report)
    raise SystemExit(
        f"{path}: expected a benchmark's report with records, an experiment's with runs, costs, or a transcript"
    )


def fault_tables(report: dict[str, Any]) -> str:
    """Kills by job, then the scenarios, and what was lost."""
    summary = report["summary"]
    lines = [
        "| job | kills before its first file | kills at work | runs to the end | lost |",
        "|---|---:|---:|---:|---:|",
    ]
    for job, counted in summary["by_job"].items():
        lost = sum(len(batch["failures"]) for batch in report["batches"] if batch["job"] == job)
        lines.append(f"| {job} | {counted['before']} | {counted['while']} | {counted['trials']} | {lost} |")
    machine = report["machine"]
    kills = f"{summary['kills']} kills (another {summary['came_too_late']} came after the end)"
    others = f"{summary['scenarios_survived']} of {len(report['scenarios'])} other scenarios survived"
    where = f"{machine['processor']}, {machine['cores']} cores, at commit {report['commit'][:10]}"
    return "\n".join(lines) + f"\n\n*{kills}; {others}. On {where}.*\n"


def bad_input_table(report: dict[str, Any]) -> str:
    """By reader: inputs tried, read, refused, and what else happened."""
    summary = report["summary"]
    lines = [
        "| reader of | bad inputs | read | refused in one line | anything else |",
        "|---|---:|---:|---:|---:|",
    ]
    for reader, counted in summary["by_reader"].items():
        lines.append("| " + " | ".join([reader, *(f"{counted[key]:,}" for key in counted)]) + " |")
    machine = report["machine"]
    limits = f"{summary['seconds_limit']} s and {summary['memory_limit_bytes'] >> 20} MiB"
    note = f"{summary['inputs']:,} different inputs, each within {limits}; {len(summary['failures'])} had any other end"
    where = f"{machine['processor']}, {machine['cores']} cores, at commit {report['commit'][:10]}"
    return "\n".join(lines) + f"\n\n*{note}. On {where}.*\n"


def benchmark_table(report: dict[str, Any], summary: bool = False) -> str:
    """Metric, ours, peer, ratio, target; a missed target says so. ``summary``: only what has a target."""
    lines = ["| metric | ours | peer | ratio | target | |", "|---|---:|---:|---:|---:|---|"]
    for record in report["records"]:
        if summary and record.get("target") is None:
            continue
        name = f" ({record['peer_name']})" if record.get("peer_name") else ""
        peer = f"{_number(record['peer'])}{name}" if record.get("peer") is not None else ""
        met = {True: "met", False: "**missed**", None: ""}[record.get("met")]
        ours = f"{_number(record['ours'])} {record['unit']}".strip() if record.get("ours") is not None else ""
        lines.append(
            f"| `{record['metric']}` | {ours} | {peer} | {_number(record.get('ratio'))} | "
            f"{_number(record.get('target'))} | {met} |"
        )
    machine = report["machine"]
    cores = f"{machine['cores']} cores" if machine.get("cores") else None
    where = ", ".join(str(part) for part in (machine.get("processor"), cores, machine.get("accelerators")) if part)
    size = "Quick size, m" if report["config"].get("quick") else "M"
    return "\n".join(lines) + f"\n\n*{size}easured on {where} at commit {report['commit'][:10]}.*\n"


def retrofit_table(report: dict[str, Any]) -> str:
    """A pretrained model before and after it was given f-grams, on text that neither was trained on."""
    before, after = report["before"], report["after"]
    lines = ["| | perplexity | loss, nats |", "|---|---:|---:|"]
    for name, part in (("the pretrained trunk", before), ("with f-grams, the trunk frozen", after)):
        lines.append(f"| {name} | {part['perplexity']:.3f} | {part['loss']:.4f} |")
    seconds = f"{report['train_seconds']:,.0f} s"
    where = f"{report['machine']['processor']}, {report['machine']['cores']} cores"
    note = f"{report['train_tokens']:,} training tokens in {seconds} on {where}, other work beside it"
    held_out = f"{before['num_predicted']:,} held-out tokens"
    return "\n".join(lines) + f"\n\n*{note}; {held_out}; at commit {report['commit'][:10]}.*\n"


def demo_table(report: dict[str, Any]) -> str:
    """A demo's two models side by side."""
    plain, scone = report["models"]["plain"], report["models"]["scone"]
    training, table_facts = report["training"], report["table"]
    rows = [
        ("held-out perplexity", [f"{model['evaluation']['perplexity']:.2f}" for model in (plain, scone)]),
        ("inference FLOPs per token", [f"{model['inference_flops_per_token']:.4g}" for model in (plain, scone)]),
        ("parameters at inference", [f"{model['resident_parameters']:,}" for model in (plain, scone)]),
        ("training FLOPs per token", [f"{model['training_flops_per_token']:.4g}" for model in (plain, scone)]),
        ("training seconds", [f"{model['training_seconds']:,.0f}" for model in (plain, scone)]),
        ("generation tokens/s", [f"{model['generation_tokens_per_second']:,.0f}" for model in (plain, scone)]),
        ("table", ["–", f"{table_facts['num_rows']:,} rows, {table_facts['file_bytes'] / 2**20:,.0f} MiB"]),
    ]
    lines = ["| | plain | SCONE, from the table |", "|---|---:|---:|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    low, high = report["comparison"]["loss_difference_interval"]
    return (
        "\n".join(lines)
        + f"\n\n*{report['corpus']['name']}: {training['steps']:,} steps of {training['batch_size']} × "
        f"{training['max_length']} tokens each, {training['trunk']}; loss difference {low:+.3f} to {high:+.3f} nats "
        f"(95 % over windows), {report['total_seconds'] / 60:.1f} minutes in all on "
        f"{report['machine']['processor']}, {report['machine']['num_threads']} threads; one seed.*\n"
    )


def cost_tables(report: dict[str, Any]) -> str:
    """What the f-gram model computes per position, by batch size; and training steps in plain steps."""
    columns = ("match_rate", "padded", "exact_lengths", "distinct_f_grams", "nodes")
    names = " | ".join(name.replace("_", " ") for name in columns)
    lines = [f"| f-grams | positions of a batch | {names} |", "|---:|---:|" + "---:|" * len(columns)]
    for batch in report["batches"]:
        values = " | ".join(f"{batch[name]:.2f}" for name in columns)
        lines.append(f"| {batch['f_grams']:,} | {batch['positions']:,} | {values} |")
    sizes = sorted({line["positions"] for line in report["costs"]})
    shared = " | ".join(f"shared, {size:,}" for size in sizes)
    lines += ["", f"| trunk + f-gram model, f-grams | padded | exact lengths | {shared} |"]
    lines.append("|---|---:|---:|" + "---:|" * len(sizes))
    rows: dict[tuple[str, str, int], dict[int, dict[str, float]]] = {}
    for line in report["costs"]:
        rows.setdefault((line["trunk"], line["f_gram_model"], line["f_grams"]), {})[line["positions"]] = line
    for (trunk, f_gram_model, f_grams), by_size in rows.items():
        largest = by_size[max(by_size)]
        values = [f"{by_size[size]['shared']:.2f}" if size in by_size else "" for size in sizes]
        cells = [f"{largest['padded']:.2f}", f"{largest['exact_lengths']:.2f}", *values]
        lines.append(f"| {trunk} + {f_gram_model}, {f_grams:,} | {' | '.join(cells)} |")
    config = report["config"]
    note = f"{config['num_tokens']:,} tokens ({config['tokens']}), N = {config['max_n']}"
    return "\n".join(lines) + f"\n\n*Counted on {note}, at commit {report['commit'][:10]}.*\n"


def transcript(report: dict[str, Any]) -> str:
    """Each command with what it printed."""
    blocks = [
        f"```console\n$ {done['command']}\n{done['output'].strip()}\n```\n\n*{done['seconds']:,.0f} s*\n"
        for done in report["commands"]
    ]
    machine = report["machine"]
    return "\n".join(blocks) + f"\n*Run on {machine['processor']} at commit {report['commit'][:10]}.*\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
