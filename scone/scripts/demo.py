"""The whole method on real text in minutes: `scone demo`, `python -m scone.scripts.demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scone.configs.loading import parse_options
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError

EXAMPLES = ("scone demo", "scone demo --data my_texts/ --output_dir my_demo", "scone demo --quick")
DESCRIPTION = """\
Train a plain language model and SCONE (same trunk, data, tokens, schedule) on a corpus, precompute the embedding table,
evaluate both on held-out text, generate from both, and write report.html and report.json. It prints what it
measured, whoever wins. A second run reuses finished steps."""


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The script's own arguments. Raises SconeError."""
    _, extra = parse_options(argv, (), DESCRIPTION, examples=EXAMPLES, add_arguments=_add_arguments, config_flag=False)
    if extra.minutes is not None and extra.minutes <= 0:
        raise SconeError(f"--minutes: found {extra.minutes:g}; expected more than 0")
    if extra.steps is not None and extra.steps < 1:
        raise SconeError(f"--steps: found {extra.steps}; expected at least 1")
    return extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print the path of the report."""
    extra = read_arguments(argv)
    from scone.evaluation.demo import run_demo
    from scone.evaluation.demo_options import QUICK, DemoOptions

    given = {
        name: getattr(extra, name)
        for name in ("data", "text_column", "output_dir", "minutes", "steps", "seed")
        if getattr(extra, name) is not None
    }
    page = run_demo(DemoOptions(**{**(QUICK if extra.quick else {}), **given}), say=_say)
    print(f"report: {page}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="file or folder with your own text (default: the Python standard library's sources)",
    )
    parser.add_argument("--text_column", metavar="NAME", help="column or JSON key with the text (default: text)")
    parser.add_argument("--output_dir", metavar="FOLDER", help="output folder (default: demo)")
    parser.add_argument(
        "--minutes", type=float, help="time limit: train fewer steps if they would take longer (default: 8)"
    )
    parser.add_argument("--steps", type=int, help="training steps of each model (default: 420, or what fits --minutes)")
    parser.add_argument("--seed", type=int, help="random seed of both runs (default: 42)")
    parser.add_argument("--quick", action="store_true", help="run everything in about a minute, with a smaller gain")


if __name__ == "__main__":
    sys.exit(run_main(main))
