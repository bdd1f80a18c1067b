"""Compare models side by side: perplexity, prefill and decode speed, memory, parameters, FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import scone
from scone.data.prepare import prepare_corpus
from scone.evaluation import measure
from scone.evaluation.benchmark_config import BaselineEntry, BenchmarkConfig, DatasetEntry, ModelEntry
from scone.evaluation.perplexity import perplexity
from scone.evaluation.text_size import text_bytes
from scone.inference.loading import LoadedModel, device_of, load_model, position_limit
from scone.models.accounting import parameter_counts
from scone.tokenization.tokenizers import load_tokenizer
from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, write_json
from scone.utils.text import human_bytes, human_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 32
"""Decode speed is measured over this many tokens after the prompt."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """How to run, apart from what to measure."""

    device: str | None = None
    cache_dir: str | None = None
    max_tokens: int = 500_000
    placement: str = "ram"
    quantization: str | None = None
    seed: int = 42


@dataclass
class Subject:
    """A model that was loaded, with its tokenizer and its name in the results."""

    name: str
    kind: str
    loaded: LoadedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model


def run_benchmark(
    config: BenchmarkConfig, output_dir: Path, settings: BenchmarkSettings, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure every model of ``config``; write benchmark.json and benchmark.md to ``output_dir``; return what is in
    the JSON.

    What is missing (a model, a table, a data set) is named, listed under ``missing``, and the rest goes on.
    Raises SconeError when no model could be measured.
    """
    torch.manual_seed(settings.seed)
    missing: list[dict[str, str]] = []
    records = []
    for entry in config.entries:
        say(f"{entry.name}")
        try:
            subject = _load(entry, settings)
        except SconeError as error:
            missing.append({"what": entry.name, "why": str(error)})
            say(f"    left out: {error}")
            continue
        records.append(_measure(subject, entry, config, settings, missing, say))
    result = {
        "benchmark": "models",
        "scone_version": scone.__version__,
        "machine": measure.describe_machine(),
        "config": asdict(config),
        "settings": asdict(settings),
        "records": records,
        "missing": missing,
    }
    if not records:
        raise SconeError(
            f"nothing could be measured: {len(missing)} of {len(missing)} models are missing "
            f"(the first: {missing[0]['why']}); train them or change the paths in the configuration"
        )
    write_json(output_dir / "benchmark.json", result)
    with atomic_path(output_dir / "benchmark.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    return result


def _load(entry: ModelEntry | BaselineEntry, settings: BenchmarkSettings) -> Subject:
    if isinstance(entry, BaselineEntry):
        path, table, kind = entry.model_name, None, "plain"
    else:
        path, table = entry.model_path, entry.embedding_cache_path
        kind = "SCONE, table" if table else "SCONE, live"
    loaded = load_model(path, table, settings.placement, settings.device, settings.quantization)
    return Subject(entry.name, kind, loaded, load_tokenizer(path))


def _measure(
    subject: Subject,
    entry: ModelEntry | BaselineEntry,
    config: BenchmarkConfig,
    settings: BenchmarkSettings,
    missing: list[dict[str, str]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    model, table = subject.model, subject.loaded.table
    limit = position_limit(model)
    lengths = [length for length in config.sequence_lengths if limit is None or length <= limit]
    for length in sorted(set(config.sequence_lengths) - set(lengths)):
        missing.append({"what": f"{subject.name} at {length} tokens", "why": f"the model has {limit} positions"})
    window = max(lengths, default=limit or 512)
    texts = _texts(subject, config.dataset_configs, settings, missing, say)
    sample = next(iter(texts.values()), None)
    if sample is None:  # no text: any tokens will do for the speed, though fewer f-grams match
        sample = np.random.default_rng(settings.seed).integers(0, model.config.get_text_config().vocab_size, 1 << 16)
    record: dict[str, Any] = {
        "name": subject.name,
        "kind": subject.kind,
        "entry": asdict(entry),
        "parameters": parameter_counts(model).to_dict(),
        "resident_bytes": measure.resident_bytes(model),
        "table_bytes": table.num_rows * table.row_bytes if table is not None else 0,
        "process_bytes": measure.process_bytes(),
        "inference_flops_per_token": measure.inference_flops_per_token(model, _batch(sample, 1, window)[0]),
        "quantization": str(subject.loaded.quantization) if subject.loaded.quantization else None,
        "perplexity": {},
        "speed": [],
    }
    for name, tokens in texts.items():
        result = perplexity(
            model,
            tokens,
            window,
            max(config.batch_sizes),
            num_bytes=text_bytes(subject.tokenizer, tokens),
            matcher=getattr(model, "matcher", None),
        )
        record["perplexity"][name] = result.to_dict()
        say(f"    {name}: perplexity {result.perplexity:.3f} ({result.num_predicted:,} tokens)")
    for batch_size in config.batch_sizes:
        for length in lengths:
            speed = measure_speed(model, _batch(sample, batch_size, length), config.num_runs, config.warmup_runs)
            record["speed"].append({"batch_size": batch_size, "sequence_length": length} | speed)
            say(
                f"    batch {batch_size}, {length} tokens: prefill {speed['prefill_tokens_per_second']:,.0f} tokens/s, "
                f"decode {speed['decode_tokens_per_second']:,.0f} tokens/s"
            )
    device = device_of(model)
    record["peak_accelerator_bytes"] = measure.peak_memory_bytes(device) if device.type == "cuda" else None
    return record


def _texts(
    subject: Subject,
    datasets: Sequence[DatasetEntry],
    settings: BenchmarkSettings,
    missing: list[dict[str, str]],
    say: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """Tokens of each data set that can be had, at most ``max_tokens`` of each."""
    found: dict[str, np.ndarray] = {}
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
        found[dataset.name] = splits[dataset.split].tokens[: settings.max_tokens]
    return found


def _batch(tokens: np.ndarray, batch_size: int, length: int) -> np.ndarray:
    """[B, T] int64 tokens from ``tokens``, begun again where they end."""
    return np.resize(np.asarray(tokens[: batch_size * length], dtype=np.int64), (batch_size, length))


def measure_speed(model: PreTrainedModel, tokens: np.ndarray, num_runs: int, warmup_runs: int) -> dict[str, float]:
    """Median speeds on prompts ``tokens`` [B, T].

    ``prefill``: the forward pass that fills the cache, over B · T tokens. ``decode``: new tokens a second after it,
    greedy, over up to `NEW_TOKENS` steps that still fit the model's positions (the prompt is shortened by as many).
    """
    device = device_of(model)
    input_ids = torch.from_numpy(tokens).to(device)
    new_tokens = min(NEW_TOKENS, max(1, tokens.shape[1] // 2))
    prompt = input_ids[:, : max(1, tokens.shape[1] - new_tokens)]

    def prefill() -> None:
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=True, logits_to_keep=1)

    def generate() -> tuple[float, float]:
        """Seconds until the first new token, and of the rest."""
        times: list[float] = []

        def note(*_: Any) -> None:
            _wait(device)
            times.append(time.perf_counter())

        hook = model.register_forward_hook(note)
        started = time.perf_counter()
        model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        hook.remove()
        return times[0] - started, times[-1] - times[0]

    prefills, first, rest = [], [], []
    for run in range(warmup_runs + num_runs):
        seconds = _timed(prefill, device)
        until_first, after = generate()
        if run >= warmup_runs:
            prefills.append(seconds)
            first.append(until_first)
            rest.append(after)
    batch_size = tokens.shape[0]
    return {
        "prefill_tokens_per_second": tokens.size / median(prefills),
        "first_token_seconds": median(first),
        "decode_tokens_per_second": batch_size * (new_tokens - 1) / median(rest) if new_tokens > 1 else float("nan"),
    }


def _timed(work: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def markdown(result: dict[str, Any]) -> str:
    """The results as Markdown tables: quality and cost, then speeds; what is missing at the end."""
    records = result["records"]
    datasets = list(dict.fromkeys(name for record in records for name in record["perplexity"]))
    flops = [record["inference_flops_per_token"] for record in records]
    head = ["model", "kind", *datasets, "inference FLOPs/token", "parameters", "model", "table"]
    rows = [
        [
            record["name"],
            record["kind"],
            *(_perplexity_of(record, name) for name in datasets),
            f"{human_count(flop)} ({flop / flops[0]:.2f}×)",
            human_count(record["parameters"]["resident"]),
            human_bytes(record["resident_bytes"]),
            human_bytes(record["table_bytes"]) if record["table_bytes"] else "–",
        ]
        for record, flop in zip(records, flops, strict=True)
    ]
    speed_head = ["model", "batch", "tokens", "prefill tokens/s", "first token ms", "decode tokens/s"]
    speed_rows = [
        [
            record["name"],
            str(speed["batch_size"]),
            str(speed["sequence_length"]),
            f"{speed['prefill_tokens_per_second']:,.0f}",
            f"{1000 * speed['first_token_seconds']:,.1f}",
            f"{speed['decode_tokens_per_second']:,.0f}",
        ]
        for record in records
        for speed in record["speed"]
    ]
    machine = result["machine"]
    device = machine["accelerator"] or f"{machine['processor']}, {machine['num_threads']} threads"
    parts = [
        "# Benchmark",
        f"{device}, PyTorch {machine['torch']}.",
        "## Perplexity and cost",
        _table(head, rows),
        "## Speed",
        _table(speed_head, speed_rows),
    ]
    if result["missing"]:
        parts += ["## Missing", "\n".join(f"- {item['what']}: {item['why']}" for item in result["missing"])]
    return "\n\n".join(parts) + "\n"


def _perplexity_of(record: dict[str, Any], dataset: str) -> str:
    found = record["perplexity"].get(dataset)
    return "–" if found is None else f"{found['perplexity']:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
