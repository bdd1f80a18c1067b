"""A rank of a run, as `scone train` is one, watched.

The second rank is killed once, after the fifth step, where the folder has a file `kill`, which it takes away. How DDP
wraps the model is written to the folder.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scone.scripts.train import main
from scone.training import run

DDP_OPTIONS = ("gradient_as_bucket_view", "find_unused_parameters", "broadcast_buffers")


class Watch(TrainerCallback):
    """Tells of DDP after the first step, and kills this process after the fifth, as a machine that fails would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 1 and os.environ["RANK"] == "0":
            wrapped = [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
            said = [{name: getattr(each, name) for name in DDP_OPTIONS} for each in wrapped]
            (self.folder / "ddp.json").write_text(json.dumps(said))
        if os.environ["RANK"] == "1" and state.global_step == 5 and (self.folder / "kill").exists():
            (self.folder / "kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def run_watched(folder: Path, flags: list[str]) -> None:
    """`scone train`, watched."""
    warnings.filterwarnings("error", ".*([Bb]uffers|DistributedDataParallel|DDP)", FutureWarning)
    run.train = functools.partial(run.train, callbacks=[Watch(folder)])
    main(flags)
    assert not dist.is_initialized(), "gloo's threads may abort the process when it exits with a group"
