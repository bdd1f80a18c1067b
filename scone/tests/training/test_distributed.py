"""Runs of two processes over gloo: what they compute, what they save, and what happens when one is killed.

The command lines of `torch.distributed.launch` and torchrun are tested as they are documented, in scripts/.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scone.tests.training.a_rank import run_watched
from scone.tests.training.runs import (
    STILL,
    assert_same_weights,
    command_line,
    free_port,
    in_shards,
    join,
    options,
    run_ranks,
)
from scone.training.distributed import is_lost_rank, report_lost_ranks
from scone.training.run import train
from scone.training.run_folder import complete_checkpoints

pytestmark = pytest.mark.slow

LAW = {"atol": 2e-4, "rtol": 2e-3}
"""How far sums in another order may move the weights of six steps."""


def launch(folder: Path, flags: list[str]) -> None:
    """Run ranks as torchrun does, by its agent, but forked; in a thread, where the agent leaves signals alone."""
    config = LaunchConfig(
        *(1, 1, 2),  # nodes, from and to; processes of each
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=1,
        start_method="forkserver",
    )
    with ThreadPoolExecutor(1) as thread:
        thread.submit(elastic_launch(config, run_watched), folder, flags).result(timeout=300)


def _node(rank: int, port: int, folder: Path, flags: list[str]) -> None:
    join(rank, port, num_nodes=2)
    run_watched(folder, flags)


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory) -> Path:
    """The final model of one process with batches of four."""
    return train(options(corpus, tmp_path_factory.mktemp("one"), **STILL), quiet=True)


def flags_of(corpus: Path, run: Path, *more: str) -> list[str]:
    """Of one of two ranks, with batches of two."""
    return command_line(corpus, run, "--batch_size", "2", "--max_steps", "6", "--eval_steps", "1000", *more)


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory) -> Path:
    """The run of two nodes of a process each (DDP), with one file system."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(_node, 2, free_port(), folder, flags_of(corpus, folder / "run", "--save_steps", "3"))
    return folder / "run"


@pytest.fixture(scope="module")
def sharded(corpus, two, tmp_path_factory) -> Path:
    """The sharded run of two processes that goes on from the other's checkpoint at half-time (FSDP), whose weights
    are in several files. Its second rank is killed once, and the launcher starts the same command again.
    """
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "kill").touch()
    run = as_if_killed(two, folder / "run")
    in_shards(complete_checkpoints(run)[-1])
    flags = flags_of(corpus, run, "--save_steps", "1", "--fsdp", "full_shard")
    launch(folder, [*flags, "--resume_from_checkpoint"])
    assert not (folder / "kill").exists()
    return folder / "run"


def as_if_killed(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it would be had it been killed while it wrote its last checkpoint."""
    shutil.copytree(run, copy)
    (complete_checkpoints(copy)[-1] / "complete.json").unlink()
    shutil.rmtree(copy / "final_model")
    return copy


@pytest.mark.parametrize("run", ["two", "sharded"])
def test_two_ranks_equal_one_rank_with_twice_the_batch(one, run, request):
    """Of the learned rows too, which DDP does not know; whether plainly, or sharded from a checkpoint that was not and
    brought back to the last checkpoint after a kill. Ranks assert that they leave without a process group: else some
    abort as they exit, and torchrun ends the others while they save.
    """
    assert_same_weights(one, request.getfixturevalue(run) / "final_model", **LAW)


@pytest.mark.parametrize("run", ["two", "sharded"])
def test_one_rank_resumes_what_two_began(corpus, one, run, request, tmp_path):
    folder = as_if_killed(request.getfixturevalue(run), tmp_path / "resumed")
    if run == "two":
        in_shards(complete_checkpoints(folder)[-1])
    changes = {"training.resume_from_checkpoint": "true", "training.save_steps": 100}
    assert_same_weights(one, train(options(corpus, folder, **STILL, **changes), quiet=True), **LAW)


def test_a_model_card_counts_the_rows_of_all_ranks(one, two):
    cards = [(folder / "README.md").read_text().splitlines() for folder in (one, two / "final_model")]
    counts = [[line for line in card if "parameters" in line or "learned rows" in line] for card in cards]
    assert len(counts[0]) == 3
    assert counts[0] == counts[1]


def test_gradients_are_reduced_where_they_are_and_nothing_is_looked_for(two):
    expected = {"gradient_as_bucket_view": True, "find_unused_parameters": False, "broadcast_buffers": False}
    assert json.loads((two.parent / "ddp.json").read_text()) == [expected]


def test_alone_nobody_is_lost():
    """Of several, one that is lost is one line: a process ends in test_row_shards."""
    with pytest.raises(RuntimeError, match=r"pair\.cc"), report_lost_ranks():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9999")
    assert not is_lost_rank(RuntimeError("shapes do not match"))
