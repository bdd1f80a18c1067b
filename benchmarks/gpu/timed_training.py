"""A training run as users start it, in one process or under torchrun, that tells how fast its steps are.

    torchrun --nproc_per_node 2 benchmarks/gpu/timed_training.py --options FILE --data DATA --warmup 10 --json FILE

The options are those of ``scone train``. The steps after the first ``--warmup`` are timed, up to ``max_steps``, where
the run ends: a model of gigabytes is not saved. The JSON has tokens a second of all processes together, by the slowest
rank, and the peak bytes of one, by the rank with most.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scone.configs.loading import load_options
from scone.data.token_file import TokenFile
from scone.tokenization.tokenizers import load_tokenizer
from scone.training.distributed import destroy_process_group
from scone.training.run import Corpus, train
from scone.utils.command_line import is_first_process
from scone.utils.files import write_json


def main() -> None:
    """Train, and write what was measured from the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", type=Path, required=True, help="YAML of the run's options")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tokenizer and the token file train")
    parser.add_argument("--warmup", type=int, required=True, help="steps before the time is taken")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write what was measured")
    arguments = parser.parse_args()
    measured = measure(arguments.options, arguments.data, arguments.warmup)
    if is_first_process():
        write_json(arguments.json, measured)
    destroy_process_group()


def measure(options_path: Path, data: Path, warmup: int) -> dict[str, float]:
    """Tokens a second, peak bytes and number of processes; the same on every rank."""
    options = load_options(options_path)
    try:
        train(options, corpus=read_corpus(data), quiet=True, callbacks=[StepTimer(warmup)])
    except StepsTimed as timed:
        steps = (options.training.max_steps - warmup) * options.training.gradient_accumulation_steps
        tokens = steps * options.training.batch_size * options.data.max_length * timed.world_size
        return {
            "per_second": tokens / timed.seconds,
            "peak_bytes": timed.peak_bytes,
            "processes": timed.world_size,
        }
    raise AssertionError("the run ended before its last step was timed")


def read_corpus(data: Path) -> Corpus:
    """What the experiments read too (``experiments/prepare_data.py``), without a validation split."""
    return Corpus(load_tokenizer(data / "tokenizer"), TokenFile.open(data / "train"), None)


class StepsTimed(Exception):
    """The last step is through; with the seconds and peak bytes of the rank with most, and the number of ranks."""

    def __init__(self, seconds: float, peak_bytes: float, world_size: int) -> None:
        super().__init__(seconds, peak_bytes, world_size)
        self.seconds, self.peak_bytes, self.world_size = seconds, peak_bytes, world_size


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
    main()
