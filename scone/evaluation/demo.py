"""The whole method on one corpus: train plain and SCONE alike, precompute, evaluate, generate, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import scone
from scone.data.prepare import prepare_corpus
from scone.evaluation import measure
from scone.evaluation.demo_facts import comparison, corpus_facts, f_gram_facts, model_facts, training_facts
from scone.evaluation.demo_options import TRUNK_FOLDER, DemoOptions, model_options, trunk_configuration
from scone.evaluation.perplexity import PerplexityResult, perplexity
from scone.evaluation.report import render_report, verdict
from scone.evaluation.text_size import text_bytes
from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.loading import load_model
from scone.inference.precompute import precompute_table
from scone.tokenization.tokenizers import vocabulary_size
from scone.training.run import TRAINING_LOG_FILE, Corpus, build_model, prepare_run_corpus, run_vocabulary, train
from scone.training.run_folder import FINAL_MODEL, OPTIONS_FILE
from scone.training.trainer import complete_checkpoints
from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, read_json, write_json
from scone.utils.text import human_bytes, human_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scone.data.token_file import TokenFile

NAMES = {"plain": "plain", "scone": "SCONE"}
TABLE_FILE = "embeddings.cache"
PLAN_FILE = "plan.json"
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 96}
NUM_SAMPLES = 3
PROMPT_TOKENS = 24
LIVE_CHECK_TOKENS = 16_384
MIN_STEPS = 20
SCONE_STEP_COST = 1.5  # a SCONE training step in plain steps, roughly; only used to fit the run into the minutes
TRAINING_SHARE = 0.8  # of the minutes; the rest is counting, precomputing, evaluating


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
    claim_folder(run.folder)
    write_json(run.folder / TRUNK_FOLDER / "config.json", trunk_configuration(options))
    say(f"SCONE demo: {options.data} → {run.folder}/")
    with run.step("Tokens: train a tokenizer, encode the corpus") as notes:
        corpus = prepare_run_corpus(model_options(options, "scone"), quiet=True)
        splits = prepare_splits(options, corpus)
        notes.append(", ".join(f"{name} {human_count(file.num_tokens)}" for name, file in splits.items()) + " tokens")
    with run.step("f-grams: count every n-gram, keep the most frequent") as notes:
        vocabulary = run_vocabulary(
            model_options(options, "scone"), corpus, vocabulary_size(corpus.tokenizer), quiet=True
        )
        notes.append(f"{vocabulary.num_f_grams:,} f-grams of 2 to {options.max_n} tokens")
    options = run.options = fit_into_minutes(run, corpus)
    logs = {name: train_one(run, name) for name in NAMES}
    live, engines = precompute_and_load(run)
    report: dict[str, Any] = {
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "scone_version": scone.__version__,
        "machine": measure.describe_machine(),
        "options": asdict(options),
        "sampling": SAMPLING,
        "corpus": corpus_facts(options.data, corpus.tokenizer, splits),
        "training": training_facts(options),
        "table": {
            "num_rows": vocabulary.num_f_grams,
            "width": options.hidden_size,
            "file_bytes": (run.folder / TABLE_FILE).stat().st_size,
        },
    }
    results, live_result = evaluate_both(run, engines, live, splits["test"])
    report["comparison"] = comparison(results["plain"], results["scone"], live_result)
    report["samples"], speeds = generate_both(run, engines, splits["test"])
    with run.step("Costs: FLOPs, parameters, bytes; what the f-grams match") as notes:
        report["models"] = {
            name: model_facts(
                engines[name].model,
                live if name == "scone" else engines[name].model,
                splits["train"].tokens[: options.batch_size * options.max_length].reshape(-1, options.max_length),
                logs[name],
                results[name],
            )
            | {"generation_tokens_per_second": speeds[name]}
            for name in NAMES
        }
        report["f_grams"] = f_gram_facts(vocabulary, corpus.tokenizer, splits["test"].tokens[: options.max_test_tokens])
        notes.append(f"{report['f_grams']['held_out_match_rate']:.0%} of held-out positions match an f-gram")
    report["steps"] = run.steps
    report["total_seconds"] = time.perf_counter() - run.started
    write_json(run.folder / "report.json", report)
    page = run.folder / "report.html"
    with atomic_path(page) as temporary:
        temporary.write_text(render_report(report), encoding="utf-8")
    say_summary(report, say)
    return page


def claim_folder(folder: Path) -> None:
    """Make sure that the folder is ours to write to: new, empty, or an earlier demo's. Raises SconeError."""
    if folder.exists() and not folder.is_dir():
        raise SconeError(f"found a file at {folder}; expected a folder; choose another --output_dir")
    known = {"cache", "plain", "scone", TRUNK_FOLDER, TABLE_FILE, PLAN_FILE, "report.json", "report.html"}
    foreign = [path.name for path in folder.iterdir() if path.name not in known] if folder.is_dir() else []
    foreign = [name for name in foreign if not name.startswith(".")]  # unfinished files of an interrupted step
    if foreign:
        raise SconeError(
            f"{folder} holds something else (found {', '.join(sorted(foreign)[:3])}); expected an empty folder or an "
            "earlier demo's; choose another --output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)


def prepare_splits(options: DemoOptions, corpus: Corpus) -> dict[str, TokenFile]:
    """The token files of train, validation and test. Raises SconeError when there is too little text to train on."""
    data = model_options(options, "scone").data
    splits = prepare_corpus(
        data.dataset_name,
        corpus.tokenizer,
        text_column=data.text_column,
        splits=("train", "validation", "test"),
        cache_dir=data.cache_dir,
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


def fit_into_minutes(run: DemoRun, corpus: Corpus) -> DemoOptions:
    """The options with as many steps and evaluations as fit into the minutes on this machine, at most those asked for.

    Decided once and kept in plan.json, so that a second run finds the trainings that the first one finished. What was
    trained with other options or on other text is removed.
    """
    asked = run.options
    key = asdict(replace(asked, output_dir="", max_test_tokens=0)) | {"corpus": corpus.train.fingerprint}
    plan_path = run.folder / PLAN_FILE
    if plan_path.is_file():
        plan = read_json(plan_path)
        if plan["key"] == key:
            return replace(asked, steps=plan["steps"], num_evaluations=plan["num_evaluations"])
    for name in NAMES:
        if (run.folder / name).exists():
            run.say(f"{NAMES[name]} was trained with other options or on other text: training again")
            shutil.rmtree(run.folder / name)
    with run.step("Plan: time a few training steps") as notes:
        seconds = seconds_of_a_step(build_model(model_options(asked, "plain"), corpus, quiet=True), corpus.train, asked)
        steps, num_evaluations = plan_steps(asked, seconds, corpus.validation.num_tokens if corpus.validation else 0)
        notes.append(f"{seconds:.2f} s a step here: {steps} steps each")
        if steps < asked.steps:
            notes.append(f"fewer than {asked.steps}, to end in {asked.minutes:g} minutes")
    write_json(plan_path, {"key": key, "steps": steps, "num_evaluations": num_evaluations})
    return replace(asked, steps=steps, num_evaluations=num_evaluations)


def plan_steps(asked: DemoOptions, seconds_a_step: float, validation_tokens: int) -> tuple[int, int]:
    """(training steps, evaluations on the validation split during a training) that fit into ``asked.minutes``.

    A forward pass is a third of a step; the validation split is read once more at a training's end. Where reading it
    often would take more than a fifth of the time, it is read once.
    """
    budget = 60 * asked.minutes * TRAINING_SHARE
    reading = seconds_a_step / 3 * validation_tokens / (asked.batch_size * asked.max_length)
    evaluations = asked.num_evaluations
    if 2 * (evaluations + 1) * reading > budget / 5:
        evaluations = 1
    left = budget - 2 * (evaluations + 1) * reading
    affordable = int(left / (seconds_a_step * (1 + SCONE_STEP_COST)))
    return max(min(MIN_STEPS, asked.steps), min(asked.steps, affordable)), evaluations


def seconds_of_a_step(model: PreTrainedModel, tokens: TokenFile, options: DemoOptions) -> float:
    """Median time of forward and backward on a training batch, of three after a warm-up."""
    count = options.batch_size * options.max_length
    batch = np.asarray(tokens.tokens[:count], dtype=np.int64).reshape(options.batch_size, options.max_length)
    input_ids = torch.from_numpy(batch)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def train_one(run: DemoRun, name: str) -> dict[str, Any]:
    """Train one of the two, go on with an interrupted run, or use a finished one; returns its training log."""
    options = model_options(run.options, name)
    folder = Path(options.training.output_dir)
    if folder.is_dir() and not (folder / OPTIONS_FILE).is_file():
        shutil.rmtree(folder)  # stopped before its first line was written
    size = f"{options.training.batch_size} × {options.data.max_length} tokens"
    title = f"Train {NAMES[name]}: {run.options.steps} steps of {size}"
    with run.step(title) as notes:
        if (folder / TRAINING_LOG_FILE).is_file():
            notes.append("finished before, used again")
        else:
            if complete_checkpoints(folder):
                options.training.resume_from_checkpoint = "true"
            train(options, quiet=True, callbacks=[ProgressLines(run.say, run.options.steps)])
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


def precompute_and_load(run: DemoRun) -> tuple[PreTrainedModel, dict[str, SconeInferenceEngine]]:
    """Write the table; returns the live SCONE model, and both models as they are served: plain, and SCONE from the
    table.
    """
    table_path = run.folder / TABLE_FILE
    with run.step("Table: run the f-gram model once over every f-gram") as notes:
        live: Any = load_model(run.folder / "scone" / FINAL_MODEL, device="cpu").model
        precompute_table(live, table_path, quiet=True)
        notes.append(f"{live.vocabulary.num_f_grams:,} rows, {human_bytes(table_path.stat().st_size)}")
    engines = {
        "plain": SconeInferenceEngine.from_pretrained(run.folder / "plain" / FINAL_MODEL, device="cpu"),
        "scone": SconeInferenceEngine.from_pretrained(run.folder / "scone" / FINAL_MODEL, table_path, device="cpu"),
    }
    return live, engines


def evaluate_both(
    run: DemoRun, engines: dict[str, SconeInferenceEngine], live: PreTrainedModel, test: TokenFile
) -> tuple[dict[str, PerplexityResult], PerplexityResult]:
    """Perplexity of both on held-out text, SCONE from its table; and of the live model on the beginning of it."""
    options = run.options
    tokens = test.tokens[: options.max_test_tokens]
    num_bytes = text_bytes(engines["plain"].tokenizer, tokens)
    matcher: Any = engines["scone"].model.matcher  # type: ignore[union-attr]
    results: dict[str, PerplexityResult] = {}
    for name, engine in engines.items():
        with run.step(
            f"Evaluate {NAMES[name]}{' from the table' if name == 'scone' else ''} on held-out text"
        ) as notes:
            results[name] = perplexity(
                engine.model, tokens, options.max_length, 16, matcher=matcher, num_bytes=num_bytes, quiet=True
            )
            notes.append(f"perplexity {results[name].perplexity:.3f}, loss {results[name].loss:.4f} nats a token")
    with run.step("Check: the table against the live model") as notes:
        beginning = tokens[: LIVE_CHECK_TOKENS // options.max_length * options.max_length]
        live_result = perplexity(live, beginning, options.max_length, 16, quiet=True)
        difference = comparison(results["plain"], results["scone"], live_result)["table_against_live"]
        notes.append(f"largest difference of a window's loss {difference:.1e} nats")
    return results, live_result


def generate_both(
    run: DemoRun, engines: dict[str, SconeInferenceEngine], test: TokenFile
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Continuations of the openings of held-out documents by both models, and new tokens a second of a single
    sequence.
    """
    tokenizer = engines["plain"].tokenizer
    prompts = [str(tokenizer.decode(opening)) for opening in document_openings(test)]
    room = run.options.max_length - PROMPT_TOKENS - 8  # a prompt may encode to a few more tokens than it was cut from
    sampled = GenerationOptions(
        max_new_tokens=min(int(SAMPLING["max_new_tokens"]), room),
        do_sample=True,
        temperature=SAMPLING["temperature"],
        top_p=SAMPLING["top_p"],
        seed=run.options.seed,
    )
    texts: dict[str, list[str]] = {}
    speeds: dict[str, float] = {}
    with run.step("Generate from both") as notes:
        for name, engine in engines.items():
            texts[name] = [generation.texts[0] for generation in engine.generate(prompts, sampled)[0]]
            speeds[name] = engine.generate(prompts[0], sampled)[1].tokens_per_second
            notes.append(f"{NAMES[name]} {speeds[name]:.0f} tokens/s")
    samples = [
        {"prompt": prompt, **{name: texts[name][index] for name in NAMES}} for index, prompt in enumerate(prompts)
    ]
    return samples, speeds


def document_openings(test: TokenFile) -> list[np.ndarray]:
    """The first tokens of a few held-out documents that are long enough, spread over the split."""
    ends = np.flatnonzero(np.asarray(test.tokens) == test.separator_id)
    starts = np.concatenate([[0], ends[:-1] + 1])
    long_enough = starts[ends - starts >= 2 * PROMPT_TOKENS]
    if not len(long_enough):
        long_enough = starts[:1]
    chosen = long_enough[np.linspace(0, len(long_enough) - 1, min(NUM_SAMPLES, len(long_enough))).astype(int)]
    return [np.asarray(test.tokens[start : start + PROMPT_TOKENS]) for start in chosen]


def say_summary(report: dict[str, Any], say: Callable[[str], None]) -> None:
    """The result in a few lines, as measured, whoever won."""
    models = report["models"]
    rows = [
        ("held-out perplexity", "evaluation.perplexity", lambda value: f"{value:.3f}"),
        ("inference FLOPs per token", "inference_flops_per_token", human_count),
        ("parameters at inference", "resident_parameters", human_count),
        ("training seconds", "training_seconds", lambda value: f"{value:.0f}"),
        ("generation tokens/s", "generation_tokens_per_second", lambda value: f"{value:.0f}"),
    ]
    say(f"\n{'':<28}{'plain':>12}{'SCONE':>12}")
    for title, path, form in rows:
        values = []
        for name in NAMES:
            value = models[name]
            for part in path.split("."):
                value = value[part]
            values.append(form(value))
        say(f"{title:<28}{values[0]:>12}{values[1]:>12}")
    say(f"{'table, off the accelerator':<28}{'–':>12}{human_bytes(report['table']['file_bytes']):>12}")
    say(f"\n{verdict(report)[1]}  [{report['total_seconds'] / 60:.1f} minutes in all]")
