"""Processes look for parameters without a gradient only where there may be some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scone.tests import tiny
from scone.tests.models.kinds import over_encoding
from scone.training.options import all_are_used

TEXTS = {"f-grams": tiny.tokens(2, 32), "none": torch.zeros(2, 8, dtype=torch.long)}
OURS = {
    "add": {},
    "replace": {"combination": "replace"},
    "rows": {"f_gram_model": False},
    "model": {"learned_rows": 0},
}


def model_named(name: str) -> Any:
    if name == "over-encoding":
        return over_encoding()
    if name == "opt":  # makes its masks by itself
        sizes = tiny.SIZES | {"ffn_dim": 32, "word_embed_proj_dim": tiny.WIDTH}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", vocab_size=tiny.VOCAB_SIZE, **sizes))
    return tiny.scone(**OURS[name]) if name in OURS else tiny.trunk(name)


@pytest.mark.parametrize("name", [*OURS, *tiny.TRUNKS, "over-encoding", "opt"])
def test_a_model_that_is_said_to_use_all_does_so(name: str) -> None:
    """Also for a batch in which no f-gram ends."""
    model = model_named(name).train()
    assert all_are_used(model)
    for text in TEXTS.values():
        model.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []


MIXTURE = {"num_key_value_heads": 1, "num_local_experts": 2}


@pytest.mark.parametrize(("kind", "changes"), [("gpt2", {"add_cross_attention": True}), ("mixtral", MIXTURE)])
def test_what_may_not_be_used_is_looked_for(kind: str, changes: dict[str, Any]) -> None:
    """Attention to the states of a model that is not there, and experts that a batch may not ask."""
    sizes = tiny.TRUNKS.get(kind, tiny.SIZES)
    config = AutoConfig.for_model(kind, vocab_size=tiny.VOCAB_SIZE, **(sizes | changes))
    assert not all_are_used(AutoModelForCausalLM.from_config(config))
