"""Compare models side by side: the JSON that says which, then perplexity, speed, memory, parameters, FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf

from scone.configs.loading import load_yaml
from scone.data.prepare import prepare_corpus
from scone.evaluation.perplexity import perplexity, sizes_of
from scone.evaluation.report import OVER_ENCODING, PLAIN, STEM, RunResult, kind_of_parts, write_report
from scone.evaluation.speed import flops_per_token, measure_speed, training_only_parameters
from scone.inference.loading import LoadedModel, choose_device, load_model
from scone.inference.quantization import check_quantization, model_bytes
from scone.models.accounting import f_gram_model_parameters, parameter_counts
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.models.trunk import longest_sequence
from scone.tokenization.tokenizers import load_tokenizer
from scone.training.run_folder import OPTIONS_FILE
from scone.utils.environment import PeakMemory, environment
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scone.data.token_file import TokenFile
    from scone.tokenization.matcher import Matcher


@dataclass
class ModelEntry:
    """A SCONE model. ``f_gram_model_size`` and ``max_f_grams`` only describe it in the results."""

    name: str
    model_path: str
    embedding_cache_path: str | None = None
    f_gram_model_size: str | None = None
    max_f_grams: int | None = None


@dataclass
class BaselineEntry:
    """A plain causal language model, by folder or hub name."""

    name: str
    model_name: str


@dataclass
class DatasetEntry:
    """A split to measure perplexity on."""

    name: str
    dataset_name: str
    dataset_config_name: str | None = None
    text_column: str = "text"
    split: str = "test"


@dataclass
class BenchmarkConfig:
    """The whole file. Speeds are medians of ``num_runs`` runs after ``warmup_runs``."""

    model_configs: list[ModelEntry] = field(default_factory=list)
    baseline_configs: list[BaselineEntry] = field(default_factory=list)
    dataset_configs: list[DatasetEntry] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 8])
    sequence_lengths: list[int] = field(default_factory=lambda: [512, 1024])
    num_runs: int = 5
    warmup_runs: int = 2

    @property
    def entries(self) -> list[ModelEntry | BaselineEntry]:
        """All models, then all baselines."""
        return [*self.model_configs, *self.baseline_configs]


def read_benchmark_config(path: str | Path) -> BenchmarkConfig:
    """Read and check the file. Raises SconeError: missing, not JSON, unknown or missing names, wrong values."""
    found = read_json(path)
    with library_refusal(f"cannot use {path}", "compare it with scone/configs/benchmark_config.json"):
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), found))
    for name in ("batch_sizes", "sequence_lengths", "num_runs"):
        if not all(value >= 1 for value in np.atleast_1d(getattr(config, name)).tolist()) or config.warmup_runs < 0:
            raise SconeError(f"{path}: found {name} {getattr(config, name)}; expected at least 1 (warmup_runs: 0)")
    if not config.entries:
        raise SconeError(f"{path}: found no models; expected entries in model_configs or baseline_configs")
    names = [entry.name for entry in config.entries]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SconeError(f"{path}: found the name {repeated[0]} twice; expected a name of its own for every model")
    return cast(BenchmarkConfig, config)


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


def run_benchmark(
    config: BenchmarkConfig, output_dir: Path, settings: BenchmarkSettings, say: Callable[[str], None] = print
) -> list[RunResult]:
    """Measure every model of ``config``; write the report (`write_report`) to ``output_dir``; return the results.

    The report is written after each model, and lists those to come as missing: one that is stopped keeps what it has.
    What is missing (a model, a data set) is named, listed in the report, and the rest goes on; a SCONE model whose
    table is missing is measured live.
    Raises SconeError when no model could be measured.
    """
    benchmark = Benchmark(config, settings, say)
    facts = {
        "machine": environment(),
        "config": asdict(config),
        "settings": asdict(settings),
        "notes": _notes(config, settings),
    }

    def keep(results: list[RunResult], to_come: Sequence[str]) -> None:
        left = [{"what": name, "why": "not measured yet"} for name in to_come]
        write_report(results, output_dir, facts=facts, missing=benchmark.missing + left)

    return benchmark.run(keep)


def _notes(config: BenchmarkConfig, settings: BenchmarkSettings) -> list[str]:
    """How it was measured, in sentences, for whoever reads the report without us."""
    return [
        f"Perplexity: the first {settings.max_tokens:,} tokens of each data set in windows of the longest sequence "
        "length that the model has positions for, without overlap; the first token of a window is not predicted. "
        "Intervals: 95 %, normal over documents (another sample of texts, not another training run).",
        "Perplexities per token compare models of one tokenizer only; across tokenizers compare bits per byte "
        f"({STEM}.json).",
        f"Speed: medians of {config.num_runs} runs after {config.warmup_runs} that do not count, models one after the "
        "other. Prefill is one forward pass over the whole prompt; decoding is greedy, as generate does it.",
        "FLOPs: a multiply-add is two; matrix products and attention over all pairs of positions, output head "
        "included. Training FLOPs per token count forward and backward of trunk and f-gram model on a batch of this "
        "text, whose f-grams share their prefixes.",
        "Memory: the process's peak holds libraries and everything else too; the table's pages in RAM are part of it.",
    ]


@dataclass
class Benchmark:
    """Measures models one after the other and keeps account of what is missing.

    ``matcher`` groups the losses of all models by the same f-grams, plain ones too (None: by each model's own).
    """

    config: BenchmarkConfig
    settings: BenchmarkSettings
    say: Callable[[str], None] = print
    matcher: Matcher | None = None
    missing: list[dict[str, str]] = field(default_factory=list)

    def run(self, keep: Callable[[list[RunResult], Sequence[str]], None] = lambda *_: None) -> list[RunResult]:
        """A result for every model that can be measured; ``keep`` gets, after each, all so far and the names of models
        to come. Raises SconeError when there is none.
        """
        torch.manual_seed(self.settings.seed)
        results: list[RunResult] = []
        for form in self.settings.quantizations:
            check_quantization(form)
        forms: tuple[str | None, ...] = (None, *self.settings.quantizations)
        wanted = [
            (entry if form is None else replace(entry, name=f"{entry.name} {form}"), form)
            for entry, form in product(self.config.entries, forms)
        ]
        for place, (entry, quantization) in enumerate(wanted, start=1):
            self.say(f"{entry.name}")
            try:
                results.append(self._measured(entry, quantization))
            except SconeError as error:
                self._leave_out(entry.name, str(error))
            except torch.OutOfMemoryError:
                self._leave_out(entry.name, "the accelerator's memory is too small for it")
            if results:
                keep(results, [later.name for later, _ in wanted[place:]])
        if not results:
            raise SconeError(
                f"nothing could be measured: {len(self.missing)} of {len(self.missing)} models are missing "
                f"(the first: {self.missing[0]['why']}); train them or change the paths in the configuration"
            )
        return results

    def _leave_out(self, what: str, why: str) -> None:
        self.missing.append({"what": what, "why": why})
        self.say(f"    {what} left out: {why}")

    def _measured(self, entry: ModelEntry | BaselineEntry, quantization: str | None) -> RunResult:
        """Load one model and measure everything; nothing of it stays in memory. Raises SconeError if it cannot be."""
        with PeakMemory(choose_device(self.settings.device)) as peak:
            result = self._measure(entry, self._load(entry, quantization))
        result.peak_process_bytes, result.peak_accelerator_bytes = peak.process_bytes, peak.accelerator_bytes
        return result

    def _load(self, entry: ModelEntry | BaselineEntry, quantization: str | None) -> LoadedModel:
        """Raises SconeError where the model is missing; one whose table is missing is measured live."""
        path, table = _path_of(entry), getattr(entry, "embedding_cache_path", None)
        if table is not None and not Path(table).exists() and Path(path).is_dir():
            how = f"make it with scone precompute --model_path {path} --output_path {table}"
            why = f"found no file {table}; the model is measured with its f-gram model running live; {how}"
            self._leave_out(f"the table of {entry.name}", why)
            table = None
        return load_model(path, table, self.settings.placement, self.settings.device, quantization)

    def _texts(self, name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenFile]:
        """The token file of each data set that can be had."""
        found: dict[str, TokenFile] = {}
        for dataset in self.config.dataset_configs:
            try:
                found[dataset.name] = prepare_corpus(
                    dataset.dataset_name,
                    tokenizer,
                    dataset_config_name=dataset.dataset_config_name,
                    text_column=dataset.text_column,
                    splits=(dataset.split,),
                    cache_dir=self.settings.cache_dir,
                )[dataset.split]
            except SconeError as error:
                self._leave_out(f"{dataset.name} for {name}", str(error))
        return found

    def _measure(self, entry: ModelEntry | BaselineEntry, loaded: LoadedModel) -> RunResult:
        model, config, tokenizer = loaded.model, self.config, load_tokenizer(_path_of(entry))
        texts = self._texts(entry.name, tokenizer)
        limit, vocab_size = longest_sequence(model.config), model.config.get_text_config().vocab_size
        lengths = [length for length in config.sequence_lengths if limit is None or length <= limit]
        for length in sorted(set(config.sequence_lengths) - set(lengths)):
            self._leave_out(f"{entry.name} at {length} tokens", f"the model has {limit} positions")
        window = max(lengths, default=limit or 512)
        # without a text any tokens will do for the speed, though fewer f-grams match
        sample = np.random.default_rng(self.settings.seed).integers(0, vocab_size, 1 << 16)
        sample = next((text.tokens for text in texts.values()), sample)
        result = _sized(entry, loaded)
        flops = flops_per_token(model, batch_of(sample, max(config.batch_sizes), window), _had_frozen_trunk(entry))
        result.inference_flops_per_token = flops.pop("inference_flops_per_token")
        result.training_flops_per_token = flops.pop("training_flops_per_token")
        result.facts |= flops
        for name, file in texts.items():
            tokens = file.tokens[: self.settings.max_tokens]
            found = perplexity(
                model,
                tokens,
                window,
                max(config.batch_sizes),
                matcher=self.matcher or getattr(model, "matcher", None),
                separator_id=file.separator_id,
                **sizes_of(tokenizer, tokens),
            )
            result.perplexity[name] = found.to_dict() | {"window_losses": found.window_losses}
            self.say(f"    {name}: perplexity {found.perplexity:.3f} ({found.num_predicted:,} tokens)")
        for batch_size, length in product(config.batch_sizes, lengths):
            speed = measure_speed(model, batch_of(sample, batch_size, length), config.num_runs, config.warmup_runs)
            result.speed.append({"batch_size": batch_size, "sequence_length": length} | speed)
            rates = {kind: speed.get(f"{kind}_tokens_per_second") for kind in ("prefill", "decode")}
            shown = ", ".join(f"{kind} {rate:,.0f} tokens/s" for kind, rate in rates.items() if rate)
            self.say(f"    batch {batch_size}, {length} tokens: {shown}")
        return result


def _path_of(entry: ModelEntry | BaselineEntry) -> str:
    return entry.model_name if isinstance(entry, BaselineEntry) else entry.model_path


def _had_frozen_trunk(entry: ModelEntry | BaselineEntry) -> bool:
    """Whether its trunk was left as it was in training, which the options beside a model of ours say."""
    options = Path(_path_of(entry)) / OPTIONS_FILE
    return options.is_file() and bool((load_yaml(options).get("training") or {}).get("freeze_trunk"))


def _sized(entry: ModelEntry | BaselineEntry, loaded: LoadedModel) -> RunResult:
    """What is known before anything runs; what only training needs is looked up where a table serves."""
    model, table, parameters = loaded.model, loaded.table, parameter_counts(loaded.model).to_dict()
    facts: dict[str, Any] = {"entry": asdict(entry)}
    result = RunResult(
        entry.name,
        kind_of(model),
        num_f_grams=getattr(model.config, "num_f_grams", None),
        f_gram_model_parameters=f_gram_model_parameters(model.config),
        f_gram_model_size=getattr(entry, "f_gram_model_size", None),
        parameters=parameters,
        resident_bytes=model_bytes(model),
        facts=facts,
    )
    if table is not None:
        parameters["training_only"] = training_only_parameters(_path_of(entry)) or 0
        result.table_bytes = table.num_rows * table.row_bytes
        result.table_memory_bytes = table.memory.ram + table.memory.mapped
    if isinstance(model, SconeForCausalLM):
        facts["served"] = "live" if table is None else "table"
    if loaded.quantization:
        facts["quantization"] = str(loaded.quantization)
    return result


def kind_of(model: PreTrainedModel) -> str:
    """The model's input embedding in words."""
    if isinstance(model, OverEncodingForCausalLM):
        return OVER_ENCODING
    if not isinstance(model, SconeForCausalLM):
        return PLAIN
    return kind_of_parts(model.config.f_gram_model is not None, bool(model.config.learned_rows))


def batch_of(tokens: np.ndarray, batch_size: int, length: int) -> np.ndarray:
    """[B, T] int64 tokens from ``tokens``, begun again where they end."""
    return np.resize(np.asarray(tokens[: batch_size * length], dtype=np.int64), (batch_size, length))
