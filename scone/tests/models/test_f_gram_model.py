"""The f-gram model: sharing prefixes changes nothing but the cost."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from scone.kernels.trie_batch import build_trie_batch
from scone.models.configuration import FGramModelConfig
from scone.models.input_embeddings import FGramModel
from scone.tests import tiny
from scone.tests.models.padded_f_gram_model import padded_f_gram_model
from scone.tokenization.matcher import Matcher

MAX_N = 4
VOCABULARY = tiny.vocabulary(tiny.corpus(2000), MAX_N, 3)


def trie_of(tokens: np.ndarray) -> dict[str, Any]:
    nodes = Matcher(VOCABULARY).match(tokens)
    batch = build_trie_batch(nodes, VOCABULARY.keys, VOCABULARY.suffixes, VOCABULARY.vocab_size, MAX_N, 0)
    return batch.fields(torch.from_numpy)


def padded_tokens(f_grams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    paths = [VOCABULARY.tokens(int(node)) for node in f_grams]
    lengths = torch.tensor([len(path) for path in paths])
    return torch.tensor([[*path, *[5] * (MAX_N - len(path))] for path in paths]), lengths


def f_gram_model(dtype: torch.dtype = torch.float32) -> FGramModel:
    model = FGramModel(FGramModelConfig(**tiny.F_GRAM_SIZES), tiny.WIDTH, MAX_N).to(dtype)
    model.init_weights()
    return model


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-10), (torch.bfloat16, 0.05)])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 60))
def test_trie_batch_equals_padded_batch(dtype, budget, seed, length):
    """Values and gradients of the shared computation are those of running each f-gram alone, padded."""
    torch.manual_seed(seed)
    model = f_gram_model(dtype)
    table = torch.randn(tiny.VOCAB_SIZE, tiny.WIDTH, dtype=dtype, requires_grad=True)
    trie = trie_of(tiny.corpus(length, seed)[None])
    tokens, lengths = padded_tokens(trie["f_grams"])
    direction = torch.randn(len(lengths), tiny.WIDTH)

    results = []
    for run in (lambda: model(table[trie["tokens"]], trie), lambda: padded_f_gram_model(model, table[tokens], lengths)):
        model.zero_grad()
        table.grad = None
        output = run()
        (output * direction).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((output.detach(), {"table": table.grad.clone(), **gradients}))
    (shared, shared_gradients), (padded, padded_gradients) = results
    torch.testing.assert_close(shared, padded, atol=budget, rtol=budget)
    for name, gradient in padded_gradients.items():
        scale = max(float(gradient.float().abs().max()), 1e-3)
        error = float((shared_gradients[name] - gradient).float().abs().max())
        assert error <= 4 * budget * scale, f"{name}: gradients differ by {error} at scale {scale}"


def test_the_operators_are_sound():
    """Fake tensors, autograd registration and schema, as torch checks them; compiled code relies on these."""
    trie = trie_of(tiny.corpus(40)[None])
    inputs = [torch.randn(len(trie["tokens"]), 2, 4, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.scone.ancestor_attention, (*inputs, trie["ancestors"]))


def test_one_compiled_graph_serves_tries_of_all_sizes():
    """No graph breaks and no recompilation, the backward pass included (traced; no code is generated here)."""
    model = f_gram_model()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    model.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (100, 150, 300):
        trie = trie_of(tiny.corpus(length, length)[None])
        vectors = torch.randn(len(trie["tokens"]), tiny.WIDTH)
        outputs = [each(vectors, trie) for each in (model, plain)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().cos().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    for compiled, eager in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad, atol=1e-4, rtol=1e-4)


def test_output_has_unit_scale():
    """The gain alone sets the scale: a residual stream that grows would drown the token embeddings."""
    model = f_gram_model()
    trie = trie_of(tiny.corpus(50)[None])
    output = model(100 * torch.randn(len(trie["tokens"]), tiny.WIDTH), trie)
    torch.testing.assert_close(output.square().mean(-1), torch.ones(len(output)), atol=1e-3, rtol=0)
