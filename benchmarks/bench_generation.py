"""Generation: the plain trunk beside SCONE with its table (RAM, mapped, direct, tiered), and live.

    python benchmarks/bench_generation.py [--quick] [--json FILE] [--device D] [--dtype T] [--rows S] [--dir DIR]
    python benchmarks/bench_generation.py --compiled --device cuda --dtype bfloat16 [--trunk 1b] [--json FILE]

A trunk of GPT-2-small size with random weights reads Wikipedia in GPT-2's tokens: a prompt at once (prefill), then
token by token through the KV cache (decode), always the text's own next token, so that f-grams match as often as in
real text. All models take turns, prompt by prompt; numbers are medians. Peak memory is that of a process of its own.

``--compiled``: static caches, and the call that ``generate(cache_implementation="static")`` of transformers compiles,
CUDA graphs in it; milliseconds a step. The host waits for every choice, as it does to stream it; or, ``queued``, the
choices stay on the GPU and the host launches the next step while this one runs. What fails is named.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PeakMemory, Report, in_child
from torch import nn
from transformers import PreTrainedModel, StaticCache
from workloads import VOCAB_SIZE, f_grams_of, gpt2_tokens, gpt2_trunk, write_table

from scone.evaluation.speed import wait
from scone.inference.embedding_table import EmbeddingTable
from scone.models.configuration import SconeConfig
from scone.models.language_model import SconeForCausalLM
from scone.models.token_history import CACHE
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

MAX_N = 5
BATCHES = (1, 8, 32)
TRUNKS = {"gpt2": (768, 12, 12), "1b": (2048, 20, 16)}  # width, layers, heads
ROW_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TABLE = "embeddings.cache"


def main() -> None:
    """Measure, print the table of records, write the JSON."""
    report = Report.from_arguments("generation", __doc__, add_options=_add_options)
    options = report.config
    if options.pop("child"):
        print(json.dumps(peak_memory(Path(options["folder"]), options["subject"], options)))
        return
    rows = options["rows"] or (30_000 if report.quick else 1_000_000)
    tokens, source = gpt2_tokens(1 if report.quick else 4, options["tokens"])
    vocabulary = f_grams_of(tokens, rows)
    options |= {
        "tokens": source,
        "rows": vocabulary.num_f_grams,
        "max_n": MAX_N,
        "sizes": sizes_of(options),
        "failed": [],
    }
    options |= {"threads": torch.get_num_threads(), "prompt": 32 if report.quick else 256}
    options |= {"steps": 4 if report.quick else 32, "turns": 2 if report.quick else 9}
    print(f"{vocabulary.num_f_grams:,} f-grams of {source}", flush=True)
    with tempfile.TemporaryDirectory(dir=options["dir"], prefix="bench_generation.") as name:
        folder = Path(name)
        vocabulary.save(folder)
        rows = rows_of(vocabulary, trunk_of(options).get_input_embeddings())
        write_table(folder / TABLE, ROW_TYPES[options["dtype"]], vocabulary.num_f_grams, rows)
        subjects = dict(all_subjects(folder, options))
        for batch in options["batches"]:
            (measure_compiled if options["compiled"] else measure_batch)(report, subjects, tokens, batch)
        for subject in subjects.values():
            subject.close()
        subjects.clear()
        if not options["compiled"]:
            measure_peaks(report, folder)
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the trunk")
    parser.add_argument("--rows", type=int, help="f-grams of the table (1,000,000; quick: 30,000)")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the table goes: the disk that is measured")
    parser.add_argument("--tokens", type=Path, metavar="FILE.npy", help="GPT-2 tokens to read (default: Wikipedia's)")
    parser.add_argument("--trunk", choices=TRUNKS, default="gpt2", help="its size")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="in this order")
    parser.add_argument("--subjects", nargs="+", help="these alone, beside plain (default: all)")
    parser.add_argument("--compiled", action="store_true", help="decoding alone, as transformers compiles it")
    for name in ("folder", "subject"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)


# ---------------------------------------------------------------------- what is measured


class Subject:
    """A model that decodes, its table if it has one, and how long its input embeddings took."""

    def __init__(self, model: PreTrainedModel, table: EmbeddingTable | None = None) -> None:
        self.model, self.table = model, table
        self.embedding_seconds = 0.0
        self.device = next(model.parameters()).device

    def time_vectors(self) -> None:
        """Measure from now on how long input embeddings take; compiled code would be cut in two by that."""
        if isinstance(self.model, SconeForCausalLM):
            self._vectors_of = self.model.vectors_of
            self.model.vectors_of = self._timed_vectors  # type: ignore[method-assign]

    def _timed_vectors(self, *arguments: Any) -> torch.Tensor:
        started = time.perf_counter()
        vectors = self._vectors_of(*arguments)
        self.embedding_seconds += time.perf_counter() - started  # on an accelerator: what the host is busy with
        return vectors

    @torch.inference_mode()
    def run(self, prompt: torch.Tensor, following: torch.Tensor) -> tuple[float, list[float], float]:
        """Seconds of the prefill, of each decoding step, and of the steps' input embeddings on average."""
        started = time.perf_counter()
        cache = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)[CACHE]
        wait(self.device)
        prefill = time.perf_counter() - started
        self.embedding_seconds = 0.0
        steps = []
        for step in range(following.shape[1]):
            started = time.perf_counter()
            output = self.model(input_ids=following[:, step : step + 1], **{CACHE: cache}, use_cache=True)
            output.logits[:, -1].argmax(-1)
            wait(self.device)
            steps.append(time.perf_counter() - started)
        return prefill, steps, self.embedding_seconds / following.shape[1]

    def close(self) -> None:
        """Release the table."""
        if self.table is not None:
            self.table.close()


