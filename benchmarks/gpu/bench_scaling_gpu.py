"""Scaling over the GPUs of one host: training with DDP and FSDP, and precomputing a table, on W GPUs against one.

    python benchmarks/gpu/bench_scaling_gpu.py --data DATA [--json FILE] [--gpus 1 2 4] [--compile] [--tiny]

DATA has the folders tokenizer and train (``experiments/prepare_data.py`` makes them). Every number is of what users do:
``scone.training.run.train`` in processes of torchrun (``timed_training.py``), and ``scone precompute`` as
docs/how-to/large-table.md has it. Training is scaled weakly: each GPU has ``--positions`` of its own, in bf16. Its time
is that of ``--steps`` steps after ``--warmup`` others: starting, compiling and saving are left out. Precomputing takes
what the command says that its rows took. What needs one GPU runs side by side, each on another, so the host is as busy
as for the runs on all of them. Nothing is compiled unless asked for: that is the default of ``scone train``, and
compiling would take longer than all that is measured. A run that fails is named in the configuration's ``failed`` with
its last words, and its log stays. ``--tiny`` rehearses everything in processes on a CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import REPOSITORY, Report
from side_by_side import Program, gpu_for, last_words, run_side_by_side
from timed_training import read_corpus

from scone.configs.loading import from_mapping, save_options
from scone.configs.schema import SconeOptions
from scone.data.collator import Collator
from scone.data.dataset import BlockDataset
from scone.evaluation.sweep import count_once
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import ROWS_PER_BATCH_UNIT
from scone.training.run import build_model
from scone.utils.files import read_json

VARIANTS = ("plain", "both", "model")
SHARDED = ("plain", "model")
"""Variants that are trained with FSDP too; learned rows are not sharded."""
TRUNK = (1024, 6, 16, 1024)
"""Width, layers, heads and context: the trunk of the paper's smallest experiment."""
TINY_TRUNK = (32, 2, 2, 64)
TINY = {"positions": 256, "f_grams": 1000, "warmup": 1, "steps": 3, "workers": 0, "table_batch": 2}
EFFICIENCY = 0.9


class Run(NamedTuple):
    """What is timed in processes of its own. ``strategy``: "one" (GPU), "ddp", "fsdp" or "precompute"."""

    strategy: str
    variant: str
    gpus: int

    @property
    def name(self) -> str:
        return f"{self.strategy}_{self.variant}_{self.gpus}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table of records, write the JSON."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is read that is not in DATA
    report = Report.from_arguments("gpu_scaling", __doc__, argv, _add_options)
    options = report.config
    options |= TINY if options["tiny"] else {}
    available = max(options["gpus"]) if options["tiny"] else torch.cuda.device_count()
    options["gpus"] = sorted(count for count in {1, *options["gpus"]} if count <= available)
    if not options["gpus"]:
        raise SystemExit("found no GPU; expected at least one; give --tiny for a rehearsal on the CPU")
    if options["output_dir"] is not None:
        options["output_dir"].mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="scaling-", dir=options["output_dir"]))
    print(f"logs in {folder}", flush=True)
    options["failed"] = {}
    try:
        make_model(folder, options)
        measure(report, folder)
    finally:
        for path in (folder / "cache", folder / "model"):
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob("table_*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of the tokenizer and the token file train")
    parser.add_argument(
        "--output_dir", type=Path, help="where a folder of logs, tables and models is made (default: /tmp)"
    )
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at toy size, in processes on the CPU")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2, 4], help="numbers of GPUs; those there are")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, help="what is trained")
    parser.add_argument(
        "--strategies",
        nargs="*",
        choices=("ddp", "fsdp", "precompute"),
        default=("ddp", "precompute", "fsdp"),
        help="what is scaled, in this order",
    )
    parser.add_argument("--compile", action="store_true", help="compile what is trained, on one GPU and on many")
    parser.add_argument("--no_compile", dest="compile", action="store_false", help="do not (the default)")
    parser.add_argument("--positions", type=int, default=16_384, help="positions of a batch, per GPU")
    parser.add_argument("--f_grams", type=int, default=1_000_000, help="f-grams, learned rows, and rows of the table")
    parser.add_argument(
        "--table_batch", type=int, default=64, help="--batch_size of precomputing (256, the guide's, makes 31 chunks)"
    )
    parser.add_argument("--warmup", type=int, default=10, help="steps before the time is taken")
    parser.add_argument("--steps", type=int, default=50, help="steps whose time is taken")
    parser.add_argument("--workers", type=int, default=4, help="processes that prepare batches, per GPU")
    parser.add_argument("--timeout", type=float, default=90, help="seconds after which a run is ended")


