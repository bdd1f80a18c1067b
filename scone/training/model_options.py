"""The parts of a model from a run's options, and which options are incompatible."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from scone.configs.schema import ModelOptions, SconeOptions
from scone.models.f_gram_config import FGramModelConfig
from scone.models.input_embeddings import scale_at_start
from scone.models.trunk import trunk_sizes
from scone.utils.errors import SconeError


def check_input_embedding(options: SconeOptions) -> None:
    """Refuse contradictory options before counting. Raises SconeError."""
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
    if rows_alone and not model.learned_rows and not plain:
        raise SconeError(
            "found neither an f-gram model nor learned rows; expected at least one; give --f_gram_num_hidden_layers or "
            "--learned_rows, or train the plain model with --use_f_gram_embeddings false"
        )
    if rows_alone and model.combination == "replace" and not plain:
        raise SconeError(
            "found --combination replace without an f-gram model; expected add or gate: rows start at zero and would "
            "leave matched positions without a vector; change it, or give the f-gram model layers"
        )


def f_gram_model_settings(options: ModelOptions, trunk: PreTrainedConfig) -> dict[str, Any] | None:
    """The f-gram model's configuration, its sizes the trunk's where the options leave them open; None for no f-gram
    model.

    Raises SconeError: a width that the heads do not divide, or a start that cannot be.
    """
    asked = options.f_gram
    sizes: dict[str, Any] = trunk_sizes(trunk)
    trunk_width = sizes["hidden_size"]
    if asked.hidden_size is not None and asked.intermediate_size is None:
        sizes["intermediate_size"] = 4 * asked.hidden_size
    for name in tuple(sizes):
        if getattr(asked, name) is not None:
            sizes[name] = getattr(asked, name)
    if sizes["num_hidden_layers"] == 0:
        return None
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise SconeError(
            f"found an f-gram model of width {sizes['hidden_size']} with {sizes['num_attention_heads']} heads; "
            "expected a multiple of the heads; give --f_gram_hidden_size and --f_gram_num_attention_heads"
        )
    settings = sizes | {
        "initializer_range": getattr(trunk, "initializer_range", 0.02),
        "start": asked.start,
        "output_norm": asked.output_norm,
        "output_gain": asked.output_gain,
        "own_tokens": asked.token_embeddings == "separate",
    }
    if asked.start == "identity" and sizes["hidden_size"] < trunk_width:
        raise SconeError(
            f"found --f_gram_start identity with an f-gram model of width {sizes['hidden_size']}; expected at least "
            f"the trunk's {trunk_width}, through which a token's embedding passes unchanged; widen it"
        )
    try:
        scale_at_start(FGramModelConfig(**settings), options.combination, 1.0)
    except ValueError as error:
        raise SconeError(
            f"{error}; change --f_gram_start, --combination, --f_gram_output_norm, --f_gram_output_gain or "
            "--f_gram_token_embeddings"
        ) from error
    return settings
