"""A training run, from options to ``final_model``: corpus, f-grams, model, trainer."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from scone.configs.loading import save_options
from scone.configs.schema import SconeOptions, TrainingOptions
from scone.data.dataset import BlockDataset, Collator
from scone.data.prepare import prepare_training_corpus
from scone.data.token_file import TokenFile
from scone.models.accounting import parameter_counts
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.models.scaled_trunk import ScaledTrunkForCausalLM
from scone.models.trunk import alone, build_trunk, draw_if_zero
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.tokenizers import separator_ids, tokenizer_fingerprint
from scone.training.artifacts import prepare_vocabulary, write_model_card
from scone.training.distributed import compile_for_training, reinit_process_group, report_lost_ranks
from scone.training.optimizer import learned_rows, rows_learning_rate
from scone.training.options import (
    all_are_used,
    check_model,
    check_training,
    config_class,
    f_gram_model_settings,
    number_of_rows,
    ranked,
    reporter_names,
    resolve_precision,
    tokens_of_a_pass,
)
from scone.training.run_folder import (
    FINAL_MODEL,
    OPTIONS_FILE,
    as_begun,
    check_kind,
    check_resume,
    one_run_at_a_time,
    resume_point,
)
from scone.training.trainer import SconeTrainer, TrainedAlready
from scone.utils.command_line import is_first_process
from scone.utils.environment import environment
from scone.utils.errors import SconeError
from scone.utils.files import write_json
from scone.utils.progress import bars_are_visible, hide_library_bars

logger = logging.getLogger(__name__)

TRAINING_LOG_FILE = "training_log.json"
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class Corpus:
    """What a run reads: its tokenizer, and the token files of the train and, where there is one, validation split."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenFile
    validation: TokenFile | None


