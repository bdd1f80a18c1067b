"""Quality: learned rows against plain, by training FLOPs and by text, and against over-encoding, on a modern trunk.

Nothing is trained here without --quick: the numbers come from the ladder's JSON (experiments/ladder.yaml, put together
by experiments/ladder_fit.py). Of learned rows: how many times our training FLOPs plain needs for the same loss; the
worst ratio of a text's perplexity to plain's at any size and budget, and of all texts' to over-encoding's; and to
plain's after four passes (docs/results/epochs.json, experiments/epochs.yaml). What has no run is null. A ratio of
perplexities below 1 says that ours is better. ``perplexity_vs_…`` are history, of a GPT-2 trunk that was far from
converged, as they once were (docs/results/quality_history.json).

--quick runs a ladder of one tiny size first (experiments/quick.yaml, on Python's standard library).
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
from common import REPOSITORY, Report
from ladder_fit import GAIN, ROWS, Rung, beside, multipliers, rungs_of, savings

from scone.utils.files import read_json

LADDER = [REPOSITORY / "docs" / "results" / f"{name}.json" for name in ("ladder", "epochs")]
HISTORY = REPOSITORY / "docs" / "results" / "quality_history.json"
QUICK = REPOSITORY / "experiments" / "quick.yaml"
MULTIPLIERS = {"7m": ("20", 1.5), "27m": ("20", 1.3), "92m": ("9", 1.2)}
"""Size → at how many tokens per weight, and the target."""
QUICK_MULTIPLIERS = {"tiny": ("2", None)}
NOT_RUN = "not run"
QUICK_SECONDS = 270
QUICK_TEST_TOKENS = 40_000


def main(argv: Sequence[str] | None = None) -> int:
    report = Report.from_arguments("quality", __doc__, argv, add_options)
    if report.quick:
        with tempfile.TemporaryDirectory(prefix="scone-quality-") as folder:
            measure(report, quick_ladder(Path(folder)), QUICK_MULTIPLIERS)
    else:
        parts = [read_json(path)["runs"] for path in report.config["ladder"] if path.exists()]
        if not parts:
            print("no ladder: run experiments/run.py experiments/ladder.yaml and ladder_fit.py first, or use --quick")
            return 1
        measure(report, {"runs": {name: run for runs in parts for name, run in runs.items()}}, MULTIPLIERS)
        report.records += read_json(HISTORY)["records"]
    report.finish()
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    help_ = "JSONs of experiments/ladder_fit.py"
    parser.add_argument("--ladder", type=Path, nargs="+", default=LADDER, metavar="FILE", help=help_)


def measure(report: Report, ladder: Mapping[str, Any], targets: Mapping[str, tuple[str, float | None]]) -> None:
    """Records of the ladder's JSON; a metric without its runs is null, and says that they were not run."""
    rungs = rungs_of(ladder)
    own = (GAIN, ROWS)  # of the former what was run: it is the default
    measured = {(each.rung.size, each.rung.per_weight, each.rung.kind): each for each in multipliers(rungs)}
    turned = {(each.rung.size, each.rung.per_weight, kind): each for kind in own for each in savings(rungs, kind)}
    for size, (per_weight, target) in targets.items():
        found = next((measured[place] for kind in own if (place := (size, per_weight, kind)) in measured), None)
        note = f"{found.rung.kind}, 95 %: {found.low:.2f} to {found.high:.2f}" if found else NOT_RUN
        if found and found.beyond:
            inner = [(kind, each) for kind in own if (each := turned.get((size, per_weight, kind))) and not each.beyond]
            if inner:
                kind, found = inner[0]
                note = f"95 %: {found.low:.2f} to {found.high:.2f}, on the curve of {kind}"
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
    return f"{rung.size} at {rung.per_weight} tokens per weight, {rung.kind}"


def quick_ladder(folder: Path) -> dict[str, Any]:
    """Run the tiny ladder in ``folder``; returns its JSON. Raises RuntimeError with its output when it fails."""
    prepare_quick_data(folder / "data")
    command = [sys.executable, str(REPOSITORY / "experiments" / "run.py"), str(QUICK)]
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
