"""The whole method on one corpus: train plain and SCONE alike, precompute, benchmark both, generate, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import scone
from scone.configs.schema import SconeOptions
from scone.data.prepare import prepare_corpus
from scone.data.token_file import TokenFile
from scone.evaluation.benchmark import (
    BaselineEntry,
    Benchmark,
    BenchmarkConfig,
    BenchmarkSettings,
    DatasetEntry,
    ModelEntry,
)
from scone.evaluation.demo_options import DemoOptions, model_options
from scone.evaluation.demo_page import render_demo, summary
from scone.evaluation.perplexity import paired_difference, perplexity
from scone.evaluation.report import write_text
from scone.evaluation.results import RunResult
from scone.evaluation.sweep import train_or_resume
from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.loading import load_model
from scone.inference.precompute import precompute_table
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.inspection import match_statistics
from scone.tokenization.matcher import Matcher
from scone.tokenization.tokenizers import vocabulary_size
from scone.training.run import (
    TRAINING_LOG_FILE,
    Corpus,
    build_model,
    build_trainer,
    prepare_run_corpus,
    run_vocabulary,
)
from scone.training.run_folder import FINAL_MODEL, OPTIONS_FILE
from scone.utils.environment import environment
from scone.utils.errors import SconeError
from scone.utils.files import read_json, write_json
from scone.utils.text import human_bytes, human_count

NAMES = {"plain": "plain", "scone": "SCONE"}
TABLE_FILE, PLAN_FILE, TEXT = "embeddings.cache", "plan.json", "held-out text"
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 96}
STDLIB = (
    "the Python standard library's sources",
    "the sources of the running Python's standard library, without tests",
)
NUM_SAMPLES, PROMPT_TOKENS, NUM_EXAMPLES = 3, 24, 9
LIVE_CHECK_TOKENS = 16_384
MIN_STEPS = 20
TIMED_STEPS = 8
TRAINING_SHARE = 0.72  # of the minutes; the rest is counting, evaluating, precomputing, measuring


@dataclass
class DemoRun:
    """A run in progress: its folder, the times of its steps, where lines are printed."""

    options: DemoOptions
    say: Callable[[str], None]
    started: float = field(default_factory=time.perf_counter)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step and print it; what is appended to the list is printed and reported beside it."""
        self.say(f"{name} …")
        notes: list[str] = []
        started = time.perf_counter()
        yield notes
        seconds = time.perf_counter() - started
        self.steps.append({"name": name, "seconds": seconds, "note": "; ".join(notes)})
        self.say(f"    {'; '.join(notes)}  [{seconds:.1f} s]")


def run_demo(options: DemoOptions, say: Callable[[str], None] = print) -> Path:
    """Run every step and return the path of report.html; what an earlier run with the same options finished is used
    again.

    Raises SconeError: bad corpus, a folder that holds something else, a corpus too small to train on.
    """
    run = DemoRun(options, say)
    _claim_folder(run.folder)
    say(f"SCONE demo: {options.data} → {run.folder}/")
    with run.step("Tokens: train a tokenizer, encode the corpus") as notes:
        corpus = prepare_run_corpus(model_options(options, "scone"), quiet=True)
        splits = _prepare_splits(options, corpus)
        notes.append(", ".join(f"{name} {human_count(file.num_tokens)}" for name, file in splits.items()) + " tokens")
    with run.step("f-grams: count every n-gram, keep the most frequent") as notes:
        size = vocabulary_size(corpus.tokenizer)
        vocabulary = run_vocabulary(model_options(options, "scone"), corpus, size, quiet=True)
        notes.append(f"{vocabulary.num_f_grams:,} f-grams of 2 to {options.max_n} tokens")
    run.options, seconds_a_step = _fit_into_minutes(run, corpus)
    logs = {name: _train_one(run, name) for name in NAMES}
    with run.step("Table: sum the learned rows of every f-gram") as notes:
        table_path = run.folder / TABLE_FILE
        live: Any = load_model(run.folder / "scone" / FINAL_MODEL, device="cpu").model
        precompute_table(live, table_path, quiet=True)
        notes.append(f"{live.vocabulary.num_f_grams:,} rows, {human_bytes(table_path.stat().st_size)}")
    with run.step("Benchmark both on held-out text, SCONE from its table") as notes:
        results = _benchmark(run, live.matcher)
        notes += [f"{NAMES[name]}: perplexity {results[name].perplexity[TEXT]['perplexity']:.3f}" for name in NAMES]
    with run.step("Check: the table against the live model") as notes:
        comparison = _comparison(run, results, live, splits["test"])
        notes.append(f"largest difference of a window's loss {comparison['table_against_live']:.1e} nats")
    with run.step("Generate from both") as notes:
        samples = _generate_both(run, splits["test"])
        notes.append(f"{len(samples)} prompts")
    source = STDLIB if options.data == "python-stdlib" else (options.data,)
    report: dict[str, Any] = {
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "scone_version": scone.__version__,
        "machine": environment(),
        "options": asdict(run.options),
        "sampling": SAMPLING,
        "corpus": {
            "name": source[0],
            "description": source[-1],
            "num_documents": sum(split.num_documents for split in splits.values()),
            "tokens": {split: file.num_tokens for split, file in splits.items()},
            "tokenizer": f"a byte-level BPE of {len(corpus.tokenizer):,} tokens trained on the training text",
        },
        "training": _training_facts(run.options),
        "table": {
            "num_rows": vocabulary.num_f_grams,
            "width": options.hidden_size,
            "file_bytes": table_path.stat().st_size,
        },
        "comparison": comparison,
        "samples": samples,
        "models": {name: _model_facts(results[name], logs[name], seconds_a_step[name]) for name in NAMES},
        "f_grams": _f_gram_facts(vocabulary, corpus, splits["test"].tokens[: options.max_test_tokens]),
        "steps": run.steps,
        "total_seconds": time.perf_counter() - run.started,
    }
    write_json(run.folder / "report.json", report)
    page = run.folder / "report.html"
    write_text(page, render_demo(report))
    say("\n" + summary(report))
    return page


