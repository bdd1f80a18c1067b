"""The cost formulas against the operations that torch counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scone.data.dataset import Collator
from scone.models.accounting import (
    RunCost,
    f_gram_forward_flops,
    input_embedding_flops,
    parameter_counts,
    training_flops,
    trunk_forward_flops,
)
from scone.models.configuration import FGramModelConfig
from scone.models.input_embeddings import FGramModel
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.models.scaled_trunk import ScaledTrunkForCausalLM
from scone.tests import tiny
from scone.tests.models.kinds import HASHED_ROWS, over_encoding
from scone.tests.models.padded_f_gram_model import padded_f_gram_model


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", list(tiny.TRUNKS))
def test_trunk_flops_equal_counted_flops(kind):
    trunk = tiny.trunk(kind, attn_implementation="eager")
    found = counted(lambda: trunk(torch.zeros(1, 16, dtype=torch.int64), use_cache=False))
    assert trunk_forward_flops(trunk.config, 16) * 16 == found
    if kind == "gpt2":  # two operations per weight and token, besides attention
        width, layers = tiny.WIDTH, 2
        matrices = 12 * width * width * layers + width * tiny.VOCAB_SIZE
        assert found == 16 * (2 * matrices + 2 * 2 * 16 * width * layers)


def test_f_gram_flops_equal_counted_flops_of_the_padded_model():
    """Padded, N f-grams of N tokens each are N² nodes; each attends to all N places there."""
    config, max_n, trunk_width = FGramModelConfig(**tiny.F_GRAM_SIZES), 4, tiny.WIDTH
    model = FGramModel(config, trunk_width, max_n)
    model.init_weights()
    inputs = (torch.zeros(max_n, max_n, trunk_width), torch.full((max_n,), max_n))
    with sdpa_kernel(SDPBackend.MATH):
        found = counted(lambda: padded_f_gram_model(model, *inputs))
    maps_out = 2 * config.hidden_size * trunk_width * (max_n * max_n - max_n)  # the padded one maps last places only
    deepest = [0.0] * (max_n - 1) + [max_n * max_n]
    assert f_gram_forward_flops(config, trunk_width, deepest) - maps_out == found


@pytest.mark.parametrize("whole_layer", [False, True])
def test_a_layer_costs_its_f_gram_model_and_its_gate(whole_layer):
    """The operations that torch counts in the f-gram model itself, and in the whole layer, attention besides, which is
    no matrix product there. The last layer counts only what positions read; own tokens are looked up, not mapped.
    """
    sizes = tiny.F_GRAM_SIZES | ({"own_tokens": True} if whole_layer else {})
    gate = {"combination": "gate"} if whole_layer else {}
    model = SconeForCausalLM.from_trunk(tiny.trunk(), tiny.vocabulary(), f_gram_model=sizes, learned_rows=20, **gate)
    layer, tokens = model.eval().f_gram_embedding, tiny.tokens(1, 60)
    trie = model.trie_of(model.match(tokens))
    nodes, f_grams = (
        [stop - start for start, stop in itertools.pairwise(trie[name])] for name in ("depth_offsets", "f_gram_offsets")
    )
    places = [sum((depth + 1) * count for depth, count in enumerate(counts)) for counts in (nodes, f_grams)]
    attention = 4 * sizes["hidden_size"] * ((sizes["num_hidden_layers"] - 1) * places[0] + places[1])
    if whole_layer:
        found = counted(lambda: layer(tokens, model.get_input_embeddings(), trie))
        assert input_embedding_flops(model.config, nodes, f_grams) - attention == found
    else:
        found = counted(lambda: layer.f_gram_model(torch.zeros(len(trie["tokens"]), tiny.WIDTH), trie))
        assert f_gram_forward_flops(FGramModelConfig(**sizes), tiny.WIDTH, nodes, f_grams) - attention == found


def test_parameters_are_counted_where_they_live():
    model = tiny.scone()
    counts = parameter_counts(model)
    assert counts.resident == sum(p.numel() for p in model.trunk.parameters())
    assert counts.resident + counts.training_only == sum(p.numel() for p in model.parameters())
    assert counts.table == model.vocabulary.num_f_grams * tiny.WIDTH
    plain = parameter_counts(model.trunk)
    assert (plain.resident, plain.training_only, plain.table) == (counts.resident, 0, 0)
    hashed = parameter_counts(over_encoding())
    assert (hashed.resident, hashed.training_only, hashed.table) == (counts.resident, 0, HASHED_ROWS * tiny.WIDTH)
    # a norm in front of the trunk serves too, whatever gives the vectors
    for normed in (
        SconeForCausalLM.from_trunk(tiny.trunk(), model.vocabulary, f_gram_model=None, learned_rows=9, input_norm=True),
        OverEncodingForCausalLM.from_trunk(tiny.trunk(), num_rows=50, separator_ids=[], input_norm=True),
        ScaledTrunkForCausalLM.from_trunk(tiny.trunk(), input_norm=True),
    ):
        assert parameter_counts(normed).resident == plain.resident + tiny.WIDTH


def test_a_run_counts_what_its_batches_computed():
    """Training is three forward passes, four with recomputation."""
    assert (training_flops(10.0), training_flops(10.0, recomputed=True)) == (30.0, 40.0)
    model = tiny.scone()
    cost, plain = RunCost(model), RunCost(model.trunk)
    collate = Collator(model.vocabulary, model.config.learned_rows)
    batches = [collate([{"input_ids": row} for row in tiny.corpus(80, seed).reshape(2, 40)]) for seed in (1, 2)]
    for batch in batches:
        cost.count(batch)
    figures = cost.to_dict()
    assert figures["nodes_per_position"] * 160 == pytest.approx(sum(len(batch["trie"]["tokens"]) for batch in batches))
    matched = sum(int(batch["trie"]["position_index"].count_nonzero()) for batch in batches)
    assert figures["match_rate"] == matched / 160
    assert figures["inference_flops_per_token"] == trunk_forward_flops(model.trunk.config, 40)
    forward = figures["inference_flops_per_token"] + figures["f_gram_flops_per_token"]
    assert figures["training_flops_per_token"] == 3 * forward
    plain.count({"input_ids": batches[0]["input_ids"]})
    assert plain.to_dict()["training_flops_per_token"] == 3 * figures["inference_flops_per_token"]
