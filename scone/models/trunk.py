"""The trunk: any Hugging Face causal language model by name, folder or architecture, from scratch or pretrained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, has_file

from scone.configs.presets import MODERN_TRUNK
from scone.configs.presets import trunk_configuration as built_in_configuration
from scone.configs.schema import ModelOptions
from scone.models.configuration import EmbeddedTrunkConfig
from scone.tokenization.gguf_files import load_arguments, unpacked
from scone.tokenization.tokenizers import vocabulary_size
from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError, library_refusal

logger = logging.getLogger(__name__)

WEIGHTS = "a folder with pretrained weights (or --init scratch)"

# An option's name first, then what architectures call it; every name that the configuration has is set.
TRUNK_SIZE_FIELDS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "hidden_act": ("hidden_act", "activation_function"),
    "hidden_dropout_prob": ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "dropout"),
    "attention_probs_dropout_prob": ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "type_vocab_size": ("type_vocab_size",),
    "initializer_range": ("initializer_range",),
    "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
}

ROBERTA_KIN = ["roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"]


def build_trunk(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """A trunk for ``tokenizer``: random weights (``init="scratch"``, seeded by the caller) or pretrained ones.

    From scratch the embedding has exactly the tokenizer's tokens; a pretrained one keeps its own size. ``config``: what
    `trunk_configuration` gave for these options, where it was asked before.
    Raises SconeError as it does, when the weights cannot be read, or when the tokenizer has more tokens than a
    pretrained trunk.
    """
    config = config or trunk_configuration(options)
    if options.init == "pretrained":
        return _pretrained(options, tokenizer, config)
    if tokenizer is not None:
        config.vocab_size = vocabulary_size(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    trunk = AutoModelForCausalLM.from_config(config)
    train_every_token(trunk, fresh=True)
    if options.base_model_name == MODERN_TRUNK:
        for name, parameter in trunk.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
    return trunk


def train_every_token(trunk: PreTrainedModel, *, fresh: bool = False) -> None:
    """Let the embedding of the tokenizer's padding token be trained as any other; ``fresh``: draw it as those are.

    Tokenizers pad with the token that separates documents, and transformers takes that token's vector to be zero for
    ever. But here it is read, and a vector of zeros takes RMSNorm's gradient times 1,000 (1 / √eps) in every layer in
    which it sees itself alone, as at a window's start: float32 ends after 13 layers of them, and a step's gradients
    are no numbers. What is padding, the mask says.
    """
    embedding: Any = trunk.get_input_embeddings()
    place = getattr(embedding, "padding_idx", None)
    if place is None:
        return
    embedding.padding_idx = None
    if fresh:
        with torch.no_grad():
            nn.init.normal_(embedding.weight[place], std=float(embedding.weight.std()))


def draw_if_zero(model: PreTrainedModel) -> None:
    """Draw the embedding of the padding token as those of others are where it is trained and was zero until now.

    As transformers leaves it: see `train_every_token`. Behind 8 layers its gradient is 5e18, to which all others are
    clipped; behind 12 it is none. Any vector but zero is another function already, to which the first step would go.
    """
    embedding: Any = model.get_input_embeddings()
    weight, place = embedding.weight, model.config.get_text_config().pad_token_id
    if place is None or not 0 <= place < len(weight) or not weight.requires_grad or weight[place].any():
        return
    drawn = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))  # on every process the same
    with torch.no_grad():
        weight[place] = (drawn * float(weight.std())).to(weight)
    logger.warning("the embedding of token %d, which was zero, begins as those of other tokens do", place)


def alone(trunk: PreTrainedModel) -> PreTrainedModel:
    """The same trunk, told what it would guess and warn of when it is trained or run by itself.

    Its loss is that of a causal language model, which transformers reads from a class's name, and GPT-2's does not say
    it. And batches without a mask have no padding: looking for it among the tokens finds the separators of ours, and
    makes every step wait for the accelerator.
    """
    body: Any = trunk.base_model
    trunk.loss_type = "ForCausalLM"
    body.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
    return trunk


def trunk_configuration(options: ModelOptions) -> PreTrainedConfig:
    """The configuration of the trunk, for one from scratch with the options' sizes in place.

    Reads no weights, so that what is wrong with a trunk is said before anything long is begun. Raises SconeError when
    the architecture is unknown or no causal language model, the options do not fit it, pretrained weights are not
    there, the hub is out of reach and the name has no built-in configuration, or transformers runs the architecture
    otherwise than it trains it.
    """
    pretrained = options.init == "pretrained"
    config = (_pretrained_configuration if pretrained else _named_configuration)(options.base_model_name)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SconeError(
            f"found {options.base_model_name!r} of type {config.model_type!r}, which has no causal language model "
            "in transformers; expected one such as gpt2, bert-base-uncased, llama or qwen2; choose another"
        )
    check_positions(config)
    # a decoder that was saved by itself says no more that it is one; its class does
    of_two = any(getattr(each, "is_encoder_decoder", False) for each in (config, type(config)))
    if of_two or config.model_type == "trocr":
        raise SconeError(
            f"found {options.base_model_name!r} of type {config.model_type!r}, the decoder of an encoder-decoder, "
            "which transformers trains to repeat each token and not to predict the next; expected one such as gpt2, "
            "llama or qwen2; choose another"
        )
    causal(config)
    if pretrained:
        _check_pretrained_sizes(config, options)
        _check_weights(options.base_model_name, config)
        return config
    _apply_sizes(config, options)
    if options.base_model_name == MODERN_TRUNK and options.hidden_size is not None:
        _complete_sizes(config, options)
    _check_heads(config)
    return config


def check_positions(config: PreTrainedConfig) -> None:
    """Raise SconeError for a trunk that counts positions by token ids, which input vectors do not have.

    Of tokens, RoBERTa and its kin count those that are not the padding token (which also separates documents), from
    behind its id on; of vectors all, in every cached step from the first position again; and ``generate`` gives them
    positions from 0 on. So training, evaluation and decoding would each see another text.
    """
    if config.model_type in ROBERTA_KIN:
        raise SconeError(
            f"found a trunk of type {config.model_type!r}, which counts positions by token ids, and in generation not "
            "as in training; expected one that counts them from the first on, such as bert-base-uncased, gpt2 or "
            "qwen2; choose another"
        )


def per_layer_inputs(trunk: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What the layers of Gemma 3n and of small ones of Gemma 4 read of tokens int64 ``[B, T]``: ``[B, T, layers, P]``.

    Of vectors alone the first leaves it out without a word, and the others look for the tokens that have these vectors.
    """
    decoder: Any = trunk.get_decoder()
    find = decoder.get_per_layer_inputs
    # Gemma 4's also asks for vectors, in place of tokens; in transformers 5.17 it has to be told that there are none
    vectors: Tensor = find(input_ids, None) if "inputs_embeds" in signature(find).parameters else find(input_ids)
    return vectors