def _claim_folder(folder: Path) -> None:
    """Make sure that the folder is ours to write to: new, empty, or an earlier demo's. Raises SconeError."""
    if folder.exists() and not folder.is_dir():
        raise SconeError(f"found a file at {folder}; expected a folder; choose another --output_dir")
    known = {"cache", *NAMES, TABLE_FILE, PLAN_FILE, "report.json", "report.html"}
    foreign = [path.name for path in folder.iterdir() if path.name not in known] if folder.is_dir() else []
    foreign = [name for name in foreign if not name.startswith(".")]  # unfinished files of an interrupted step
    if foreign:
        raise SconeError(
            f"{folder} holds something else (found {', '.join(sorted(foreign)[:3])}); expected an empty folder or an "
            "earlier demo's; choose another --output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _prepare_splits(options: DemoOptions, corpus: Corpus) -> dict[str, TokenFile]:
    """The token files of train, validation and test. Raises SconeError when there is too little text to train on."""
    splits = prepare_corpus(
        options.data,
        corpus.tokenizer,
        text_column=options.text_column,
        splits=("train", "validation", "test"),
        cache_dir=model_options(options, "scone").data.cache_dir,
        quiet=True,
    )
    needed = {"train": options.batch_size * options.max_length, "test": 2 * options.max_length}
    for name, tokens in needed.items():
        if splits[name].num_tokens < tokens:
            raise SconeError(
                f"found {splits[name].num_tokens:,} {name} tokens in {options.data}; expected at least {tokens:,}; "
                "give more text"
            )
    return splits


def _fit_into_minutes(run: DemoRun, corpus: Corpus) -> tuple[DemoOptions, dict[str, float]]:
    """The options with as many steps as fit into the minutes on this machine, at most those asked for; and the seconds
    that a step of each of the two takes.

    Decided once and kept in plan.json, so that a second run finds the trainings that the first one finished. What was
    trained with other options or on other text is removed.
    """
    asked = run.options
    same = replace(asked, output_dir="", max_test_tokens=0)
    recipe = asdict(model_options(same, "scone").training)  # of the trunk, which another version may change
    key = asdict(same) | {"recipe": recipe, "corpus": corpus.train.fingerprint}
    plan_path = run.folder / PLAN_FILE
    plan: dict[str, Any] = read_json(plan_path) if plan_path.is_file() else {}
    if plan.get("key") != key:
        for name in NAMES:
            if (run.folder / name).exists():
                run.say(f"{NAMES[name]} was trained with other options or on other text: training again")
                shutil.rmtree(run.folder / name)
        with run.step("Plan: time a few training steps of both in turn") as notes:
            seconds = _seconds_of_a_step(asked, corpus)
            steps = plan_steps(asked, sum(seconds.values()))
            notes.append(", ".join(f"{NAMES[name]} {seconds[name]:.3f} s a step" for name in NAMES))
            notes.append(f"{steps} steps each")
            if steps < asked.steps:
                notes.append(f"fewer than {asked.steps}, to end in {asked.minutes:g} minutes")
        plan = {"key": key, "steps": steps, "seconds_a_step": seconds}
        write_json(plan_path, plan)
    return replace(asked, steps=plan["steps"]), plan["seconds_a_step"]


def plan_steps(asked: DemoOptions, seconds_of_both: float) -> int:
    """How many steps fit into ``asked.minutes``. ``seconds_of_both``: of a step of one and a step of the other."""
    affordable = int(60 * asked.minutes * TRAINING_SHARE / seconds_of_both)
    return max(min(MIN_STEPS, asked.steps), min(asked.steps, affordable))


def _seconds_of_a_step(options: DemoOptions, corpus: Corpus) -> dict[str, float]:
    """Median time of a whole training step, batch included, of each of the two. They take turns: what else the machine
    does hits both alike.
    """
    steps = {name: _steps_of_a_training(model_options(options, name), corpus) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(TIMED_STEPS + 2):  # the first ones warm up
        for name, of_one in steps.items():
            started = time.perf_counter()
            next(of_one)
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(found[2:])) for name, found in seconds.items()}