def sizes_of(options: dict[str, Any]) -> tuple[int, int, int]:
    """The trunk's width, layers (a quarter of them at the quick size) and heads."""
    width, layers, heads = TRUNKS[options["trunk"]]
    return width, layers // 4 if options["quick"] else layers, heads


def trunk_of(options: dict[str, Any]) -> PreTrainedModel:
    """Random weights, the same in every process."""
    model = gpt2_trunk(*sizes_of(options)).eval().requires_grad_(False)
    return model.to(options["device"], getattr(torch, options["dtype"]))


def all_subjects(folder: Path, options: dict[str, Any]) -> Iterator[tuple[str, Subject]]:
    """Every subject by its name; they share one trunk."""
    trunk, vocabulary = trunk_of(options), FGramVocabulary.load(folder)
    for name in ("plain", *placements(options), *["live"] * (not options["compiled"])):
        if name == "plain" or not options["subjects"] or name in options["subjects"]:
            subject = subject_of(name, trunk, vocabulary, folder, options)
            if not options["compiled"]:
                subject.time_vectors()
            yield name, subject


def placements(options: dict[str, Any]) -> dict[str, str]:
    """Name of a subject → placement of its table."""
    found = {"ram": "ram", "mmap": "mmap", "direct": "direct", "tiered": f"ram:{options['rows'] // 10},disk"}
    if options["device"].startswith("cuda"):
        found |= {"gpu": "gpu", "tiered": f"gpu:{options['rows'] // 10},ram:{options['rows'] * 4 // 10},disk"}
    return found


