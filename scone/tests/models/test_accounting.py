"""The cost formulas against the operations that torch counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scone.models.accounting import f_gram_forward_flops, parameter_counts, training_flops, trunk_forward_flops
from scone.models.f_gram_model import FGramModel, FGramModelConfig, padded_f_gram_model
from scone.tests import tiny


@pytest.mark.parametrize("kind", list(tiny.TRUNKS))
def test_trunk_flops_equal_counted_flops(kind):
    trunk = tiny.trunk(kind, attn_implementation="eager")
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(tokens, use_cache=False)
    assert trunk_forward_flops(trunk.config, 16) * 16 == counter.get_total_flops()


def test_a_gpt2_costs_two_operations_per_weight_and_token_besides_attention():
    trunk = tiny.trunk("gpt2")
    width, layers, length = tiny.WIDTH, 2, 16
    matrices = 12 * width * width * layers + width * tiny.VOCAB_SIZE
    attention = 2 * 2 * length * width * layers
    assert trunk_forward_flops(trunk.config, length) == 2 * matrices + attention


def test_f_gram_flops_equal_counted_flops_of_the_padded_model():
    """Padded, N f-grams of N tokens each are N² nodes; each attends to all N places there."""
    config, max_n, trunk_width = FGramModelConfig(**tiny.F_GRAM_SIZES), 4, tiny.WIDTH
    model = FGramModel(config, trunk_width, max_n)
    model.init_weights()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        padded_f_gram_model(model, torch.zeros(max_n, max_n, trunk_width), torch.full((max_n,), max_n))
    counted = counter.get_total_flops()
    maps_out = 2 * config.hidden_size * trunk_width * (max_n * max_n - max_n)  # the padded one maps last places only
    deepest = [0.0] * (max_n - 1) + [max_n * max_n]
    assert f_gram_forward_flops(config, trunk_width, deepest) - maps_out == counted


def test_the_last_layer_counts_only_what_positions_read():
    """The operations that torch counts in the model itself, attention besides, which is no matrix product there."""
    config, trunk_width = FGramModelConfig(**tiny.F_GRAM_SIZES), tiny.WIDTH
    model = tiny.scone(max_n=3)
    trie = model.trie_of(model.match(torch.from_numpy(tiny.corpus(60)[None])))
    f_gram_model = model.f_gram_embedding.f_gram_model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        f_gram_model(torch.zeros(len(trie["tokens"]), trunk_width), trie)
    nodes, f_grams = (
        [stop - start for start, stop in itertools.pairwise(trie[name])] for name in ("depth_offsets", "f_gram_offsets")
    )
    places = [sum((depth + 1) * count for depth, count in enumerate(counts)) for counts in (nodes, f_grams)]
    attention = 4 * config.hidden_size * ((config.num_hidden_layers - 1) * places[0] + places[1])
    assert f_gram_forward_flops(config, trunk_width, nodes, f_grams) - attention == counter.get_total_flops()


def test_training_is_three_forward_passes_and_four_with_recomputation():
    assert (training_flops(10.0), training_flops(10.0, recomputed=True)) == (30.0, 40.0)


def test_parameters_are_counted_where_they_live():
    model = tiny.scone()
    counts = parameter_counts(model)
    assert counts.resident == sum(p.numel() for p in model.trunk.parameters())
    assert counts.resident + counts.training_only == sum(p.numel() for p in model.parameters())
    assert counts.table == model.vocabulary.num_f_grams * tiny.WIDTH
    plain = parameter_counts(model.trunk)
    assert (plain.resident, plain.training_only, plain.table) == (counts.resident, 0, 0)
