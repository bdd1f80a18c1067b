"""What a run's options come to: which contradict each other, the f-gram model's sizes, precision, trackers."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from scone.configs.schema import ModelOptions, SconeOptions, TrainingOptions
from scone.models.accounting import without_memory
from scone.models.configuration import FGramModelConfig, OverEncodingConfig, ScaledTrunkConfig, SconeConfig
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.trunk import longest_sequence, trunk_configuration, trunk_sizes
from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError

logger = logging.getLogger(__name__)

_MODULES = {"azure_ml": "azureml", "comet_ml": "comet_ml", "dagshub": "dagshub", "flyte": "flytekit"}
"""Modules of trackers that are not named as their module is."""
ROWS_BESIDE_A_MODEL = 1_000_000
"""Learned rows beside an f-gram model, unless said: it gives the rarer f-grams theirs."""

TOKENS_PER_F_GRAM = 10
"""With so many tokens read for each f-gram, those by gain are level; with more they are ahead, with fewer behind: see
docs/decisions/0021-ranking.md."""


def check_training(options: TrainingOptions) -> None:
    """Refuse what a run cannot do here, before anything is touched. Raises SconeError."""
    reporter_names(options.report_to)
    if options.fsdp != "none" and options.optimizer == "muon":
        raise SconeError("found --optimizer muon with --fsdp; expected adamw in a sharded run; use --optimizer adamw")
    if options.fsdp != "none" and options.fp16:
        raise SconeError("found --fp16 with --fsdp; expected bf16 or fp32 in a sharded run; use --bf16")
    if options.device is not None:
        _check_device(options.device)


def check_model(options: SconeOptions) -> PreTrainedConfig:
    """Refuse a model that cannot be built, before the corpus is read; returns the configuration of its trunk.

    Raises SconeError: options that contradict each other, a trunk that cannot be had or is too short.
    """
    _check_input_embedding(options)
    config = trunk_configuration(options.model)
    limit = longest_sequence(config)
    if limit is not None and options.data.max_length > limit:
        raise SconeError(
            f"found --max_length {options.data.max_length}; expected at most {limit}, the positions of "
            f"{options.model.base_model_name!r}; lower it, or raise --max_position_embeddings with --init scratch"
        )
    if options.model.use_f_gram_embeddings and not options.model.over_encoding_rows:
        sizes = f_gram_model_settings(options.model, config)
        if sizes is not None:
            FGramModelConfig(**sizes)  # refuses heads that do not divide the width
    return config


def tokens_of_a_pass(options: SconeOptions, corpus_tokens: int, num_processes: int) -> int:
    """How many tokens the run reads before it reads one again, or ends."""
    training = options.training
    if training.max_steps <= 0:
        return int(min(training.num_epochs, 1.0) * corpus_tokens)
    per_step = training.batch_size * training.gradient_accumulation_steps * num_processes * options.data.max_length
    return min(training.max_steps * per_step, corpus_tokens)


def ranked(options: SconeOptions, corpus_tokens: int, num_processes: int | None = None) -> SconeOptions:
    """The same options, with the ranking of f-grams that suits the run where it has some and they name none.

    ``num_processes`` that train: of this launch, unless it is given.
    """
    model = options.model
    if options.data.ranking is not None or not model.use_f_gram_embeddings or model.over_encoding_rows:
        return options
    num_processes = num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    read = tokens_of_a_pass(options, corpus_tokens, num_processes)
    ranking = "gain" if read >= TOKENS_PER_F_GRAM * options.data.max_f_grams else "frequency"
    return replace(options, data=replace(options.data, ranking=ranking))


def _check_device(device: str) -> None:
    """Without touching it: in each process of a launch that would take memory of the first GPU."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise SconeError(f"found --device {device}, which torch does not know; expected cpu, cuda, cuda:1 …") from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted.type == "cpu" or (
        here is not None and here.type == wanted.type and (wanted.index or 0) < torch.accelerator.device_count()
    ):
        return
    found = "no accelerator" if here is None else f"{torch.accelerator.device_count()} of type {here.type}"
    raise SconeError(f"found --device {device} on a machine with {found}; expected one that it has; use --device cpu")


def _check_input_embedding(options: SconeOptions) -> None:
    model = options.model
    plain = not model.use_f_gram_embeddings
    if plain and options.training.freeze_trunk:
        raise SconeError(
            "found --freeze_trunk with --use_f_gram_embeddings false, which leaves nothing to train; expected at "
            "most one of them; leave one out"
        )
    if plain and model.over_encoding_rows:
        raise SconeError(
            f"found --over_encoding_rows {model.over_encoding_rows} with --use_f_gram_embeddings false; expected at "
            "most one of these baselines; leave one out"
        )
    rows_alone = model.f_gram.num_hidden_layers == 0 and not model.over_encoding_rows
    if rows_alone and model.learned_rows == 0 and not plain:
        raise SconeError(
            "found neither an f-gram model nor learned rows; expected at least one; give --f_gram_num_hidden_layers or "
            "--learned_rows, or train the plain model with --use_f_gram_embeddings false"
        )
    if rows_alone and model.combination == "replace" and not plain:
        raise SconeError(
            "found --combination replace without an f-gram model; expected add or gate: rows start at zero and would "
            "leave matched positions without a vector; change it, or give the f-gram model layers"
        )


