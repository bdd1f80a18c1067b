"""Laws of learned rows that are shared out: what each process computes is what it would with a copy of all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from scone.models.learned_rows import LearnedRows
from scone.tests import tiny
from scone.training.optimizer import AdamWWithRows, learned_rows
from scone.training.sharding import shard

ROWS = 41  # no multiple of 2, 3 or 4
PASSES = 2
STEPS = 3


def model_with_rows() -> Any:
    """A model whose rows have begun to learn."""
    model = tiny.scone("llama", f_gram_model=False, learned_rows=ROWS).train()
    with torch.no_grad():
        learned_rows(model).weight.copy_(torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1)))
    return model


def local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def trained(
    shared: bool,
    strategy: str,
    rank: int,
    world_size: int,
    on_host: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> tuple[Any, Any, list]:
    """A model after a few steps of accumulated, clipped gradients, its optimizer, and the losses on the way.

    Ranks see other text, and the last one none with an f-gram in the second step.
    """
    model = model_with_rows()
    rows = learned_rows(model)
    rows.on_host = on_host
    if shared:
        rows.share_out()
        assert rows.weight.shape[0] == len(range(rank, ROWS, world_size))
    model.to(device)
    if strategy == "fsdp":
        shard(model, reshard_after_forward=True)
    dense = [parameter for parameter in model.parameters() if parameter is not rows.weight]
    optimizer = AdamWWithRows([{"params": dense, "lr": 1e-2}], rows=rows, rows_learning_rate=0.1)
    wrapped = DistributedDataParallel(model) if strategy == "ddp" and world_size > 1 else model
    losses = []
    for step in range(STEPS):
        for turn in range(PASSES):
            ids = torch.from_numpy(tiny.corpus(40, 100 * step + 10 * turn + rank).reshape(2, 20))
            if step == 1 and rank == world_size - 1:
                ids = torch.full_like(ids, tiny.VOCAB_SIZE - 1)
            ids = ids.to(device)
            loss = wrapped(input_ids=ids, labels=ids).loss
            (loss / PASSES).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(dense, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids).loss)
    return model, optimizer, losses


def check_that_shares_equal_copies(rank: int, world_size: int, strategy: str) -> None:
    copies, its_optimizer, its_losses = trained(False, strategy, rank, world_size)
    for on_host in (False, True):
        shared, optimizer, losses = trained(True, strategy, rank, world_size, on_host)
        assert all(map(torch.equal, losses, its_losses))
        assert (learned_rows(copies).weight - learned_rows(model_with_rows()).weight).abs().max() > 0.1
        theirs = dict(copies.named_parameters())
        for name, weight in shared.named_parameters():
            if not name.endswith("rows.weight"):
                assert torch.equal(local(weight), local(theirs[name])), (name, strategy, world_size)
        rows, copied = learned_rows(shared), learned_rows(copies)
        assert torch.equal(rows.weight, rows.shards.own(copied.weight))
        state, expected = optimizer.state[rows.weight], its_optimizer.state[copied.weight]
        assert expected["visits"].max() > 1
        for name, value in expected.items():
            assert torch.equal(
                state[name], rows.shards.own(value) if len(value.shape) and len(value) == ROWS else value
            )
        memory = sum(tensor.nbytes for tensor in (rows.weight, state["sums"], state["visits"]))
        assert memory == len(rows.weight) * (4 * 16 + 8)


def _touch_on_a_gpu(rank: int, folder: Path) -> None:
    """Rows of copies, of shares on the GPUs and of shares on the host learn the same."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{folder}/nccl", rank=rank, world_size=2, device_id=device)
    learned = []
    for shared, on_host in ((False, False), (True, False), (True, True)):
        rows = LearnedRows(100_001, 256)
        with torch.no_grad():
            rows.weight.copy_(torch.randn(rows.weight.shape, generator=torch.Generator().manual_seed(1)))
        rows.on_host = on_host
        if shared:
            rows.share_out()
        rows.to(device)
        optimizer = AdamWWithRows([], rows=rows, rows_learning_rate=0.1)
        random = np.random.default_rng(rank)
        seen = []
        for step in range(4):
            for _ in range(1 + step % 2):
                ids = random.permutation(rows.num_rows)[: 0 if (step, rank) == (2, 1) else 5000]
                chains = torch.from_numpy(random.integers(0, len(ids) + 1, (6000, 3))).to(device)
                vectors = rows(ids, chains)
                direction = torch.from_numpy(random.standard_normal(vectors.shape, np.float32)).to(device)
                (vectors * direction).sum().backward()
                seen.append(vectors.detach())
            optimizer.step()
        weight = rows.weight.detach()
        assert weight.device.type == ("cpu" if on_host else "cuda")
        state = optimizer.state[rows.weight]
        learned.append([*seen, *(part.to(device) for part in (weight, state["sums"], state["columns"]))])
    own = rows.shards.own
    *vectors, weight, sums, columns = learned[0]
    for mine, ours in zip([*vectors, own(weight), own(sums), columns], learned[1], strict=True):
        assert torch.equal(mine, ours), "shares and copies"
    for ours, its in zip(learned[1], learned[2], strict=True):  # a kernel of its own, which adds in another order
        torch.testing.assert_close(ours, its, atol=1e-4, rtol=1e-4)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_rows_equal_replicated_rows_on_gpus(tmp_path: Path) -> None:
    """Over NCCL, bit for bit; and rows_on_host_equal_rows_on_device."""
    torch.multiprocessing.spawn(_touch_on_a_gpu, args=(tmp_path,), nprocs=2)


def _train_on_a_gpu(rank: int, folder: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{folder}/model", rank=rank, world_size=2, device_id=device)
    for strategy in ("ddp", "fsdp"):
        copies, _, its_losses = trained(False, strategy, rank, 2, device=device)
        shared, _, losses = trained(True, strategy, rank, 2, device=device)
        torch.testing.assert_close(losses, its_losses, atol=1e-4, rtol=1e-4)
        rows, copied = learned_rows(shared), learned_rows(copies)
        torch.testing.assert_close(rows.weight, rows.shards.own(copied.weight), atol=1e-3, rtol=1e-3)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_models_with_sharded_rows_train_on_gpus(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_on_a_gpu, args=(tmp_path,), nprocs=2)


def _as_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for world_size in (1, 2, 3, 4):
        if rank < world_size:
            group = f"file://{folder}/{world_size}"
            dist.init_process_group("gloo", init_method=group, rank=rank, world_size=world_size)
            for strategy in ("ddp", "fsdp"):
                check_that_shares_equal_copies(rank, world_size, strategy)
            dist.destroy_process_group()


def test_sharded_rows_equal_replicated_rows(tmp_path: Path) -> None:
    """Bit for bit, over 1, 2, 3 and 4 processes, under DDP and FSDP, with rows on the host too."""
    torch.multiprocessing.spawn(_as_ranks, args=(tmp_path,), nprocs=4)