def subject_of(
    name: str, trunk: PreTrainedModel, vocabulary: FGramVocabulary, folder: Path, options: dict[str, Any]
) -> Subject:
    """The plain trunk, or a SCONE around it."""
    if name == "plain":
        return Subject(trunk)
    if name == "live":
        sizes = {
            "hidden_size": trunk.config.n_embd,
            "num_hidden_layers": max(1, trunk.config.n_layer // 2),
            "num_attention_heads": trunk.config.n_head,
            "intermediate_size": 4 * trunk.config.n_embd,
        }
        model = SconeForCausalLM.from_trunk(trunk, vocabulary, f_gram_model=sizes).eval()
        return Subject(model.to(options["device"]))
    facts = {"max_n": MAX_N, "num_f_grams": vocabulary.num_f_grams, "vocabulary_fingerprint": vocabulary.fingerprint}
    config = SconeConfig(text_config=copy.deepcopy(trunk.config), requires_table=True, **facts)
    model = SconeForCausalLM(config, trunk=trunk).eval()
    model.set_vocabulary(vocabulary)
    table = EmbeddingTable.open(folder / TABLE, placements(options)[name], options["device"])
    model.attach_table(table)
    return Subject(model, table)


def rows_of(vocabulary: FGramVocabulary, tokens: nn.Module) -> Iterator[torch.Tensor]:
    """Rows as training leaves them: the last token's embedding and something of the same scale."""
    weight, random = tokens.weight.detach().float().cpu(), torch.Generator().manual_seed(1)
    for first in range(0, vocabulary.num_f_grams, 8192):
        last = torch.from_numpy(vocabulary.last_tokens[first : first + 8192].astype(np.int64))
        yield weight[last] + 0.02 * torch.randn(len(last), weight.shape[1], generator=random)


# ---------------------------------------------------------------------- measurements


def measure_batch(report: Report, subjects: dict[str, Subject], tokens: np.ndarray, batch: int) -> None:
    """Prefill and decode of every subject at one batch size, in turn, against the plain trunk in the same turns."""
    options, random = report.config, np.random.default_rng(batch)
    prefill, steps, embedding = (defaultdict(list) for _ in range(3))
    hits: list[float] = []
    scone = next(subject for subject in subjects.values() if isinstance(subject.model, SconeForCausalLM))
    for turn in range(options["turns"] + 1):
        text = some_text(tokens, batch, options, random)
        prompt, following = text.to(options["device"]).split([options["prompt"], options["steps"]], dim=1)
        hits.append(float((scone.model.match(text) >= VOCAB_SIZE).mean()))  # type: ignore[operator]
        for name, subject in subjects.items():
            found = subject.run(prompt, following)
            if turn:  # the first one warms up
                prefill[name].append(found[0])
                steps[name] += found[1]
                embedding[name].append(found[2])
    options[f"positions_with_f_gram_b{batch}"] = round(statistics.mean(hits), 3)
    step = {name: statistics.median(values) for name, values in steps.items()}
    fill = {name: statistics.median(values) for name, values in prefill.items()}
    for name in [name for name in subjects if name != "plain"]:
        suffix, target = ("", 0.97) if name == "ram" else (f"_{name}", None)
        rates = {"ours": batch / step[name], "peer": batch / step["plain"], "peer_name": "plain trunk"}
        report.add(f"decode_vs_plain_b{batch}{suffix}", "tokens/s", **rates, target=target)
        count = batch * options["prompt"]
        rates = {"ours": count / fill[name], "peer": count / fill["plain"], "peer_name": "plain trunk"}
        # the batch in the middle gives the metric its plain name
        at = "" if batch == BATCHES[1] else f"_b{batch}"
        report.add(f"prefill_vs_plain{at}{suffix}", "tokens/s", **rates, target=target if not at else None)
        seconds = statistics.median(embedding[name])
        where = ("" if batch == 1 else f"_b{batch}") + suffix
        report.add(f"embedding_us_per_token{where}", "µs", 1000000.0 * seconds / batch, ratio=None)
        report.add(f"embedding_share{where}", "share of a step", seconds / step[name], ratio="ours")


def some_text(tokens: np.ndarray, batch: int, options: dict[str, Any], random: np.random.Generator) -> torch.Tensor:
    """int64 [batch, prompt and steps]: stretches of the text."""
    length = options["prompt"] + options["steps"]
    starts = random.integers(0, len(tokens) - length, batch)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


def measure_compiled(report: Report, subjects: dict[str, Subject], tokens: np.ndarray, batch: int) -> None:
    """A step of every subject at one batch size, in turn; the ratio is its speed in plain's."""
    options, random = report.config, np.random.default_rng(batch)
    calls: dict[str, tuple[Callable[..., Any], StaticCache]] = {}
    text = some_text(tokens, batch, options, random).to(options["device"])
    for name, subject in subjects.items():
        trunk = getattr(subject.model, "trunk", subject.model)
        cache = StaticCache(trunk.config, max_cache_len=text.shape[1])
        call: Callable[..., Any] = subject.model.get_compiled_call(None)
        try:  # compile, and whatever is done once more
            for _ in range(2):
                decode(subject, text, options["prompt"], call, cache)
            calls[name] = call, cache
        except Exception as error:  # of the compiler, or out of memory
            options["failed"].append(f"compiled {name} at batch {batch}: {str(error).splitlines()[0]}")
            print(options["failed"][-1], flush=True)
    if "plain" not in calls:  # which all others are compared with
        return
    for waits, metric in ((True, "compiled_decode_ms"), (False, "queued_decode_ms")):
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options["turns"]):
            text = some_text(tokens, batch, options, random).to(options["device"])
            for name, (call, cache) in calls.items():
                taken[name].append(1e3 * decode(subjects[name], text, options["prompt"], call, cache, waits))
        times = {name: statistics.median(each) for name, each in taken.items()}
        plain = times.pop("plain")
        report.add(f"{metric}_b{batch}_plain", "ms", plain, ratio=None)
        for name, value in times.items():
            report.add(f"{metric}_b{batch}_{name}", "ms", value, plain, "plain", ratio="peer/ours", target=0.97)


