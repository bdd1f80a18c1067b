"""Quality: the best of our input embeddings against plain, doubled plain, over-encoding and its own parts.

Nothing is trained here without --quick: the numbers come from an experiment's JSON, made by experiments/run.py
(docs/results/main_claim_best.json). ``ratio`` is one of perplexities, ours ÷ the peer's: below 1, ours is better. A
perplexity is that of several texts, the geometric mean, and of all seeds of a run.

* The best of each kind's settings is chosen by validation loss, which the tests have no part in; the doubled plain, by
  the tests, is the hardest of its kind. Candidates for ours: f-gram model, learned rows, both, with or without a gate.
* Equal tokens: plain, and plain of about twice the inference FLOPs, that saw as many tokens as ours.
* Equal training FLOPs: plain's loss at ours' training FLOPs, linear in log FLOPs between plain runs of several budgets.
  Beyond them nothing is said (null).
* Equal rows: peers with the same number of f-grams, or of hashed rows.

* The ladder (docs/results/ladder.json, experiments/ladder.yaml), learned rows against its peers: how many times our
  training FLOPs plain needs for the same loss; the worst ratio of a text's perplexity to plain's at any size and
  budget, and of all texts' to over-encoding's; and to plain's after four passes (docs/results/epochs.json,
  experiments/epochs.yaml). What has no run is null.

--quick runs a tiny version of the experiment first (models of about a million weights on Python's standard library).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import REPOSITORY, Report
from experiment_results import (
    MODEL,
    OURS,
    OVER_ENCODING,
    PLAIN,
    ROWS,
    best_of,
    family,
    mean_loss,
    plain_loss_at,
    run_results,
    same_tokens,
)
from ladder_fit import Rung, beside, multipliers, rungs_of, savings

from scone.evaluation.results import RunResult
from scone.utils.files import read_json

RESULTS = REPOSITORY / "docs" / "results" / "main_claim_best.json"
LADDER = [REPOSITORY / "docs" / "results" / f"{name}.json" for name in ("ladder", "epochs")]
MULTIPLIERS = {"7m": ("20", 1.5), "27m": ("20", 1.3), "92m": ("10", 1.2)}
"""Size → at how many tokens per weight, and the target."""
NOT_RUN = "not run"
DOUBLED = (1.8, 2.3)
"""What counts as twice the inference FLOPs."""
OUTSIDE = "plain: budget outside its runs"
QUICK_SECONDS = 270


def main(argv: Sequence[str] | None = None) -> int:
    report = Report.from_arguments("quality", __doc__, argv, add_options)
    if report.quick:
        with tempfile.TemporaryDirectory(prefix="scone-quality-") as folder:
            experiment = quick_experiment(Path(folder))
    else:
        path = Path(report.config["results"])
        if not path.exists():
            print(f"no {path}: run experiments/run.py experiments/main_claim_best.yaml first, or use --quick")
            return 1
        experiment = read_json(path)
    compare(report, experiment)
    if not report.quick:
        parts = [read_json(path)["runs"] for path in report.config["ladder"] if path.exists()]
        measure_ladder(report, {"runs": {name: run for runs in parts for name, run in runs.items()}})
    report.finish()
    return 0 if report.records else 1


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="the experiment's JSON")
    help_ = "JSONs of experiments/ladder_fit.py"
    parser.add_argument("--ladder", type=Path, nargs="+", default=LADDER, metavar="FILE", help=help_)


def compare(report: Report, experiment: dict[str, Any]) -> None:
    """Add all records of the experiment to ``report``."""
    results = run_results(experiment)
    tests = list(experiment["experiment"]["tests"])
    ours = [result for result in results if family(result.kind) in OURS]
    sizes = sorted({int(result.num_f_grams) for result in ours if result.num_f_grams})
    report.config |= {
        "tests": tests,
        "experiment_commit": experiment.get("commit"),
        "experiment_machine": (experiment.get("machine") or {}).get("accelerators"),
        "num_f_grams": sizes,
    }
    if not ours:
        print("the experiment has no finished run of ours: nothing to compare")
        return
    best = best_of(ours)
    report.config["best"] = best.name
    measure(report, results, best, tests)
    for size in sizes:
        at_size = best_of([result for result in ours if result.num_f_grams == size])
        report.config[f"best_{short(size)}"] = at_size.name
        measure(report, results, at_size, tests, f"_{short(size)}")
    for test in tests:
        measure(report, results, best, [test], f"_{test}", PLAIN_PEERS)


PLAIN_PEERS = {"plain_equal_tokens": 0.90, "plain_equal_train_flops": 0.97, "doubled_plain": 1.0}
EQUAL_ROWS = {"over_encoding": 0.98, "rows_only": 1.0, "model_only": 1.0}
"""Peer in the metric's name → target."""


