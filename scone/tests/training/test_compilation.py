"""Compiling for training changes nothing but speed, and leaves no part of the accelerator's work outside."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from scone.tests import tiny
from scone.tests.training.runs import RARELY, STILL, options
from scone.training.distributed import compile_for_training
from scone.training.run import build_model, build_trainer, prepare_run_corpus


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("with_f_grams", [True, False])
def test_compiled_parts_equal_the_uncompiled_model(with_f_grams):
    model = tiny.scone() if with_f_grams else tiny.trunk("gpt2")
    compiled, targets = copy.deepcopy(model), []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compile_for_training(compiled, backend=backend)
    tokens = tiny.tokens(2, 32)
    losses = []
    for either in (model, compiled):
        loss = either(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert any("cross_entropy" in target for target in targets), "the loss stayed outside the graphs"
    assert any("scaled_dot_product_attention" in target for target in targets)
    assert not with_f_grams or any("rms_norm" in target for target in targets), "the f-gram model stayed outside"


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
