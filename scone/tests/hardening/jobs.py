"""The long jobs that a fault may hit, made small: tokenise, count, train, precompute, convert, on inputs made here.

Each is run by a forked process (``spawned``), so that a kill costs no imports. What it leaves is compared by digest.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scone.utils.command_line import run_main

VOLATILE = ("training_log.json", "environment.json", "README.md")
"""Files of a run that tell of this run alone: seconds, machine, versions."""


@dataclass(frozen=True)
class Job:
    """``run(inputs, work)`` writes below ``work`` only; ``results`` are the files there that count (glob patterns)."""

    name: str
    run: Callable[[Path, Path], int]
    results: tuple[str, ...]

    def digest(self, work: Path) -> str:
        """SHA-256 over names and bytes of the results; "" where there are none."""
        digest = hashlib.sha256()
        files = sorted({path for pattern in self.results for path in work.glob(pattern) if path.is_file()})
        files = [path for path in files if path.name not in VOLATILE]
        for path in files:
            content = path.read_bytes().replace(str(work).encode(), b"WORK")  # options name their folder
            digest.update(f"{path.relative_to(work)} {len(content)}\n".encode() + content)
        return digest.hexdigest() if files else ""


def make_inputs(inputs: Path) -> None:
    """A corpus of 60 documents, its tokens as an array, a trained model and a table in many chunks."""
    import numpy as np

    from scone.tests.training.runs import write_corpus

    inputs.mkdir(parents=True, exist_ok=True)
    write_corpus(inputs)
    tokens = np.minimum(np.random.default_rng(0).zipf(1.4, 60_000) - 1, 999).astype(np.uint16)
    np.save(inputs / "tokens.npy", tokens)
    train(inputs, inputs / "trained")
    precompute(inputs, inputs / "trained")


def tokenise(inputs: Path, work: Path) -> int:
    """The corpus to token files, with a note of how far it is every 4,000 characters."""
    from scone.data import prepare
    from scone.tokenization.tokenizers import load_tokenizer

    prepare.BATCH_CHARACTERS, prepare.COMMIT_CHARACTERS = 500, 4000
    tokenizer = load_tokenizer(inputs / "trained" / "run" / "final_model")
    prepare.prepare_corpus(str(inputs / "corpus.jsonl"), tokenizer, cache_dir=work, num_threads=2, quiet=True)
    return 0


def count(inputs: Path, work: Path) -> int:
    """F-grams counted through files: the budget is the least that is accepted, so partitions go to disk."""
    import numpy as np

    from scone.tokenization.counting import count_f_grams

    tokens = np.load(inputs / "tokens.npy", mmap_mode="r")
    counted = count_f_grams(
        [tokens],
        vocab_size=1000,
        max_n=4,
        min_freq=2,
        max_f_grams=500,
        separator_ids=[999],
        ranking="frequency",  # its few survivors leave so small a budget to the files
        memory_budget_bytes=COUNT_BUDGET,
        work_dir=work / "counting",
        num_threads=2,
        quiet=True,
    )
    counted.vocabulary.save(work / "f_grams.safetensors")
    return 0


COUNT_BUDGET = 1_700_000


def train(inputs: Path, work: Path) -> int:
    """`scone train`, six steps, a checkpoint after each."""
    from scone.scripts.train import main
    from scone.tests.training.runs import command_line

    steps = "--max_steps 6 --save_steps 1 --eval_steps 3 --logging_steps 2 --batch_size 2 --resume_from_checkpoint"
    return main(command_line(inputs / "corpus.jsonl", work / "run", *steps.split()))


def precompute(inputs: Path, work: Path) -> int:
    """`scone precompute` in chunks of eight rows."""
    from scone.inference import precompute, table_format
    from scone.scripts.precompute_embeddings import main

    precompute.ROWS_PER_BATCH_UNIT = 8
    table_format._CHECKSUM_SPAN_BYTES = 2048
    model, output = inputs / "trained" / "run" / "final_model", work / "embeddings.cache"
    return main(["--model_path", str(model), "--output_path", str(output), "--batch_size", "1", "--device", "cpu"])


def convert(inputs: Path, work: Path) -> int:
    """`scone table convert` to int8, in chunks of 2 KiB."""
    from scone.inference import table_format
    from scone.scripts.table import main

    table_format._CHECKSUM_SPAN_BYTES = 2048
    work.mkdir(parents=True, exist_ok=True)
    source = inputs / "trained" / "embeddings.cache"
    return main(["convert", str(source), str(work / "embeddings.int8"), "--row_type", "int8"])


JOBS = {
    job.name: job
    for job in (
        Job("tokenise", tokenise, ("tokens/*/corpus.json", "tokens/*/*/tokens.*")),
        Job("count", count, ("f_grams.safetensors",)),
        Job("train", train, ("run/final_model/*", "run/checkpoint-6/model.safetensors")),
        Job("precompute", precompute, ("embeddings.cache",)),
        Job("convert", convert, ("embeddings.int8",)),
    )
}


def preload() -> None:
    """Import what the jobs need, before processes are forked."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import scone.data.prepare
    import scone.inference.precompute
    import scone.scripts.precompute_embeddings
    import scone.scripts.table
    import scone.scripts.train
    import scone.tokenization.counting
    import scone.training.run  # noqa: F401


def spawned(run: Callable[[Path, Path], int], inputs: Path, work: Path, log: Path, set_up: Callable[[], None]) -> int:
    """Fork a process that calls ``set_up()`` and then ``run`` as a command would be run; returns its process id.

    What it prints, and its traceback where there is one, is added to ``log``; its exit status is the command's.
    """
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        with log.open("a", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        set_up()
        status = run_main(lambda _: run(inputs, work), ["--debug"] if os.environ.get("SCONE_FAULT_DEBUG") else [])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def nothing() -> None:
    """The set-up of a run without a fault."""


def finished(process: int) -> int:
    """Wait for a process and return its exit code, −N where signal N ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