def rounds(options: Mapping[str, Any]) -> list[list[Run]]:
    """All runs, those in one list at once: first what needs one GPU, then what needs several."""
    one = [Run("one", variant, 1) for variant in options["variants"]]
    one += [Run("precompute", "table", 1)] if "precompute" in options["strategies"] else []
    most = max(options["gpus"])
    found = [one[low : low + most] for low in range(0, len(one), most)]
    scaled = {
        "ddp": options["variants"],
        "fsdp": [variant for variant in options["variants"] if variant in SHARDED],
        "precompute": ["table"],
    }
    for strategy in options["strategies"]:
        several = [count for count in options["gpus"] if count > 1]
        found += [[Run(strategy, variant, count)] for variant in scaled[strategy] for count in several]
    return found


def run_options(run: Run, folder: Path, options: Mapping[str, Any]) -> SconeOptions:
    """The options of ``scone train``: a GPT-2 trunk; an f-gram model as large, and learned rows, where it has them."""
    width, layers, heads, length = TINY_TRUNK if options["tiny"] else TRUNK
    return from_mapping(
        {
            "data": {
                "max_length": length,
                "max_n": 5,
                "min_freq": 2,
                "max_f_grams": options["f_grams"],
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
                "use_f_gram_embeddings": run.variant != "plain",
                "learned_rows": options["f_grams"] if run.variant == "both" else 0,
                # else the f-gram model's part of every row is zero before training, and equal whatever it computes
                "f_gram": {"num_hidden_layers": None} | ({"start": "random"} if run.strategy == "precompute" else {}),
            },
            "training": {
                "output_dir": str(folder / run.name),
                "batch_size": options["positions"] // length,
                "max_steps": options["warmup"] + options["steps"],
                "bf16": True,
                "torch_compile": options["compile"],
                "fsdp": "full_shard" if run.strategy == "fsdp" else "none",
                "logging_steps": 10**9,
                "save_steps": 10**9,
                "report_to": "none",
            },
        }
    )


def make_model(folder: Path, options: dict[str, Any]) -> None:
    """Count the f-grams of all runs, write the model whose table is precomputed, and compile what all would compile.

    Kernels go to caches on disk. Without them the first run, the one that others are compared with, would wait.
    """
    corpus = read_corpus(options["data"])
    settings = run_options(Run("precompute", "table", 1), folder, options)
    count_once([settings], corpus, quiet=True)
    model = build_model(settings, corpus, quiet=True)
    model.save_pretrained(folder / "model")
    corpus.tokenizer.save_pretrained(folder / "model")
    Collator(model.vocabulary, num_rows=1)([BlockDataset(corpus.train, settings.data.max_length)[0]])
    count = min(options["table_batch"] * ROWS_PER_BATCH_UNIT, model.vocabulary.num_f_grams)
    model.to("cpu" if options["tiny"] else "cuda").embed_nodes(torch.arange(count) + model.vocabulary.vocab_size)
    options |= {"num_tokens": corpus.train.num_tokens, "f_grams_found": model.vocabulary.num_f_grams}
    options["trunk"] = "{} wide, {} layers, {} heads, context {}".format(*(TINY_TRUNK if options["tiny"] else TRUNK))


def measure(report: Report, folder: Path) -> None:
    """Run everything and report it as it comes; what fails is noted in the configuration."""
    options = report.config
    measured: dict[Run, Mapping[str, float]] = {}
    for runs in rounds(options):
        started = time.monotonic()
        programs = [program(run, place, folder, options) for place, run in enumerate(runs)]
        run_side_by_side(programs, options["timeout"])
        print(f"{', '.join(run.name for run in runs)}: {time.monotonic() - started:.0f} s", flush=True)
        for run, its_program in zip(runs, programs, strict=True):
            log = its_program.log.read_text(encoding="utf-8", errors="replace")
            found = result(run, folder, log)
            if found is None:
                options["failed"][run.name] = last_words(log)
                print(f"{run.name} failed; its log ends:\n{log[-3000:]}", file=sys.stderr, flush=True)
            else:
                measured[run] = found
                try:
                    add_records(report, run, measured, folder)
                except Exception as error:  # a table that cannot be compared, say: the other runs go on
                    options["failed"][run.name] = repr(error)
                    print(f"{run.name} failed: {error!r}", file=sys.stderr, flush=True)


