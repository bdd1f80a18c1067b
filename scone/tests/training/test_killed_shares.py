"""Processes that are killed, or have no room, while they write their shares of the rows: nothing is lost."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from scone.tests.hardening.kills import kill_at_change
from scone.tests.training.runs import (
    RARELY,
    STILL,
    assert_same_weights,
    command_line,
    free_port,
    join,
    options,
    run_command,
    run_ranks,
)
from scone.training.distributed import destroy_process_group
from scone.training.run import train
from scone.training.run_folder import complete_checkpoints

pytestmark = pytest.mark.slow
RUN = STILL | RARELY | {"training.save_steps": 2, "training.resume_from_checkpoint": "true"}
RUN |= {"model.rows_dtype": "bfloat16"}
HALF = 6000
"""Bytes, of a share of some 12,000."""


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _train(rank: int, port: int, corpus: Path, folder: Path, victim: int, moment: int) -> None:
    """One of two ranks. ``victim`` is killed at the so many-th touch of the shares of the fourth step (-1: by the
    system, in the middle of its file).
    """
    join(rank, port)
    if rank == victim and moment > 0:
        kill_at_change(moment, folder / "checkpoint-4" / "rows")()
    elif rank == victim:
        limit_files()
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    train(options(corpus, folder, **RUN), quiet=True)
    destroy_process_group()


def _run_without_room(rank: int, port: int, flags: list[str], folder: Path) -> None:
    """The command of one of two ranks, of which the second cannot write its share; its exit status and its line."""
    if rank == 1:
        limit_files()
    run_command(rank, port, flags, folder)


def test_a_job_killed_while_shares_are_written_goes_on_from_the_last_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """At several points, one after the other; in the end the model has the bits of a run that nobody disturbed."""
    run_ranks(_train, 2, free_port(), corpus, tmp_path / "whole", 2, 1)
    folder = tmp_path / "run"
    # its folder is made, half of its file is there, all of it is and has its name
    for victim, moment in ((0, 1), (1, -1), (1, 6)):
        with pytest.raises(ProcessExitedException) as ended:
            run_ranks(_train, 2, free_port(), corpus, folder, victim, moment)
        assert ended.value.signal_name in ("SIGKILL", "SIGXFSZ"), (victim, moment)
        assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-2"], (victim, moment)
    run_ranks(_train, 2, free_port(), corpus, folder, 2, 1)
    assert_same_weights(tmp_path / "whole" / "final_model", folder / "final_model", atol=0.0, rtol=0.0)
    for checkpoint in complete_checkpoints(folder):
        names = {path.name for path in (checkpoint / "rows").iterdir()}
        assert names == {"1-of-2.safetensors", "2-of-2.safetensors"}


def test_no_room_for_a_share_is_one_line_everywhere(corpus: Path, tmp_path: Path) -> None:
    flags = command_line(corpus, tmp_path / "run", "--max_steps", "4", "--save_steps", "2")
    run_ranks(_run_without_room, 2, free_port(), flags, tmp_path)
    for rank in range(2):
        said = (tmp_path / f"{rank}.err").read_text()
        (line,) = [line for line in said.splitlines() if line.startswith("error:")]
        assert "File too large" in line
        assert line.endswith("rows; raise the limit on file sizes (ulimit -f) and run again")
        assert "Traceback" not in said
        assert (tmp_path / f"{rank}.status").read_text() == "2"
    assert not complete_checkpoints(tmp_path / "run")