def _steps_of_a_training(options: SconeOptions, corpus: Corpus) -> Iterator[None]:
    """The steps of the training that ``options`` describe, one at a ``next``; nothing of it is kept."""
    model = build_model(options, corpus, quiet=True)
    trainer = build_trainer(options, model, corpus, quiet=True)
    optimizer = trainer.create_optimizer()
    model.train()
    while True:
        for batch in trainer.get_train_dataloader():
            trainer.compute_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield


def _train_one(run: DemoRun, name: str) -> dict[str, Any]:
    """Train one of the two, go on with an interrupted run, or use a finished one; returns its training log."""
    options = model_options(run.options, name)
    folder = Path(options.training.output_dir)
    if folder.is_dir() and not (folder / OPTIONS_FILE).is_file():
        shutil.rmtree(folder)  # stopped before its first line was written
    size = f"{options.training.batch_size} × {options.data.max_length} tokens"
    with run.step(f"Train {NAMES[name]}: {run.options.steps} steps of {size}") as notes:
        if (folder / TRAINING_LOG_FILE).is_file():
            notes.append("finished before, used again")
        else:
            train_or_resume(options, quiet=True, callbacks=[ProgressLines(run.say, run.options.steps)])
        log: dict[str, Any] = read_json(folder / TRAINING_LOG_FILE)
        speed = log["steps"] * log["tokens_per_step"] / log["train_seconds"]
        notes.append(f"validation loss {log['final']['eval_loss']:.4f}, {human_count(speed)} tokens/s")
    return log


