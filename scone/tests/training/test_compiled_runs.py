"""Compiled runs compile once: what compiles too often is slow, and nothing says so."""

from __future__ import annotations

import pytest
import torch

from scone.tests.training.runs import RARELY, STILL, options
from scone.training.distributed import compile_for_training
from scone.training.run import build_model, build_trainer, prepare_run_corpus


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
    graphs, losses = [], []
    for epochs, is_compiled in ((0.5, True), (2, True), (2, False)):
        length = {"training.max_steps": -1, "training.num_epochs": epochs}
        run = options(corpus, tmp_path / f"{epochs}-{is_compiled}", **changes, **length)
        model = build_model(run, corpus_of, quiet=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if is_compiled:
            compile_for_training(model, backend="eager")
        trainer = build_trainer(run, model, corpus_of, quiet=True)
        assert len(trainer.train_dataset) % 16, "the last batch of an epoch is smaller"
        losses.append(trainer.train().training_loss)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
