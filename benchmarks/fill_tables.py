"""Fill the tables of README.md and docs/ from the JSON of real runs, so that no number is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is made from ``docs/results/NAME.json``:
a benchmark's report (``benchmarks/common.py``), perplexities (`quality_table`) or what else is named here. Tables of
finished experiments have no such marks: nothing measures them again.

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
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "experiments")]

from common import benchmark_table  # noqa: E402
from quality_tables import quality_table  # noqa: E402

from scone.utils.text import markdown_table  # noqa: E402

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
    if "screens" in report or "ladder" in report:
        return quality_table(report, view)
    if view:
        return placement_table(report, view)
    if "records" in report:
        return benchmark_table(report)
    if "bad_inputs" in report:
        return bad_input_table(report)
    if "batches" in report:
        return fault_table(report)
    raise SystemExit(f"{path}: expected the report of a benchmark or of an experiment")


def placement_table(report: dict[str, Any], view: str) -> str:
    """``steps``: milliseconds of a step by trunk and placement, and plain's over them, by batch; ``lookup``: of the
    lookup alone, and of its kernel.
    """
    batches = [str(batch) for batch in report["config"]["batches"]]
    columns = {
        "steps": {**{batch: f"decode_ms_b{batch}" for batch in batches}, "prefill of 2,048": "prefill_ms"},
        "lookup": {number: f"lookup_ms_{number}" for number in [*batches, "2048"]},
    }[view]
    found = {record["metric"]: record for record in report["records"]}
    rows = []
    for trunk in report["config"]["trunks"]:
        for placement in ["plain", "none", *report["config"]["placements"]]:
            names = [f"{trunk}_{what}_{placement}" for what in columns.values()]
            cells = [_placement_cell(found, name) for name in names]
            if any(cells):
                target = next((found[name]["target"] for name in names if name in found), None)
                rows.append([trunk, placement, *cells, *([target or ""] if view == "steps" else [])])
    head = ["trunk", "rows", *columns, *(["target"] if view == "steps" else [])]
    missed = sum(record["met"] is False for record in report["records"])
    notes = {
        "steps": f"Milliseconds, and in brackets plain's over them; bold: below the target ({missed} in all)",
        "lookup": "Milliseconds until the rows are there, and in brackets those of the kernel",
    }
    return _with_note(markdown_table(head, rows), notes[view], report)


def _placement_cell(found: dict[str, Any], name: str) -> str:
    if name not in found:
        return ""
    record, kernel = found[name], found.get(name.replace("lookup", "kernel"))
    if kernel is not None and kernel is not record:
        return f"{record['ours']:.2f} ({kernel['ours']:.3f})"
    ratio = "" if record["ratio"] is None else f" ({record['ratio']:.2f})"
    return f"{record['ours']:.2f}" + (f"**{ratio}**".replace("** ", " **") if record["met"] is False else ratio)


def fault_table(report: dict[str, Any]) -> str:
    """Kills by job, what was lost, and how many other scenarios were survived."""
    summary, rows = report["summary"], []
    for job, counted in summary["by_job"].items():
        lost = sum(len(batch["failures"]) for batch in report["batches"] if batch["job"] == job)
        rows.append([job, counted["before"], counted["while"], counted["trials"], lost])
    kills = f"{summary['kills']} kills (another {summary['came_too_late']} came after the end)"
    others = f"{summary['scenarios_survived']} of {len(report['scenarios'])} other scenarios survived"
    head = ["job", "kills before its first file", "kills at work", "runs to the end", "lost"]
    return _with_note(markdown_table(head, rows), f"{kills}; {others}", report)


def bad_input_table(report: dict[str, Any]) -> str:
    """By reader: inputs tried, read, refused, and what else happened."""
    summary = report["summary"]
    rows = [[reader, *(f"{counted[key]:,}" for key in counted)] for reader, counted in summary["by_reader"].items()]
    limits = f"{summary['seconds_limit']} s and {summary['memory_limit_bytes'] >> 20} MiB"
    note = f"{summary['inputs']:,} different inputs, each within {limits}; {len(summary['failures'])} had any other end"
    head = ["reader of", "bad inputs", "read", "refused in one line", "anything else"]
    return _with_note(markdown_table(head, rows), note, report)


def _with_note(table: str, note: str, report: dict[str, Any]) -> str:
    cards = [f", {card}" for card in dict.fromkeys(report["machine"].get("accelerators") or [])]
    where = f"{report['machine']['processor']}, {report['machine']['cores']} cores" + "".join(cards)
    return f"{table}\n\n*{note}. On {where}, at commit {report['commit'][:10]}.*\n"


if __name__ == "__main__":
    sys.exit(main())