def measure(
    report: Report,
    results: Sequence[RunResult],
    ours: RunResult,
    tests: Sequence[str],
    suffix: str = "",
    targets: Mapping[str, float] = PLAIN_PEERS | EQUAL_ROWS,
) -> None:
    """Records of one run of ours against its peers; without a peer the ratio is null, and no target met or missed."""
    at_size = [result for result in results if result.num_f_grams == ours.num_f_grams]
    plain = [result for result in results if result.kind == PLAIN and same_tokens(result, ours)]
    times = {result.name: _flops(result) / _flops(ours) for result in plain}
    peers: dict[str, list[RunResult]] = {
        "plain_equal_tokens": [result for result in plain if math.isclose(times[result.name], 1, rel_tol=0.02)],
        "doubled_plain": [result for result in plain if DOUBLED[0] <= times[result.name] <= DOUBLED[1]],
    }
    for name, kind in {"over_encoding": OVER_ENCODING, "rows_only": ROWS, "model_only": MODEL}.items():
        peers[name] = [result for result in at_size if family(result.kind) == kind]
    for name, target in targets.items():
        if name == "plain_equal_train_flops":
            loss = plain_loss_at(results, ours.training_flops or 1.0, tests)
            peer_name: str | None = "plain at equal training FLOPs" if loss is not None else OUTSIDE
        elif peers[name]:
            hardest = min(peers[name], key=lambda result: mean_loss(result, tests))
            peer = hardest if name == "doubled_plain" else best_of(peers[name])
            seeds = len(peer.facts["seeds"])
            loss, peer_name = mean_loss(peer, tests), peer.name + (f", {seeds} seeds" if seeds > 1 else "")
        else:
            loss, peer_name = None, None
        value = None if loss is None else math.exp(loss)
        own = math.exp(mean_loss(ours, tests))
        metric = f"perplexity_vs_{name}{suffix}"
        report.add(metric, "perplexity", own, value, peer_name, most=target)


def measure_ladder(report: Report, ladder: Mapping[str, Any]) -> None:
    """Records of the ladder's JSON; a metric without its runs is null, and says that they were not run."""
    rungs = rungs_of(ladder)
    read = [*multipliers(rungs), *savings(rungs)]
    measured = {(each.rung.size, each.rung.per_weight, each.rung.kind): each for each in read}
    for size, (per_weight, target) in MULTIPLIERS.items():
        found = measured.get((size, per_weight, "rows"))
        note = f"95 %: {found.low:.2f} to {found.high:.2f}" if found else NOT_RUN
        if found and found.beyond:
            inner = measured.get((size, per_weight, "plain"))
            if inner and not inner.beyond:
                found, note = inner, f"95 %: {inner.low:.2f} to {inner.high:.2f}, on the curve of rows"
            else:
                note += ", plain's curve beyond its runs"
        value = found.value if found else None
        report.add(f"compute_multiplier_{size}", "× FLOPs", value, None, note, ratio="ours", target=target)
    plain, hashed = (beside(rungs, kind) for kind in ("plain", "over-encoding"))
    by_text = [
        (ours.losses[text], peer.losses[text], f"plain, {text}, {_where(ours)}")
        for ours, peer in plain
        for text in ours.losses
    ]
    epochs = [ladder["runs"].get(name, {}) for name in ("epochs4-rows", "epochs4-plain")]
    losses = [run["curve"][-1]["validation"] for run in epochs if run.get("finished")]
    passes = [(*losses, "plain, four passes, validation text")] if len(losses) == 2 else []
    pairs = {
        "worst_text_vs_plain": by_text,
        "vs_over_encoding": [(ours.loss, peer.loss, f"over-encoding, {_where(ours)}") for ours, peer in hashed],
        "rows_overfit_4_epochs": passes,
    }
    for metric, losses in pairs.items():
        ours, peer, name = max(losses, key=lambda pair: pair[0] - pair[1], default=(None, None, NOT_RUN))
        values = [None if loss is None else math.exp(loss) for loss in (ours, peer)]
        report.add(metric, "perplexity", *values, name, most=1.0)


