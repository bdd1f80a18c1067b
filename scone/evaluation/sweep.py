"""Several runs on one corpus: f-grams are counted once, each run is trained, resumed or kept, and all are tested alike.

Every input embedding and baseline goes through here, so that runs differ in their options alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from scone.configs.schema import SconeOptions
from scone.data.token_file import TokenFile
from scone.evaluation.perplexity import perplexity
from scone.evaluation.text_size import sizes_of
from scone.inference.loading import choose_device
from scone.models.accounting import parameter_counts
from scone.models.language_model import SconeForCausalLM
from scone.models.trunk import trunk_configuration
from scone.tokenization.matcher import Matcher
from scone.tokenization.tokenizers import vocabulary_size
from scone.training.run import TRAINING_LOG_FILE, Corpus, run_vocabulary, train
from scone.training.run_folder import FINAL_MODEL
from scone.training.trainer import complete_checkpoints
from scone.utils.files import read_json, write_json

# ---------------------------------------------------------------------- count once


def count_once(runs: Sequence[SconeOptions], corpus: Corpus, *, quiet: bool = False) -> None:
    """Count the f-grams of all ``runs`` before any starts, and write the vocabulary of each to the cache.

    Of runs with the same N one is counted, with the lowest floor and the highest limit; the others are its beginnings.
    """
    sizes = {(run.data.max_n, run.data.min_freq, run.data.max_f_grams): run for run in _with_f_grams(runs)}
    for run in [*_largest_by_length(runs), *sizes.values()]:
        run_vocabulary(run, corpus, _trunk_tokens(run, corpus), quiet=quiet)


def shared_matcher(runs: Sequence[SconeOptions], corpus: Corpus) -> Matcher | None:
    """Of the longest f-grams among ``runs``, and of these the most; None where no run has f-grams."""
    largest = _largest_by_length(runs)[-1:]
    return next((Matcher(run_vocabulary(run, corpus, _trunk_tokens(run, corpus))) for run in largest), None)


def _trunk_tokens(options: SconeOptions, corpus: Corpus) -> int:
    """V: of a trunk from scratch the tokenizer's, a pretrained one keeps its own."""
    pretrained = options.model.init == "pretrained"
    return trunk_configuration(options.model).vocab_size if pretrained else vocabulary_size(corpus.tokenizer)


def _with_f_grams(runs: Sequence[SconeOptions]) -> list[SconeOptions]:
    return [run for run in runs if run.model.use_f_gram_embeddings and not run.model.over_encoding_rows]


def _largest_by_length(runs: Sequence[SconeOptions]) -> list[SconeOptions]:
    """For each N, ascending, options whose vocabulary contains those of all runs with it."""
    by_length: dict[int, list[SconeOptions]] = {}
    for run in _with_f_grams(runs):
        by_length.setdefault(run.data.max_n, []).append(run)
    return [
        replace(
            same[0],
            data=replace(
                same[0].data,
                min_freq=min(run.data.min_freq for run in same),
                max_f_grams=max(run.data.max_f_grams for run in same),
            ),
        )
        for _, same in sorted(by_length.items())
    ]


# ---------------------------------------------------------------------- run many


def train_or_resume(
    options: SconeOptions,
    corpus: Corpus | None = None,
    *,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train as ``options`` say, from the newest checkpoint of an interrupted run; returns the final model's folder.

    Raises as ``train`` does.
    """
    resume = options.training.resume_from_checkpoint or "true"
    options = replace(options, training=replace(options.training, resume_from_checkpoint=resume))
    return train(options, corpus=corpus, quiet=quiet, callbacks=callbacks)


@dataclass(frozen=True)
class Tests:
    """What finished models are tested on.

    ``matcher`` groups the losses of every run by the same f-grams, plain ones too. On the texts named in ``shuffled``
    a model with f-grams is also tested with its vectors handed to other f-grams, which tells whether it used what they
    say or only that they are there.
    """

    texts: Mapping[str, TokenFile]
    matcher: Matcher | None = None
    stride: int | None = None
    shuffled: Sequence[str] = field(default_factory=tuple)


def measured_run(
    options: SconeOptions, corpus: Corpus, tests: Tests, progress_path: Path, *, keep_model: bool = False
) -> dict[str, Any]:
    """Train and test one model; an interrupted run goes on from its checkpoint.

    Args:
        progress_path: a JSON file that holds the log so far while the model trains, marked as unfinished.
        keep_model: leave the run's folder; otherwise it is removed once everything is measured.

    Returns the options' seed, tokens seen, seconds, costs per token and in all, parameters, the log, and for each test
    its perplexity per token and word, bits per byte, losses by match length and rank, and the windows' mean losses.

    Raises SconeError as ``train`` does.
    """
    started = time.perf_counter()
    before, folder = 0.0, Path(options.training.output_dir)
    if complete_checkpoints(folder) and not (folder / FINAL_MODEL).exists():
        before = read_json(progress_path)["train_seconds"] if progress_path.exists() else 0.0
    else:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    final_model = train_or_resume(options, corpus, quiet=True, callbacks=[ProgressFile(progress_path, before)])
    log = read_json(folder / TRAINING_LOG_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(final_model)
    model = model.to(choose_device(options.training.device)).eval()
    tokens = log["steps"] * log["tokens_per_step"]
    result: dict[str, Any] = {
        "finished": True,
        "seed": options.training.seed,
        "steps": log["steps"],
        "tokens": tokens,
        "train_tokens": log["train_tokens"],
        "train_seconds": before + log["train_seconds"],
        "cost": log["cost"] | {"training_flops": log["cost"]["training_flops_per_token"] * tokens},
        "parameters": parameter_counts(model).to_dict(),
        "tests": {name: _tested(model, file, options, corpus, tests) for name, file in tests.texts.items()},
        "log": log["log"],
    }
    if isinstance(model, SconeForCausalLM) and model.config.control == "none" and tests.shuffled:
        assert model.vocabulary is not None
        model.config.control = "shuffled"
        model.set_vocabulary(model.vocabulary)
        result["tests_shuffled"] = {
            name: _tested(model, tests.texts[name], options, corpus, replace(tests, matcher=None))
            for name in tests.shuffled
        }
    if not keep_model:
        shutil.rmtree(folder)
    return result | {"seconds": time.perf_counter() - started}


def _tested(
    model: PreTrainedModel, file: TokenFile, options: SconeOptions, corpus: Corpus, tests: Tests
) -> dict[str, Any]:
    result = perplexity(
        model,
        file.tokens,
        max_length=options.data.max_length,
        batch_size=options.training.batch_size,
        stride=tests.stride,
        matcher=tests.matcher,
        separator_id=file.separator_id,
        quiet=True,
        **sizes_of(corpus.tokenizer, file.tokens),
    )
    return result.to_dict() | {"window_losses": [round(loss, 4) for loss in result.window_losses]}


class ProgressFile(TrainerCallback):
    """Writes the log so far to a JSON file at every log line, so that a run that is cut off leaves its curve.

    ``seconds_before``: those that the run took before it was resumed.
    """

    def __init__(self, path: Path, seconds_before: float = 0.0) -> None:
        self.path = path
        self._started = time.perf_counter() - seconds_before

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            facts = {"finished": False, "seed": args.seed, "steps": state.global_step, "max_steps": state.max_steps}
            seconds = time.perf_counter() - self._started
            write_json(self.path, facts | {"train_seconds": seconds, "log": state.log_history})