@torch.inference_mode()
def decode(
    subject: Subject,
    text: torch.Tensor,
    prompt: int,
    call: Callable[..., Any],
    cache: StaticCache,
    waits: bool = True,
) -> float:
    """Seconds of a decoding step by ``call``, after a prefill; the host ``waits`` for each choice, or for the last.

    Waiting, it is the median of all; else they cannot be told apart, and it is their mean.
    """
    cache.reset()
    shared = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    logits = subject.model(input_ids=text[:, :prompt], **shared).logits
    wait(subject.device)
    times = [time.perf_counter()]
    for place in range(prompt, text.shape[1]):
        # the real next token, once the model has chosen its own
        following = torch.where(logits[:, -1:].argmax(-1) >= 0, text[:, place : place + 1], 0)
        logits = call(input_ids=following, **shared).logits
        if waits:
            logits[:, -1].argmax(-1).cpu()
            times.append(time.perf_counter())
    wait(subject.device)
    if waits:
        return statistics.median(end - begin for begin, end in itertools.pairwise(times))
    return (time.perf_counter() - times[0]) / (text.shape[1] - prompt)


def measure_peaks(report: Report, folder: Path) -> None:
    """Peak memory of a process of each one's own, from loading's end on (mapped pages that it read included)."""
    options, plain = report.config, None
    for name in ("plain", "ram", "mmap") if report.quick else ("plain", *placements(options), "live"):
        shared = [word for name in ("device", "dtype", "trunk", "rows") for word in (f"--{name}", str(options[name]))]
        shared += ["--quick"] * report.quick
        arguments = ["--child", "--folder", str(folder), "--subject", name, *shared]
        found = in_child(Path(__file__), arguments)
        plain = plain or found
        for key, peak in found.items():
            if peak is not None:
                report.add(f"{key}_{name}", "bytes", peak, plain[key], "plain trunk")


def peak_memory(folder: Path, name: str, options: dict[str, Any]) -> dict[str, int | None]:
    """Peaks of one subject that reads 8 texts of 64 tokens and 8 more tokens each."""
    subject = subject_of(name, trunk_of(options), FGramVocabulary.load(folder), folder, options)
    text = torch.randint(0, VOCAB_SIZE, (8, 72), device=options["device"])
    with PeakMemory(torch.device(options["device"])) as peak:
        subject.run(text[:, :64], text[:, 64:])
    return {"peak_process_bytes": peak.process_bytes, "peak_accelerator_bytes": peak.accelerator_bytes}


if __name__ == "__main__":
    main()
