"""Compare models and baselines: `scone benchmark`, `python -m scone.scripts.benchmark`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scone.configs.loading import parse_options
from scone.configs.schema import SconeOptions
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError

EXAMPLES = ("scone benchmark --config scone/configs/benchmark_config.json --output_dir ./benchmark_results",)
DESCRIPTION = """\
Measure perplexity, prefill and decode speed, memory, parameters and FLOPs of every model and baseline of a JSON file.
Missing models and datasets are listed and skipped; the command fails only if no model could be measured. Writes
benchmark.json, benchmark.csv, benchmark_speed.csv, benchmark.md and benchmark.html, a report with plots."""


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The options on the command line, and the script's own arguments. Raises SconeError."""
    options, extra = parse_options(
        argv,
        ("data.cache_dir", "training.device", "training.seed"),
        DESCRIPTION,
        examples=EXAMPLES,
        add_arguments=_add_arguments,
        config_flag=False,
    )
    if extra.max_tokens < 2:
        raise SconeError(f"--max_tokens: found {extra.max_tokens}; expected at least 2")
    return options, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    options, extra = read_arguments(argv)
    from scone.evaluation.benchmark import BenchmarkSettings, read_benchmark_config, run_benchmark
    from scone.evaluation.results import STEM

    config = read_benchmark_config(extra.config)
    settings = BenchmarkSettings(
        device=options.training.device,
        cache_dir=options.data.cache_dir,
        max_tokens=extra.max_tokens,
        placement=extra.placement,
        quantizations=tuple(extra.quantization),
        seed=options.training.seed,
    )
    folder = Path(extra.output_dir)
    run_benchmark(config, folder, settings, say=_say)
    print("\n" + (folder / f"{STEM}.md").read_text(encoding="utf-8"))
    print(f"report: {folder / f'{STEM}.html'}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON file of models, baselines, datasets and grid"
    )
    parser.add_argument("--output_dir", default="./benchmark_results", metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--max_tokens", type=int, default=500_000, metavar="N", help="tokens per dataset (default: 500000)"
    )
    parser.add_argument("--placement", default="ram", help="where tables are kept: ram, mmap, direct, or tiers")
    parser.add_argument(
        "--quantization",
        nargs="+",
        default=[],
        metavar="TYPE",
        help="also measure every model with its trunk quantised: fp16, int8, int4",
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
