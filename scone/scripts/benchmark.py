"""Compare models and baselines: `scone benchmark`, `python -m scone.scripts.benchmark`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scone.configs.loading import parse_options
from scone.scripts.arguments import SHARED, arguments, number
from scone.utils.command_line import run_main
from scone.utils.files import check_writable

EXAMPLES = ("scone benchmark --config scone/configs/benchmark_config.json --output_dir ./benchmark_results",)
DESCRIPTION = """\
Measure perplexity, prefill and decode speed, memory, parameters and FLOPs of every model and baseline of a JSON file.
Missing models and datasets are listed and skipped; the command fails only if no model could be measured. Writes
benchmark.json, benchmark.md and benchmark.html, a report with plots."""
ARGUMENTS = arguments(
    config={"required": True, "metavar": "FILE", "help": "JSON file of models, baselines, datasets and grid"},
    output_dir={"default": "./benchmark_results", "metavar": "FOLDER", "help": "output folder"},
    max_tokens=number(2, "tokens a dataset", 500_000),
    placement=SHARED["placement"],
    quantization={
        "nargs": "+",
        "default": [],
        "metavar": "TYPE",
        "help": "also measure every model with its trunk quantised: fp16, int8, int4",
    },
)
read_arguments = partial(
    parse_options,
    sections=("data.cache_dir", "training.device", "training.seed"),
    description=DESCRIPTION,
    examples=EXAMPLES,
    add_arguments=ARGUMENTS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    options, extra = read_arguments(argv)
    from scone.evaluation.benchmark import BenchmarkSettings, read_benchmark_config, run_benchmark
    from scone.evaluation.report import STEM

    folder = Path(extra.output_dir)
    check_writable(folder / f"{STEM}.json")
    config = read_benchmark_config(extra.config)
    settings = BenchmarkSettings(
        options.training.device,
        options.data.cache_dir,
        extra.max_tokens,
        extra.placement,
        tuple(extra.quantization),
        options.training.seed,
    )
    run_benchmark(config, folder, settings, say=partial(print, flush=True))
    print("\n" + (folder / f"{STEM}.md").read_text(encoding="utf-8"))
    print(f"report: {folder / f'{STEM}.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
