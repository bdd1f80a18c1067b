"""Compiled models give what they give uncompiled, and a table's lookup is one operator of one graph.

With the compiler's tracing and autograd, but without code generation, which takes minutes: one slow test generates.
Trunks have one layer: compiling costs seconds a layer, and the laws are about what is in front of them.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch.library import opcheck
from transformers import (
    CompileConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
)

from scone.kernels.common import triton_is_installed
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.language_model import SconeForCausalLM
from scone.models.table_lookup import BY_DEVICE, BY_HOST, TableLookup
from scone.models.token_history import marked
from scone.tests import tiny
from scone.tests.models import kinds
from scone.tests.models.kinds import KINDS
from scone.tests.tiny import tokens

# PyTorch's own, where vectors with a gradient come into a graph from outside of it
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
IN_ONE_GRAPH = ("table", "scaled")
ONE_LAYER = {"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep all of it
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@cache
def model_of(kind: str, trunk: str = "llama") -> EmbeddedTrunk:
    return kinds.model_of(kind, trunk, **ONE_LAYER[trunk]).double()


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("operator", [BY_DEVICE, BY_HOST])
@pytest.mark.parametrize(("past", "is_static"), [(0, False), (5, False), (5, True)])
def test_the_operator_is_what_it_says(operator, past, is_static):
    """What PyTorch checks of an operator: schema, shapes without data, gradients, in graphs of any sizes."""
    model = tiny.scone(min_freq=1)
    lookup = TableLookup(tiny.RowsInMemory(model), model.matcher)
    text, mask = tokens(2, 12, 3), torch.ones(2, 12)
    mask[1, :2] = mask[0, 6:8] = 0
    written = marked(text, mask)
    vectors = torch.randn(2, 12 - past, tiny.WIDTH, requires_grad=True)
    before = written[:, :past] if past else None
    places = count = None
    if is_static and past:
        before = torch.cat([written[:, :past], torch.full((2, 4), -1)], dim=1)
        places, count = torch.tensor(past), torch.tensor(past)
    arguments = (vectors, written[:, past:], before, places, count, lookup.handle)
    assert operator(*arguments)[1].any()
    opcheck(operator, arguments)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("live", how) for how in ("packed", "any length")),  # padded: from a prompt on, below
        ("table", "packed"),
        ("over-encoding", "packed"),
        ("scaled", "padded"),
    ],
)
@torch.no_grad()
def test_compiled_equals_eager(kind, how):
    model = model_of(kind)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=kind in IN_ONE_GRAPH)
    if how == "any length":
        for length in (9, 12):
            same(compiled(tokens(2, length, length)).logits, model(tokens(2, length, length)).logits)
        return
    text, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if how == "packed":
        mask = torch.ones_like(mask)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1], [*range(7), *range(5)]])
        options = {"position_ids": positions, "use_cache": False}
    same(compiled(text, **options).logits[mask.bool()], model(text, **options).logits[mask.bool()])


@torch.no_grad()
def test_compiled_steps_equal_a_full_forward():
    """Padded, over a cache that grows, from the prompt on; over one that does not, every kind generates below."""
    model = model_of("table")
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    text, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(text, attention_mask=mask, position_ids=positions).logits
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    found = []
    for start, stop in ((0, 6), (6, 10), (10, 11)):
        step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        found.append(compiled(text[:, start:stop], cache=cache, use_cache=True, **step).logits)
    same(torch.cat(found, dim=1)[mask[:, :11].bool()], full[:, :11][mask[:, :11].bool()])


@pytest.mark.parametrize(
    ("kind", "trunk", "is_padded"),
    [("table", "gpt2", False), *((kind, "llama", True) for kind in KINDS[:3])],
)
def test_generate_compiles_its_steps_over_a_static_cache(kind, trunk, is_padded):
    """The compiled steps of transformers give the tokens of full forward passes; all steps are one compilation."""
    model, text = model_of(kind, trunk), tokens(2, 8, 3)
    mask = torch.ones_like(text)
    mask[0, : 3 if is_padded else 0] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "no_repeat_ngram_size": 2}
    expected = model.generate(text, use_cache=False, **arguments)
    compiling = CompileConfig(backend="aot_eager", fullgraph=kind in IN_ONE_GRAPH, mode=None)
    compiling._compile_all_devices = True
    found = model.generate(text, cache_implementation="static", compile_config=compiling, **arguments)
    assert found.tolist() == expected.tolist()
    if kind in IN_ONE_GRAPH:
        assert graphs() == 1
    if isinstance(model, SconeForCausalLM):
        assert (model.match(found)[:, 8:] >= tiny.VOCAB_SIZE).any(), "generated text must have f-grams"


def test_another_table_is_seen_by_that_copy_of_a_model_alone():
    model = copy.deepcopy(model_of("table"))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    other = tiny.RowsInMemory(tiny.scone("llama", min_freq=1, **ONE_LAYER["llama"]))
    other.data = other.data + 1
    with torch.no_grad():
        before = compiled(tokens(1, 12)).logits
        same(before, model_of("table")(tokens(1, 12)).logits)
        model.attach_table(other)
        after = compiled(tokens(1, 12)).logits
        same(after, model(tokens(1, 12)).logits)
        same(before, model_of("table")(tokens(1, 12)).logits)
    assert (before - after).abs().max() > 0.01


def test_gradients_are_those_of_eager():
    """With a table, the token embedding of a position that reads a row has no part in it. Live, a trainer trains."""
    gradients = []
    for is_compiled in (False, True):
        model = copy.deepcopy(model_of("table")).requires_grad_(True)
        if is_compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        model(tokens(2, 12), labels=tokens(2, 12)).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    same(*gradients)
    model = copy.deepcopy(model_of("table"))
    text = torch.arange(1, 5)[None]
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    model.input_vectors(text).sum().backward()
    reads_row = torch.from_numpy(model.match(text)[0] >= tiny.VOCAB_SIZE)
    assert weight.grad[text[0]].any(1).tolist() == (~reads_row).tolist()


def test_a_whole_graph_of_a_live_model_is_refused_with_a_reason():
    compiled: Any = torch.compile(model_of("live"), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the sizes of a trie batch depend on the tokens"):
        compiled(tokens(1, 12))


def test_a_trainer_may_compile(tmp_path):
    """``TrainingArguments(torch_compile=True)`` gives the loss that it gives without."""
    data = [{"input_ids": row, "labels": row} for row in tokens(6, 11).tolist()]
    losses = []
    for is_compiled in (False, True):
        compiling = {"torch_compile": is_compiled, "torch_compile_backend": "aot_eager" if is_compiled else None}
        options = tiny.training_arguments(tmp_path, per_device_train_batch_size=2, max_steps=2, **compiling)
        model = copy.deepcopy(model_of("live")).requires_grad_(True)
        trainer = Trainer(model, options, train_dataset=data, data_collator=DataCollatorWithFlattening())
        losses.append(trainer.train().training_loss)
    assert abs(losses[0] - losses[1]) < 1e-6


@pytest.mark.slow
def test_generated_code_equals_eager():
    """Of what is in front of the trunk, which is the library's own. A row of another f-gram would be 0.1 away."""
    model, text = model_of("table"), tokens(2, 12)
    plainest = {"cpp.simdlen": 1}  # else a program is compiled that tries the processor's vectors
    compiled: Any = torch.compile(model.input_vectors, fullgraph=True, options=plainest)
    with torch.no_grad():
        same(compiled(text), model.input_vectors(text), 1e-6)
        assert (model.match(text) >= tiny.VOCAB_SIZE).any()


def test_asking_for_triton_compiles_without_a_warning() -> None:
    """The f-gram model's attention asks while it is traced on a GPU; warnings are errors here."""
    compiled: Any = torch.compile(lambda ones: ones + triton_is_installed(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [1.0 + triton_is_installed()] * 2
