"""A rank of a run whose second rank is killed once, after the fifth step: `dying_rank.py MARKER FLAGS …`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scone.scripts.train import read_arguments
from scone.training.distributed import destroy_process_group
from scone.training.run import train


class DieOnce(TrainerCallback):
    """Kill this process, as a machine that fails would, unless the marker tells that it was done before."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == 5 and not self.marker.exists():
            self.marker.write_text("rank 1, step 5", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    train(read_arguments(sys.argv[2:]), callbacks=[DieOnce(Path(sys.argv[1]))], quiet=True)
    destroy_process_group()  # as the command does: a rank that exits with its group may abort
