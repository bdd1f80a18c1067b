"""Laws of learned rows that are shared out: what each process computes is what it would with a copy of all rows."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from scone.inference.loading import load_model
from scone.models import row_files
from scone.models.learned_rows import LearnedRows, RowShards, is_untouched
from scone.models.row_files import ROWS_FOLDER, append_rows, save_shares
from scone.tests import tiny
from scone.tests.training.runs import run_ranks
from scone.training.distributed import (
    clip_sharded_gradients,
    load_whole_weights,
    local,
    report_lost_ranks,
    shard,
    whole_weights,
)
from scone.training.optimizer import PER_ROW, AdamWWithRows, learned_rows
from scone.utils.environment import process_bytes
from scone.utils.errors import SconeError

ROWS = 41  # no multiple of 2, 3 or 4
WIDTH = 16
PASSES = 2
STEPS = 3


def model_with_rows() -> Any:
    """A model whose rows have begun to learn."""
    model = tiny.scone("llama", f_gram_model=False, learned_rows=ROWS).train()
    with torch.no_grad():
        learned_rows(model).weight.copy_(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))
    return model


def trained(
    shared: bool,
    strategy: str,
    rank: int,
    world_size: int,
    on_host: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any, list]:
    """A model after a few steps of accumulated, clipped gradients, its optimizer, and the losses on the way.

    Ranks see other text, and the last one none with an f-gram in the second step.
    """
    model = model_with_rows()
    rows = learned_rows(model)
    rows.on_host = on_host
    rows.weight = torch.nn.Parameter(rows.weight.detach().to(dtype))
    model.config.rows_dtype = str(dtype).removeprefix("torch.")
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
    for step in range(steps):
        for turn in range(PASSES - step % 2):  # accumulated or not
            ids = tiny.tokens(2, 20, 100 * step + 10 * turn + rank)
            if step == 1 and rank == world_size - 1:
                ids = torch.full_like(ids, tiny.VOCAB_SIZE - 1)
            ids = ids.to(device)
            loss = wrapped(input_ids=ids, labels=ids).loss
            (loss / PASSES).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(dense, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    if not steps:
        return model, optimizer, losses
    model.eval()
    ids = tiny.tokens(2, 20, rank).to(device)
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids).loss)
    return model, optimizer, losses


def check_that_shares_equal_copies(
    rank: int, world_size: int, strategy: str, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    copies, its_optimizer, its_losses = trained(False, strategy, rank, world_size, dtype=dtype)
    copied = learned_rows(copies)
    expected = its_optimizer.state[copied.weight]
    assert (copied.weight - learned_rows(model_with_rows()).weight).abs().max() > 0.1
    assert expected["visits"].max() > 1
    for on_host in (False, True) if world_size == 2 else (False,):
        shared, optimizer, losses = trained(True, strategy, rank, world_size, on_host, dtype=dtype)
        assert all(map(torch.equal, losses, its_losses))
        theirs = dict(copies.named_parameters())
        for name, weight in shared.named_parameters():
            if not name.endswith("rows.weight"):
                assert torch.equal(local(weight), local(theirs[name])), (name, strategy, world_size)
        rows = learned_rows(shared)
        check_state(rows, optimizer, copied.weight, expected)
        memory = torch.tensor([part.nbytes for part in (rows.weight, *map(optimizer.state[rows.weight].get, PER_ROW))])
        dist.all_reduce(memory)
        assert memory.sum() == ROWS * (dtype.itemsize * WIDTH + 8)
    if strategy == "fsdp":
        check_that_whole_weights_are_cut(copies, copied.weight, rank, world_size, folder)
    if strategy == "ddp":
        save(shared, optimizer, folder / str(world_size))
        if rank == 0:
            torch.save({"weight": copied.weight.detach()} | expected, folder / f"{world_size}.pt")
        shared, optimizer, _ = trained(True, strategy, rank, world_size, steps=0, dtype=dtype)
        shared.load_state_dict(copies.state_dict())
        optimizer.load_state_dict(its_optimizer.state_dict())
        check_state(learned_rows(shared), optimizer, copied.weight, expected)


def check_that_whole_weights_are_cut(
    copies: Any, weight: torch.Tensor, rank: int, world_size: int, folder: Path
) -> None:
    """A checkpoint of one process goes on as one of several that is sharded, whether it is one file or many."""
    state = {name: tensor.clone() for name, tensor in whole_weights(copies, keep=True).items()}
    for size in ("5GB", "2KB"):
        (folder / f"whole{rank}-{size}").mkdir(exist_ok=True)
        save_torch_state_dict(state, folder / f"whole{rank}-{size}", max_shard_size=size)
        shared, _, _ = trained(True, "fsdp", rank, world_size, steps=0)
        load_whole_weights(shared, folder / f"whole{rank}-{size}")
        rows = learned_rows(shared)
        assert torch.equal(rows.weight, rows.shards.own(weight))
        loaded = whole_weights(shared, keep=True)
        assert all(torch.equal(loaded[name], state[name]) for name in state.keys() - {"f_gram_embedding.rows.weight"})
    assert len(list((folder / f"whole{rank}-2KB").glob("*.safetensors"))) > 2


def check_that_gradients_are_clipped_as_torch_does(rank: int) -> None:
    """By the norm over all processes, whether it is too large or not; some have nothing of a small parameter."""
    model = tiny.trunk("llama")
    shard(model, reshard_after_forward=True)
    ids = tiny.tokens(2, 20, rank)
    model(input_ids=ids, labels=ids).loss.backward()
    parameters = list(model.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]
    for most in (0.01, 100.0):
        results = []
        for clip in (clip_sharded_gradients, nn.utils.clip_grad_norm_):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            norm = clip(parameters, most)
            whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
            results.append([whole, *(local(parameter.grad) for parameter in parameters)])
        torch.testing.assert_close(*results)
    for parameter in parameters:  # of a frozen trunk
        parameter.grad = None
    assert clip_sharded_gradients(parameters, 1.0) == 0


def check_state(rows: LearnedRows, optimizer: Any, weight: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    """Weight and state are this rank's share of those of all rows."""
    assert torch.equal(rows.weight, rows.shards.own(weight))
    for name, value in expected.items():
        whole = rows.shards.own(value) if name in PER_ROW else value
        assert torch.equal(optimizer.state[rows.weight][name], whole), name


