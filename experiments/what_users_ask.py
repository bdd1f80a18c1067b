"""What users ask of a trained pair, plain and with learned rows: ``python experiments/what_users_ask.py``.

    … what_users_ask.py --plain FOLDER --rows FOLDER --data DATA --task_data EVALS --json FILE
    … what_users_ask.py --collect FILE … --json docs/results/what_users_ask.json

The first takes two final_model folders of one run each (experiments/run.py --keep_models) and measures: losses on the
texts of ``--data``, also with the rows silenced (all zero); the same by how often the training text visited the f-gram
that a prediction is made from; zero-shot accuracies; continuations of ten prompts. The second puts pairs of several
seeds, and what experiments/long_context.py wrote, into one file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from common import measured_on  # noqa: E402

from scone.data.token_file import TokenFile  # noqa: E402
from scone.evaluation.perplexity import paired_difference, token_losses, windows  # noqa: E402
from scone.evaluation.zero_shot import TaskResult, evaluate_tasks, refuse_left_out  # noqa: E402
from scone.inference.engine import GenerationOptions, SconeInferenceEngine  # noqa: E402
from scone.inference.loading import load_model  # noqa: E402
from scone.models.trunk import longest_sequence  # noqa: E402
from scone.tokenization.matcher import Matcher  # noqa: E402
from scone.tokenization.tokenizers import load_tokenizer  # noqa: E402
from scone.utils.command_line import run_main  # noqa: E402
from scone.utils.errors import SconeError  # noqa: E402
from scone.utils.files import read_json, write_json  # noqa: E402

TEXTS = ("wikipedia_test", "novels", "wikitext103_test", "c4", "court_opinions", "arxiv_abstracts")
VISITS = (0, 3, 5, 10, 30, 100, 300, 1_000, 10_000)
"""Where buckets of visits begin; 0: no f-gram ends there. f-grams occur three times or more (``min_freq``)."""
PROMPTS = (
    "The history of the city begins with",
    "Albert Einstein was born in",
    "The capital of France is",
    "She opened the letter and",
    "Once upon a time there was",
    "The court held that the defendant",
    "In this paper, we propose a new method for",
    "Economic activity in the Boston district",
    "To install the module, run",
    "The most important thing about cooking is",
)
SAMPLING = GenerationOptions(max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95, seed=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a pair, or put pairs together. Raises SconeError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, help="model folder")
    parser.add_argument("--rows", type=Path, help="model folder")
    parser.add_argument("--data", type=Path, help="folder of the token files")
    parser.add_argument("--task_data", type=Path, help="folder of the tasks' items (default: no tasks)")
    parser.add_argument("--tasks", default="all", help="of these, separated by commas")
    parser.add_argument("--limit", type=int, help="the first items of each task only")
    parser.add_argument("--max_tokens", type=int, help="the first tokens of each text only")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--collect", nargs="+", type=Path, help="results to put together")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.collect:
        write_json(arguments.json, collected([read_json(path) for path in arguments.collect]))
        return 0
    if None in (arguments.plain, arguments.rows, arguments.data):
        raise SconeError("found no pair to measure; expected --plain, --rows and --data, or --collect; give these")
    pair: dict[str, Any] = {"plain": run_name(arguments.plain), "rows": run_name(arguments.rows)}
    report = {"users": True, **measured_on(), "pairs": [pair]}
    engines = {"plain": engine_of(arguments.plain), "rows": engine_of(arguments.rows)}
    generated = {kind: engine.generate(PROMPTS, SAMPLING)[0] for kind, engine in engines.items()}
    pair["generations"] = [
        {"prompt": prompt} | {kind: each[place].texts[0][len(prompt) :] for kind, each in generated.items()}
        for place, prompt in enumerate(PROMPTS)
    ]
    texts = {name: np.asarray(TokenFile.open(arguments.data / name).tokens[: arguments.max_tokens]) for name in TEXTS}
    models = {kind: engine.model for kind, engine in engines.items()}
    pair |= losses_of_pair(models["plain"], models["rows"], texts, arguments.batch_size)
    write_json(arguments.json, report)
    if arguments.task_data:
        pair["tasks"], outcomes = {kind: [] for kind in engines}, []
        for kind, engine in engines.items():
            settings = (arguments.tasks, arguments.task_data, arguments.limit, 4 * arguments.batch_size)
            for outcome in evaluate_tasks(engine.model, engine.tokenizer, *settings):
                outcomes.append(outcome)
                if isinstance(outcome, TaskResult):
                    pair["tasks"][kind].append(outcome.to_dict())
                else:
                    pair.setdefault("tasks_left_out", {}).setdefault(kind, {})[outcome.task] = outcome.reason
                write_json(arguments.json, report)
        refuse_left_out(outcomes)
    return 0


def run_name(folder: Path) -> str:
    """A run's name: of the folder that holds its final_model."""
    return folder.resolve().parent.name


