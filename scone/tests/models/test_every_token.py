"""The token that separates documents also pads, as tokenizers have it; to the model it is a token like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scone.configs.schema import ModelOptions
from scone.models.trunk import build_trunk, draw_if_zero
from scone.tests import tiny

OTHER = 5
TOKENIZER = tiny.word_tokenizer(
    (f"w{token}" for token in range(tiny.VOCAB_SIZE)), unknown="w0", pad_token="w0", eos_token="w0"
)
NAMES = ("scone-modern", "llama", "qwen2", "gpt2", "bert")


def built(name: str, layers: int = 2, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    trunk = build_trunk(ModelOptions(base_model_name=name, **(sizes | options)), TOKENIZER)
    for parameter_name, parameter in trunk.named_parameters():
        if not parameter.any():  # as training leaves nothing
            torch.nn.init.normal_(parameter, std=0.3 if parameter_name.endswith("weight") else 0.0)
    return trunk.eval()


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def exchange(rows: torch.Tensor) -> torch.Tensor:
    exchanged = rows.clone()
    exchanged[[tiny.SEPARATOR, OTHER]] = rows[[OTHER, tiny.SEPARATOR]]
    return exchanged


def check_exchange(model: Any) -> None:
    """With a token's id and its rows exchanged for the separator's, every gradient is the same, exchanged."""
    ids = tiny.tokens(4, 12)
    ids[:, 0], ids[:, 5] = tiny.SEPARATOR, OTHER
    before = gradients(model, ids)
    by_token = [name for name, p in model.named_parameters() if p.shape and p.shape[0] == tiny.VOCAB_SIZE]
    with torch.no_grad():
        for name in by_token:
            parameter = model.get_parameter(name)
            parameter.copy_(exchange(parameter))
    order = torch.arange(tiny.VOCAB_SIZE)
    after = gradients(model, exchange(order)[ids])
    assert by_token
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        expected = exchange(gradient) if name in by_token else gradient
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_trunk_from_scratch_trains_it(name: str) -> None:
    trunk = built(name)
    rows: Any = trunk.get_input_embeddings().weight.detach()  # type: ignore[union-attr, operator]
    assert 0.2 < float(rows[tiny.SEPARATOR].std() / rows.std()) < 5
    check_exchange(trunk)


@pytest.mark.parametrize("name", NAMES)
def test_a_trunk_that_is_trained_on_does(name: str, tmp_path: Path) -> None:
    built(name).save_pretrained(tmp_path)
    options = ModelOptions(base_model_name=str(tmp_path), init="pretrained")
    check_exchange(build_trunk(options, TOKENIZER).eval())


def test_a_saved_model_of_ours_does_in_other_hands(tmp_path: Path) -> None:
    tiny.scone("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.tokens(2, 12)
    ids[:, 0] = tiny.SEPARATOR
    assert gradients(model, ids)["trunk.model.embed_tokens.weight"][tiny.SEPARATOR].any()


def test_a_deep_trunk_has_gradients_at_a_window_that_begins_with_it() -> None:
    trunk = built("scone-modern", layers=24)
    ids = tiny.tokens(2, 12)
    ids[:, 0] = tiny.SEPARATOR
    with_it = torch.stack([gradient.norm() for gradient in gradients(trunk, ids).values()]).norm()
    ids[:, 0] = OTHER
    without = torch.stack([gradient.norm() for gradient in gradients(trunk, ids).values()]).norm()
    assert 0.1 < float(with_it / without) < 10


def test_a_deep_trunk_of_before_whose_separator_is_zeros_has_gradients_from_its_first_step_on() -> None:
    """And one that is not trained, or has a vector there, stays as it is, bit for bit."""
    for begins_at, is_trained in ((0.0, True), (0.0, False), (0.1, True)):
        trunk = built("llama", layers=16).requires_grad_(is_trained)
        rows: Any = trunk.get_input_embeddings().weight.detach()  # type: ignore[union-attr, operator]
        rows[tiny.SEPARATOR] = begins_at
        before = rows.clone()
        draw_if_zero(trunk)
        if begins_at or not is_trained:
            assert torch.equal(rows, before)
            continue
        assert torch.equal(rows[1:], before[1:])
        ids = tiny.tokens(2, 12)
        ids[:, 0] = tiny.SEPARATOR
        norm = torch.stack([gradient.norm() for gradient in gradients(trunk, ids).values()]).norm()
        assert 0 < float(norm) < 1e3
    for beyond in (-1, tiny.VOCAB_SIZE):  # tokens without a vector, which some models pad with
        trunk.config.pad_token_id = beyond
        rows.zero_()
        draw_if_zero(trunk)
        assert not rows.any()
