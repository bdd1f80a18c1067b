"""Compare models side by side: perplexity, prefill and decode speed, memory, parameters, FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scone.data.prepare import prepare_corpus
from scone.evaluation import measure
from scone.evaluation.benchmark_config import BaselineEntry, BenchmarkConfig, DatasetEntry, ModelEntry
from scone.evaluation.perplexity import perplexity
from scone.evaluation.results import PLAIN, STEM, RunResult, write_report
from scone.evaluation.speed import measure_speed
from scone.evaluation.text_size import text_size
from scone.inference.loading import LoadedModel, choose_device, load_model, position_limit
from scone.inference.quantization import check_quantization
from scone.models.accounting import f_gram_model_parameters, parameter_counts
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.tokenization.tokenizers import load_tokenizer
from scone.utils.errors import SconeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scone.data.token_file import TokenFile
    from scone.inference.embedding_table import EmbeddingTable


@dataclass(frozen=True)
class BenchmarkSettings:
    """How to run, apart from what to measure."""

    device: str | None = None
    cache_dir: str | None = None
    max_tokens: int = 500_000
    placement: str = "ram"
    quantizations: tuple[str, ...] = ()
    """Every model is measured as it is, and once more with its trunk in each of these forms."""
    seed: int = 42


@dataclass
class Subject:
    """A model that was loaded, with its tokenizer, its name in the results and where it came from."""

    name: str
    path: str
    loaded: LoadedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model


def run_benchmark(
    config: BenchmarkConfig, output_dir: Path, settings: BenchmarkSettings, say: Callable[[str], None] = print
) -> list[RunResult]:
    """Measure every model of ``config``; write the report (`write_report`) to ``output_dir``; return the results.

    What is missing (a model, a data set) is named, listed in the report, and the rest goes on; a SCONE model whose
    table is missing is measured live.
    Raises SconeError when no model could be measured.
    """
    torch.manual_seed(settings.seed)
    missing: list[dict[str, str]] = []
    results: list[RunResult] = []
    for wanted in settings.quantizations:
        check_quantization(wanted)
    forms: tuple[str | None, ...] = (None, *settings.quantizations)
    for found, quantization in product(config.entries, forms):
        entry = found if quantization is None else replace(found, name=f"{found.name} {quantization}")
        say(f"{entry.name}")
        try:
            results.append(_measure_entry(entry, quantization, config, settings, missing, say))
        except SconeError as error:
            missing.append({"what": entry.name, "why": str(error)})
            say(f"    left out: {error}")
        except torch.OutOfMemoryError:
            missing.append({"what": entry.name, "why": "the accelerator's memory is too small for it"})
            say("    left out: the accelerator's memory is too small for it")
    if not results:
        raise SconeError(
            f"nothing could be measured: {len(missing)} of {len(missing)} models are missing "
            f"(the first: {missing[0]['why']}); train them or change the paths in the configuration"
        )
    facts = {
        "machine": measure.describe_machine(),
        "config": asdict(config),
        "settings": asdict(settings),
        "notes": _notes(config, settings),
    }
    write_report(results, output_dir, facts=facts, missing=missing)
    return results


def _notes(config: BenchmarkConfig, settings: BenchmarkSettings) -> list[str]:
    """How it was measured, in sentences, for whoever reads the report without us."""
    return [
        f"Perplexity: the first {settings.max_tokens:,} tokens of each data set in windows of the longest sequence "
        "length that the model has positions for, without overlap; the first token of a window is not predicted. "
        "Intervals: 95 %, normal over documents (another sample of texts, not another training run).",
        "Perplexities per token compare models of one tokenizer only; across tokenizers compare bits per byte "
        f"({STEM}.csv).",
        f"Speed: medians of {config.num_runs} runs after {config.warmup_runs} that do not count, models one after the "
        "other. Prefill is one forward pass over the whole prompt; decoding is greedy, as generate does it.",
        "FLOPs: a multiply-add is two; matrix products and attention over all pairs of positions, output head "
        "included. Training FLOPs per token count forward and backward of trunk and f-gram model on a batch of this "
        "text, whose f-grams share their prefixes.",
        "Memory: the process's peak holds libraries and everything else too; the table's pages in RAM are part of it.",
    ]


def _load(
    entry: ModelEntry | BaselineEntry,
    quantization: str | None,
    settings: BenchmarkSettings,
    missing: list[dict[str, str]],
    say: Callable[[str], None],
) -> Subject:
    """Raises SconeError where the model is missing; one whose table is missing is measured live."""
    if isinstance(entry, BaselineEntry):
        path, table = entry.model_name, None
    else:
        path, table = entry.model_path, entry.embedding_cache_path
    if table is not None and not Path(table).exists() and Path(path).is_dir():
        why = f"found no file {table}; the model is measured with its f-gram model running live; make it with "
        why += f"scone precompute --model_path {path} --output_path {table}"
        missing.append({"what": f"the table of {entry.name}", "why": why})
        say(f"    without its table: {why}")
        table = None
    loaded = load_model(path, table, settings.placement, settings.device, quantization)
    return Subject(entry.name, path, loaded, load_tokenizer(path))


def _measure_entry(
    entry: ModelEntry | BaselineEntry,
    quantization: str | None,
    config: BenchmarkConfig,
    settings: BenchmarkSettings,
    missing: list[dict[str, str]],
    say: Callable[[str], None],
) -> RunResult:
    """Load one model and measure everything; nothing of it stays in memory. Raises SconeError when it cannot be."""
    with measure.PeakMemory(choose_device(settings.device)) as peak:
        subject = _load(entry, quantization, settings, missing, say)
        texts = _texts(subject, config.dataset_configs, settings, missing, say)
        result = _measure(subject, entry, config, texts, settings, missing, say)
    result.peak_process_bytes, result.peak_accelerator_bytes = peak.process_bytes, peak.accelerator_bytes
    return result


def _measure(
    subject: Subject,
    entry: ModelEntry | BaselineEntry,
    config: BenchmarkConfig,
    texts: Mapping[str, TokenFile],
    settings: BenchmarkSettings,
    missing: list[dict[str, str]],
    say: Callable[[str], None],
) -> RunResult:
    model, table = subject.model, subject.loaded.table
    limit = position_limit(model)
    lengths = [length for length in config.sequence_lengths if limit is None or length <= limit]
    for length in sorted(set(config.sequence_lengths) - set(lengths)):
        missing.append({"what": f"{subject.name} at {length} tokens", "why": f"the model has {limit} positions"})
    window = max(lengths, default=limit or 512)
    text = next(iter(texts.values()), None)
    if text is None:  # no text: any tokens will do for the speed, though fewer f-grams match
        sample = np.random.default_rng(settings.seed).integers(0, model.config.get_text_config().vocab_size, 1 << 16)
    else:
        sample = text.tokens
    result = RunResult(
        subject.name,
        kind_of(model),
        f_gram_model_size=getattr(entry, "f_gram_model_size", None),
        resident_bytes=measure.resident_bytes(model),
        table_bytes=table.num_rows * table.row_bytes if table is not None else None,
        table_memory_bytes=table.memory.ram + table.memory.mapped if table is not None else None,
        facts={"entry": asdict(entry)} | _served(model, table),
        **_sizes(subject, model),
    )
    if subject.loaded.quantization:
        result.facts["quantization"] = str(subject.loaded.quantization)
    flops = measure.flops_per_token(model, batch_of(sample, max(config.batch_sizes), window))
    result.inference_flops_per_token = flops.pop("inference_flops_per_token")
    result.training_flops_per_token = flops.pop("training_flops_per_token")
    result.facts |= flops
    for name, file in texts.items():
        result.perplexity[name] = _perplexity(subject, file, window, config, settings)
        predicted = result.perplexity[name]["num_predicted"]
        say(f"    {name}: perplexity {result.perplexity[name]['perplexity']:.3f} ({predicted:,} tokens)")
    for batch_size in config.batch_sizes:
        for length in lengths:
            speed = measure_speed(model, batch_of(sample, batch_size, length), config.num_runs, config.warmup_runs)
            result.speed.append({"batch_size": batch_size, "sequence_length": length} | speed)
            decoded = speed.get("decode_tokens_per_second")
            say(
                f"    batch {batch_size}, {length} tokens: prefill {speed['prefill_tokens_per_second']:,.0f} tokens/s"
                + (f", decode {decoded:,.0f} tokens/s" if decoded else "")
            )
    return result


def _served(model: PreTrainedModel, table: EmbeddingTable | None) -> dict[str, str]:
    if not isinstance(model, SconeForCausalLM):
        return {}
    return {"served": "live" if table is None else "table"}


def _sizes(subject: Subject, model: PreTrainedModel) -> dict[str, Any]:
    """Numbers of f-grams and parameters; what only training needs is looked up where a table serves."""
    parameters = parameter_counts(model).to_dict()
    if subject.loaded.table is not None:
        parameters["training_only"] = measure.training_only_parameters(subject.path) or 0
    return {
        "parameters": parameters,
        "num_f_grams": getattr(model.config, "num_f_grams", None),
        "f_gram_model_parameters": f_gram_model_parameters(model.config),
    }


def kind_of(model: PreTrainedModel) -> str:
    """The model's input embedding in words."""
    if isinstance(model, OverEncodingForCausalLM):
        return "over-encoding"
    if not isinstance(model, SconeForCausalLM):
        return PLAIN
    parts = ["f-gram model"] if model.config.f_gram_model is not None else []
    return " + ".join(parts + (["learned rows"] if model.config.learned_rows else []))


