"""Draw docs/results/main_claim_best.svg from the JSON beside it: ``python benchmarks/plot_claim.py``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import REPOSITORY  # first: it makes the others known

from claim_plot import claim_svg  # isort: skip
from scone.utils.files import atomic_path, read_json

RESULTS = REPOSITORY / "docs" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "main_claim_best.json", help="an experiment's JSON")
    parser.add_argument("--output", type=Path, help="the picture (default: beside the JSON, as .svg)")
    arguments = parser.parse_args()
    if not arguments.results.exists():
        print(f"no {arguments.results}: run experiments/run.py with main_claim_best.yaml first", file=sys.stderr)
        return 1
    output = arguments.output or arguments.results.with_suffix(".svg")
    with atomic_path(output) as temporary:
        temporary.write_text(claim_svg(read_json(arguments.results)), encoding="utf-8")
    print(f"drawn: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