def save(model: Any, optimizer: Any, folder: Path) -> None:
    """As the trainer does: a checkpoint, and a finished model, of two ranks in several files."""
    rows = learned_rows(model)
    if rows.exchange is None:
        return
    state = optimizer.state[rows.weight]
    tensors = {"weight": rows.weight.detach()} | {name: state[name] for name in PER_ROW}
    save_shares(folder / "model" / ROWS_FOLDER, tensors, rows.shards, None)
    with pytest.raises(SconeError, match="shared out over processes"):
        model.save_pretrained(folder / "model")
    for name in ("model", "final_model"):
        if rows.shards.rank == 0:
            size = "10KB" if rows.shards.world_size == 2 else "1GB"
            model.save_pretrained(folder / name, state_dict=model.state_dict(), max_shard_size=size)
    append_rows(folder / "final_model", "f_gram_embedding.rows.weight", rows)


def check_many_rows(rank: int) -> None:
    """Five million rows over four ranks, over 2³¹ numbers on each: memory and time are those of what is touched."""
    rows = LearnedRows(5_000_000, 2048)
    rows.share_out()
    assert is_untouched(rows.weight)
    optimizer = AdamWWithRows([], rows=rows, rows_learning_rate=0.1)
    ids = np.unique(np.append(np.random.default_rng(rank).integers(0, rows.num_rows, 500), [0, rows.num_rows - 1]))
    chains = torch.arange(1, len(ids) + 1)[:, None]
    for _ in range(3):
        rows(ids, chains).sum().backward()
        optimizer.step()
    found = rows(ids, chains)
    assert (found < 0).all()
    assert torch.equal(found[0], found[-1])  # each was touched by all ranks in all steps
    assert process_bytes() < 1e9, "a fortieth of all rows"


