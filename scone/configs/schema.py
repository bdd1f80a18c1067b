"""Every option once: name, type, default, help, unit, bounds. Flags, YAML files and Hydra are views of this file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scone.utils.text import parse_bytes


@dataclass(frozen=True)
class OptionInfo:
    """What is known of an option besides its name, type and default."""

    help: str
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None
    flag: str | None = None  # the flag's name where it is not the field's own
    bare: str | None = None  # what the flag means when it is given without a value
    check: Callable[[Any], object] | None = None  # raises SconeError on a bad value


def option(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    flag: str | None = None,
    bare: str | None = None,
    check: Callable[[Any], object] | None = None,
) -> Any:
    """A dataclass field that carries an :class:`OptionInfo` (read it with :func:`option_info`)."""
    info = OptionInfo(help, unit, minimum, maximum, choices, flag, bare, check)
    return field(default=default, metadata={"option": info})


def option_info(item: dataclasses.Field[Any]) -> OptionInfo | None:
    """The information of a field made by :func:`option`; None for a nested group of options."""
    return item.metadata.get("option")


@dataclass
class DataOptions:
    """The corpus, and the f-grams that are counted on it."""

    dataset_name: str = option(
        "wikitext",
        "Hugging Face data set, local file or folder (txt, jsonl, parquet; also .zst, .gz, .xz), or python-stdlib",
    )
    dataset_config_name: str | None = option(
        "wikitext-103-v1",
        "configuration of the Hugging Face data set; none when --dataset_name is given without it",
    )
    text_column: str = option("text", "column, or JSON key, that holds the text")
    max_length: int = option(512, "length of a training or evaluation sequence", unit="tokens", minimum=1)
    max_n: int = option(3, "longest f-gram", unit="tokens", minimum=2, maximum=255)
    min_freq: int = option(100, "fewest occurrences of an f-gram", unit="occurrences", minimum=1)
    max_f_grams: int = option(1_000_000, "how many f-grams, the most frequent first", minimum=1)
    cache_dir: str | None = option(
        None,
        "folder for token files and counted vocabularies, reused between runs (none: $SCONE_CACHE or ~/.cache/scone)",
    )
    memory_budget: str | None = option(
        None,
        "most memory that counting may use, such as 4GiB; what does not fit goes to disk (none: half of what is free)",
        check=parse_bytes,
    )
    num_workers: int = option(2, "processes that prepare training batches", minimum=0)


@dataclass
class FGramModelOptions:
    """The f-gram model: the transformer that embeds f-grams."""

    hidden_size: int | None = option(
        None, "width of the f-gram model (none: as the trunk)", minimum=1, flag="f_gram_hidden_size"
    )
    num_hidden_layers: int | None = option(
        0,
        "layers of the f-gram model (none: as the trunk; 0: no f-gram model, learned rows only)",
        minimum=0,
        flag="f_gram_num_hidden_layers",
    )
    num_attention_heads: int | None = option(
        None, "attention heads of the f-gram model (none: as the trunk)", minimum=1, flag="f_gram_num_attention_heads"
    )
    intermediate_size: int | None = option(
        None, "feed-forward width of the f-gram model (none: as the trunk)", minimum=1, flag="f_gram_intermediate_size"
    )
    start: str | None = option(
        None,
        "zero: a gain of zero, so that training starts at the plain trunk; random: at the scale of token embeddings; "
        "identity: as the last token's embedding (none: zero, or random where no gain or no token embedding is left)",
        choices=("zero", "random", "identity"),
        flag="f_gram_start",
    )
    output_norm: bool = option(
        True, "divide the f-gram model's vectors by their root mean square", flag="f_gram_output_norm"
    )
    output_gain: bool = option(True, "multiply them by a learned gain", flag="f_gram_output_gain")
    token_embeddings: str = option(
        "shared",
        "shared: the f-gram model reads the trunk's token embeddings; separate: its own",
        choices=("shared", "separate"),
        flag="f_gram_token_embeddings",
    )


@dataclass
class ModelOptions:
    """The trunk, its tokenizer and its input embeddings. Sizes left at none are those of base_model_name."""

    base_model_name: str = option(
        "gpt2",
        "the trunk: any causal language model, by hub name or local folder; scone-modern: a Qwen3-form trunk of any "
        "size with settings that suit training from scratch (Muon, cosine, norm after the input embedding)",
    )
    init: str = option(
        "scratch", "start the trunk from random or from its pretrained weights", choices=("scratch", "pretrained")
    )
    tokenizer: str | None = option(
        None, "tokenizer by name or folder, or `train`: a byte-level BPE of the corpus (none: that of base_model_name)"
    )
    vocab_size: int = option(
        16384, "tokens of a tokenizer that is trained (--tokenizer train)", unit="tokens", minimum=257
    )
    use_f_gram_embeddings: bool = option(
        True, "give positions f-gram embeddings (false: the plain trunk, the baseline)"
    )
    combination: str = option(
        "add",
        "add: the token embedding plus a learned correction that starts at zero; replace: the paper's literal form; "
        "gate: add, each number times a factor that token and correction decide",
        choices=("add", "replace", "gate"),
    )
    learned_rows: int = option(
        1_000_000, "how many f-grams, the most frequent first, get a learned row (0: none)", unit="rows", minimum=0
    )
    rows_backoff: bool = option(
        True, "an f-gram's vector sums the rows of all its suffixes (false: only the row of the longest that has one)"
    )
    rows_device: str = option(
        "accelerator",
        "where learned rows and their moments live; host: those of a step travel, for rows that fill the accelerator",
        choices=("accelerator", "host"),
    )
    control: str = option(
        "none",
        "a control experiment; shuffled: every f-gram takes the vector of another one of its length; single: all take "
        "that of one",
        choices=("none", "shuffled", "single"),
    )
    over_encoding_rows: int = option(
        0,
        "a baseline in place of f-grams: over-encoding (arXiv 2501.16975) with this many hashed 2- and 3-gram rows (0: "
        "f-grams)",
        unit="rows",
        minimum=0,
    )
    over_encoding_start: str = option(
        "zero", "start of these rows; random: at the scale of token embeddings", choices=("zero", "random")
    )
    embedding_scale: float = option(
        1.0, "factor on the input vectors in front of the trunk, against its position embeddings", minimum=0
    )
    input_norm: bool = option(
        False,
        "normalise the input vectors in front of the trunk (RMSNorm with a learned gain), plain ones too",
    )
    f_gram: FGramModelOptions = field(default_factory=FGramModelOptions)
    hidden_size: int | None = option(None, "width of the trunk", minimum=1)
    num_hidden_layers: int | None = option(None, "layers of the trunk", minimum=1)
    num_attention_heads: int | None = option(None, "attention heads of the trunk", minimum=1)
    intermediate_size: int | None = option(None, "feed-forward width of the trunk", minimum=1)
    hidden_act: str | None = option(None, "activation function of the trunk, such as gelu or silu")
    hidden_dropout_prob: float | None = option(None, "dropout of embeddings and hidden states", minimum=0, maximum=1)
    attention_probs_dropout_prob: float | None = option(None, "dropout of attention weights", minimum=0, maximum=1)
    max_position_embeddings: int | None = option(None, "longest sequence of the trunk", unit="tokens", minimum=1)
    type_vocab_size: int | None = option(
        None, "token types of the trunk (BERT; architectures without token types ignore it)", minimum=1
    )
    initializer_range: float | None = option(None, "standard deviation of random weights", minimum=0)
    layer_norm_eps: float | None = option(None, "epsilon of the trunk's norms", minimum=0)


def _check_max_steps(value: int) -> None:
    from scone.utils.errors import SconeError

    if value == 0:
        raise SconeError("found 0; expected -1 (as --num_epochs says) or at least 1; leave the option out")


@dataclass
class TrainingOptions:
    """A training run."""

    output_dir: str = option("./outputs/scone-model", "folder of the run; the result is its final_model")
    num_epochs: float = option(3.0, "passes over the training split", unit="epochs", minimum=0)
    max_steps: int = option(
        -1, "optimizer steps; wins over num_epochs (-1: unset)", unit="steps", minimum=-1, check=_check_max_steps
    )
    batch_size: int = option(8, "sequences of a step, per process", unit="sequences", minimum=1)
    learning_rate: float = option(5e-5, "peak learning rate of the trunk", minimum=0)
    f_gram_learning_rate: float | None = option(None, "that of the f-gram model (none: learning_rate)", minimum=0)
    rows_learning_rate: float | None = option(
        None, "that of the learned rows (none: by the training tokens, 2e-3 at 82 M, as their root below)", minimum=0
    )
    f_gram_dropout: float = option(
        0.0,
        "probability with which a position uses its token in place of its f-gram in a training batch (models without "
        "f-grams have nothing to leave out)",
        minimum=0,
        maximum=0.99,
    )
    f_gram_length_warmup_steps: int = option(
        0,
        "steps over which the longest f-gram that training uses grows from 2 to max_n; a longer match gives its suffix",
        unit="steps",
        minimum=0,
    )
    optimizer: str = option(
        "adamw",
        "of the trunk's matrices; muon: orthogonalised momentum, at learning rates as AdamW's (torch 2.9 or later)",
        choices=("adamw", "muon"),
    )
    weight_decay: float = option(0.01, "weight decay of matrices", minimum=0)
    warmup_steps: int = option(0, "steps over which the learning rate rises", unit="steps", minimum=0)
    lr_scheduler_type: str = option(
        "linear",
        "course of the learning rate after the warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this (0: not clipped)", minimum=0)
    logging_steps: int = option(100, "steps between log lines", unit="steps", minimum=1)
    save_steps: int = option(1000, "steps between checkpoints", unit="steps", minimum=1)
    eval_steps: int = option(1000, "steps between evaluations on the validation split", unit="steps", minimum=1)
    max_eval_tokens: int | None = option(
        None, "evaluate on the first so many tokens of the validation split (none: all)", unit="tokens", minimum=2
    )
    save_total_limit: int | None = option(None, "checkpoints to keep, the newest (none: all)", minimum=1)
    seed: int = option(42, "seed of weights, order and sampling", minimum=0, maximum=2**32 - 1)
    gradient_accumulation_steps: int = option(1, "batches that make one optimizer step", unit="batches", minimum=1)
    fp16: bool = option(False, "train in float16 mixed precision where the device can")
    bf16: bool = option(False, "train in bfloat16 mixed precision where the device can")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    torch_compile: bool = option(False, "compile trunk and f-gram model with torch.compile")
    fsdp: str = option(
        "none",
        "shard the model over the processes of a launcher: full_shard; or shard_grad_op, more memory and less traffic",
        choices=("none", "full_shard", "shard_grad_op"),
    )
    freeze_trunk: bool = option(False, "train only the input embeddings")
    resume_from_checkpoint: str | None = option(
        None, "checkpoint folder to go on from; without a value (or true): the newest one in output_dir", bare="true"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, mps … (none: the best there is)")
    report_to: str = option("tensorboard", "where metrics go: tensorboard, wandb, … (comma-separated), or none")


@dataclass
class InferenceOptions:
    """Precomputing, evaluating and generating."""

    use_memory_map: bool = option(False, "stream the embedding table to and from disk: bounded memory")
    batch_size: int = option(32, "sequences, or f-grams when precomputing, of a batch", minimum=1)


@dataclass
class SconeOptions:
    """All options, by section.

    ``given`` remembers what was set, and where: dotted name → "flag", the file's name, "override" (Hydra), or other
    words for the place. What is absent has its default.
    """

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    given: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


SECTIONS = ("data", "model", "training", "inference")
