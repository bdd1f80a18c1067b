"""Train several input embeddings under one budget and compare: ``python experiments/run.py experiments/NAME.yaml``.

The YAML names the tokenizer, the token files (or a data set) of train, validation and test texts, ``base`` options, and
``runs``: what each run changes of them. All runs see the same batches. Finished runs are kept and skipped, so an
interrupted experiment goes on where it was. ``--jobs`` runs several at once. The result is one JSON with configuration,
machine and commit, and a table, last.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from common import commit, machine  # noqa: E402

from scone.configs.loading import from_mapping  # noqa: E402
from scone.utils.files import read_json, write_json  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the token files that the YAML names")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--only", nargs="*", help="these runs alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the merged result here (default OUTPUT_DIR/result.json)")
    arguments = parser.parse_args()
    experiment = yaml.safe_load(arguments.experiment.read_text(encoding="utf-8"))
    if arguments.worker:
        run_one(experiment, arguments.worker, arguments.data, arguments.output_dir)
        return 0
    names = [name for name in experiment["runs"] if not arguments.only or name in arguments.only]
    pending = [name for name in names if not (arguments.output_dir / f"{name}.json").exists()]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        failed = [name for name, status in zip(pending, pool.map(start_worker, pending), strict=True) if status]
    result = merge(experiment, arguments.output_dir)
    write_json(arguments.json or arguments.output_dir / "result.json", result)
    print(table(result))
    if failed:
        print(f"failed: {', '.join(failed)} (see their .log files in {arguments.output_dir})", file=sys.stderr)
    return 1 if failed else 0


def start_worker(name: str) -> int:
    """Run one configuration in its own process, so that one failure or leak stays its own."""
    output_dir = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / f"{name}.log").open("w") as log:
        return subprocess.run([sys.executable, *sys.argv, "--worker", name], stdout=log, stderr=log).returncode


def run_one(experiment: dict[str, Any], name: str, data: Path, output_dir: Path) -> None:
    """Train and evaluate one configuration; its JSON appears when it is done."""
    import torch
    from transformers import AutoModelForCausalLM

    from scone.data.token_file import TokenFile
    from scone.evaluation.perplexity import perplexity
    from scone.models.accounting import parameter_counts
    from scone.tokenization.tokenizers import load_tokenizer
    from scone.training.run import Corpus, train

    changes = experiment["base"] | {
        "training.output_dir": str(output_dir / name),
        "data.cache_dir": str(output_dir / "cache"),
        "training.save_steps": 10**9,
        "training.report_to": "none",
        **experiment["runs"][name],
    }
    options = from_mapping(nested(changes))
    corpus = Corpus(
        load_tokenizer(experiment["tokenizer"].format(data=data)),
        TokenFile.open(data / experiment["train"]),
        TokenFile.open(data / experiment["validation"]),
    )
    started = time.perf_counter()
    final_model = train(options, corpus=corpus, quiet=True)
    seconds = time.perf_counter() - started
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(final_model).to(device).eval()
    tests = {
        test: perplexity(
            model,
            TokenFile.open(data / test).tokens,
            max_length=options.data.max_length,
            batch_size=options.training.batch_size,
            device=device,
            matcher=getattr(model, "matcher", None),
            quiet=True,
        ).to_dict()
        for test in experiment["tests"]
    }
    log = read_json(output_dir / name / "training_log.json")
    write_json(
        output_dir / f"{name}.json",
        {
            "changes": experiment["runs"][name],
            "seconds": seconds,
            "train_seconds": log["train_seconds"],
            "parameters": parameter_counts(model).to_dict(),
            "tests": tests,
            "log": log["log"],
        },
    )


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` → ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for dotted, value in flat.items():
        place = result
        *sections, last = dotted.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


def merge(experiment: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """All finished runs in one mapping."""
    runs = {name: output_dir / f"{name}.json" for name in experiment["runs"]}
    return {
        "experiment": experiment,
        "machine": machine(),
        "commit": commit(),
        "runs": {name: read_json(path) for name, path in runs.items() if path.exists()},
    }


def table(result: dict[str, Any]) -> str:
    """Perplexity of each run on each test text, as Markdown."""
    tests = result["experiment"]["tests"]
    lines = [f"| run | {' | '.join(tests)} | training s |", "|---|" + "---:|" * (len(tests) + 1)]
    for name, run in result["runs"].items():
        cells = " | ".join(f"{run['tests'][test]['perplexity']:.2f}" for test in tests)
        lines.append(f"| {name} | {cells} | {run['train_seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
