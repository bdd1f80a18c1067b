"""What the input embedding layer can be besides its default: starts, gates, controls, back-off, scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from scone.data.collator import Collator
from scone.models.configuration import FGramModelConfig
from scone.models.input_embeddings import scale_at_start
from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tests.models.kinds import over_encoding, tokens
from scone.tokenization.controls import permuted_nodes, replaced

IDENTITY = {"start": "identity", "output_norm": False}
VARIANTS = {
    **{trunk: {"trunk": trunk} for trunk in tiny.TRUNKS},
    "model alone": {"trunk": "llama", "learned_rows": 0},
    "rows alone": {"trunk": "qwen2", "f_gram_model": None},
    "gate": {"combination": "gate"},
    "replace": {"combination": "replace"},
    "no back-off": {"rows_backoff": False, "learned_rows": 10},
    "shuffled": {"control": "shuffled"},
    "single": {"control": "single"},
    "scaled": {"embedding_scale": 4.0},
    "normed": {"input_norm": True},
    "own tokens": {"f_gram_model": tiny.F_GRAM_SIZES | {"own_tokens": True}},
    "no norm": {"f_gram_model": tiny.F_GRAM_SIZES | {"output_norm": False}},
    "no gain": {"f_gram_model": tiny.F_GRAM_SIZES | {"output_gain": False}},
}


def model_with(trained: bool = True, trunk: str = "gpt2", **changes) -> SconeForCausalLM:
    settings = {"f_gram_model": tiny.F_GRAM_SIZES, "learned_rows": 40} | changes
    model = SconeForCausalLM.from_trunk(tiny.trunk(trunk), tiny.vocabulary(), **settings).eval()
    if trained:
        torch.manual_seed(1)
        for name, parameter in model.f_gram_embedding.named_parameters():
            if name in ("gain", "gate.weight", "gate.bias", "rows.weight"):
                torch.nn.init.normal_(parameter, std=0.5)
        if model.input_norm is not None:
            torch.nn.init.normal_(model.input_norm.weight)
    return model


@pytest.mark.parametrize("variant", list(VARIANTS))
@torch.no_grad()
def test_every_variant_is_a_function_of_the_node(variant, tmp_path):
    """Saved, loaded with one row per f-gram, it gives the live model's logits; so does what a loader looked up."""
    live, ids = model_with(**VARIANTS[variant]), tokens(3, 40)
    live.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    served = SconeForCausalLM.from_pretrained(tmp_path, table=tiny.RowsInMemory(live)).eval()
    assert served.f_gram_embedding is None
    logits, config = live(ids).logits, live.config
    # weights bit for bit; what is computed from them may differ by where in memory they lie
    torch.testing.assert_close(loaded.state_dict(), live.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(served(ids).logits, logits, atol=1e-5, rtol=1e-5)
    collate = Collator(live.vocabulary, config.learned_rows, backoff=config.rows_backoff, control=config.control)
    trie = collate([{"input_ids": row} for row in ids])["trie"]
    assert torch.equal(live(ids, trie=trie).logits, logits)


@pytest.mark.parametrize(
    "changes",
    [
        *({"trunk": trunk, "learned_rows": rows} for trunk in tiny.TRUNKS for rows in (0, 40)),
        *({"combination": "gate"}, {"control": "shuffled"}, {"control": "single"}),
        *(  # the identity, in place of the token's embedding: its own width, and a wider one
            {"f_gram_model": tiny.F_GRAM_SIZES | IDENTITY | {"hidden_size": width}, "combination": "replace"}
            | {"learned_rows": 0}
            for width in (tiny.WIDTH, 2 * tiny.WIDTH)
        ),
    ],
)
@torch.no_grad()
def test_untrained_scone_equals_its_trunk(changes):
    """Bit for bit, so a pretrained trunk begins exactly at its own loss."""
    model, ids = model_with(trained=False, **changes), tokens(2, 20)
    assert (model.match(ids) >= tiny.VOCAB_SIZE).any(), "the test needs matches"
    tolerance = {"atol": 1e-5, "rtol": 1.3e-6} if "f_gram_model" in changes else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(model(ids).logits, model.trunk(ids).logits, **tolerance)
    model = over_encoding(trained=False)
    assert torch.equal(model(ids).logits, model.trunk(ids).logits)


@torch.no_grad()
def test_a_gate_starts_as_a_factor_of_one():
    gated, added, ids = model_with(combination="gate"), model_with(), tokens(2, 20)
    added.f_gram_embedding.load_state_dict(gated.f_gram_embedding.state_dict(), strict=False)
    assert not torch.allclose(gated(ids).logits, added(ids).logits, atol=1e-3)
    for parameter in gated.f_gram_embedding.gate.parameters():
        parameter.zero_()
    torch.testing.assert_close(gated(ids).logits, added(ids).logits)


def test_starts_that_cannot_be_are_refused():
    sizes = FGramModelConfig(**tiny.F_GRAM_SIZES)
    assert (scale_at_start(sizes, "add", 0.02), scale_at_start(sizes, "replace", 0.02)) == (0, 0.02)
    for changes, combination in [
        ({"start": "identity"}, "replace"),
        (IDENTITY, "add"),
        ({"start": "zero"}, "replace"),
        ({"start": "zero", "output_gain": False}, "add"),
    ]:
        with pytest.raises(ValueError, match="found the start"):
            scale_at_start(FGramModelConfig(**(tiny.F_GRAM_SIZES | changes)), combination, 0.02)


def test_shuffling_permutes_f_grams_of_one_length_among_those_with_rows():
    vocabulary, num_rows = tiny.vocabulary(), 25
    nodes = permuted_nodes(vocabulary, "shuffled", num_rows)
    ranks = nodes - vocabulary.vocab_size
    np.testing.assert_array_equal(np.sort(ranks), np.arange(vocabulary.num_f_grams))
    np.testing.assert_array_equal(vocabulary.lengths[ranks], vocabulary.lengths)
    np.testing.assert_array_equal(ranks < num_rows, np.arange(len(ranks)) < num_rows)
    assert (ranks != np.arange(len(ranks))).mean() > 0.5
    np.testing.assert_array_equal(permuted_nodes(vocabulary, "shuffled", num_rows), nodes)


@torch.no_grad()
def test_single_tells_that_an_f_gram_matched_and_not_which():
    model, ids = model_with(control="single"), tokens(2, 30)
    added = model.embed(ids) - model.get_input_embeddings()(ids)
    matched = torch.from_numpy(model.match(ids) >= tiny.VOCAB_SIZE)
    assert matched.any()
    assert not matched.all()
    assert not added[~matched].any()
    torch.testing.assert_close(added[matched], added[matched][:1].expand_as(added[matched]))


def test_replaced_leaves_tokens_alone():
    nodes = np.arange(10)
    assert replaced(nodes, 8, None) is nodes
    np.testing.assert_array_equal(replaced(nodes, 8, np.array([9, 8])), [0, 1, 2, 3, 4, 5, 6, 7, 9, 8])


@pytest.mark.parametrize("served", [False, True])
@torch.no_grad()
def test_an_input_norm_in_front_of_a_trunk_in_fp16_gives_fp16(served):
    """Quantising converts the trunk alone; PyTorch warns of a norm whose gain is of another type."""
    model, ids = model_with(f_gram_model=None, input_norm=True), tokens(1, 24)
    if served:
        model.attach_table(tiny.RowsInMemory(model))
    expected = model.input_vectors(ids)
    model.trunk.half()
    found = model.input_vectors(ids)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=5e-3)