def check_that_a_full_disk_is_everybodys(rank: int, folder: Path) -> None:
    """One rank cannot write: none goes on as if the checkpoint were whole."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    with pytest.raises(OSError, match="File too large"):
        save_shares(folder / "full", {"weight": torch.ones(100, 100)}, RowShards(400, rank, 4), None)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@report_lost_ranks()
def learn(rows: LearnedRows) -> None:
    optimizer = AdamWWithRows([], rows=rows)
    for _ in range(100):  # what a lost rank sent may still be on its way
        rows(np.arange(10), torch.ones(3, 2, dtype=torch.int64)).sum().backward()
        optimizer.step()


def check_that_a_lost_rank_is_one_line(rank: int) -> None:
    rows = LearnedRows(10, 4)
    rows.share_out()
    if rank == 3:
        os._exit(0)
    assert re.search(r"lost the connection .* --resume_from_checkpoint", tiny.refusal(learn, rows))


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
        assert rows.are_pinned_for(device) == on_host
        state = optimizer.state[rows.weight]
        learned.append([*seen, *(part.to(device) for part in (weight, state["sums"], state["columns"]))])
    own = rows.shards.own
    *vectors, weight, sums, columns = learned[0]
    for mine, ours in zip([*vectors, own(weight), own(sums), columns], learned[1], strict=True):
        assert torch.equal(mine, ours), "shares and copies"
    assert all(map(torch.equal, learned[1], learned[2])), "on the GPU and on the host"
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
    row_files.BLOCK_ROWS = 4
    for world_size in (1, 2, 3, 4):
        if rank < world_size:
            group = f"file://{folder}/group{world_size}"
            dist.init_process_group("gloo", init_method=group, rank=rank, world_size=world_size)
            check_that_shares_equal_copies(rank, world_size, "ddp", folder)
            if world_size == 2:
                check_that_shares_equal_copies(rank, world_size, "ddp", folder / "bf16", torch.bfloat16)
            if world_size == 3:
                check_that_shares_equal_copies(rank, world_size, "fsdp", folder)
                check_that_gradients_are_clipped_as_torch_does(rank)
            if world_size == 4:
                check_many_rows(rank)
                check_that_a_full_disk_is_everybodys(rank, folder)
                check_that_a_lost_rank_is_one_line(rank)
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2, 3 and 4 ranks saved: checkpoints, finished models, and what is expected of them."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "bf16").mkdir()
    run_ranks(_as_ranks, 4, folder)
    return folder


def test_sharded_rows_equal_replicated_rows(saved: Path) -> None:
    """Bit for bit, over 1, 2, 3 and 4 processes, under DDP and FSDP: what each checks for itself (`_as_ranks`)."""
    assert all((saved / f"{world_size}.pt").exists() for world_size in (1, 2, 3, 4))


SAVED = ["2", "3", "4", "bf16/2"]


@pytest.mark.parametrize("owners", SAVED)
def test_resharded_checkpoint_equals_itself(saved: Path, owners: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of processes reads it."""
    monkeypatch.setattr(row_files, "BLOCK_ROWS", 4)
    whole = torch.load(saved / f"{owners}.pt", weights_only=True)
    folder = saved / owners / "model" / ROWS_FOLDER
    assert row_files.saved_shape(folder) == (ROWS, WIDTH)
    for world_size in (1, 2, 3, 4, 6):
        for rank in range(world_size):
            shards = RowShards(ROWS, rank, world_size)
            expected = {name: shards.own(whole[name]) for name in ("weight", *PER_ROW)}
            found = {name: torch.full_like(value, torch.nan) for name, value in expected.items()}
            row_files.load_shares(folder, found, shards)
            for name, value in expected.items():
                assert torch.equal(found[name], value), (name, rank, world_size)


@pytest.mark.parametrize("name", ["model", "final_model"])
@pytest.mark.parametrize("owners", SAVED)
def test_what_several_processes_saved_loads_as_one_model(saved: Path, owners: str, name: str) -> None:
    folder = saved / owners / name
    tiny.scone("llama").vocabulary.save(folder)
    loaded = load_model(folder, device="cpu").model
    whole = torch.load(saved / f"{owners}.pt", weights_only=True)
    assert torch.equal(learned_rows(loaded).weight, whole["weight"])
    if name == "final_model":  # read where it lies: processes that precompute its table share what they touch
        assert ".safetensors" in mapping_of(learned_rows(loaded).weight)


def mapping_of(tensor: torch.Tensor) -> str:
    """The file that is mapped where a tensor's memory begins."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line
    return ""


def test_damaged_shares_are_one_line(saved: Path, tmp_path: Path) -> None:
    """A lost file, or half of one."""
    for damage in ("lost", "cut"):
        folder = tmp_path / damage
        shutil.copytree(saved / "3" / "model", folder)
        tiny.scone("llama").vocabulary.save(folder)
        share = folder / ROWS_FOLDER / "2-of-3.safetensors"
        content = share.read_bytes()
        share.unlink()
        if damage == "cut":
            share.write_bytes(content[: len(content) // 2])
        assert "cannot load a causal language model" in tiny.refusal(load_model, folder, device="cpu")


def test_untouched_memory_is_told_from_memory_that_is_zero() -> None:
    rows = LearnedRows(5000, 64)
    assert is_untouched(rows.weight) == Path("/proc/self/smaps").exists()
    rows.weight.data[4999, 63] = 1.0  # unseen by autograd's version counter
    assert not is_untouched(rows.weight)
    rows.reset()
    assert not rows.weight.any()
    assert not is_untouched(rows.weight)


def loaded_rows(folder: Path) -> LearnedRows:
    """Ones, mapped from their file, as a loaded model's are."""
    save_file({"weight": torch.ones(5000, 64)}, folder / "rows.safetensors")
    rows = LearnedRows(5000, 64)
    with safe_open(folder / "rows.safetensors", "pt") as file:
        rows.load_state_dict({"weight": file.get_tensor("weight")}, assign=True)
    return rows


def test_loaded_rows_are_not_taken_for_untouched(tmp_path: Path) -> None:
    """Nobody has written to their memory either; they once came to a GPU as zeros."""
    assert not is_untouched(loaded_rows(tmp_path).weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loaded_rows_come_to_a_gpu(tmp_path: Path) -> None:
    assert bool((loaded_rows(tmp_path).to("cuda").weight == 1).all())
