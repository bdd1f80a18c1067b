"""Laws of the row-sparse optimizer."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.models.learned_rows import LearnedRows
from scone.tests.training.dense_row_rms import DenseRowRMS
from scone.tests.training.runs import run_ranks
from scone.training.muon import stacks
from scone.training.optimizer import AdamWWithRows, sum_by_row, update_with_rms


def touch(rows: LearnedRows, chains: torch.Tensor, direction: torch.Tensor) -> None:
    """One forward and backward pass in which f-gram m sums the rows of ``chains[m]`` (−1: none)."""
    row_ids, inverse = torch.unique(chains[chains >= 0], return_inverse=True)
    links = torch.zeros_like(chains)
    links[chains >= 0] = inverse + 1
    (rows(row_ids.numpy(), links) * direction).sum().backward()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), passes=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_rows_learn_as_row_rms_teaches_them(seed, passes):
    """Equal to row-RMS of an embedding whose gradient is summed by autograd; accumulated, or none in a step."""
    torch.manual_seed(seed)
    num_rows, width = 9, 4
    rows = LearnedRows(num_rows, width)
    ours = AdamWWithRows([{"params": [torch.nn.Parameter(torch.zeros(1))]}], rows=rows, rows_learning_rate=0.1)
    plain = torch.nn.Embedding(num_rows, width, dtype=torch.float64)
    reference = DenseRowRMS(num_rows, width, 0.1)
    for count in passes:
        ours.zero_grad()
        plain.weight.grad = torch.zeros_like(plain.weight)
        for _ in range(count):
            chains = torch.randint(-1, num_rows, (5, 2))
            direction = torch.randn(5, width)
            touch(rows, chains, direction)
            used = (chains >= 0)[..., None]
            (((plain(chains.clamp(min=0)) * used).sum(1)) * direction).sum().backward()
        ours.step()
        reference.step(plain.weight.grad.numpy())
        torch.testing.assert_close(
            rows.weight.detach().double(), torch.from_numpy(reference.weight), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_other_types_learn_the_same(dtype):
    """What no kernel of ours is for goes through PyTorch's operators."""
    states: list[dict] = [{}, {}]
    random = torch.Generator().manual_seed(0)
    weights = [torch.zeros(6, 3), torch.zeros(6, 3, dtype=dtype)]
    for ids in (torch.tensor([4, 1]), torch.tensor([1, 2, 5])):
        gradients = torch.randn(len(ids), 3, generator=random)
        for weight, state in zip(weights, states, strict=True):
            update_with_rms(weight, ids, gradients, 0.1, state)
    assert weights[0].abs().sum() > 0.5
    slack = 1e-6 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(weights[1].float(), weights[0], atol=slack, rtol=slack)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon (2.9 has)")
def test_muon_for_matrices_equals_torchs_own_and_comes_back_from_a_state_dict():
    """Beside AdamW in one optimizer, with a state dictionary in the middle; the last matrix never has a gradient."""
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (4, 6), (4, 6), (3,)]

    def parameters():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]

    def gradients(parameters, turn):
        for parameter in parameters[:-2] + parameters[-1:]:
            parameter.grad = torch.cos(parameter.detach() * (turn + 1))

    ours, theirs = parameters(), parameters()
    settings_ = {"lr": 0.1, "weight_decay": 0.1}
    muon = torch.optim.Muon(theirs[:-1], adjust_lr_fn="match_rms_adamw", **settings_)
    adamw = torch.optim.AdamW(theirs[-1:], **settings_)

    def make():
        groups = [{"params": ours[:-1], "muon": True} | settings_, {"params": ours[-1:]} | settings_]
        return AdamWWithRows(groups)

    optimizer = make()
    for turn in range(4):
        gradients(ours, turn)
        gradients(theirs, turn)
        optimizer.step()
        muon.step()
        adamw.step()
        if turn == 1:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make()
            optimizer.load_state_dict(saved)
    for our, their, start in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(our, their, atol=2e-3, rtol=0)  # bfloat16 within
        assert (start - our).abs().max() > 0.05 or our is ours[-2]


@pytest.mark.parametrize(("shape", "count", "lengths"), [((1024, 4096), 9, [4, 4, 1]), ((8192, 8192), 2, [1, 1])])
def test_stacks_of_matrices_are_of_bounded_size(shape, count, lengths):
    matrices = [torch.empty(shape, device="meta") for _ in range(count)]
    others = [torch.empty(shape[::-1], device="meta"), torch.empty(2, 2, device="meta")]
    made = stacks([*matrices, *others])
    assert [len(stack) for stack in made if stack[0].shape == shape][: len(lengths)] == lengths
    assert sum(map(len, made)) == count + 2
    assert all(len({matrix.shape for matrix in stack}) == 1 for stack in made)


