"""What the input embedding layer can be besides its default: other parts, the paper's form, scales."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from scone.data.dataset import Collator
from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tests.models.kinds import over_encoding
from scone.tests.tiny import tokens

VARIANTS = {
    **{trunk: {"kind": trunk} for trunk in tiny.TRUNKS},
    "model alone": {"kind": "llama", "learned_rows": 0},
    "rows alone": {"kind": "qwen2", "f_gram_model": None},
    "gate": {"combination": "gate"},
    "replace": {"combination": "replace"},
    "few rows": {"learned_rows": 10},
    "scaled": {"embedding_scale": 4.0},
    "normed": {"input_norm": True},
    "own tokens": {"f_gram_model": tiny.F_GRAM_SIZES | {"own_tokens": True}},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@torch.no_grad()
def test_every_variant_is_a_function_of_the_node(variant, tmp_path):
    """Saved, loaded with one row per f-gram, it gives the live model's logits; so does what a loader looked up."""
    live, ids = tiny.scone(**VARIANTS[variant]), tokens(3, 40)
    live.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    served = SconeForCausalLM.from_pretrained(tmp_path, table=tiny.RowsInMemory(live)).eval()
    assert served.f_gram_embedding is None
    logits, config = live(ids).logits, live.config
    # weights bit for bit; what is computed from them may differ by where in memory they lie
    torch.testing.assert_close(loaded.state_dict(), live.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(served(ids).logits, logits, atol=1e-5, rtol=1e-5)
    collate = Collator(live.vocabulary, config.learned_rows)
    trie = collate([{"input_ids": row} for row in ids])["trie"]
    assert torch.equal(live(ids, trie=trie).logits, logits)


@pytest.mark.parametrize(
    "changes",
    [*({"kind": trunk, "learned_rows": rows} for trunk in tiny.TRUNKS for rows in (0, 40)), {"combination": "gate"}],
)
@torch.no_grad()
def test_untrained_scone_equals_its_trunk(changes):
    """Bit for bit, so a pretrained trunk begins exactly at its own loss."""
    model, ids = tiny.scone(trained=False, **changes), tokens(2, 20)
    assert (model.match(ids) >= tiny.VOCAB_SIZE).any(), "the test needs matches"
    assert torch.equal(model(ids).logits, model.trunk(ids).logits)
    model = over_encoding(trained=False)
    assert torch.equal(model(ids).logits, model.trunk(ids).logits)


@torch.no_grad()
def test_a_gate_starts_as_a_factor_of_one():
    gated, added, ids = tiny.scone(combination="gate"), tiny.scone(), tokens(2, 20)
    added.f_gram_embedding.load_state_dict(gated.f_gram_embedding.state_dict(), strict=False)
    assert not torch.allclose(gated(ids).logits, added(ids).logits, atol=1e-3)
    for parameter in gated.f_gram_embedding.gate.parameters():
        parameter.zero_()
    torch.testing.assert_close(gated(ids).logits, added(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "single"}, "control single"),
        ({"rows_backoff": False}, "rows_backoff False"),
        ({"f_gram_model": tiny.F_GRAM_SIZES | {"output_gain": False, "start": None}}, "output_gain False"),
    ],
)
@torch.no_grad()
def test_a_model_of_a_kind_that_is_gone_serves_from_its_table_alone(changes, message, tmp_path):
    """As version 0.1.0 wrote it: computed as another kind, its vectors would be silently wrong."""
    model, ids = tiny.scone(), tokens(2, 20)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    said = tiny.refusal(SconeForCausalLM.from_pretrained, tmp_path)
    assert f"found a model with {message}" in said
    assert "serve it from the table" in said
    served = SconeForCausalLM.from_pretrained(tmp_path, table=tiny.RowsInMemory(model)).eval()
    torch.testing.assert_close(served(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("served", [False, True])
@torch.no_grad()
def test_an_input_norm_in_front_of_a_trunk_in_fp16_gives_fp16(served):
    """Quantising converts the trunk alone; PyTorch warns of a norm whose gain is of another type."""
    model, ids = tiny.scone(f_gram_model=None, input_norm=True), tokens(1, 24)
    if served:
        model.attach_table(tiny.RowsInMemory(model))
    expected = model.input_vectors(ids)
    model.trunk.half()
    found = model.input_vectors(ids)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=5e-3)