def _where(rung: Rung) -> str:
    return f"{rung.size} at {rung.per_weight} tokens per weight"


def _flops(result: RunResult) -> float:
    return result.inference_flops_per_token or 1.0


def short(size: int) -> str:
    """10000 → "10k"."""
    for unit, suffix in ((1_000_000, "1m"), (1_000, "1k")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{suffix[1]}"
    return str(size)


# ---------------------------------------------------------------------- the tiny experiment of --quick

QUICK = {
    "tokenizer": "{data}/tokenizer",
    "train": "train",
    "validation": "validation",
    "tests": ["test"],
    "base": {
        "data.max_length": 128,
        "data.max_n": 4,
        "data.min_freq": 5,
        "data.max_f_grams": 30_000,
        "data.num_workers": 0,
        "model.base_model_name": "gpt2",
        "model.hidden_size": 96,
        "model.num_hidden_layers": 3,
        "model.num_attention_heads": 3,
        "model.max_position_embeddings": 128,
        "model.hidden_dropout_prob": 0.0,
        "model.attention_probs_dropout_prob": 0.0,
        "model.learned_rows": 0,
        "model.f_gram.num_hidden_layers": 1,
        "training.batch_size": 16,
        "training.max_steps": 100,
        "training.learning_rate": 3e-3,
        "training.lr_scheduler_type": "cosine",
        "training.warmup_steps": 10,
        "training.weight_decay": 0.1,
        "training.eval_steps": 100,
        "training.logging_steps": 50,
        "training.device": "cpu",
    },
    "runs": {
        "plain": {"model.use_f_gram_embeddings": False},
        "plain-2x-steps": {"model.use_f_gram_embeddings": False, "training.max_steps": 200},
        "plain-2x-deep": {"model.use_f_gram_embeddings": False, "model.num_hidden_layers": 10},
        "model": {},
        "rows": {"model.f_gram.num_hidden_layers": 0, "model.learned_rows": 30_000},
        "both": {"model.learned_rows": 30_000},
        "over-encoding": {"model.over_encoding_rows": 30_000},
    },
}
QUICK_TEST_TOKENS = 40_000


def quick_experiment(folder: Path) -> dict[str, Any]:
    """Run the tiny experiment in ``folder``; returns its JSON. Raises RuntimeError with its output when it fails."""
    prepare_quick_data(folder / "data")
    (folder / "quick.yaml").write_text(yaml.safe_dump(QUICK, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "experiments" / "run.py"), str(folder / "quick.yaml")]
    command += ["--data", str(folder / "data"), "--output_dir", str(folder / "out"), "--jobs", "2"]
    done = subprocess.run(
        [*command, "--deadline_s", str(QUICK_SECONDS)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    result = folder / "out" / "result.json"
    if not result.exists():
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-2000:]}")
    print(done.stdout, flush=True)
    return read_json(result)


def prepare_quick_data(folder: Path) -> None:
    """Tokenizer and token files of Python's standard library; little to test on, as it is read often."""
    from scone.data.prepare import prepare_corpus
    from scone.data.sources import stdlib_files
    from scone.data.token_file import TokenFileWriter
    from scone.tokenization.tokenizers import train_tokenizer

    texts = (path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files()[::3])
    tokenizer = train_tokenizer(texts, 4096, folder / "tokenizer")
    splits = prepare_corpus("python-stdlib", tokenizer, cache_dir=folder / "cache", quiet=True)
    for name, file in splits.items():
        if name == "train":
            (folder / name).symlink_to(file.folder, target_is_directory=True)
            continue
        writer = TokenFileWriter(folder / name, file.vocab_size, file.separator_id)
        tokens = np.asarray(file.tokens[:QUICK_TEST_TOKENS])
        for document in np.split(tokens, np.flatnonzero(tokens == file.separator_id) + 1):
            if len(document):
                writer.add_document(document[document != file.separator_id])
        writer.finish({"tokenizer_fingerprint": file.metadata["tokenizer_fingerprint"]})


if __name__ == "__main__":
    sys.exit(main())