class ProgressLines(TrainerCallback):
    """Says where a training is, eight times in all."""

    def __init__(self, say: Callable[[str], None], num_steps: int) -> None:
        self.say = say
        self.every = max(1, num_steps // 8)
        self.next = self.every

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """A line with the loss of the last steps."""
        if "loss" in logs and state.global_step >= self.next:
            self.next = state.global_step + self.every
            self.say(f"    step {state.global_step:>5}/{state.max_steps}  loss {float(logs['loss']):.3f}")


def _benchmark(run: DemoRun, matcher: Matcher) -> dict[str, RunResult]:
    """What `scone benchmark` says of the two, judged on the same f-grams."""
    options, data = run.options, model_options(run.options, "scone").data
    paths = {name: str(run.folder / name / FINAL_MODEL) for name in NAMES}
    config = BenchmarkConfig(
        [ModelEntry("scone", paths["scone"], str(run.folder / TABLE_FILE))],
        [BaselineEntry("plain", paths["plain"])],
        [DatasetEntry(TEXT, options.data, None, options.text_column, "test")],
        batch_sizes=[1],
        sequence_lengths=[options.max_length],
        num_runs=3,
        warmup_runs=1,
    )
    settings = BenchmarkSettings("cpu", data.cache_dir, options.max_test_tokens, seed=options.seed)
    return {result.name: result for result in Benchmark(config, settings, lambda line: None, matcher).run()}


def _comparison(
    run: DemoRun, results: Mapping[str, RunResult], live: PreTrainedModel, test: TokenFile
) -> dict[str, Any]:
    """The paired loss difference with its interval, and how far the table is from the live model (on its windows)."""
    length = run.options.max_length
    plain, scone_ = (results[name].perplexity[TEXT]["window_losses"] for name in NAMES)
    difference, interval = paired_difference(plain, scone_)
    beginning = test.tokens[: run.options.max_test_tokens][: LIVE_CHECK_TOKENS // length * length]
    found = perplexity(live, beginning, length, 16, quiet=True).window_losses
    return {
        "loss_difference": difference,
        "loss_difference_interval": interval,
        "num_windows": len(scone_),
        "table_against_live": max(abs(first - second) for first, second in zip(found, scone_, strict=False)),
    }


def _generate_both(run: DemoRun, test: TokenFile) -> list[dict[str, str]]:
    """Continuations of the openings of held-out documents by both models."""
    tables = {"plain": None, "scone": run.folder / TABLE_FILE}
    engines = {
        name: SconeInferenceEngine.from_pretrained(run.folder / name / FINAL_MODEL, table, device="cpu")
        for name, table in tables.items()
    }
    prompts = [str(engines["plain"].tokenizer.decode(opening)) for opening in _document_openings(test)]
    room = run.options.max_length - PROMPT_TOKENS - 8  # a prompt may encode to a few more tokens than it was cut from
    sampled = GenerationOptions(
        max_new_tokens=min(int(SAMPLING["max_new_tokens"]), room),
        do_sample=True,
        temperature=SAMPLING["temperature"],
        top_p=SAMPLING["top_p"],
        seed=run.options.seed,
    )
    texts = {
        name: [generation.texts[0] for generation in engine.generate(prompts, sampled)[0]]
        for name, engine in engines.items()
    }
    return [{"prompt": prompt, **{name: texts[name][index] for name in NAMES}} for index, prompt in enumerate(prompts)]


def _document_openings(test: TokenFile) -> list[np.ndarray]:
    """The first tokens of a few held-out documents that are long enough, spread over the split."""
    ends = np.flatnonzero(np.asarray(test.tokens) == test.separator_id)
    starts = np.concatenate([[0], ends[:-1] + 1])
    long_enough = starts[ends - starts >= 2 * PROMPT_TOKENS]
    if not len(long_enough):
        long_enough = starts[:1]
    chosen = long_enough[np.linspace(0, len(long_enough) - 1, min(NUM_SAMPLES, len(long_enough))).astype(int)]
    return [np.asarray(test.tokens[start : start + PROMPT_TOKENS]) for start in chosen]


def _training_facts(options: DemoOptions) -> dict[str, Any]:
    """The settings that both models share, and SCONE's input embedding, in words."""
    recipe = model_options(options, "scone").training
    shared = ("steps", "batch_size", "max_length", "seed")
    return {name: getattr(options, name) for name in shared} | {
        "trunk": f"Qwen3 architecture, {options.num_hidden_layers} layers × {options.hidden_size} wide, from scratch",
        "tokens": options.steps * options.batch_size * options.max_length,
        "optimizer": {"muon": "Muon for matrices, AdamW for the rest", "adamw": "AdamW"}[recipe.optimizer],
        "learning_rate": recipe.learning_rate,
        "schedule": recipe.lr_scheduler_type,
        "input_embedding": (
            "a learned row for each f-gram with back-off along its suffixes, starting at zero on top of the token "
            "embedding; no f-gram model"
        ),
    }


def _model_facts(result: RunResult, log: Mapping[str, Any], seconds_a_step: float) -> dict[str, Any]:
    """Costs and quality of a model: served as benchmarked, trained as its log says."""
    found = result.to_dict()

    def curve(loss: str) -> list[list[float]]:
        return [[entry["step"] * log["tokens_per_step"], entry[loss]] for entry in log["log"] if loss in entry]

    return {
        "evaluation": found["perplexity"][TEXT],
        "resident_parameters": found["parameters"]["resident"],
        "trained_parameters": log["parameters"]["resident"] + log["parameters"]["training_only"],
        "resident_bytes": result.resident_bytes,
        "inference_flops_per_token": result.inference_flops_per_token,
        "training_flops_per_token": log["cost"]["training_flops_per_token"],
        "training_seconds": log["train_seconds"],
        "seconds_a_step": seconds_a_step,
        "generation_tokens_per_second": result.speed[0]["decode_tokens_per_second"],
        "training_curve": curve("loss"),
        "validation_curve": curve("eval_loss"),
        "speed": result.speed,
    }


def _f_gram_facts(vocabulary: FGramVocabulary, corpus: Corpus, tokens: np.ndarray) -> dict[str, Any]:
    """How many f-grams, what they match of held-out ``tokens`` [n] as their number grows, and examples by rank."""
    total = vocabulary.num_f_grams
    sizes = [size for exponent in range(2, 9) for size in (10**exponent, 3 * 10**exponent) if size < total] + [total]
    found = match_statistics(Matcher(vocabulary), tokens, sizes)
    # ranks spread evenly on a logarithmic scale: from the most frequent f-gram to the last
    ranks = sorted({int(rank) - 1 for rank in np.geomspace(1, total, num=min(NUM_EXAMPLES, total))})

    def example(rank: int) -> dict[str, Any]:
        tokens = vocabulary.tokens(vocabulary.vocab_size + rank)
        text = str(corpus.tokenizer.decode(list(tokens)))
        text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
        return {"text": text, "length": len(tokens), "rank": rank + 1, "count": int(vocabulary.counts[rank])}

    return {
        "num_f_grams": total,
        "max_n": vocabulary.max_n,
        "min_count": int(vocabulary.counts[total - 1]),
        "match_rate_by_size": [[each.num_f_grams, each.match_rate] for each in found],
        "held_out_match_rate": found[-1].match_rate,
        "examples": [example(rank) for rank in ranks],
    }
