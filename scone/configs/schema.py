"""Every option, declared once: name, type, default, help, unit, bounds; the flat list of them; a value's conversion.

Flags, YAML and Hydra are derived from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from scone.utils.errors import SconeError
from scone.utils.text import parse_bytes

RANKINGS = ("gain", "frequency")
"""What decides which n-grams become f-grams, and their order."""
DEFAULT_RANKING = "gain"
"""Of what is counted for no run in particular; a run that names none has what suits it (`training.options.ranked`)."""


@dataclass(frozen=True)
class OptionInfo:
    """What an option has besides its name, type and default."""

    help: str
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None
    bare: str | None = None  # the value of a flag that is given without one
    check: Callable[[Any], object] | None = None  # raises SconeError on a bad value


def option(default: Any, help: str, **info: Any) -> Any:
    """A dataclass field that carries an :class:`OptionInfo`."""
    return field(default=default, metadata={"option": OptionInfo(help, **info)})


def of_the_trunk(help: str, **info: Any) -> Any:
    """An option of the trunk's configuration, whose default is that of its base model."""
    return option(None, f"{help} (default: base_model_name's)", **info)


@dataclass
class DataOptions:
    """The corpus, and the f-grams that are counted on it."""

    dataset_name: str = option(
        "wikitext",
        "Hugging Face dataset, local file or folder (txt, jsonl, parquet; also .zst, .gz, .xz), or python-stdlib",
    )
    dataset_config_name: str | None = option(
        "wikitext-103-v1",
        "configuration of the Hugging Face dataset (not used if only --dataset_name is given)",
    )
    text_column: str = option("text", "column or JSON key that holds the text")
    max_length: int = option(512, "length of a training or evaluation sequence", unit="tokens", minimum=1)
    max_n: int = option(3, "length of the longest f-gram", unit="tokens", minimum=2, maximum=255)
    min_freq: int = option(100, "how often an n-gram must occur to become an f-gram", unit="occurrences", minimum=1)
    max_f_grams: int = option(1_000_000, "number of f-grams to keep, the first of the ranking", minimum=1)
    ranking: str | None = option(
        None,
        "which n-grams become f-grams; gain: those that say most about the next token; frequency: the most frequent, "
        "as in the paper (default: gain, but frequency in a run that reads fewer than 10 tokens for each f-gram)",
        choices=RANKINGS,
    )
    cache_dir: str | None = option(
        None,
        "folder for token files and counted f-grams, reused across runs (default: $SCONE_CACHE or ~/.cache/scone)",
    )
    memory_budget: str | None = option(
        None,
        "memory limit for counting, such as 4GiB; the rest goes to disk (default: half of the free memory)",
        check=parse_bytes,
    )
    num_workers: int = option(2, "worker processes that prepare training batches", minimum=0)


@dataclass
class FGramModelOptions:
    """The f-gram model: the transformer that embeds f-grams."""

    hidden_size: int | None = option(None, "width of the f-gram model (default: the trunk's)", minimum=1)
    num_hidden_layers: int | None = option(
        0,
        "layers of the f-gram model (none: as many as the trunk; 0: no f-gram model, learned rows only)",
        minimum=0,
    )
    num_attention_heads: int | None = option(
        None, "attention heads of the f-gram model (default: the trunk's)", minimum=1
    )
    intermediate_size: int | None = option(
        None, "feed-forward width of the f-gram model (default: the trunk's)", minimum=1
    )
    token_embeddings: str = option(
        "shared",
        "shared: the f-gram model's input is the trunk's token embeddings; separate: it has its own",
        choices=("shared", "separate"),
    )


