"""Trunks that read, count or learn in ways of their own: in front of them, too, nothing changes but input vectors."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scone.configs.schema import ModelOptions
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import precompute_table
from scone.models.language_model import SconeForCausalLM
from scone.models.token_history import CACHE
from scone.models.trunk import trunk_configuration
from scone.tests import tiny

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
EXPERTS |= {"output_router_logits": True, "router_aux_loss_coef": 0.5, "aux_loss_coef": 0.5}
IN_LAYERS = {"vocab_size_per_layer_input": tiny.VOCAB_SIZE, "hidden_size_per_layer_input": 4, "head_dim": 8}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
SPARSE = {"activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4, "altup_num_inputs": 2}
OWN_WAYS: dict[str, dict[str, Any]] = {
    "gemma3n_text": IN_LAYERS | SLIDING | SPARSE | {"num_kv_shared_layers": 0},
    "gemma4_text": IN_LAYERS | SLIDING | {"num_kv_shared_layers": 0, "global_head_dim": 8},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 8},
    "jetmoe": EXPERTS | {"kv_channels": 8},
    "opt": {"word_embed_proj_dim": 8, "ffn_dim": 32},  # token embeddings that are narrower than the layers
    "electra": {"embedding_size": 8, "is_decoder": True},
    "falcon_h1": {"num_key_value_heads": 1, "head_dim": 8},
}
NAMES = [name for name in OWN_WAYS if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]  # older transformers lack some
COUNT_BY_TOKENS = "create_position_ids_from_inputs_embeds"


def trunk(name: str) -> PreTrainedModel:
    """Of random weights, gains too, as training leaves them."""
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 1, "vocab_size": tiny.VOCAB_SIZE, "pad_token_id": tiny.SEPARATOR}
    sizes |= {"bos_token_id": tiny.SEPARATOR, "eos_token_id": tiny.SEPARATOR}
    config = AutoConfig.for_model(name, **(tiny.SIZES | sizes | OWN_WAYS[name]))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def scone(trunk: PreTrainedModel) -> SconeForCausalLM:
    """Not trained: its rows are zero."""
    rows = {"f_gram_model": None, "learned_rows": 10**6}
    return SconeForCausalLM.from_trunk(trunk, tiny.vocabulary(min_freq=1), **rows).eval()


def trained(model: SconeForCausalLM) -> SconeForCausalLM:
    assert model.f_gram_embedding is not None
    torch.nn.init.normal_(model.f_gram_embedding.rows.weight, std=0.3)
    return model


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_untrained_scone_equals_its_trunk(name: str) -> None:
    """In logits, in loss and in its gradients, those of routers too."""
    plain = trunk(name)
    model, ids = scone(plain), tiny.tokens(2, 16)
    outputs, gradients = [], []
    for each in (plain, model):
        plain.zero_grad()
        outputs.append(each(input_ids=ids, labels=ids, use_cache=False))
        outputs[-1].loss.backward()
        found = {key: value.grad for key, value in plain.named_parameters() if value.grad is not None}
        gradients.append({key: value.clone() for key, value in found.items()})
    same(outputs[1].logits, outputs[0].logits)
    same(outputs[1].loss, outputs[0].loss)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        same(gradients[1][key], gradient)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_decoding_equals_full_forward_and_table_model_equals_live_model(name: str) -> None:
    model, ids = trained(scone(trunk(name))), tiny.tokens(2, 16)
    whole, cache, pieces = model(ids, use_cache=False).logits, None, []
    for start, stop in ((0, 6), (6, 9), *((at, at + 1) for at in range(9, 16))):
        output = model(ids[:, start:stop], cache=cache, use_cache=True)
        cache = output[CACHE]
        pieces.append(output.logits)
    same(torch.cat(pieces, 1), whole)
    text, greedy = ids[:, :6], {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for _ in range(6):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids[:, :6], attention_mask=torch.ones_like(ids[:, :6]), **greedy), text)
    model.attach_table(tiny.RowsInMemory(model))
    same(model(ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    model, ids = trained(scone(trunk(name))), tiny.tokens(2, 16)
    model.save_pretrained(tmp_path)
    loaded = SconeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def counts_by_tokens(name: str) -> bool:
    """Whether the source of an architecture of transformers says so."""
    module = model_type_to_module_name(name)
    found = find_spec(f"transformers.models.{module}.modeling_{module}")
    source = "" if found is None or found.origin is None else Path(found.origin).read_text(encoding="utf-8")
    return COUNT_BY_TOKENS in source


def test_trunks_that_count_positions_by_tokens_are_refused() -> None:
    """All that transformers has: vectors of ours would be counted anew in each cached step, from another number on."""
    names = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if counts_by_tokens(name)]
    assert {"roberta", "xlm-roberta", "camembert"} <= set(names)
    for name in names:
        said = tiny.refusal(trunk_configuration, ModelOptions(base_model_name=name))
        assert said.startswith(f"found a trunk of type '{name}', which counts positions by token ids"), said
    config = AutoConfig.for_model("roberta", **tiny.SIZES, vocab_size=tiny.VOCAB_SIZE, is_decoder=True)
    assert "counts positions by token ids" in tiny.refusal(scone, AutoModelForCausalLM.from_config(config))


def test_decoders_whose_loss_is_not_that_of_the_next_token_are_refused(tmp_path: Path) -> None:
    """Of a plain trunk, the baseline, the trainer takes the trunk's own loss; theirs wants labels that are shifted."""
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **sizes, vocab_size=tiny.VOCAB_SIZE))
    decoder.save_pretrained(tmp_path)  # and says no more that it was one of two
    for name in ("bart", "marian", "pegasus", "trocr", str(tmp_path)):
        said = tiny.refusal(trunk_configuration, ModelOptions(base_model_name=name))
        assert "trains to repeat each token" in said, said
    assert "trains to repeat" in tiny.refusal(trunk_configuration, ModelOptions(str(tmp_path), init="pretrained"))


def test_the_table_of_a_trunk_that_is_saved_under_other_names(tmp_path: Path) -> None:
    """transformers calls its token embeddings otherwise in the file."""
    sizes = tiny.SIZES | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": tiny.VOCAB_SIZE}
    model = trained(scone(AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **sizes))))
    model.save_pretrained(tmp_path)
    name = next(f"{name}.weight" for name, part in model.named_modules() if part is model.get_input_embeddings())
    assert name not in load_file(tmp_path / "model.safetensors")
    for each, changed in (("ours", 0.0), ("other", 1.0)):
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(changed)
        precompute_table(model, tmp_path / each, quiet=True)
    assert SconeForCausalLM.from_pretrained(tmp_path, table=EmbeddingTable.open(tmp_path / "ours")) is not None
    other = EmbeddingTable.open(tmp_path / "other")
    assert "table of another model" in tiny.refusal(SconeForCausalLM.from_pretrained, tmp_path, table=other)