def test_state_of_adam_is_replaced_and_said(caplog):
    rows = LearnedRows(4, 2)
    optimizer = AdamWWithRows([], rows=rows)
    optimizer.state[rows.weight] = {"step": torch.ones(()), "exp_avg": torch.zeros(4, 2)}
    touch(rows, torch.tensor([[1]]), torch.ones(1, 2))
    optimizer.step()
    assert set(optimizer.state[rows.weight]) == {"step", "sums", "visits", "columns", "mean"}
    assert "row-RMS starts anew" in caplog.text


def test_loss_scale_is_taken_out_of_the_rows_gradients():
    """One that changes: the update itself divides out a scale that stays."""
    results = []
    for scales in ((1.0, 1.0), (1024.0, 8.0)):
        rows, now = LearnedRows(3, 2), [0.0]
        dense = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
        optimizer = AdamWWithRows(dense, rows=rows, gradient_scale=lambda now=now: now[0])
        for now[0] in scales:
            touch(rows, torch.tensor([[1]]), now[0] * torch.tensor([[1e-6, -2e-6]]))
            optimizer.step()
            optimizer.zero_grad()
        results.append(rows.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1])


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=4))
def test_sum_by_row_equals_a_dictionary(parts):
    """Bit for bit, added part after part."""
    given_parts = [(np.array(sorted(ids), np.int64), torch.randn(len(ids), 2)) for ids in parts]
    expected: dict[int, torch.Tensor] = {}
    for ids, gradients in given_parts:
        for row, gradient in zip(ids.tolist(), gradients, strict=True):
            expected[row] = expected.get(row, torch.zeros(2)) + gradient
    distinct, summed = sum_by_row(given_parts)
    assert distinct.tolist() == sorted(expected)
    for row, total in zip(distinct.tolist(), summed, strict=True):
        assert torch.equal(total, expected[row])


def test_rows_on_the_host_stay_there():
    for on_host, expected in ((False, "meta"), (True, "cpu")):
        rows = LearnedRows(6, 3)
        rows.on_host = on_host
        torch.nn.ModuleList([rows]).to("meta", torch.float16)
        assert rows.weight.device.type == expected
    assert rows.weight.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_the_host_learn_as_those_on_the_gpu(dtype):
    """Bit for bit: the GPU reads and writes them where they lie, and who reads them there waits for it."""
    learned = []
    for on_host in (False, True):
        rows = LearnedRows(100_001, 256, dtype=dtype)
        rows.on_host = on_host
        rows.to("cuda")
        optimizer = AdamWWithRows([], rows=rows, rows_learning_rate=0.1)
        random = np.random.default_rng(0)
        for _ in range(5):
            ids = random.permutation(rows.num_rows)[:20_000]
            chains = torch.from_numpy(random.integers(0, len(ids) + 1, (6000, 3))).cuda()
            vectors = rows(ids, chains)
            direction = torch.from_numpy(random.standard_normal(vectors.shape, np.float32)).cuda()
            (vectors * direction).sum().backward()
            optimizer.step()
        weight = rows.state_dict()["weight"]
        assert weight.any()
        assert weight.device.type == ("cpu" if on_host else "cuda")
        assert rows.are_pinned_for(vectors.device) == on_host
        learned.append([weight.cpu(), vectors.detach(), optimizer.state[rows.weight]["sums"]])
        assert not copy.deepcopy(rows).pending
    assert all(map(torch.equal, *learned))


BACKENDS = ("gloo", "cpu:gloo")


def _learn_as_a_rank(rank: int, folder: Path) -> None:
    """Four steps of one of two ranks, which touch different rows, and in two steps one of them none; saves its rows."""
    for number, backend in enumerate(BACKENDS):
        dist.init_process_group(backend, init_method=f"file://{folder}/{number}", rank=rank, world_size=2)
        rows = LearnedRows(50, 8)
        optimizer = AdamWWithRows([], rows=rows, rows_learning_rate=0.1)
        random = np.random.default_rng(rank)
        for count in ((5, 0, 7, 3), (3, 4, 0, 3))[rank]:
            if count:
                chains = torch.from_numpy(random.choice(50, (count, 1), replace=False))
                touch(rows, chains, torch.from_numpy(random.standard_normal((count, 8), np.float32)))
            optimizer.step()
            optimizer.zero_grad()
        assert (optimizer._hosts is None) == (backend == "gloo")
        torch.save(rows.weight.detach(), folder / f"{backend}.{rank}")
        del optimizer
        dist.destroy_process_group()


def test_ranks_agree_whatever_their_default_group(tmp_path):
    """On GPUs it is not one in which hosts talk, and the optimizer makes one: "cpu:gloo" is not known to be one."""
    run_ranks(_learn_as_a_rank, 2, tmp_path)
    saved = [tmp_path / f"{backend}.{rank}" for backend in BACKENDS for rank in range(2)]
    found = [torch.load(path, weights_only=True) for path in saved]
    assert found[0].abs().sum() > 1
    assert all(torch.equal(rows, found[0]) for rows in found)
