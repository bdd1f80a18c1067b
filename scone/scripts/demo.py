"""The whole method on real text in minutes: `scone demo`, `python -m scone.scripts.demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from scone.configs.loading import parse_options
from scone.scripts.arguments import arguments, number, switch
from scone.utils.command_line import run_main

EXAMPLES = ("scone demo", "scone demo --data my_texts/ --output_dir my_demo", "scone demo --quick")
DESCRIPTION = """\
Train a plain language model and SCONE (same trunk, data, tokens, schedule) on a corpus, precompute the embedding table,
evaluate both on held-out text, generate from both, and write report.html and report.json. It prints what it
measured, whoever wins. A second run reuses finished steps."""
OWN: dict[str, dict[str, Any]] = {
    "data": {"metavar": "PATH", "help": "file or folder of your own text (default: the Python library's sources)"},
    "text_column": {"metavar": "NAME", "help": "column or JSON key with the text (default: text)"},
    "output_dir": {"metavar": "FOLDER", "help": "output folder (default: demo)"},
    "steps": number(1, "training steps of each model (default: 420)"),
    "seed": {"type": int, "metavar": "N", "help": "random seed of both runs (default: 42)"},
}
read_arguments = partial(
    parse_options,
    sections=(),
    description=DESCRIPTION,
    examples=EXAMPLES,
    add_arguments=arguments(**OWN, quick=switch("run everything in about a minute, with a smaller gain")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print the path of the report."""
    _, extra = read_arguments(argv)
    from scone.evaluation.demo import QUICK, DemoOptions, run_demo

    given = {name: value for name in OWN if (value := getattr(extra, name)) is not None}
    page = run_demo(DemoOptions(**((QUICK if extra.quick else {}) | given)), say=partial(print, flush=True))
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
