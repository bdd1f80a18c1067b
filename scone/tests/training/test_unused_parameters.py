"""Processes look for parameters without a gradient only where there may be some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scone.models.over_encoding import OverEncodingForCausalLM
from scone.tests import tiny
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
        return OverEncodingForCausalLM.from_trunk(tiny.trunk(), num_rows=99, separator_ids=[0])
    return tiny.scone(**OURS[name]) if name in OURS else tiny.trunk(name)


@pytest.mark.parametrize("name", [*OURS, *tiny.TRUNKS, "over-encoding"])
def test_a_model_that_is_said_to_use_all_does_so(name: str) -> None:
    """Also for a batch in which no f-gram ends."""
    model = model_named(name).train()
    assert all_are_used(model)
    for text in TEXTS.values():
        model.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []


def test_what_is_not_used_or_not_known_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=24, n_embd=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    assert all_are_used(model)
    build = AutoModelForCausalLM.from_config

    def with_one_more(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        built.one_more = torch.nn.Linear(2, 2)
        return built

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", with_one_more)
    assert not all_are_used(model)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("data-dependent")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)
    assert not all_are_used(model)
