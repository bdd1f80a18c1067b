"""Compiling for training changes nothing but speed, and leaves no part of the accelerator's work outside."""

from __future__ import annotations

import copy

import pytest
import torch

from scone.tests import tiny
from scone.training.distributed import compile_for_training


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
