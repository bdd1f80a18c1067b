"""Ten million learned rows on W GPUs of one host: a step with shared rows against a plain step, and how it scales.

    python benchmarks/gpu/bench_sharded_rows.py [--data DATA] [--json FILE] [--gpus 1 2 4] [--timeout 150] [--tiny]

On each number of GPUs the same processes train one variant after the other, as ``scone train`` does, in bf16 and not
compiled: the plain trunk with DDP; with rows that are shared out over the GPUs, in fp32, in bf16 and in host memory;
with a copy of all rows on every GPU; the plain trunk with FSDP (weights shared out, or moments and gradients alone);
and an f-gram model as deep as the trunk, with DDP and with FSDP. Each GPU has ``--positions`` of its own; the time is
that of ``--steps`` steps after ``--warmup`` others. Results are written as they come, and what still
runs after ``--timeout`` is ended.

DATA has the folders tokenizer and train (``experiments/prepare_data.py`` makes them); without it tokens are synthetic,
Zipf-distributed phrases. ``--tiny`` rehearses everything in processes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from common import REPOSITORY, Report, stop
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scone.configs.loading import from_mapping
from scone.configs.schema import SconeOptions
from scone.data.token_file import TokenFile, TokenFileWriter
from scone.evaluation.sweep import count_once
from scone.models.learned_rows import LearnedRows
from scone.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint
from scone.training.distributed import destroy_process_group
from scone.training.run import Corpus, train
from scone.utils.command_line import is_first_process
from scone.utils.files import read_json, write_json

ROWS = {"shared": "shared", "bf16": "shared", "copies": "shared", "host": "host"}
"""Variants with rows, and what their tokens a second are compared with on one GPU."""
OF_ONE_GPU = {"plain": "plain"} | ROWS | {"fsdp": "plain", "zero2": "plain", "model": "model", "model_fsdp": "model"}
VARIANTS = tuple(OF_ONE_GPU)
SHARDED = {"fsdp": "full_shard", "zero2": "shard_grad_op", "model_fsdp": "full_shard"}
TRUNK = (1024, 12, 16, 1024)
"""Width, layers, heads and context: GPT-2 small's depth at width 1,024."""
TINY = {"rows": 3000, "positions": 256, "warmup": 1, "steps": 3, "workers": 0, "tokens": 20_000}
TINY_TRUNK = (32, 2, 2, 64)
STEP_TARGET, ROWS_EFFICIENCY, PLAIN_EFFICIENCY = 1.10, 0.92, 0.9


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table of records, write the JSON; or be one of the processes that are timed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is read that is not on this machine
    if argv is None and sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), int(sys.argv[3]))
        return
    started = time.monotonic()
    report = Report.from_arguments("sharded_rows", __doc__, argv, add_options)
    options = report.config
    options |= TINY if options["tiny"] else {}
    available = max(options["gpus"]) if options["tiny"] else torch.cuda.device_count()
    options["gpus"] = sorted(count for count in {*options["gpus"]} if count <= available)
    if not options["gpus"]:
        raise SystemExit("found no GPU; expected at least one; give --tiny for a rehearsal on the CPU")
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=options["output_dir"]))
    print(f"logs in {folder}", flush=True)
    options["failed"] = {}
    try:
        prepare(folder, options)
        print(f"counted after {time.monotonic() - started:.0f} s", flush=True)
        for count in options["gpus"]:
            late = run_workers(count, folder, options, started + options["timeout"] - time.monotonic())
            print(f"{count} GPUs after {time.monotonic() - started:.0f} s", flush=True)
            log = (folder / f"log_{count}.txt").read_text(encoding="utf-8", errors="replace")
            for variant in variants_on(count, options):
                if not (folder / f"{variant}_{count}.json").exists():
                    options["failed"][f"{variant}_{count}"] = "not through in time" if late else last_error(log)
                    print(f"{variant}_{count} failed; its log ends:\n{log[-2000:]}", file=sys.stderr, flush=True)
            report.records.clear()
            add_records(report, folder)
    finally:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    report.finish()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the tokenizer and the token file train")
    parser.add_argument("--output_dir", type=Path, help="where a folder of logs is made (default: /tmp)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at toy size, in processes on the CPU")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2, 4], help="numbers of GPUs; those there are")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, help="what is trained")
    parser.add_argument("--rows", type=int, default=10_000_000, help="f-grams and learned rows")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="synthetic tokens, without --data")
    parser.add_argument("--positions", type=int, default=16_384, help="positions of a batch, per GPU")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the time is taken")
    parser.add_argument("--steps", type=int, default=40, help="steps whose time is taken")
    parser.add_argument("--workers", type=int, default=4, help="processes that prepare batches, per GPU")
    parser.add_argument("--timeout", type=float, default=150, help="seconds after which everything is ended")