def program(run: Run, place: int, folder: Path, options: Mapping[str, Any]) -> Program:
    """What times ``run``: one process, on the ``place``-th GPU, or torchrun over the first ``run.gpus``."""
    command = [sys.executable]
    if run.gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.gpus}"]
    if run.strategy == "precompute":
        command += ["-m", "scone.scripts.precompute_embeddings", "--row_type", "int8", "--use_memory_map"]
        command += ["--model_path", str(folder / "model"), "--output_path", str(folder / f"table_{run.gpus}")]
        command += ["--batch_size", str(options["table_batch"])]
    else:
        settings = folder / f"{run.name}.yaml"
        save_options(run_options(run, folder, options), settings)
        command += [str(Path(__file__).with_name("timed_training.py")), "--options", str(settings)]
        command += ["--data", str(options["data"]), "--warmup", str(options["warmup"])]
        command += ["--json", str(folder / f"{run.name}.json")]
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // max(options["gpus"]))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
    }
    if options["tiny"]:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif run.gpus == 1:
        environment |= gpu_for(place)
    return Program(command, folder / f"{run.name}.log", environment)


def result(run: Run, folder: Path, log: str) -> Mapping[str, float] | None:
    """What a run that is over has measured, None where that is nothing."""
    if run.strategy != "precompute":
        path = folder / f"{run.name}.json"
        return read_json(path) if path.exists() else None
    ranks = re.findall(r"computed ([\d,]+) rows in ([\d.]+) s", log)
    if len(ranks) < run.gpus or not (folder / f"table_{run.gpus}").is_file():
        return None
    rows = sum(int(rows.replace(",", "")) for rows, _ in ranks)
    slowest = max(0.01, *(float(seconds) for _, seconds in ranks))  # the command says hundredths
    return {"per_second": rows / slowest, "processes": len(ranks)}


def add_records(report: Report, run: Run, measured: Mapping[Run, Mapping[str, float]], folder: Path) -> None:
    """The records of a run that is through, against the run on one GPU where that is too."""
    now, gib = measured[run], 2**30
    assert now["processes"] == run.gpus, f"{run.name}: {now['processes']} processes"
    is_table, ending = run.strategy == "precompute", f"{run.variant}_{run.gpus}"
    unit = "f-grams/s" if is_table else "tokens/s"
    one = measured.get(Run("precompute" if is_table else "one", run.variant, 1))
    if run.gpus == 1:
        report.add(f"{('f_grams' if is_table else 'tokens')}_per_second_{ending}", unit, now["per_second"], ratio=None)
        if not is_table:
            report.add(f"peak_memory_{ending}", "GiB", now["peak_bytes"] / gib, ratio=None)
        return
    report.add(
        f"precompute_efficiency_{run.gpus}" if is_table else f"{run.strategy}_efficiency_{ending}",
        unit,
        now["per_second"],
        one and run.gpus * one["per_second"],
        f"{run.gpus} times one GPU",
        target=EFFICIENCY,
    )
    if not is_table:
        peer = one and one["peak_bytes"] / gib
        report.add(f"{run.strategy}_peak_memory_{ending}", "GiB", now["peak_bytes"] / gib, peer, "one GPU")
    elif one is not None:
        difference = largest_difference(folder / "table_1", folder / f"table_{run.gpus}")
        name = f"precompute_difference_{run.gpus}"
        report.add(name, "between rows", difference, ratio="ours", target=0.0, better="lower")


def largest_difference(left: Path, right: Path) -> float:
    """Between the numbers of two tables; 0 where the SHA-256 of their rows are equal."""
    with EmbeddingTable.open(left, placement="mmap") as ours, EmbeddingTable.open(right, placement="mmap") as theirs:
        if ours.layout.rows_checksum == theirs.layout.rows_checksum:
            return 0.0
        blocks = torch.arange(ours.num_rows).split(1 << 16)
        return max(float((ours.rows(block) - theirs.rows(block)).abs().max()) for block in blocks)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # runs are ended, not left behind
    main()
