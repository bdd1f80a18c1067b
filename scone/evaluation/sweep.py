"""Several runs on one corpus: f-grams are counted once, and each run is trained, resumed or kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback

from scone.configs.schema import SconeOptions
from scone.models.trunk import trunk_configuration
from scone.tokenization.matcher import Matcher
from scone.tokenization.tokenizers import vocabulary_size
from scone.training.artifacts import ranking_of
from scone.training.options import ranked
from scone.training.run import Corpus, run_vocabulary, train


def count_once(
    runs: Sequence[SconeOptions], corpus: Corpus, *, num_processes: int | None = None, quiet: bool = False
) -> None:
    """Count the f-grams of all ``runs`` before any starts, and write the vocabulary of each to the cache.

    Of runs with the same N and ranking one is counted, with the lowest floor and the highest limit; the others are its
    beginnings. ``num_processes`` that train each run: of this launch, unless it is given.
    """
    runs = _with_f_grams(runs, corpus, num_processes)
    sizes = {(run.data.max_n, run.data.ranking, run.data.min_freq, run.data.max_f_grams): run for run in runs}
    for run in [*_largest_of_each_ranking(runs), *sizes.values()]:
        run_vocabulary(run, corpus, _trunk_tokens(run, corpus), quiet=quiet)


def shared_matcher(runs: Sequence[SconeOptions], corpus: Corpus, *, num_processes: int | None = None) -> Matcher | None:
    """What groups the losses of all ``runs`` alike, whatever f-grams each has; None where no run has any.

    Of the longest f-grams among them, of these the most, and of as many those by frequency.
    """
    runs = sorted(_largest_of_each_ranking(_with_f_grams(runs, corpus, num_processes)), key=_reach)
    return Matcher(run_vocabulary(runs[-1], corpus, _trunk_tokens(runs[-1], corpus))) if runs else None


def _reach(run: SconeOptions) -> tuple[int, int, bool, int]:
    return run.data.max_n, run.data.max_f_grams, run.data.ranking == "frequency", -run.data.min_freq


def _trunk_tokens(options: SconeOptions, corpus: Corpus) -> int:
    """V: of a trunk from scratch the tokenizer's, a pretrained one keeps its own."""
    pretrained = options.model.init == "pretrained"
    return trunk_configuration(options.model).vocab_size if pretrained else vocabulary_size(corpus.tokenizer)


def _with_f_grams(runs: Sequence[SconeOptions], corpus: Corpus, num_processes: int | None) -> list[SconeOptions]:
    """Those of ``runs`` that have any, each with its ranking."""
    have = [run for run in runs if run.model.use_f_gram_embeddings and not run.model.over_encoding_rows]
    return [ranked(run, corpus.train.num_tokens, num_processes) for run in have]


def _largest_of_each_ranking(runs: Sequence[SconeOptions]) -> list[SconeOptions]:
    """For each N and each ranking, options whose vocabulary begins with those of all runs with it."""
    alike: dict[tuple, list[SconeOptions]] = {}
    for run in runs:
        alike.setdefault((run.data.max_n, ranking_of(run.data)), []).append(run)
    return [
        replace(
            same[0],
            data=replace(
                same[0].data,
                min_freq=min(run.data.min_freq for run in same),
                max_f_grams=max(run.data.max_f_grams for run in same),
            ),
        )
        for same in alike.values()
    ]


def train_or_resume(
    options: SconeOptions,
    corpus: Corpus | None = None,
    *,
    model: PreTrainedModel | None = None,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train as ``options`` say, from the newest checkpoint of an interrupted run; returns the final model's folder.

    Arguments and errors are those of ``train``.
    """
    resume = options.training.resume_from_checkpoint or "true"
    options = replace(options, training=replace(options.training, resume_from_checkpoint=resume))
    return train(options, corpus=corpus, model=model, quiet=quiet, callbacks=callbacks)