def last_error(log: str) -> str:
    """The last line of a log that names an error, not torchrun's own; else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "torch.distributed.elastic" not in line]
    return (errors or lines or ["no output"])[-1]


def variants_on(count: int, options: dict[str, Any]) -> list[str]:
    """One GPU shares nothing out: its rows are all there."""
    return [variant for variant in options["variants"] if count > 1 or variant in OF_ONE_GPU.values()]


def run_options(variant: str, count: int, folder: Path, options: dict[str, Any]) -> SconeOptions:
    """The options of ``scone train``: a GPT-2 trunk, with rows or an f-gram model."""
    width, layers, heads, length = TINY_TRUNK if options["tiny"] else TRUNK
    return from_mapping(
        {
            "data": {
                "max_length": length,
                "max_n": 5,
                "min_freq": 1 if options["data"] in (None, str(folder)) else 2,
                "max_f_grams": options["rows"],
                "cache_dir": str(folder / "cache"),
                "num_workers": options["workers"],
            },
            "model": {
                "base_model_name": "gpt2",
                "hidden_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "intermediate_size": 4 * width,
                "max_position_embeddings": length,
                "hidden_act": "gelu_pytorch_tanh",  # GPT-2's own function, as one kernel
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "use_f_gram_embeddings": OF_ONE_GPU[variant] != "plain",
                "learned_rows": options["rows"] if variant in ROWS else 0,
                "rows_device": "host" if variant == "host" else "accelerator",
                "rows_dtype": "bfloat16" if variant == "bf16" else "float32",
                "f_gram": {"num_hidden_layers": 0 if variant in ROWS else layers},
            },
            "training": {
                "output_dir": str(folder / f"run_{variant}_{count}"),
                "batch_size": options["positions"] // length,
                "max_steps": options["warmup"] + options["steps"],
                "bf16": True,
                "fsdp": SHARDED.get(variant, "none"),
                "logging_steps": 10**9,
                "save_steps": 10**9,
                "report_to": "none",
            },
        }
    )


def prepare(folder: Path, options: dict[str, Any]) -> None:
    """Tokens, counted f-grams, and what the processes that are timed are told."""
    data = options["data"] or make_data(folder, options["tokens"])
    corpus = read_corpus(data)
    count_once([run_options(variant, 1, folder, options) for variant in options["variants"]], corpus, quiet=True)
    simple = {name: value for name, value in options.items() if isinstance(value, int | float | list | tuple)}
    write_json(folder / "plan.json", simple | {"data": str(data)})
    options["num_tokens"] = corpus.train.num_tokens
    options["trunk"] = "{} wide, {} layers, {} heads, context {}".format(*(TINY_TRUNK if options["tiny"] else TRUNK))


def make_data(folder: Path, num_tokens: int) -> Path:
    """Phrases of four tokens, Zipf-distributed like the tokens in them, each followed by two tokens of its own."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    random, size = np.random.default_rng(0), 50_257
    phrases = random.zipf(1.15, (1_000_000, 4)) % size
    chosen = np.minimum(random.zipf(1.05, num_tokens // 6) - 1, len(phrases) - 1)
    tokens = np.concatenate([phrases[chosen], random.zipf(1.15, (len(chosen), 2)) % size], axis=1)
    words = {f"w{number}": number for number in range(size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="w0")
    tokenizer.save_pretrained(folder / "tokenizer")
    writer = TokenFileWriter(folder / "train", size, 0)
    writer.add_document(tokens.reshape(-1))
    writer.finish({"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)})
    return folder


def run_workers(count: int, folder: Path, options: dict[str, Any], seconds: float) -> bool:
    """Time all variants on the first ``count`` GPUs; whether that was not through after ``seconds``."""
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += [str(Path(__file__)), "--worker", str(folder), str(count)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // max(options["gpus"]))),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "" if options["tiny"] else ",".join(visible.split(",")[:count]),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
    }
    with (folder / f"log_{count}.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
        )
        try:
            process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return True
        finally:
            stop(process, grace_s=40.0)  # torchrun kills its own that do not answer after 30
    return False


def work(folder: Path, count: int) -> None:
    """Train the variants, one after the other; one that fails does not keep the others from being measured."""
    plan = read_json(folder / "plan.json")
    share_out = LearnedRows.share_out
    for variant in variants_on(count, plan):
        LearnedRows.share_out = (lambda rows: None) if variant == "copies" else share_out  # type: ignore[method-assign]
        started = time.monotonic()
        try:
            measured = measure(run_options(variant, count, folder, plan), Path(plan["data"]), plan["warmup"])
            if is_first_process():
                write_json(folder / f"{variant}_{count}.json", measured)
                print(f"{variant}: {time.monotonic() - started:.0f} s, {measured}", flush=True)
        except Exception:
            traceback.print_exc()
            if count > 1:  # the ranks no longer agree on what comes next
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    destroy_process_group()


def add_records(report: Report, folder: Path) -> None:
    """All that was measured so far."""
    options, gib = report.config, 2**30
    found = {
        (variant, count): read_json(path)
        for count in options["gpus"]
        for variant in VARIANTS
        if (path := folder / f"{variant}_{count}.json").exists()
    }
    for (variant, count), now in found.items():
        plain, one = found.get(("plain", count)), found.get((OF_ONE_GPU[variant], 1))
        name = f"{variant}_{count}"
        target = STEP_TARGET if variant in ("shared", "bf16", "host") else None
        milliseconds = plain and 1000 * plain["step_seconds"]
        report.add(
            *(f"step_{name}", "ms", 1000 * now["step_seconds"]), peer=milliseconds, peer_name="plain step", most=target
        )
        report.add(f"peak_memory_{name}", "GiB", now["peak_bytes"] / gib, ratio=None)
        if count > 1 and one is not None:
            report.add(
                *(f"efficiency_{name}", "tokens/s", now["per_second"]),
                peer=count * one["per_second"],
                peer_name=f"{count} times one GPU",
                target=ROWS_EFFICIENCY if variant in ("shared", "bf16", "host") else PLAIN_EFFICIENCY,
            )
        if variant in ROWS and variant != "host" and plain is not None:
            width = (TINY_TRUNK if options["tiny"] else TRUNK)[0]
            a_row = count * (now["peak_bytes"] - plain["peak_bytes"]) / options["rows"]
            bound = (2 if variant == "bf16" else 4) * width + 8
            report.add(f"memory_a_row_{name}", "bytes over all GPUs", a_row, bound=bound, ratio=a_row / bound)


# ---------------------------------------------------------------------- how fast a run's steps are


def measure(options: SconeOptions, data: Path, warmup: int) -> dict[str, float]:
    """Tokens a second of all ranks, seconds a step of the slowest, peak bytes of the one with most; the same on every
    rank. Timed are the steps after ``warmup`` others, and there the run ends: gigabytes are not saved.
    """
    try:
        train(options, corpus=read_corpus(data), quiet=True, callbacks=[StepTimer(warmup)])
    except StepsTimed as timed:
        seconds, peak_bytes, processes = timed.args
        steps = options.training.max_steps - warmup
        tokens = steps * options.training.batch_size * options.data.max_length * processes
        found = {"per_second": tokens / seconds, "step_seconds": seconds / steps}
        return found | {"peak_bytes": peak_bytes, "processes": processes}
    raise AssertionError("the run ended before its last step was timed")


def read_corpus(data: Path) -> Corpus:
    """What the experiments read too (``experiments/prepare_data.py``), without a validation split."""
    return Corpus(load_tokenizer(data / "tokenizer"), TokenFile.open(data / "train"), None)


class StepsTimed(Exception):
    """The last step is through; its arguments are the seconds and peak bytes of the rank with most, and the ranks."""


class StepTimer(TrainerCallback):
    """Times the steps after ``warmup`` others, and raises ``StepsTimed`` on every rank after the last."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.started = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step not in (self.warmup, state.max_steps):
            return
        on_gpu = args.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        if state.global_step == self.warmup:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self.started = time.perf_counter()
            return
        seconds = time.perf_counter() - self.started
        resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole run, to have one on a CPU
        peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else resident
        most = torch.tensor([seconds, peak_bytes], dtype=torch.float64, device=args.device)
        if args.world_size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        raise StepsTimed(*most.tolist(), args.world_size)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # runs are ended, not left behind
    main()