def train(
    options: SconeOptions,
    *,
    corpus: Corpus | None = None,
    model: PreTrainedModel | None = None,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train one model as ``options`` say and return ``OUTPUT_DIR/final_model``.

    ``model.use_f_gram_embeddings=False`` trains the plain trunk on the same batches: the baseline. The folder also gets
    the resolved options, the environment, checkpoints, TensorBoard events under ``runs``, and the log as JSON.
    ``corpus`` and ``model`` stand in for those that the options name: a model that `build_model` made, with adapters
    say. ``callbacks`` are told of steps and logs, as the trainer's own are.

    Raises:
        SconeError: whatever is wrong with corpus, tokenizer, model or folder, before anything is trained.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint to resume from was saved.
    """
    hide_library_bars(quiet)
    output_dir = Path(options.training.output_dir)
    check_training(options.training)  # these refuse before anything is touched
    trunk_config = check_model(options) if model is None else None
    checkpoint = resume_point(output_dir, options.training.resume_from_checkpoint)
    if checkpoint is not None and trunk_config is not None:
        check_kind(checkpoint, config_class(options.model, trunk_config), trunk_config)
    with one_run_at_a_time(output_dir) if is_first_process() else nullcontext():
        checkpoint = resume_point(output_dir, options.training.resume_from_checkpoint)
        corpus = corpus or prepare_run_corpus(options, quiet=quiet)
        options = ranked(as_begun(options, checkpoint), corpus.train.num_tokens)
        model = model or build_model(options, corpus, trunk_config=trunk_config, quiet=quiet)
        if checkpoint is not None:
            check_resume(checkpoint, model, _facts(corpus))
        trainer = build_trainer(options, model, corpus, quiet=quiet)
        if quiet:
            trainer.remove_callback(PrinterCallback)  # it stands in for the bar, and prints every log line
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.add_callback(_NotesOfTheRun(options, output_dir))
        started = time.perf_counter()
        with report_lost_ranks():
            with suppress(TrainedAlready):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.is_in_train = False
            if trainer.stop.received is not None:
                raise KeyboardInterrupt
            return _save_result(options, trainer, corpus, time.perf_counter() - started)


class _NotesOfTheRun(TrainerCallback):
    """Writes options and environment once training begins: all that can be refused has been read by then, and a run
    that could not go on keeps what it noted.
    """

    def __init__(self, options: SconeOptions, output_dir: Path) -> None:
        self.options, self.output_dir = options, output_dir

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            save_options(self.options, self.output_dir / OPTIONS_FILE)
            write_json(self.output_dir / ENVIRONMENT_FILE, environment())


def _facts(corpus: Corpus) -> dict[str, str]:
    """What a checkpoint notes of the data it was trained on."""
    return {"tokenizer": tokenizer_fingerprint(corpus.tokenizer), "tokens": corpus.train.fingerprint}


def prepare_run_corpus(options: SconeOptions, *, quiet: bool = False) -> Corpus:
    """Tokenizer and token files of the run; made once per corpus and tokenizer. Raises SconeError."""
    tokenizer, files = prepare_training_corpus(options, quiet=quiet)
    return Corpus(tokenizer, files["train"], files.get("validation"))


def build_model(
    options: SconeOptions, corpus: Corpus, *, trunk_config: PreTrainedConfig | None = None, quiet: bool = False
) -> PreTrainedModel:
    """The model to train, on the CPU: SCONE or over-encoding around a trunk, or the plain trunk. The seed decides all
    weights. ``trunk_config``: what `check_model` gave, where it was asked before.
    """
    trunk_config = trunk_config or check_model(options)
    set_seed(options.training.seed)
    trunk = build_trunk(options.model, corpus.tokenizer, trunk_config)
    if options.training.freeze_trunk:
        trunk.requires_grad_(False)
    draw_if_zero(trunk)
    settings: dict[str, Any] = {
        "embedding_scale": options.model.embedding_scale,
        "input_norm": options.model.input_norm,
    }
    if not options.model.use_f_gram_embeddings:
        is_bare = config_class(options.model, trunk.config) is type(trunk.config)
        return alone(trunk) if is_bare else ScaledTrunkForCausalLM.from_trunk(trunk, **settings)
    settings["rows_dtype"] = options.model.rows_dtype
    model: EmbeddedTrunk
    if options.model.over_encoding_rows:
        separators, num_rows = separator_ids(corpus.tokenizer), options.model.over_encoding_rows
        model = OverEncodingForCausalLM.from_trunk(trunk, num_rows=num_rows, separator_ids=separators, **settings)
    else:
        vocabulary = run_vocabulary(options, corpus, trunk.config.vocab_size, quiet=quiet)
        if vocabulary.num_f_grams < options.data.max_f_grams:
            logger.info(
                "found %s f-grams that occur at least %s times, fewer than --max_f_grams %s",
                f"{vocabulary.num_f_grams:,}",
                options.data.min_freq,
                f"{options.data.max_f_grams:,}",
            )
        f_gram_model = f_gram_model_settings(options.model, trunk.config)
        model = SconeForCausalLM.from_trunk(
            trunk,
            vocabulary,
            f_gram_model=f_gram_model,
            learned_rows=number_of_rows(options.model, vocabulary.num_f_grams, f_gram_model is not None),
            combination=options.model.combination,
            **settings,
        )
    rows = learned_rows(model)
    if rows is not None:
        rows.on_host = options.model.rows_device == "host"
    return model


def run_vocabulary(options: SconeOptions, corpus: Corpus, vocab_size: int, *, quiet: bool = False) -> FGramVocabulary:
    """The f-grams of the run's training split, counted or from the cache."""
    return prepare_vocabulary(
        corpus.train,
        ranked(options, corpus.train.num_tokens).data,
        vocab_size=vocab_size,
        separator_ids=separator_ids(corpus.tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(corpus.tokenizer),
        quiet=quiet,
    )


def build_trainer(
    options: SconeOptions, model: PreTrainedModel, corpus: Corpus, *, quiet: bool = False
) -> SconeTrainer:
    """The trainer of the run, on the device that the options name or the best there is."""
    training, data = options.training, options.data
    arguments = training_arguments(training, data.num_workers, evaluate=corpus.validation is not None, quiet=quiet)
    scone = model if isinstance(model, SconeForCausalLM) else None
    if arguments.world_size > 1:
        if all_are_used(model):  # else transformers looks for the others in every step
            arguments.ddp_find_unused_parameters = False
        rows = learned_rows(model)
        if rows is not None:
            rows.share_out()
    if training.torch_compile:
        compile_for_training(model)
    return SconeTrainer(
        model=model,
        args=arguments,
        train_dataset=BlockDataset(corpus.train, data.max_length, drop_last=True),
        eval_dataset=(
            evaluation_blocks(corpus.validation, data.max_length, training.max_eval_tokens)
            if corpus.validation
            else None
        ),
        data_collator=Collator(
            scone.vocabulary if scone else None,
            scone.config.learned_rows if scone else 0,
            corpus.tokenizer.pad_token_id or 0,
            hashed=model.grams if isinstance(model, OverEncodingForCausalLM) else None,
        ),
        processing_class=corpus.tokenizer,
        fsdp=training.fsdp,
        muon=training.optimizer == "muon",
        checkpoints_kept=training.save_total_limit,
        facts=_facts(corpus),
        f_gram_learning_rate=training.f_gram_learning_rate,
        rows_learning_rate=(
            rows_learning_rate(tokens_of_a_pass(options, corpus.train.num_tokens, arguments.world_size))
            if training.rows_learning_rate is None
            else training.rows_learning_rate
        ),
    )


def evaluation_blocks(tokens: TokenFile, length: int, max_tokens: int | None = None) -> BlockDataset:
    """Blocks of equal length, so that the mean over blocks, however they are batched, is the mean over tokens.

    A file shorter than a block is one short block. No more than the first ``max_tokens`` are read (None: all).
    """
    available = tokens.num_tokens if max_tokens is None else min(tokens.num_tokens, max_tokens)
    return BlockDataset(tokens, length, available >= length, available)


_NAMED_ALIKE = (
    *("output_dir", "max_steps", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps"),
    *("lr_scheduler_type", "max_grad_norm", "logging_steps", "save_steps", "eval_steps", "seed"),
)
"""Options that Hugging Face's arguments have under the same name."""


def training_arguments(training: TrainingOptions, num_workers: int, evaluate: bool, quiet: bool) -> TrainingArguments:
    """Hugging Face's arguments for our options."""
    if training.device:
        os.environ["ACCELERATE_TORCH_DEVICE"] = training.device
    use_cpu = (training.device or "").startswith("cpu") or not torch.accelerator.is_available()
    device_type = "cpu" if use_cpu else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    precision = resolve_precision(training.fp16, training.bf16, device_type)
    if training.fsdp != "none" and precision == "fp16":
        raise SconeError("found --bf16 with --fsdp on a GPU without bf16; expected one that has it; leave --bf16 out")
    reinit_process_group("gloo" if use_cpu else None)
    # transformers 5.23 renamed it, and warns of the old name
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    checkpointing: dict[str, Any] = {
        "activation_checkpointing" if renamed else "gradient_checkpointing": training.gradient_checkpointing
    }
    arguments = TrainingArguments(
        **{name: getattr(training, name) for name in _NAMED_ALIKE},
        num_train_epochs=training.num_epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        # it hides that a loss is no number, and to ask for that has the host wait for the accelerator at every step
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        prediction_loss_only=True,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        **checkpointing,
        dataloader_num_workers=num_workers,
        # batches for an accelerator come in pinned memory: nothing waits for their copy
        accelerator_config={"non_blocking": not use_cpu},
        remove_unused_columns=False,
        report_to=reporter_names(training.report_to),
        use_cpu=use_cpu,
        disable_tqdm=quiet or not bars_are_visible(),
    )
    if arguments.parallel_mode.value == "not_distributed":
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun; DataParallel would copy the trie
    return arguments


def _save_result(options: SconeOptions, trainer: SconeTrainer, corpus: Corpus, seconds: float) -> Path:
    final_model = Path(options.training.output_dir) / FINAL_MODEL
    metrics: dict[str, float] = {}
    if corpus.validation is not None:
        measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        is_last = bool(measured) and measured[-1]["step"] == trainer.state.global_step
        metrics = measured[-1] if is_last else trainer.evaluate()
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True
    trainer.save_model(str(final_model))
    if trainer.is_world_process_zero():
        (final_model / "training_args.bin").unlink(missing_ok=True)  # a pickle; the options are beside it as YAML
        write_model_card(final_model, options, model, corpus.train.num_tokens, trainer.state.global_step, metrics)
        save_options(options, final_model / OPTIONS_FILE)
        write_json(
            Path(options.training.output_dir) / TRAINING_LOG_FILE,
            {
                "train_seconds": seconds,
                "steps": trainer.state.global_step,
                "tokens_per_step": trainer._train_batch_size
                * options.training.gradient_accumulation_steps
                * trainer.args.world_size
                * options.data.max_length,
                "train_tokens": corpus.train.num_tokens,
                "parameters": parameter_counts(model).to_dict(),
                "cost": trainer.run_cost.to_dict(options.training.gradient_checkpointing),
                "log": trainer.state.log_history,
                "final": metrics,
            },
        )
    return final_model
