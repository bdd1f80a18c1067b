"""Compiled runs compile once: what compiles too often is slow, and nothing says so."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from scone.tests.training.runs import RARELY, STILL, options
from scone.training.distributed import compile_for_training
from scone.training.run import build_model, build_trainer, prepare_run_corpus


class Graphs(TrainerCallback):
    """How many there are after each step."""

    def __init__(self) -> None:
        self.after_step: list[int] = []

    def on_step_end(self, args, state, control, **_):
        self.after_step.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


# PyTorch's own, where vectors with a gradient come into a graph from outside of it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [{"model.use_f_gram_embeddings": False}, {"model.f_gram.num_hidden_layers": 0}],
    ids=["plain", "rows"],
)
def test_the_last_batch_of_an_epoch_compiles_nothing(kind, corpus, tmp_path):
    """It is smaller. Compiled, all later ones would run by what PyTorch makes for any size."""
    changes = kind | RARELY | STILL | {"training.batch_size": 16}
    corpus_of = prepare_run_corpus(options(corpus, tmp_path, **changes), quiet=True)
    length = {"training.max_steps": -1, "training.num_epochs": 2}
    losses = []
    for is_compiled in (True, False):
        run = options(corpus, tmp_path / str(is_compiled), **changes, **length)
        model = build_model(run, corpus_of, quiet=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if is_compiled:
            compile_for_training(model, backend="eager")
        trainer, graphs = build_trainer(run, model, corpus_of, quiet=True), Graphs()
        trainer.add_callback(graphs)
        assert len(trainer.train_dataset) % 16, "the last batch of an epoch is smaller"
        losses.append(trainer.train().training_loss)
        assert len(graphs.after_step) > 4
        assert set(graphs.after_step) == {graphs.after_step[0]}, "all were compiled in the first step"
        assert (graphs.after_step[0] > 0) == is_compiled
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
