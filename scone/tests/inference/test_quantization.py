"""Quantised trunks are really smaller, really used, and still the same function within rounding."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scone.inference.quantization import HalfStorageLinear, computes_in_fp16, model_bytes, quantize_trunk
from scone.tests.inference.tables import small_model
from scone.utils.errors import SconeError

# The largest relative error of the logits, and the layers' size relative to fp32 (scales included).
EXPECTED = {"fp16": (0.01, 0.5), "int8": (0.05, 0.27), "int4": (0.3, 0.15)}


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=128, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


def layer_bytes(model: PreTrainedModel) -> int:
    """Everything but the token embeddings."""
    return model_bytes(model) - model_bytes(model.get_input_embeddings())


@pytest.mark.parametrize("quantization", ["fp16", "int8", "int4"])
def test_quantised_trunk_is_smaller_and_close(model: PreTrainedModel, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    input_ids = torch.randint(0, 50, (2, 20))
    quantised = copy.deepcopy(model)
    report = quantize_trunk(quantised, quantization)
    with torch.no_grad():
        expected, got = model(input_ids).logits, quantised(input_ids).logits.float()
    error, size = EXPECTED[quantization]
    assert 0 < (got - expected).norm() / expected.norm() < error, "not quantised, or no longer the same function"
    assert layer_bytes(quantised) < (size + 0.05) * layer_bytes(model)  # norms and biases keep their type
    assert report.bytes_before == model_bytes(model)
    assert report.bytes_after == pytest.approx(model_bytes(quantised), rel=0.05)  # bitsandbytes repacks scales on use
    assert report.num_layers == (8 if model.config.model_type == "gpt2" else 14)
    assert not any(isinstance(layer, Conv1D) for layer in quantised.modules()) or quantization == "fp16"
    generated = quantised.generate(input_ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 24)


def test_half_storage_equals_the_linear_layer_with_rounded_weights() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 5)
    stored = HalfStorageLinear(layer.weight, layer.bias)
    x = torch.randn(3, 8)
    assert torch.equal(stored(x), torch.nn.functional.linear(x, layer.weight.half().float(), layer.bias))
    assert stored.weight.dtype == torch.float16


def test_processors_without_fp16_store_in_fp16(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    monkeypatch.setattr("scone.inference.quantization.computes_in_fp16", lambda device: False)
    quantised = copy.deepcopy(model)
    report = quantize_trunk(quantised, "fp16")
    assert "no fp16" in report.computes_in
    assert layer_bytes(quantised) < 0.55 * layer_bytes(model)
    input_ids = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(quantised(input_ids).logits, model(input_ids).logits, atol=2e-3, rtol=0)


def test_a_trunk_in_fp16_takes_a_live_f_gram_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The f-gram model stays as it is, and its width is not the trunk's: both of its maps are fp32."""
    monkeypatch.setattr("scone.inference.quantization.computes_in_fp16", lambda device: True)
    live = small_model()
    quantised = copy.deepcopy(live)
    quantize_trunk(quantised, "fp16")
    input_ids = torch.randint(0, 23, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = quantised(input_ids).logits
        torch.testing.assert_close(found.float(), live(input_ids).logits, atol=2e-2, rtol=0)


def test_accelerators_compute_in_fp16() -> None:
    assert computes_in_fp16(torch.device("cuda"))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    real_import = builtins.__import__

    def without_bitsandbytes(name: str, *args: object, **kwargs: object) -> object:
        if name == "bitsandbytes":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_bitsandbytes)
    with pytest.raises(SconeError, match=r'pip install "scone-lm\[quantization\]"'):
        quantize_trunk(model, "int4")


def test_unknown_quantization_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(SconeError, match="found quantization 'int3'; expected one of fp16, int8, int4"):
        quantize_trunk(model, "int3")


def test_layers_that_int4_cannot_hold_are_left_alone() -> None:
    pytest.importorskip("bitsandbytes")
    config = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2}
    odd = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=72, **config)).eval()
    report = quantize_trunk(odd, "int4")
    assert (report.num_layers, report.num_left) == (4, 3)
    assert "3 left as they were" in str(report)
    assert odd(torch.randint(0, 50, (1, 8))).logits.isfinite().all()
    with pytest.raises(SconeError, match="use int8"):
        quantize_trunk(LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, **config)), "int4")