def engine_of(folder: Path) -> SconeInferenceEngine:
    """The model with its tokenizer."""
    return SconeInferenceEngine(load_model(folder), load_tokenizer(str(folder)))


def losses_of_pair(plain: Any, rows: Any, texts: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Any]:
    """Losses in nats of both models, and of ``rows`` silenced: by text, and by visits over all texts.

    Differences from plain are means over windows with their 95 % interval.
    """
    length = longest_sequence(plain.config)
    texts = {name: tokens[: len(tokens) // length * length] for name, tokens in texts.items()}  # whole windows
    losses = {kind: measured(model, texts, length, batch_size) for kind, model in (("plain", plain), ("rows", rows))}
    visits = {name: visits_of(rows.matcher, tokens, length) for name, tokens in texts.items()}
    with silenced(rows):
        losses["silenced"] = measured(rows, texts, length, batch_size)
    by_text = {}
    for name in texts:
        each = {kind: found[name].mean(1) for kind, found in losses.items()}
        by_text[name] = {kind: float(means.mean()) for kind, means in each.items()}
        for kind in ("rows", "silenced"):
            mean, interval = paired_difference(each["plain"], each[kind])
            by_text[name][f"{kind}_minus_plain"] = {"mean": mean, "interval": interval}
    together = {kind: np.concatenate([found[name].ravel() for name in texts]) for kind, found in losses.items()}
    buckets = np.searchsorted(VISITS, np.concatenate([visits[name].ravel() for name in texts]), "right") - 1
    by_visits = []
    for place, first in enumerate(VISITS):
        chosen = buckets == place
        if chosen.any():
            means = {kind: float(found[chosen].mean()) for kind, found in together.items()}
            by_visits.append(
                {"first": first, "share": float(chosen.mean()), "num_predicted": int(chosen.sum())} | means
            )
    return {"by_text": by_text, "by_visits": by_visits}


def measured(model: Any, texts: Mapping[str, np.ndarray], length: int, batch_size: int) -> dict[str, np.ndarray]:
    """Of each text the losses [windows, length − 1]: of every token but the first of a window."""
    found = {}
    for name, tokens in texts.items():
        each = windows(len(tokens), length, length)
        batches = (each[first : first + batch_size] for first in range(0, len(each), batch_size))
        found[name] = np.stack(
            [losses for batch in batches for losses in token_losses(model, tokens, batch, model.device)]
        )
    return found


def visits_of(matcher: Matcher, tokens: np.ndarray, length: int) -> np.ndarray:
    """How often the training text has the longest f-gram that each prediction is made from (0: there is none), which is
    how often its row was trained in one pass: int64 [windows, length − 1].
    """
    vocabulary = matcher.vocabulary
    ranks = matcher.match(tokens.reshape(-1, length))[:, :-1] - vocabulary.vocab_size
    return np.where(ranks >= 0, vocabulary.counts.astype(np.int64)[np.maximum(ranks, 0)], 0)


@contextmanager
def silenced(model: Any) -> Iterator[None]:
    """All rows zero: an f-gram adds nothing to its token."""
    weight = model.f_gram_embedding.rows.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        yield
        weight.copy_(kept)


def collected(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reports as one: pairs one after the other, of everything else the last."""
    report: dict[str, Any] = {}
    for part in parts:
        report |= {**part, "pairs": [*report.get("pairs", []), *part.get("pairs", [])]}
    return report


if __name__ == "__main__":
    sys.exit(run_main(main))