@dataclass
class ModelOptions:
    """The trunk, its tokenizer and its input embeddings. Sizes left at none are those of base_model_name."""

    base_model_name: str = option(
        "gpt2",
        "the trunk: any Hugging Face causal language model, by hub name or local folder; scone-modern: a trunk of "
        "Qwen3's form, of any size, with settings for training from scratch (Muon, cosine, --input_norm)",
    )
    init: str = option(
        "scratch", "start from random (scratch) or from pretrained weights", choices=("scratch", "pretrained")
    )
    tokenizer: str | None = option(
        None, "tokenizer by name or folder, or `train`: a byte-level BPE of the corpus (default: base_model_name's)"
    )
    vocab_size: int = option(
        16384, "vocabulary size of a tokenizer made by --tokenizer train", unit="tokens", minimum=257
    )
    use_f_gram_embeddings: bool = option(True, "use f-gram embeddings (false: train the plain trunk, the baseline)")
    combination: str = option(
        "add",
        "add: the token embedding plus a learned correction that starts at zero; replace: the f-gram's vector alone, "
        "as in the paper; gate: add, with the correction scaled element by element",
        choices=("add", "replace", "gate"),
    )
    learned_rows: int | None = option(
        None,
        "number of f-grams, the first of the ranking, that get a learned row (default: all; beside an f-gram model at "
        "most 1,000,000; 0: none)",
        unit="rows",
        minimum=0,
    )
    rows_device: str = option(
        "accelerator",
        "where learned rows live while they train; host: in pinned memory, for more than fit on the accelerator",
        choices=("accelerator", "host"),
    )
    rows_dtype: str = option(
        "float32",
        "type of the learned rows while they train; bfloat16: half the memory, rounded at random (stochastically)",
        choices=("float32", "bfloat16"),
    )
    over_encoding_rows: int = option(
        0,
        "baseline: over-encoding (arXiv 2501.16975) with this many rows of hashed 2- and 3-grams, instead of f-grams "
        "(0: off)",
        unit="rows",
        minimum=0,
    )
    embedding_scale: float = option(
        1.0, "factor by which the input embeddings are multiplied, before position embeddings are added", minimum=0
    )
    input_norm: bool = option(
        False,
        "normalise the input embeddings before the trunk (RMSNorm with a learned gain), with or without f-grams",
    )
    f_gram: FGramModelOptions = field(default_factory=FGramModelOptions)
    hidden_size: int | None = of_the_trunk("width of the trunk", minimum=1)
    num_hidden_layers: int | None = of_the_trunk("layers of the trunk", minimum=1)
    num_attention_heads: int | None = of_the_trunk("attention heads of the trunk", minimum=1)
    intermediate_size: int | None = of_the_trunk("feed-forward width of the trunk", minimum=1)
    hidden_act: str | None = of_the_trunk("activation function of the trunk, such as gelu or silu")
    hidden_dropout_prob: float | None = of_the_trunk("dropout of embeddings and hidden states", minimum=0, maximum=1)
    attention_probs_dropout_prob: float | None = of_the_trunk("dropout of attention weights", minimum=0, maximum=1)
    max_position_embeddings: int | None = of_the_trunk("longest sequence of the trunk", unit="tokens", minimum=1)
    type_vocab_size: int | None = option(
        None, "token types of the trunk (BERT; ignored by architectures without them)", minimum=1
    )
    initializer_range: float | None = of_the_trunk("standard deviation of the initial weights", minimum=0)
    layer_norm_eps: float | None = of_the_trunk("epsilon of the trunk's normalisation layers", minimum=0)


TRUNK_SIZES = [f"model.{item.name}" for item in dataclasses.fields(ModelOptions)][-11:]
"""Options that are fields of the trunk's configuration, whatever that calls them."""


def _check_max_steps(value: int) -> None:
    if value == 0:
        raise SconeError("found 0; expected -1 (use --num_epochs) or at least 1; leave the option out")