def _perplexity(
    subject: Subject, file: TokenFile, window: int, config: BenchmarkConfig, settings: BenchmarkSettings
) -> dict[str, Any]:
    tokens = file.tokens[: settings.max_tokens]
    size = text_size(subject.tokenizer, tokens)
    return perplexity(
        subject.model,
        tokens,
        window,
        max(config.batch_sizes),
        matcher=getattr(subject.model, "matcher", None),
        num_bytes=size.num_bytes if size else None,
        num_words=size.num_words if size else None,
        separator_id=file.separator_id,
    ).to_dict()


def _texts(
    subject: Subject,
    datasets: Sequence[DatasetEntry],
    settings: BenchmarkSettings,
    missing: list[dict[str, str]],
    say: Callable[[str], None],
) -> dict[str, TokenFile]:
    """The token file of each data set that can be had."""
    found: dict[str, TokenFile] = {}
    for dataset in datasets:
        try:
            splits = prepare_corpus(
                dataset.dataset_name,
                subject.tokenizer,
                dataset_config_name=dataset.dataset_config_name,
                text_column=dataset.text_column,
                splits=(dataset.split,),
                cache_dir=settings.cache_dir,
            )
        except SconeError as error:
            missing.append({"what": f"{dataset.name} for {subject.name}", "why": str(error)})
            say(f"    {dataset.name} left out: {error}")
            continue
        found[dataset.name] = splits[dataset.split]
    return found


def batch_of(tokens: np.ndarray, batch_size: int, length: int) -> np.ndarray:
    """[B, T] int64 tokens from ``tokens``, begun again where they end."""
    return np.resize(np.asarray(tokens[: batch_size * length], dtype=np.int64), (batch_size, length))
