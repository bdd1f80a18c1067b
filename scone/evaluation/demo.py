"""The whole method on one corpus: train plain and SCONE alike, precompute, benchmark both, generate, report."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import scone
from scone.configs.loading import Layer, merge
from scone.configs.presets import MODERN_TRUNK
from scone.configs.schema import SconeOptions
from scone.data.prepare import prepare_corpus
from scone.data.sources import STDLIB
from scone.data.token_file import TokenFile
from scone.evaluation.benchmark import (
    BaselineEntry,
    Benchmark,
    BenchmarkConfig,
    BenchmarkSettings,
    DatasetEntry,
    ModelEntry,
)
from scone.evaluation.demo_page import NAMES, render_demo, summary
from scone.evaluation.perplexity import paired_difference
from scone.evaluation.report import RunResult, write_text
from scone.evaluation.sweep import train_or_resume
from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.loading import load_model
from scone.inference.precompute import precompute_table
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.training.run import TRAINING_LOG_FILE, Corpus, prepare_run_corpus
from scone.training.run_folder import FINAL_MODEL
from scone.utils.environment import environment
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of, read_json, write_json
from scone.utils.text import human_bytes, human_count

TEXT = "held-out text"
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 96}
STDLIB_IN_WORDS = "the Python standard library's sources"
NUM_SAMPLES, PROMPT_TOKENS, NUM_EXAMPLES = 3, 24, 9
STEP_SECONDS_FILE = "step_seconds.json"
MAX_EVAL_TOKENS = 65_536
"""Validation text that a training reads each time: its cost must not depend on the corpus."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does, and how large. The sizes were chosen by experiment (docs/experiments/demo.md)."""

    data: str = STDLIB
    text_column: str = "text"
    output_dir: str = "demo"
    steps: int = 420
    batch_size: int = 16
    max_length: int = 256
    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 3
    max_n: int = 4
    max_f_grams: int = 300_000
    seed: int = 42
    max_test_tokens: int = 200_000


QUICK = {"steps": 60, "batch_size": 8, "vocab_size": 2048, "max_f_grams": 50_000, "max_test_tokens": 20_000}
"""What ``--quick`` changes: every step in about a minute; too short for the gain to be large."""


