"""One run of a comparison: train a model as its options say, test it, and say what it computed; JSON-ready.

Every input embedding and baseline goes through here, so that runs differ in their options alone.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from scone.configs.schema import SconeOptions
from scone.data.token_file import TokenFile
from scone.evaluation.perplexity import perplexity
from scone.evaluation.results import RunResult
from scone.evaluation.text_size import text_size
from scone.models.accounting import f_gram_forward_flops, parameter_counts, training_flops, trunk_forward_flops
from scone.models.f_gram_model import FGramModelConfig
from scone.models.language_model import SconeForCausalLM
from scone.models.trunk import trunk_configuration
from scone.tokenization.matcher import Matcher
from scone.tokenization.tokenizers import vocabulary_size
from scone.training.model_options import f_gram_model_settings
from scone.training.run import TRAINING_LOG_FILE, Corpus, run_vocabulary, train
from scone.training.run_folder import FINAL_MODEL
from scone.training.trainer import complete_checkpoints
from scone.utils.files import read_json, write_json

TYPICAL_NODES_PER_POSITION = 0.8
"""For estimates before anything was measured (docs/experiments/training-cost.md)."""


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
    options: SconeOptions,
    corpus: Corpus,
    tests: Tests,
    *,
    progress_path: Path | None = None,
    keep_model: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Train and test one model.

    Args:
        progress_path: a JSON file that holds the log so far while the model trains, marked as unfinished.
        keep_model: leave the run's folder; otherwise it is removed once everything is measured.

    Returns the options' seed, tokens seen, seconds, costs per token and in all, parameters, the log, and for each test
    its perplexity per token and word, bits per byte, losses by match length and rank, and the windows' mean losses.

    Raises SconeError as ``train`` does.
    """
    started = time.perf_counter()
    before = 0.0
    if progress_path is not None and progress_path.exists() and options.training.resume_from_checkpoint:
        before = read_json(progress_path)["train_seconds"]
    callbacks = [] if progress_path is None else [ProgressFile(progress_path, before)]
    final_model = train(options, corpus=corpus, quiet=quiet, callbacks=callbacks)
    log = read_json(final_model.parent / TRAINING_LOG_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(final_model)
    model = model.to(_device(options)).eval()
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
        shutil.rmtree(final_model.parent)
    return result | {"seconds": time.perf_counter() - started}


def can_resume(folder: Path) -> bool:
    """Whether an interrupted run left a checkpoint to go on from; what else is left of a killed run is removed."""
    if complete_checkpoints(folder) and not (folder / FINAL_MODEL).exists():
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _device(options: SconeOptions) -> str:
    return options.training.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _tested(
    model: PreTrainedModel, file: TokenFile, options: SconeOptions, corpus: Corpus, tests: Tests
) -> dict[str, Any]:
    size = text_size(corpus.tokenizer, file.tokens)
    result = perplexity(
        model,
        file.tokens,
        max_length=options.data.max_length,
        batch_size=options.training.batch_size,
        stride=tests.stride,
        matcher=tests.matcher,
        num_bytes=size.num_bytes if size else None,
        num_words=size.num_words if size else None,
        separator_id=file.separator_id,
        quiet=True,
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


def count_once(runs: Sequence[SconeOptions], corpus: Corpus, *, quiet: bool = False) -> None:
    """Count the f-grams of all ``runs`` before any starts, and write the vocabulary of each to the cache.

    Of runs with the same N one is counted, with the lowest floor and the highest limit; the others are its beginnings.
    """
    for largest in _largest_by_length(runs):
        run_vocabulary(largest, corpus, _trunk_tokens(largest, corpus), quiet=quiet)
    sizes = {(run.data.max_n, run.data.min_freq, run.data.max_f_grams): run for run in _with_f_grams(runs)}
    for run in sizes.values():
        run_vocabulary(run, corpus, _trunk_tokens(run, corpus), quiet=quiet)


def _trunk_tokens(options: SconeOptions, corpus: Corpus) -> int:
    """V: of a trunk from scratch the tokenizer's, a pretrained one keeps its own."""
    pretrained = options.model.init == "pretrained"
    return trunk_configuration(options.model).vocab_size if pretrained else vocabulary_size(corpus.tokenizer)


def shared_matcher(runs: Sequence[SconeOptions], corpus: Corpus) -> Matcher | None:
    """Of the longest f-grams among ``runs``, and of these the most; None where no run has f-grams."""
    largest = _largest_by_length(runs)[-1:]
    return next((Matcher(run_vocabulary(run, corpus, _trunk_tokens(run, corpus))) for run in largest), None)


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


def estimated_flops(options: SconeOptions, corpus: Corpus) -> float:
    """About what training with ``options`` will compute, to start long runs first. Needs ``max_steps``."""
    training, model = options.training, options.model
    config = trunk_configuration(model)
    config.vocab_size = vocabulary_size(corpus.tokenizer)
    forward = trunk_forward_flops(config, options.data.max_length)
    if model.use_f_gram_embeddings and not model.over_encoding_rows:
        settings = f_gram_model_settings(model, config)
        if settings is not None:
            sizes = FGramModelConfig(**settings)
            forward += f_gram_forward_flops(sizes, config.hidden_size, [0, TYPICAL_NODES_PER_POSITION])
    tokens = training.max_steps * training.batch_size * training.gradient_accumulation_steps * options.data.max_length
    return training_flops(forward) * tokens


def run_result(name: str, kind: str, options: SconeOptions, runs: Sequence[Mapping[str, Any]]) -> RunResult:
    """What `measured_run` found, for the report; several ``runs`` are seeds of one configuration: means and spreads."""
    first = runs[0]
    perplexities = {}
    for test, found in first["tests"].items():
        losses = [run["tests"][test]["loss"] for run in runs]
        perplexities[test] = {key: value for key, value in found.items() if key != "window_losses"}
        if len(runs) > 1:
            spread = (math.exp(min(losses)), math.exp(max(losses)))
            mean = math.exp(sum(losses) / len(losses))
            perplexities[test] = {"perplexity": mean, "perplexity_spread": spread, "seeds": len(runs)}
    model = options.model
    with_f_grams = model.use_f_gram_embeddings and not model.over_encoding_rows
    return RunResult(
        name,
        kind,
        perplexities,
        num_f_grams=options.data.max_f_grams if with_f_grams else model.over_encoding_rows or None,
        parameters=first["parameters"],
        inference_flops_per_token=first["cost"]["inference_flops_per_token"],
        training_flops_per_token=first["cost"]["training_flops_per_token"],
        training_flops=first["cost"]["training_flops"],
        training_tokens=first["tokens"],
        facts={name: first["cost"][name] for name in ("match_rate", "nodes_per_position") if name in first["cost"]},
    )


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of (second − first) over the windows of one text, and half of its 95 % interval (normal); in nats."""
    differences = np.asarray(second) - np.asarray(first)
    if len(differences) < 2:
        return float(differences.mean()), math.inf
    return float(differences.mean()), 1.96 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
