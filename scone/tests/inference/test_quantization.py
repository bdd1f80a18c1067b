"""Quantised trunks are really smaller, really used, and still the same function within rounding."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from scone.inference.quantization import HalfStorageLinear, computes_in_fp16, model_bytes, quantize_trunk
from scone.tests import tiny
from scone.utils.errors import SconeError

# The largest relative error of the logits, and the layers' size relative to fp32 (scales included).
EXPECTED = {"fp16": (0.01, 0.5), "int8": (0.05, 0.27), "int4": (0.3, 0.15)}


def llama(**sizes):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        return llama()
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes)).eval()


def layer_bytes(model) -> int:
    """Everything but the token embeddings."""
    return model_bytes(model) - model_bytes(model.get_input_embeddings())


@pytest.mark.parametrize("quantization", ["fp16", "int8", "int4"])
def test_quantised_trunk_is_smaller_and_close(model, quantization):
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


def test_half_storage_equals_the_linear_layer_with_rounded_weights():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 5), torch.randn(3, 8)
    stored = HalfStorageLinear(layer.weight, layer.bias)
    assert torch.equal(stored(x), torch.nn.functional.linear(x, layer.weight.half().float(), layer.bias))
    assert stored.weight.dtype == torch.float16


@pytest.mark.parametrize("computes", [False, True])
@torch.no_grad()
def test_fp16_with_a_live_f_gram_model_on_processors_with_fp16_and_without(monkeypatch, computes):
    """Without, it is stored in fp16. The f-gram model stays as it is, and its width is not the trunk's."""
    monkeypatch.setattr("scone.inference.quantization.computes_in_fp16", lambda device: computes)
    assert computes_in_fp16(torch.device("cuda"))
    live = tiny.scone()
    quantised = copy.deepcopy(live)
    report = quantize_trunk(quantised, "fp16")
    assert ("no fp16" in report.computes_in) == (not computes)
    assert layer_bytes(quantised.trunk) < 0.6 * layer_bytes(live.trunk)
    input_ids = torch.randint(0, 23, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantised(input_ids).logits.float(), live(input_ids).logits, atol=2e-2, rtol=0)


def test_what_cannot_be_quantised_is_said(monkeypatch):
    with pytest.raises(SconeError, match="found quantization 'int3'; expected one of fp16, int8, int4"):
        quantize_trunk(llama(), "int3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SconeError, match=r'pip install "scone-lm\[quantization\]"'):
        quantize_trunk(llama(), "int4")


def test_layers_that_int4_cannot_hold_are_left_alone():
    pytest.importorskip("bitsandbytes")
    odd = llama(hidden_size=64, intermediate_size=72, num_hidden_layers=1, num_attention_heads=2)
    report = quantize_trunk(odd, "int4")
    assert (report.num_layers, report.num_left) == (4, 3)
    assert "3 left as they were" in str(report)
    assert odd(torch.randint(0, 50, (1, 8))).logits.isfinite().all()
    with pytest.raises(SconeError, match="use int8"):
        quantize_trunk(llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2), "int4")