def config_class(options: ModelOptions, trunk: PreTrainedConfig) -> type[PreTrainedConfig]:
    """The kind of model that a run trains."""
    if options.use_f_gram_embeddings:
        return OverEncodingConfig if options.over_encoding_rows else SconeConfig
    is_bare = options.embedding_scale == 1.0 and not options.input_norm
    return type(trunk) if is_bare else ScaledTrunkConfig


def f_gram_model_settings(options: ModelOptions, trunk: PreTrainedConfig) -> dict[str, Any] | None:
    """The f-gram model's configuration, its sizes the trunk's where the options leave them open; None for no f-gram
    model.
    """
    asked = options.f_gram
    sizes: dict[str, Any] = trunk_sizes(trunk)
    if asked.hidden_size is not None and asked.intermediate_size is None:
        sizes["intermediate_size"] = 4 * asked.hidden_size
    for name in tuple(sizes):
        if getattr(asked, name) is not None:
            sizes[name] = getattr(asked, name)
    if sizes["num_hidden_layers"] == 0:
        return None
    own_tokens = asked.token_embeddings == "separate"
    return sizes | {"initializer_range": getattr(trunk, "initializer_range", 0.02), "own_tokens": own_tokens}


def number_of_rows(options: ModelOptions, num_f_grams: int, has_f_gram_model: bool) -> int:
    """How many of the f-grams get a learned row; warns where the others would get no vector at all."""
    if options.learned_rows is None:
        return min(num_f_grams, ROWS_BESIDE_A_MODEL) if has_f_gram_model else num_f_grams
    if options.learned_rows < num_f_grams and not has_f_gram_model:
        logger.warning(
            "found %s f-grams but --learned_rows %s and no f-gram model: those without a row are matched, stored and "
            "add nothing; leave --learned_rows out, or give --max_f_grams %s",
            f"{num_f_grams:,}",
            f"{options.learned_rows:,}",
            options.learned_rows,
        )
    return min(options.learned_rows, num_f_grams)


def resolve_precision(fp16: bool, bf16: bool, device_type: str) -> str:
    """ "fp16", "bf16" or "fp32" for mixed-precision training on ``device_type``; warns when it is not what was asked.

    A CPU without native bf16 computes it many times slower than fp32, so it gets fp32.
    """
    asked = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    if asked == "fp32":
        return asked
    if device_type == "cuda":
        if asked == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning("this GPU has no native bf16: training in fp16")
            return "fp16"
        return asked
    found = "bf16" if device_type == "cpu" and cpu_has_native_bf16() else "fp32"
    if found != asked:
        logger.warning("%s is not available on this device (%s): training in %s", asked, device_type, found)
    return found


def cpu_has_native_bf16() -> bool:
    """Whether matrix products in bf16 run on instructions made for them (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))


def reporter_names(report_to: str) -> list[str]:
    """The trackers in "tensorboard,wandb"; empty for "none".

    Raises SconeError for one that the trainer does not know, or whose library is not installed.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as known

    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if name not in known:
            advice = did_you_mean(name, known) or f"expected none, or some of {', '.join(sorted(known))}"
            raise SconeError(f"found --report_to {name}; {advice}")
        if find_spec(_MODULES.get(name, name)) is None:
            raise SconeError(
                f"found --report_to {name}, whose library is not installed; install it (pip install "
                f"{_MODULES.get(name, name)}), or leave {name} out"
            )
    return names


def all_are_used(model: PreTrainedModel) -> bool:
    """Whether every step gives each trained parameter of ``model`` a gradient, whatever the text.

    Tried on a model of the trunk's configuration without data, which computes nothing. What cannot be tried that way
    (experts that only some tokens go to, say) counts as not known, and the answer is False. Our own layers use all of
    theirs, also for a batch in which no f-gram ends.
    """
    trunk = model.trunk if isinstance(model, EmbeddedTrunk) else model
    try:
        trial = without_memory(trunk.config).train()
        trial.set_attn_implementation("eager")
        with torch.device("meta"):
            tokens = torch.zeros(1, 8, dtype=torch.int64)
            # with a mask, or transformers looks for one in the positions' values, which meta tensors do not have
            trial(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.sum().backward()
    except Exception:  # of any model, ours or not
        return False
    return all(parameter.grad is not None for parameter in trial.parameters())
