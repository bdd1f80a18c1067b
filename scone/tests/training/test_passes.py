"""Rows start again with each pass over the text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from scone.data.dataset import BlockDataset
from scone.tests import tiny
from scone.tests.training.runs import RARELY, assert_same_weights, options
from scone.training.optimizer import RowOptimizer, learned_rows
from scone.training.run import build_model, build_trainer, prepare_run_corpus, train
from scone.training.run_folder import complete_checkpoints
from scone.training.trainer import RowPasses


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 60))
def test_all_passes_but_the_first_are_whole(max_steps, steps_per_pass):
    passes = RowPasses(max_steps, steps_per_pass)
    starts = [0, *(step for step in range(max_steps) if passes.begins_at(step))]
    lengths = np.diff([*starts, max_steps])
    assert len(lengths) == passes.number
    assert 1 <= lengths[0] <= steps_per_pass
    assert set(lengths[1:]) <= {steps_per_pass}
    for start, length in zip(starts, lengths, strict=True):  # each goes through the whole run's schedule once
        places = [passes.in_the_run(start + done) for done in range(length)]
        assert np.allclose(places, np.linspace(0, max_steps, length, endpoint=False))
    assert passes.in_the_run(max_steps) == max_steps


class Watch(TrainerCallback):
    """Keeps what the rows were, and what was known of them, after every step, and the rates of all groups."""

    def __init__(self):
        self.sizes, self.visits, self.rates = [], [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **_):
        rows = learned_rows(model)
        self.visits.append(float(optimizer.state[rows.weight]["visits"].sum()))
        self.sizes.append(int(rows.weight.any(1).sum()))
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def steps_of_a_pass(run):
    files = prepare_run_corpus(run, quiet=True)
    return -(-len(BlockDataset(files.train, run.data.max_length, drop_last=True)) // run.training.batch_size)


@pytest.mark.parametrize(
    "kind",
    [{"training.lr_scheduler_type": "cosine"}, {"model.over_encoding_rows": 500}],
    ids=["f-grams", "over-encoding"],
)
def test_rows_know_the_last_pass_alone(corpus, tmp_path, kind):
    changes = kind | RARELY | {"training.warmup_steps": 3, "training.batch_size": 16}
    length = steps_of_a_pass(options(corpus, tmp_path, **changes))
    changes |= {"training.max_steps": 3 * length}
    watch = Watch()
    train(options(corpus, tmp_path / "run", **changes), quiet=True, callbacks=[watch])
    for start in (length, 2 * length):  # the first step of a pass has the rate 0 of the warm-up
        assert watch.sizes[start - 1] > watch.sizes[start + 1] > watch.sizes[start] == 0
        assert watch.visits[start] < watch.visits[start - 1] / 4
    assert watch.visits[-1] < 1.2 * watch.visits[length - 1], "not those of three passes"
    trunk, rows = np.array(watch.rates)[:, 0], np.array(watch.rates)[:, -1]
    assert np.argmax(trunk) < length, "the trunk goes through its schedule once"
    peaks = [np.argmax(rows[start : start + length]) for start in range(0, 3 * length, length)]
    assert len(set(peaks)) == 1
    assert np.allclose(rows[:length], rows[length : 2 * length])


@pytest.mark.parametrize("by_steps", [True, False])
def test_the_rows_that_are_kept_have_read_all_of_the_text(corpus, tmp_path, by_steps):
    """By the batches that the trainer makes, in a run of two passes and a rest, which comes first."""
    changes = RARELY | {"training.batch_size": 16}
    whole = steps_of_a_pass(options(corpus, tmp_path, **changes))
    steps = math.ceil(2.4 * whole)
    changes |= {"training.num_epochs": 2.4, "training.max_steps": steps if by_steps else -1}
    run = options(corpus, tmp_path / "run", **changes)
    files = prepare_run_corpus(run, quiet=True)
    trainer = build_trainer(run, build_model(run, files, quiet=True), files, quiet=True)
    texts = []
    for step in range(0, steps + whole, whole):  # what the trainer takes for epochs
        trainer.state.global_step = step
        texts += [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    passes = trainer.row_passes(steps)
    starts = [step for step in range(steps) if passes.begins_at(step)]
    assert starts == [steps - 2 * whole, steps - whole]
    blocks = BlockDataset(files.train, run.data.max_length, drop_last=True)
    expected = sorted(tuple(blocks[index]["input_ids"].tolist()) for index in range(len(blocks)))
    for start in starts:
        read = [tuple(block.tolist()) for batch in texts[start : start + whole] for block in batch]
        assert sorted(read) == expected


def test_a_run_of_one_pass_goes_through_the_trunks_schedule(corpus, tmp_path):
    watch = Watch()
    train(options(corpus, tmp_path / "run", **{"training.max_steps": 5}), quiet=True, callbacks=[watch])
    rates = np.array(watch.rates)
    assert np.allclose(rates[:, 0] / rates[0, 0], rates[:, -1] / rates[0, -1])
    assert np.all(np.diff(watch.visits) > 0)


def test_a_resume_where_a_pass_begins_equals_the_run_uninterrupted(corpus, tmp_path):
    changes = RARELY | {"training.batch_size": 16}
    length = steps_of_a_pass(options(corpus, tmp_path, **changes))
    changes |= {"training.max_steps": 2 * length, "training.save_steps": length}
    whole = train(options(corpus, tmp_path / "whole", **changes), quiet=True)

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == length:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(options(corpus, tmp_path / "cut", **changes), quiet=True, callbacks=[Kill()])
    assert [path.name for path in complete_checkpoints(tmp_path / "cut")] == [f"checkpoint-{length}"]
    changes |= {"training.resume_from_checkpoint": "true"}
    resumed = train(options(corpus, tmp_path / "cut", **changes), quiet=True)
    assert_same_weights(whole, resumed, atol=0.0, rtol=0.0)


def test_rows_of_a_loop_of_ones_own_start_again():
    model = tiny.scone(f_gram_model=False).train()
    rows = learned_rows(model)
    optimizer = RowOptimizer(model, lr=0.1)
    tokens = tiny.tokens(1, 64)
    found = []
    for _ in range(2):
        optimizer.start_rows_again()
        assert not rows.weight.any()
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert rows.weight.any()
        found.append(optimizer.state[rows.weight]["visits"].clone())
    assert found[0].max() == 2
    assert torch.equal(*found)