def routing_loss(trunk: Any, output: Any) -> Tensor | float:
    """What a mixture of experts adds to its loss, so that experts share the work: where it puts ``aux_loss`` out."""
    found = getattr(output, "aux_loss", None)
    if found is None:
        return 0.0
    named = next((name for name in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(trunk, name)), None)
    factor = trunk.config.get_text_config().router_aux_loss_coef if named is None else getattr(trunk, named)
    return factor * found


def causal(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same, told that attention looks back alone: BERT and its kin look ahead too, unless they are told."""
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def trunk_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The four sizes by which an f-gram model as large as this trunk is built."""
    width = config.hidden_size
    inner = next((getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")), None)
    return {
        "hidden_size": width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": inner or 4 * width,
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each part in the mode that it was in."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """The most positions that a model of this configuration can take, None where it states no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def _pretrained_configuration(name: str) -> PreTrainedConfig:
    with _loading_weights(name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(**load_arguments(name, WEIGHTS))
    if isinstance(config, EmbeddedTrunkConfig):
        raise SconeError(
            f"found {name!r} of type {config.model_type!r}, which has input embeddings of ours already; expected a "
            "plain causal language model; train it on by --resume_from_checkpoint or in your own loop, or save "
            "its model.trunk and give that"
        )
    return config


def _check_weights(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model without weights, none of which is read."""
    where = load_arguments(name, WEIGHTS)
    files = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    named = getattr(config, "transformers_weights", None)
    with _loading_weights(name):
        if "gguf_file" in where or any(
            has_file(where["pretrained_model_name_or_path"], file) for file in (*files, named) if file
        ):
            return
    raise SconeError(
        f"found a configuration and no weights in {name!r}; expected {SAFE_WEIGHTS_NAME} beside it for --init "
        "pretrained; give a folder that holds them, or train with --init scratch"
    )


def _loading_weights(name: str) -> AbstractContextManager[None]:
    advice = "expected a folder, or a hub name with the hub in reach; give a folder, or train with --init scratch"
    return library_refusal(f"cannot load pretrained weights of {name!r}", advice)


def _pretrained(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig
) -> PreTrainedModel:
    name = options.base_model_name
    where = load_arguments(name, WEIGHTS)
    with _loading_weights(name):
        trunk = AutoModelForCausalLM.from_pretrained(**where, **unpacked(where), config=config)
    quantizer: Any = getattr(trunk, "hf_quantizer", None)
    if "gguf_file" in where and quantizer is not None:
        # its weights are ordinary now, but a model that calls itself quantised is neither trained nor saved
        quantizer.remove_quantization_config(trunk)
    train_every_token(trunk)
    size = int(trunk.get_input_embeddings().weight.shape[0])  # type: ignore[index, arg-type]
    if tokenizer is not None and vocabulary_size(tokenizer) > size:
        raise SconeError(
            f"the tokenizer does not fit the trunk: found {vocabulary_size(tokenizer)} tokens; expected at most "
            f"{size}, the size of {name!r}'s embedding; use its own tokenizer"
        )
    return trunk


def _check_pretrained_sizes(config: PreTrainedConfig, options: ModelOptions) -> None:
    """Dropout may change with pretrained weights, shapes may not; what would change their function is ignored."""
    for name, fields in TRUNK_SIZE_FIELDS.items():
        value = getattr(options, name)
        known = [field for field in fields if hasattr(config, field)]
        if value is None or not known:
            continue
        if "dropout" in name:
            for field in known:
                setattr(config, field, value)
        elif name in ("hidden_act", "initializer_range", "layer_norm_eps"):
            logger.warning("%s=%s is ignored: the pretrained weights keep %s", name, value, getattr(config, known[0]))
        elif (found := trunk_sizes(config).get(name, getattr(config, known[0]))) != value:
            raise SconeError(
                f"found {name}={value} with --init pretrained; expected {found}, the size of the pretrained weights; "
                "leave it out, or train with --init scratch"
            )


def _named_configuration(name: str) -> PreTrainedConfig:
    """From a folder or file, an architecture's bare name, the hub, or the built-in configurations, in this order."""
    built_in = built_in_configuration(name)
    if not Path(name).expanduser().is_dir():
        if name in CONFIG_MAPPING_NAMES and built_in is None:
            return AutoConfig.for_model(name)
        if name == MODERN_TRUNK and built_in is not None:  # ours: the hub knows nothing of it
            return AutoConfig.for_model(**built_in)
    advice = "expected config.json of a transformers model, or an architecture such as gpt2; check --base_model_name"
    try:
        with library_refusal(f"cannot read a model configuration in {name}", advice):
            return AutoConfig.from_pretrained(**load_arguments(name, "a model folder, or an architecture such as gpt2"))
    except SconeError:
        if built_in is None or Path(name).is_dir():
            raise
        logger.warning("the hub is out of reach: using the built-in configuration of %s", name)
        return AutoConfig.for_model(**built_in)


def _apply_sizes(config: PreTrainedConfig, options: ModelOptions) -> None:
    had_all_heads = getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", None)
    for name, fields in TRUNK_SIZE_FIELDS.items():
        value = getattr(options, name)
        if value is None:
            continue
        if name == "hidden_act" and value not in ACT2FN:
            advice = did_you_mean(value, ACT2FN) or "expected one such as gelu, silu or relu"
            raise SconeError(f"found --hidden_act {value}, which transformers does not know; {advice}")
        known = [field for field in fields if hasattr(config, field)]
        for field in known:
            setattr(config, field, value)
        if not known:
            logger.warning("%s=%s has no meaning for a %s trunk: ignored", name, value, config.model_type)
    heads = config.num_attention_heads
    if options.num_attention_heads is not None and hasattr(config, "num_key_value_heads"):
        shared = config.num_key_value_heads
        if had_all_heads or shared > heads or heads % shared:
            config.num_key_value_heads = heads
    changed = options.hidden_size is not None or options.num_attention_heads is not None
    if changed and getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // heads
    if options.num_hidden_layers is not None and getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % len(config.layer_types)] for i in range(options.num_hidden_layers)]


def _complete_sizes(config: PreTrainedConfig, options: ModelOptions) -> None:
    """Heads of 64 and a SwiGLU of 8/3 of the width, where the options give the width alone."""
    width = config.hidden_size
    if options.num_attention_heads is None:
        config.num_attention_heads = config.num_key_value_heads = max(1, width // 64)
        config.head_dim = width // config.num_attention_heads
    if options.intermediate_size is None:
        config.intermediate_size = 64 * max(1, round(width * 8 / 3 / 64))


def _check_heads(config: PreTrainedConfig) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise SconeError(
            f"found hidden_size={width} with num_attention_heads={heads}; expected a width that is a multiple of the "
            "heads; change one of them"
        )
