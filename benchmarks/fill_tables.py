"""Fill the tables of README.md and docs/ from the JSON of real runs, so that no number is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is made from ``docs/results/NAME.json``:
a benchmark's report (``benchmarks/common.py``) or a demo's ``report.json``. ``NAME__summary`` gives of a benchmark's
records those that have a target; ``NAME__graphs`` see `tables.generation_tables`;
``recipe__VIEW`` see `recipe_table`, ``ladder__VIEW`` `ladder_table`. Tables of finished experiments have no such marks:
nothing measures them again.

    python benchmarks/fill_tables.py            fill them
    python benchmarks/fill_tables.py --check    exit 1 if one is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "experiments")]

import tables  # noqa: E402
from ladder_table import ladder_table  # noqa: E402
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
    if "ladder" in report:
        return ladder_table(report, view)
    if report.get("benchmark") == "gpu_generation":
        return tables.generation_tables(report, view)
    if report.get("benchmark") == "gpu_training":
        return tables.training_table(report, view == "summary")
    if report.get("benchmark") == "gpu_scaling":
        return tables.scaling_table(report)
    if "records" in report:
        return tables.benchmark_table(report, view == "summary")
    if "comparison" in report:
        return tables.demo_table(report)
    if "bad_inputs" in report:
        return tables.bad_input_table(report)
    if "batches" in report:
        return tables.fault_tables(report)
    raise SystemExit(f"{path}: expected the report of a benchmark, of the demo or of the recipe")


if __name__ == "__main__":
    sys.exit(main())
