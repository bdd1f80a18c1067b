"""One run of an experiment: trained or resumed, then tested as all others are, so that they differ in options alone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from scone.configs.schema import SconeOptions
from scone.data.token_file import TokenFile
from scone.evaluation.perplexity import perplexity, sizes_of
from scone.evaluation.sweep import train_or_resume
from scone.inference.loading import choose_device
from scone.models.accounting import parameter_counts
from scone.tokenization.matcher import Matcher
from scone.training.run import TRAINING_LOG_FILE, Corpus, build_model, evaluation_blocks
from scone.training.run_folder import FINAL_MODEL, complete_checkpoints
from scone.utils.command_line import is_first_process
from scone.utils.errors import SconeError
from scone.utils.files import read_json, write_json

SAME_LOSS = 0.02
"""Nats a token by which training in bf16 and testing in fp32 may differ."""


def measured_run(
    options: SconeOptions,
    corpus: Corpus,
    texts: Mapping[str, TokenFile],
    progress_path: Path,
    *,
    matcher: Matcher | None,
    stride: int | None = None,
    curve_tokens: int = 0,
    test_tokens: int = 0,
    lora_rank: int = 0,
    keep_model: bool = False,
) -> dict[str, Any]:
    """Train and test one model; an interrupted run goes on from its checkpoint. Of several processes (torchrun) all
    train, the first tests, and the others return nothing.

    Args:
        texts: what it is tested on.
        progress_path: a JSON file that holds the log so far while the model trains, marked as unfinished.
        matcher: groups the losses of every run by the same f-grams, plain ones too.
        curve_tokens: of each text so many tokens are tested on at every evaluation (0: none), after its log line.
        test_tokens: of each text so many tokens are tested on in the end (0: all).
        lora_rank: train adapters of that rank in place of the trunk's weights, and merge them in the end (0: none).
        keep_model: leave the run's folder; otherwise it is removed once everything is measured.

    Returns the options' seed, tokens seen, seconds, costs per token and in all, parameters, the log, and for each test
    its perplexity per token and word, bits per byte, losses by match length and rank, and the windows' mean losses.

    Raises SconeError as ``train`` does.
    """
    started = time.perf_counter()
    before, folder = 0.0, Path(options.training.output_dir)
    if complete_checkpoints(folder) and not (folder / FINAL_MODEL).exists():
        before = read_json(progress_path)["train_seconds"] if progress_path.exists() else 0.0
    elif is_first_process():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    PartialState(cpu=choose_device(options.training.device).type == "cpu").wait_for_everyone()
    callbacks: list[TrainerCallback] = [ProgressFile(progress_path, before)]
    if curve_tokens:
        length, size = options.data.max_length, options.training.batch_size
        callbacks.append(TextLosses({name: file.tokens[:curve_tokens] for name, file in texts.items()}, length, size))
    tuned = None
    if lora_rank:
        tuned = build_model(options, corpus, quiet=True)
        callbacks.append(Adapters(tuned, lora_rank))
    final_model = train_or_resume(options, corpus, model=tuned, quiet=True, callbacks=callbacks)
    if not is_first_process():
        return {}
    log = read_json(folder / TRAINING_LOG_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(final_model)
    model = model.to(choose_device(options.training.device)).eval()
    tokens = log["steps"] * log["tokens_per_step"]
    check_model(model, corpus, options, log)

    def tested(file: TokenFile) -> dict[str, Any]:
        read = file.tokens[: test_tokens or None]
        found = perplexity(
            model,
            read,
            options.data.max_length,
            options.training.batch_size,
            stride,
            matcher=matcher,
            separator_id=file.separator_id,
            quiet=True,
            **sizes_of(corpus.tokenizer, read),
        )
        return found.to_dict() | {"window_losses": [round(loss, 4) for loss in found.window_losses]}

    per_token = log["cost"]["training_flops_per_token"]  # None: of a trunk that cannot be counted
    result: dict[str, Any] = {
        "finished": True,
        "seed": options.training.seed,
        "steps": log["steps"],
        "tokens": tokens,
        "train_tokens": log["train_tokens"],
        "train_seconds": before + log["train_seconds"],
        "cost": log["cost"] | {"training_flops": per_token and per_token * tokens},
        "parameters": parameter_counts(model).to_dict(),
        "tests": {name: tested(file) for name, file in texts.items()},
        "log": log["log"],
    }
    if not keep_model:
        shutil.rmtree(folder)
    return result | {"seconds": time.perf_counter() - started}


def check_model(model: Any, corpus: Corpus, options: SconeOptions, log: Mapping[str, Any]) -> None:
    """Raises SconeError when the saved model is not the one that was trained, told by its loss on the validation text.

    Models once lost their rows on the way to a GPU, and four runs were tested without them.
    """
    trained = [line["eval_loss"] for line in log["log"] if "eval_loss" in line and line["step"] == log["steps"]]
    if corpus.validation is None or not trained:
        return
    length, training = options.data.max_length, options.training
    blocks = evaluation_blocks(corpus.validation, length, training.max_eval_tokens)
    saved = perplexity(model, corpus.validation.tokens[: blocks.num_tokens], length, training.batch_size, quiet=True)
    if abs(saved.loss - trained[-1]) > SAME_LOSS:
        raise SconeError(
            f"found a loss of {saved.loss:.4f} of the saved model on the validation text; expected the "
            f"{trained[-1]:.4f} with which training ended; the model changed while it was saved or loaded"
        )


class Adapters(TrainerCallback):
    """LoRA in every matrix of the trunk but embeddings and head, which are frozen; merged once training has ended.

    What is added to token embeddings trains as it would without.
    """

    def __init__(self, model: PreTrainedModel, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        trunk: Any = getattr(model, "trunk", model)
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self._adapted: Any = get_peft_model(trunk, config)  # changes the trunk itself

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._adapted.merge_and_unload()


class ProgressFile(TrainerCallback):
    """Writes the log so far to a JSON file at every log line, so that a run that is cut off leaves its curve.

    ``seconds_before``: those that the run took before it was resumed.
    """

    def __init__(self, path: Path, seconds_before: float = 0.0) -> None:
        self.path = path
        self._started = time.perf_counter() - seconds_before

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            facts = {"finished": False, "seed": args.seed, "steps": state.global_step, "max_steps": state.max_steps}
            seconds = time.perf_counter() - self._started
            write_json(self.path, facts | {"train_seconds": seconds, "log": state.log_history})


class TextLosses(TrainerCallback):
    """Adds the loss on each of ``texts`` (tokens [n], in windows of ``length``) to every evaluation's log line."""

    def __init__(self, texts: Mapping[str, np.ndarray], length: int, batch_size: int) -> None:
        self.texts, self.length, self.batch_size = texts, length, batch_size

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        results = {
            name: perplexity(model, tokens, self.length, self.batch_size, quiet=True)
            for name, tokens in self.texts.items()
        }
        state.log_history[-1]["text_losses"] = {name: round(result.loss, 5) for name, result in results.items()}