def model_options(options: DemoOptions, name: str, key: str = "") -> SconeOptions:
    """What `scone train` makes of the modern trunk's recipe and the demo's sizes. The two trainings differ in the input
    embedding and the folder only.
    """
    folder = Path(options.output_dir)
    values = {
        "data.dataset_name": options.data,
        "data.text_column": options.text_column,
        "data.max_length": options.max_length,
        "data.max_n": options.max_n,
        "data.max_f_grams": options.max_f_grams,
        "data.cache_dir": str(folder / "cache"),
        "data.num_workers": 0,
        "model.base_model_name": MODERN_TRUNK,
        "model.hidden_size": options.hidden_size,
        "model.num_hidden_layers": options.num_hidden_layers,
        "model.tokenizer": "train",
        "model.vocab_size": options.vocab_size,
        "model.use_f_gram_embeddings": name == "scone",
        "model.learned_rows": options.max_f_grams,
        "training.output_dir": str(folder / f"{name}-{key}"),
        "training.max_steps": options.steps,
        "training.batch_size": options.batch_size,
        "training.warmup_steps": max(1, options.steps // 12),
        "training.logging_steps": max(1, options.steps // 40),
        "training.eval_steps": max(1, options.steps // 4),
        "training.max_eval_tokens": MAX_EVAL_TOKENS,
        "training.save_steps": -(-options.steps // 2),  # a demo that is stopped goes on from here
        "training.save_total_limit": 1,
        "training.seed": options.seed,
        "training.device": "cpu",
        "training.report_to": "none",
    }
    return merge([Layer("the demo", values)])[0]


def run_demo(options: DemoOptions, say: Callable[[str], None] = print) -> Path:
    """Run every step and return the path of report.html. What an earlier run with the same options and text finished is
    used again.

    Raises SconeError: bad corpus, a folder that holds something else, a corpus too small to train on.
    """

    @contextmanager
    def step(name: str) -> Iterator[list[str]]:
        """Print a step, its time, and what was appended to the list."""
        say(f"{name} …")
        notes: list[str] = []
        before = time.perf_counter()
        yield notes
        say(f"    {'; '.join(notes)}  [{time.perf_counter() - before:.1f} s]")

    started, folder = time.perf_counter(), Path(options.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "cache").is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:3])
        raise SconeError(
            f"{folder} holds something else (found {found}); expected an empty folder or an earlier demo's; choose "
            "another --output_dir"
        )
    say(f"SCONE demo: {options.data} → {folder}/")
    with step("Tokens: train a tokenizer, encode the corpus") as notes:
        data = model_options(options, "scone").data
        corpus = prepare_run_corpus(model_options(options, "scone"), quiet=True)
        source: dict[str, Any] = {"text_column": options.text_column, "cache_dir": data.cache_dir}
        wanted = ("train", "validation", "test")
        splits = prepare_corpus(options.data, corpus.tokenizer, splits=wanted, quiet=True, **source)
        notes.append(", ".join(f"{name} {human_count(file.num_tokens)}" for name, file in splits.items()) + " tokens")
    runs, logs = {}, {}
    for name, title in NAMES.items():
        # trainings with other options or on other text have folders of their own
        of_all = asdict(model_options(replace(options, output_dir=""), name))
        key = fingerprint_of(json.dumps(of_all | {"given": None}, sort_keys=True), corpus.train.fingerprint)[:8]
        run = model_options(options, name, key)
        runs[name] = Path(run.training.output_dir)
        size = f"{options.batch_size} × {options.max_length} tokens"
        with step(f"Train {title}: {options.steps} steps of {size}") as notes:
            if (runs[name] / TRAINING_LOG_FILE).is_file():
                notes.append("finished before, used again")
            else:
                progress = ProgressLines(say, options.steps, runs[name] / STEP_SECONDS_FILE)
                train_or_resume(run, quiet=True, callbacks=[progress])
            logs[name] = read_json(runs[name] / TRAINING_LOG_FILE)
            if (runs[name] / STEP_SECONDS_FILE).is_file():
                logs[name] |= read_json(runs[name] / STEP_SECONDS_FILE)
            notes.append(f"validation loss {logs[name]['final']['eval_loss']:.4f}")
    table_path = folder / "embeddings.cache"
    with step("Table: sum the learned rows of every f-gram") as notes:
        live: Any = load_model(runs["scone"] / FINAL_MODEL, device="cpu").model
        precompute_table(live, table_path, quiet=True)
        notes.append(f"{live.vocabulary.num_f_grams:,} rows, {human_bytes(table_path.stat().st_size)}")
    with step("Benchmark both on held-out text, SCONE from its table") as notes:
        config = BenchmarkConfig(
            [ModelEntry("scone", str(runs["scone"] / FINAL_MODEL), str(table_path))],
            [BaselineEntry("plain", str(runs["plain"] / FINAL_MODEL))],
            [DatasetEntry(TEXT, options.data, None, options.text_column, "test")],
            batch_sizes=[1],
            sequence_lengths=[options.max_length],
            num_runs=3,
            warmup_runs=1,
        )
        settings = BenchmarkSettings("cpu", data.cache_dir, options.max_test_tokens, seed=options.seed)
        benchmark = Benchmark(config, settings, lambda line: None, live.matcher)
        results = {result.name: result for result in benchmark.run()}
        windows = [results[name].perplexity[TEXT]["window_losses"] for name in NAMES]
        difference, interval = paired_difference(*windows)
        notes += [f"{NAMES[name]}: perplexity {results[name].perplexity[TEXT]['perplexity']:.3f}" for name in NAMES]
    with step("Generate from both") as notes:
        samples = _generate_both(options, runs, table_path, splits["test"])
        notes.append(f"{len(samples)} prompts")
    recipe = model_options(options, "scone").training
    report: dict[str, Any] = {
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "scone_version": scone.__version__,
        "machine": environment(),
        "options": asdict(options),
        "sampling": SAMPLING,
        "corpus": {
            "name": STDLIB_IN_WORDS if options.data == STDLIB else options.data,
            "num_documents": sum(split.num_documents for split in splits.values()),
            "tokens": {split: file.num_tokens for split, file in splits.items()},
            "tokenizer": f"a byte-level BPE of {len(corpus.tokenizer):,} tokens trained on the training text",
        },
        "training": {
            "tokens": options.steps * options.batch_size * options.max_length,
            **{name: getattr(recipe, name) for name in ("optimizer", "learning_rate", "lr_scheduler_type")},
        },
        "table_bytes": table_path.stat().st_size,
        "comparison": {
            "loss_difference": difference,
            "loss_difference_interval": interval,
            "num_windows": len(windows[0]),
        },
        "samples": samples,
        "models": {name: _model_facts(results[name], logs[name]) for name in NAMES},
        "f_grams": _f_gram_facts(live.vocabulary, corpus),
        "total_seconds": time.perf_counter() - started,
    }
    write_json(folder / "report.json", report)
    page = folder / "report.html"
    write_text(page, render_demo(report))
    say("\n" + summary(report))
    return page


class ProgressLines(TrainerCallback):
    """Says where a training is, eight times in all, and writes the median seconds of a step to ``step_seconds``.

    From the end of a step to that of the next, so that reading and matching are in it. Evaluations, and what the first
    step compiles (14 s for rows on a new machine, beside 18 s of training with --quick), are not.
    """

    def __init__(self, say: Callable[[str], None], num_steps: int, step_seconds: Path) -> None:
        self.say = say
        self.every = max(1, num_steps // 8)
        self.next = self.every
        self.step_seconds, self._ends = step_seconds, list[float]()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._ends.append(time.perf_counter())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = [end - begin for begin, end in itertools.pairwise(self._ends)]
        if seconds:
            write_json(self.step_seconds, {"step_seconds": statistics.median(seconds)})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """A line with the loss of the last steps."""
        if "loss" in logs and state.global_step >= self.next:
            self.next = state.global_step + self.every
            self.say(f"    step {state.global_step:>5}/{state.max_steps}  loss {float(logs['loss']):.3f}")


def _generate_both(
    options: DemoOptions, runs: Mapping[str, Path], table: Path, test: TokenFile
) -> list[dict[str, str]]:
    """Continuations by both models of the openings of a few held-out documents, spread over the split."""
    ends = np.flatnonzero(np.asarray(test.tokens) == test.separator_id)
    starts = np.concatenate([[0], ends[:-1] + 1])
    starts = starts[ends - starts >= 2 * PROMPT_TOKENS] if (ends - starts).max() >= 2 * PROMPT_TOKENS else starts[:1]
    chosen = starts[np.linspace(0, len(starts) - 1, min(NUM_SAMPLES, len(starts))).astype(int)]
    engines = {
        name: SconeInferenceEngine.from_pretrained(run / FINAL_MODEL, table if name == "scone" else None, device="cpu")
        for name, run in runs.items()
    }
    decode = engines["plain"].tokenizer.decode
    prompts = [str(decode(np.asarray(test.tokens[start : start + PROMPT_TOKENS]))) for start in chosen]
    room = options.max_length - PROMPT_TOKENS - 8  # a prompt may encode to a few more tokens than it was cut from
    sampled = GenerationOptions(
        max_new_tokens=min(int(SAMPLING["max_new_tokens"]), room),
        do_sample=True,
        temperature=SAMPLING["temperature"],
        top_p=SAMPLING["top_p"],
        seed=options.seed,
    )
    texts = {name: engine.generate(prompts, sampled)[0] for name, engine in engines.items()}
    return [
        {"prompt": prompt} | {name: texts[name][index].texts[0] for name in runs}
        for index, prompt in enumerate(prompts)
    ]


def _model_facts(result: RunResult, log: Mapping[str, Any]) -> dict[str, Any]:
    """Costs and quality of a model: served as benchmarked, trained as its log says."""
    found = result.to_dict()

    def curve(loss: str) -> list[list[float]]:
        return [[entry["step"] * log["tokens_per_step"], entry[loss]] for entry in log["log"] if loss in entry]

    return {
        "evaluation": found["perplexity"][TEXT],
        "resident_parameters": found["parameters"]["resident"],
        "trained_parameters": log["parameters"]["resident"] + log["parameters"]["training_only"],
        "inference_flops_per_token": result.inference_flops_per_token,
        "training_flops_per_token": log["cost"]["training_flops_per_token"],
        "training_seconds": log["steps"] * log["step_seconds"] if "step_seconds" in log else log["train_seconds"],
        "steps": log["steps"],
        "generation_tokens_per_second": result.speed[0]["decode_tokens_per_second"],
        "training_curve": curve("loss"),
        "validation_curve": curve("eval_loss"),
    }


def _f_gram_facts(vocabulary: FGramVocabulary, corpus: Corpus) -> dict[str, Any]:
    """How many f-grams, and examples by rank: evenly on a logarithmic scale, from the first to the last."""
    total = vocabulary.num_f_grams
    examples = []
    for rank in sorted({int(rank) - 1 for rank in np.geomspace(1, total, num=min(NUM_EXAMPLES, total))}):
        tokens = vocabulary.tokens(vocabulary.vocab_size + rank)
        text = str(corpus.tokenizer.decode(list(tokens)))
        text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
        examples.append([text, len(tokens), rank + 1, int(vocabulary.counts[rank])])
    facts = {"num_f_grams": total, "max_n": vocabulary.max_n, "ranking": vocabulary.ranking}
    return facts | {"min_count": int(vocabulary.counts.min()), "examples": examples}