@dataclass
class TrainingOptions:
    """A training run."""

    output_dir: str = option("./outputs/scone-model", "folder of the run; the trained model is OUTPUT_DIR/final_model")
    num_epochs: float = option(
        3.0, "passes over the training split; learned rows start again with each", unit="epochs", minimum=0
    )
    max_steps: int = option(
        -1, "optimizer steps; overrides num_epochs (-1: not set)", unit="steps", minimum=-1, check=_check_max_steps
    )
    batch_size: int = option(8, "sequences per batch and process", unit="sequences", minimum=1)
    learning_rate: float = option(5e-5, "peak learning rate of the trunk", minimum=0)
    f_gram_learning_rate: float | None = option(
        None, "peak learning rate of the f-gram model (default: learning_rate)", minimum=0
    )
    rows_learning_rate: float | None = option(
        None,
        "peak learning rate of the learned rows (default: 2e-3 · √(82 M / tokens of one pass), from 5e-4 to 1e-2)",
        minimum=0,
    )
    optimizer: str = option(
        "adamw",
        "optimizer of the trunk's matrices; muon takes learning rates like AdamW's",
        choices=("adamw", "muon"),
    )
    weight_decay: float = option(0.01, "weight decay of weight matrices", minimum=0)
    warmup_steps: int = option(0, "steps of learning rate warm-up", unit="steps", minimum=0)
    lr_scheduler_type: str = option(
        "linear",
        "learning rate schedule after the warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    max_grad_norm: float = option(1.0, "clip the gradient norm to this (0: no clipping)", minimum=0)
    logging_steps: int = option(100, "steps between log lines", unit="steps", minimum=1)
    save_steps: int = option(1000, "steps between checkpoints", unit="steps", minimum=1)
    eval_steps: int = option(1000, "steps between evaluations on the validation split", unit="steps", minimum=1)
    max_eval_tokens: int | None = option(
        None, "evaluate on the first N tokens of the validation split (default: all)", unit="tokens", minimum=2
    )
    save_total_limit: int | None = option(None, "number of newest checkpoints to keep (default: all)", minimum=1)
    seed: int = option(42, "random seed for weights, data order and sampling", minimum=0, maximum=2**32 - 1)
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", unit="batches", minimum=1)
    fp16: bool = option(False, "float16 mixed precision, if the device supports it")
    bf16: bool = option(False, "bfloat16 mixed precision, if the device supports it")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    torch_compile: bool = option(False, "compile trunk and f-gram model with torch.compile")
    fsdp: str = option(
        "none",
        "shard the model across processes. full_shard: least memory; shard_grad_op: more memory, less communication",
        choices=("none", "full_shard", "shard_grad_op"),
    )
    freeze_trunk: bool = option(False, "freeze the trunk and train only the input embeddings")
    resume_from_checkpoint: str | None = option(
        None, "checkpoint folder to resume from; without a value (or true): the newest one in output_dir", bare="true"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, mps … (default: the best available)")
    report_to: str = option("tensorboard", "where to report metrics: tensorboard, wandb, … (comma-separated), or none")


@dataclass
class InferenceOptions:
    """Precomputing, evaluating and generating."""

    use_memory_map: bool = option(False, "stream the embedding table to and from disk, with bounded memory")
    batch_size: int = option(32, "sequences per batch (f-grams, when precomputing)", minimum=1)


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

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NONES = ("none", "null")


@dataclass(frozen=True)
class Entry:
    """One option: ``name`` is dotted ("model.f_gram.hidden_size"), ``type`` is bool, int, float or str."""

    name: str
    type: type
    optional: bool  # None is a value
    default: Any
    info: OptionInfo

    @property
    def section(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def flag(self) -> str:
        return "_".join(self.name.split(".")[1:])


@functools.cache
def entries() -> dict[str, Entry]:
    """Every option by its dotted name, in the order of the schema."""
    return {entry.name: entry for entry in _entries_of(SconeOptions, "")}


def _entries_of(group: type, prefix: str) -> Iterator[Entry]:
    hints = typing.get_type_hints(group)
    for item in dataclasses.fields(group):
        name, hint, info = f"{prefix}{item.name}", hints[item.name], item.metadata.get("option")
        if info is not None:
            kinds = typing.get_args(hint) or (hint,)
            yield Entry(name, kinds[0], type(None) in kinds, item.default, info)
        elif dataclasses.is_dataclass(hint):
            yield from _entries_of(hint, f"{name}.")  # type: ignore[arg-type]


def convert(entry: Entry, value: Any, shown_as: str, from_text: bool = False) -> Any:
    """``value`` as the option's type, within its bounds.

    ``shown_as`` names the option in errors ("--max_n", "base.yaml: data.max_n"); ``from_text`` says that the value
    was typed in a shell, where ``none`` is the only way to write None. Raises SconeError.
    """
    if from_text and entry.optional and isinstance(value, str) and value.lower() in _NONES:
        value = None
    if value is None and entry.optional:
        return None
    try:
        converted: Any = _CONVERTERS[entry.type](entry, value)
    except (TypeError, ValueError, OverflowError):
        raise _refusal(entry, value, shown_as) from None
    info, low, high = entry.info, entry.info.minimum, entry.info.maximum
    if converted is not None and (
        (info.choices is not None and converted not in info.choices)
        or (low is not None and converted < low)
        or (high is not None and converted > high)
    ):
        raise _refusal(entry, value, shown_as)
    if entry.info.check is not None and converted is not None:
        try:
            entry.info.check(converted)
        except SconeError as error:
            raise SconeError(f"{shown_as}: {error}") from None
    return converted


def expectation(entry: Entry) -> str:
    """What the option takes, in words: "a whole number of at least 2"."""
    info = entry.info
    if info.choices:
        return "one of " + ", ".join(info.choices)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[entry.type]
    if info.minimum is not None and info.maximum is not None:
        words += f" from {info.minimum:g} to {info.maximum:,.10g}"
    elif info.minimum is not None:
        words += f" of at least {info.minimum:g}"
    return words + (" or none" if entry.optional else "")


def _refusal(entry: Entry, value: Any, shown_as: str) -> SconeError:
    meaning = entry.info.help + (f" ({entry.info.unit})" if entry.info.unit else "")
    hint = "; put it in quotes" if entry.type is str and not isinstance(value, (str, dict, list, type(None))) else ""
    return SconeError(f"{shown_as}: found {shown(value)}; expected {expectation(entry)}{hint}; meaning: {meaning}")


def shown(value: Any) -> str:
    """A value that was found, as a message shows it: never longer than a line."""
    if isinstance(value, str) and value and " " not in value:
        return shortened(value)
    try:
        return shortened(repr(value))
    except ValueError:  # a number that Python refuses to write out
        return f"a {type(value).__name__}"


def shortened(text: str) -> str:
    """``text``, its middle left out where it is longer than 200 characters."""
    return text if len(text) <= 200 else f"{text[:150]} … {text[-30:]}"


def _to_bool(entry: Entry, value: Any) -> bool:
    if str(value).lower() not in _BOOLEANS:
        raise ValueError(value)
    return _BOOLEANS[str(value).lower()]


def _to_int(entry: Entry, value: Any) -> int:
    if isinstance(value, (bool, bytes)):
        raise ValueError(value)
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)  # "1e6" is a whole number too
    if not isinstance(value, float) or value != math.floor(value):
        raise ValueError(value)
    return int(value)


def _to_float(entry: Entry, value: Any) -> float:
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise ValueError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _to_text(entry: Entry, value: Any) -> str | None:
    if entry.info.bare is not None and isinstance(value, bool):
        return entry.info.bare if value else None  # `resume_from_checkpoint: true` in a file
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a configuration named 2020
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value


_CONVERTERS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text}
