"""Runs of two processes over gloo: what they compute, what they save, and what happens when one is killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scone.tests.training.runs import STILL, assert_same_weights, command_line, options
from scone.training.distributed import is_lost_rank, report_lost_ranks
from scone.training.run import train
from scone.training.run_folder import complete_checkpoints
from scone.utils.errors import SconeError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
TORCH_LAUNCH = ("torch.distributed.launch", "--standalone", "--nproc_per_node=2")
ACCELERATE_LAUNCH = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
    *("--dynamo_backend=no", "--main_process_port={free_port}", "--num_cpu_threads_per_process=1"),
)
LAW = {"atol": 2e-4, "rtol": 2e-3}
"""How far sums in another order may move the weights of six steps."""


def launch(launcher: tuple[str, ...], *program: str) -> str:
    """What it prints."""
    with socket.create_server(("127.0.0.1", 0)) as free:  # accelerate 1.4 does not look for a free port itself
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", *(word.replace("{free_port}", port) for word in launcher), *program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory) -> Path:
    """The final model of one process with batches of four."""
    return train(options(corpus, tmp_path_factory.mktemp("one"), **STILL), quiet=True)


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory) -> Path:
    """The run of two processes with batches of two (DDP)."""
    folder = tmp_path_factory.mktemp("two")
    flags = command_line(corpus, folder, "--batch_size", "2", "--max_steps", "6", "--save_steps", "3")
    launch(TORCH_LAUNCH, "-m", "scone.scripts.train", *flags)
    return folder


@pytest.fixture(scope="module")
def sharded(corpus, two, tmp_path_factory) -> Path:
    """The sharded run of two processes that goes on from the other's checkpoint at half-time (FSDP)."""
    folder = as_if_killed(two, tmp_path_factory.mktemp("sharded") / "run")
    flags = command_line(corpus, folder, "--batch_size", "2", "--max_steps", "6", "--save_steps", "1")
    launch(
        ACCELERATE_LAUNCH, "--module", "scone.scripts.train", *flags, "--fsdp", "full_shard", "--resume_from_checkpoint"
    )
    return folder


def as_if_killed(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it would be had it been killed while it wrote its last checkpoint."""
    shutil.copytree(run, copy)
    (complete_checkpoints(copy)[-1] / "complete.json").unlink()
    shutil.rmtree(copy / "final_model")
    return copy


def test_two_ranks_equal_one_rank_with_twice_the_batch(one, two):
    """DDP; the learned rows, which DDP does not know, are averaged by our optimizer."""
    assert_same_weights(one, two / "final_model", **LAW)


def test_two_sharded_ranks_equal_one_rank_with_twice_the_batch(one, sharded):
    """And a sharded run resumes from the checkpoint of one that was not."""
    assert_same_weights(one, sharded / "final_model", **LAW)


@pytest.mark.parametrize("run", ["two", "sharded"])
def test_one_rank_resumes_what_two_began(corpus, one, run, request, tmp_path):
    folder = as_if_killed(request.getfixturevalue(run), tmp_path / "resumed")
    changes = {"training.resume_from_checkpoint": "true", "training.save_steps": 100}
    assert_same_weights(one, train(options(corpus, folder, **STILL, **changes), quiet=True), **LAW)


def test_two_nodes_equal_one_rank_with_twice_the_batch(corpus, one, tmp_path):
    """Two launchers, each with an address of its own, as on two machines that share a file system."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = command_line(corpus, tmp_path / "run", "--batch_size", "2", "--max_steps", "6", "--save_steps", "3")
    nodes = []
    for rank, address in enumerate(("127.0.0.1", "127.0.0.2")):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}"]
        launcher += ["--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
        launcher += [f"--local_addr={address}", "-m", "scone.scripts.train", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with (tmp_path / f"{rank}.log").open("w") as log:
            nodes.append(subprocess.Popen(launcher, stdout=log, stderr=log, env=environment))
    try:
        codes = [node.wait(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert codes == [0, 0], [(tmp_path / f"{rank}.log").read_text()[-2000:] for rank in range(2)]
    assert_same_weights(one, tmp_path / "run" / "final_model", **LAW)


def test_max_restarts_brings_a_killed_rank_back_to_the_last_checkpoint(corpus, one, tmp_path):
    """A fresh folder with --resume_from_checkpoint simply starts; after the kill the same command resumes."""
    flags = command_line(
        *(corpus, tmp_path / "run", "--batch_size", "2", "--max_steps", "6", "--save_steps", "2"),
        "--resume_from_checkpoint",
    )
    worker = Path(__file__).with_name("dying_rank.py")
    launch((*TORCHRUN, "--max_restarts=1"), str(worker), str(tmp_path / "died_at"), *flags)
    assert (tmp_path / "died_at").read_text() == "rank 1, step 5"
    assert_same_weights(one, tmp_path / "run" / "final_model", **LAW)


def test_no_process_exits_with_what_connects_it_to_the_others(corpus, tmp_path):
    """Else some abort as they exit, and torchrun ends the others while they save."""
    flags = command_line(corpus, tmp_path / "run", "--batch_size", "2", "--max_steps", "1", "--fsdp", "full_shard")
    launch(TORCHRUN, str(Path(__file__).with_name("leaving_rank.py")), *flags)


def test_gradients_are_reduced_where_they_are_and_nothing_is_looked_for(corpus, tmp_path):
    flags = command_line(corpus, tmp_path / "run", "--max_steps", "1")
    said = json.loads(launch(TORCHRUN, str(Path(__file__).with_name("ddp_options.py")), *flags).splitlines()[-1])
    assert said == {"gradient_as_bucket_view": True, "find_unused_parameters": False, "broadcast_buffers": False}


def test_a_lost_process_is_one_line(monkeypatch):
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9999")
    with pytest.raises(RuntimeError, match=r"pair\.cc"), report_lost_ranks():
        raise closed  # alone there is nobody to lose
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(SconeError, match="start again with --resume_from_checkpoint"), report_lost_ranks():
        raise closed
    assert not is_lost_rank(RuntimeError("shapes do not match"))
