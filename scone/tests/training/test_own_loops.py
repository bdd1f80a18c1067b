"""Laws of learned rows in other people's training loops: they learn there as a plain embedding of theirs would."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from scone.models import learned_rows as learned_rows_module
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.tests import tiny
from scone.tests.training.dense_row_rms import DenseRowRMS
from scone.tests.training.runs import run_ranks
from scone.training.optimizer import RowOptimizer, learned_rows
from scone.utils.errors import SconeError

ROWS = 40
STEPS = 3


class PlainRows(nn.Module):
    """The same trunk and rows, the most ordinary way: an embedding whose vectors are added position by position."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(model.trunk)
        weight = learned_rows(model).weight.detach()
        self.rows = nn.Embedding(*weight.shape, _weight=weight.clone())
        self.model = [model]  # not a part: it says which rows a position has

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        chains = row_chains(self.model[0], input_ids)
        added = self.rows(chains.clamp(min=0)) * (chains >= 0)[..., None]
        vectors = self.trunk.get_input_embeddings()(input_ids) + added.sum(2)
        return self.trunk(inputs_embeds=vectors, labels=labels)


def row_chains(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Rows of each position, int64 ``[B, T, K]``, -1: none."""
    if isinstance(model, OverEncodingForCausalLM):
        return torch.from_numpy(model.grams.rows(ids.numpy()))
    vocabulary, found = model.vocabulary, []
    for node in model.match(ids).reshape(-1).tolist():
        chain = []
        while node >= tiny.VOCAB_SIZE:
            rank = node - tiny.VOCAB_SIZE
            chain.append(rank if rank < model.config.learned_rows else -1)
            node = int(vocabulary.suffixes[rank])
        found.append(chain + [-1] * (vocabulary.max_n - len(chain)))
    return torch.tensor(found).view(*ids.shape, -1)


def fresh() -> SconeForCausalLM:
    return tiny.scone("llama", f_gram_model=False, learned_rows=ROWS)


def over_encoding() -> OverEncodingForCausalLM:
    return OverEncodingForCausalLM.from_trunk(tiny.trunk("llama"), num_rows=ROWS)


def batch(number: int) -> torch.Tensor:
    return tiny.tokens(3, 20, number)


def dense(model: nn.Module) -> torch.optim.Optimizer:
    # an eps that is not small: rounding must not decide which way a row goes
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def by_hand(
    model: Any,
    folder: Path,
    sgd: bool = False,
    parts: int = 1,
    clip: float | None = None,
    scale: bool = False,
    evaluating: bool = False,
    checkpointing: bool = False,
    idle: bool = False,
) -> None:
    """A loop as people write it; ``idle``: with passes that have no backward, which must leave nothing."""
    model.train(not evaluating)
    if checkpointing:
        trunk = model.trunk
        enable = getattr(trunk, "activation_checkpointing_enable", None) or trunk.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    optimizer = dense(model)
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)
    for step in range(STEPS):
        if idle:
            model(input_ids=batch(7), labels=batch(7))
            with torch.no_grad():
                model(input_ids=batch(8), labels=batch(8))
        for part in range(parts):
            ids = batch(10 * step + part)
            scaler.scale(model(input_ids=ids, labels=ids).loss / parts).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        (model if sgd else optimizer).zero_grad()


def trainer(model: nn.Module, folder: Path) -> None:
    options = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "weight_decay": 0.0, "max_grad_norm": 0.5}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = tiny.training_arguments(folder, max_steps=STEPS, **options)
    rows = [{"input_ids": ids, "labels": ids} for step in range(4) for ids in batch(step)]
    Trainer(model, arguments, train_dataset=rows).train()


def accelerated(model: nn.Module, folder: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, dense(model))
    for step in range(2 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch(step), labels=batch(step)).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


LOOPS: dict[str, Callable[[Any, Path], None]] = {
    "AdamW": by_hand,
    "SGD, cleared by the model": partial(by_hand, sgd=True),
    "accumulated and clipped": partial(by_hand, parts=3, clip=0.1),
    "scaled": partial(by_hand, scale=True),
    "in evaluation mode": partial(by_hand, evaluating=True),
    "with idle passes": partial(by_hand, idle=True),
    "checkpointed": partial(by_hand, checkpointing=True),
    "trainer": trainer,
    "accelerate": accelerated,
}
WAYS_TO_A_MODEL = [("AdamW", made) for made in ("from_pretrained", "copied", "over-encoding")]


@pytest.mark.parametrize(("loop", "made"), [*((loop, "from_trunk") for loop in LOOPS), *WAYS_TO_A_MODEL])
def test_rows_learn_under_any_loop(loop, made, tmp_path):
    """Every weight ends where the ordinary embedding's does, and nothing is kept."""
    model: Any = over_encoding() if made == "over-encoding" else fresh()
    if made == "from_pretrained":
        model.save_pretrained(tmp_path / "model")
        model = SconeForCausalLM.from_pretrained(tmp_path / "model")
    if made == "copied":
        original, model = model, copy.deepcopy(model)
        keeper = RowOptimizer(original)
        model = copy.deepcopy(original)
        assert learned_rows(original).are_collected
        assert not learned_rows(model).are_collected, "a copy is nobody's"
        del keeper
    before = learned_rows(model).weight.detach().clone()
    reference = PlainRows(model).train()
    model.train()
    LOOPS[loop](model, tmp_path / "ours")
    LOOPS[loop](reference, tmp_path / "plain")
    rows = learned_rows(model)
    assert (rows.weight != before).any(1).sum() > 10, "the test needs rows that move"
    torch.testing.assert_close(rows.weight, reference.rows.weight, atol=1e-5, rtol=1e-4)
    for name, weight in reference.trunk.named_parameters():
        torch.testing.assert_close(model.trunk.get_parameter(name), weight, atol=1e-5, rtol=1e-4)
    assert not rows.pending


def test_frozen_rows_stay():
    """What PEFT and others freeze is frozen, with a row optimizer and without."""
    model = fresh().train()
    model.requires_grad_(False)
    model.trunk.lm_head.weight.requires_grad_()
    before = learned_rows(model).weight.clone()
    by_hand(model, Path())
    rows_optimizer = RowOptimizer(model)
    by_hand(model, Path())
    rows_optimizer.step()
    assert torch.equal(learned_rows(model).weight, before)
    assert not learned_rows(model).pending


def step_with_row_optimizer(model, rows_optimizer, optimizer, ids, scaler=None):
    loss = model(input_ids=ids, labels=ids).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    for each in (optimizer, rows_optimizer):
        each.step() if scaler is None else scaler.step(each)
        each.zero_grad()
    if scaler is not None:
        scaler.update()


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_row_optimizer_equals_row_rms_beside_any_optimizer(with_scaler):
    """The reference is row-RMS of the gradient of an embedding; idle passes leave nothing behind."""
    model = fresh().train()
    reference = PlainRows(model).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if with_scaler else None
    rows_optimizer, optimizer = RowOptimizer(model, lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    trunk = torch.optim.SGD(reference.trunk.parameters(), lr=0.1)
    rows = DenseRowRMS(*reference.rows.weight.shape, 0.1)
    rows.weight += reference.rows.weight.detach().numpy()
    for step in range(STEPS):
        model(input_ids=batch(9), labels=batch(9))
        step_with_row_optimizer(model, rows_optimizer, optimizer, batch(step), scaler)
        assert not learned_rows(model).pending
        reference(batch(step), batch(step)).loss.backward()
        rows.step(reference.rows.weight.grad.double().numpy())
        trunk.step()
        reference.zero_grad()
        with torch.no_grad():
            reference.rows.weight.copy_(torch.from_numpy(rows.weight))
    torch.testing.assert_close(learned_rows(model).weight, reference.rows.weight, atol=1e-4, rtol=1e-3)
    assert (learned_rows(model).weight - learned_rows(fresh()).weight).abs().max() > 0.1


def test_a_step_that_overflowed_leaves_the_rows_as_they_were():
    model = fresh().train()
    before = learned_rows(model).weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    step_with_row_optimizer(model, RowOptimizer(model), dense(model), batch(0), scaler)
    assert torch.equal(learned_rows(model).weight, before)
    assert not learned_rows(model).pending


def test_rows_of_a_row_optimizer_that_is_gone_are_parameters_again():
    model = fresh().train()
    before = learned_rows(model).weight.detach().clone()
    rows_optimizer = RowOptimizer(model)
    del rows_optimizer
    gc.collect()
    by_hand(model, Path())
    assert not torch.equal(learned_rows(model).weight, before)


def test_a_row_optimizer_that_takes_no_step_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(learned_rows_module, "MOST_PASSES_PER_STEP", 5)
    model = fresh().train()
    rows_optimizer = RowOptimizer(model)
    by_hand(model, Path())
    with pytest.raises(RuntimeError, match=r"found the learned rows' gradients of 5 .* call its step\(\)"):
        by_hand(model, Path())
    del rows_optimizer


def test_a_model_without_rows_has_no_row_optimizer():
    with pytest.raises(SconeError, match="found a model without learned rows"):
        RowOptimizer(tiny.trunk())


def test_a_row_optimizer_comes_back_from_its_state():
    models = [fresh().train() for _ in range(2)]
    optimizers = [(RowOptimizer(model, lr=0.1), dense(model)) for model in models]
    for step in range(2):
        step_with_row_optimizer(models[0], *optimizers[0], batch(step))
    models[1].load_state_dict(models[0].state_dict())
    for mine, its in zip(optimizers[0], optimizers[1], strict=True):
        its.load_state_dict(copy.deepcopy(mine.state_dict()))
    for model, both in zip(models, optimizers, strict=True):
        step_with_row_optimizer(model, *both, batch(5))
    assert torch.equal(learned_rows(models[0]).weight, learned_rows(models[1]).weight)


WAYS = ["dense", "row optimizer", "sharded"]


def _train_as_a_rank(rank: int, folder: Path) -> None:
    for world_size in (1, 2):
        if rank < world_size:
            _train_every_way(rank, world_size, folder)


def _train_every_way(rank: int, world_size: int, folder: Path) -> None:
    """Over 2 ranks or as one with twice the batch; saves what came of the rows."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size)
    for way in WAYS:
        model: Any = fresh().train()
        rows_optimizer = RowOptimizer(model, lr=0.1) if way == "row optimizer" else None
        wrapped = model
        if way == "sharded":
            fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        elif world_size > 1:
            wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            ids = batch(step)[:2][rank::world_size]
            wrapped(input_ids=ids, labels=ids).loss.backward()
            for each in (optimizer, rows_optimizer):
                if each is not None:
                    each.step()
                    each.zero_grad()
        weight = learned_rows(model).weight.detach()
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        torch.save(weight, folder / f"{world_size}.{rank}.{way}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_rows_as_one_with_twice_the_batch(tmp_path):
    run_ranks(_train_as_a_rank, 2, tmp_path)
    for way in WAYS:
        one, first, second = (
            torch.load(tmp_path / f"{name}.{way}", weights_only=True) for name in ("1.0", "2.0", "2.1")
        )
        assert torch.equal(first, second)
        torch.testing.assert_close(first, one, atol=1e-5, rtol=1e-5)
        assert (one - learned_rows(fresh()).weight).abs().max() > 1e-4
