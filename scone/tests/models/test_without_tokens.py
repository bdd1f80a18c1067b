"""Vectors or caches without the tokens that f-grams are found in get one line, never other answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from scone.tests import tiny
from scone.tests.models.kinds import KINDS, model_of
from scone.utils.errors import SconeError

MODELS = {kind: model_of(kind) for kind in KINDS}
TEXT = tiny.tokens(1, 12)


@pytest.mark.parametrize("kind", MODELS)
def test_vectors_without_tokens_are_refused(kind):
    """T(tokens), as adapters and tools make them, is not what these models read."""
    model = MODELS[kind]
    vectors = model.get_input_embeddings()(TEXT)
    with torch.no_grad():
        wrong, right = model.trunk(inputs_embeds=vectors).logits, model(TEXT).logits
        assert (wrong - right).abs().max() > 0.01, "the refusal is for nothing"
        with pytest.raises(ValueError, match=r"^found inputs_embeds without input_ids; expected .*; give .*$"):
            model(inputs_embeds=vectors)
        with pytest.raises(ValueError, match="You passed `inputs_embeds`"):  # the line of transformers
            model.generate(inputs_embeds=vectors, max_new_tokens=2)
        ready = model.input_vectors(TEXT)
        assert torch.equal(model(TEXT, inputs_embeds=ready).logits, right)
        assert torch.equal(model.trunk(inputs_embeds=ready).logits, right)
        with pytest.raises(ValueError, match="found no input_ids"):
            model()


@pytest.mark.filterwarnings("ignore")  # of PEFT's own
@pytest.mark.parametrize("how", ["prompt", "p", "prefix"])
def test_soft_prompts_are_refused(how):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    kinds: dict[str, Any] = {
        "prompt": peft.PromptTuningConfig,
        "p": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
    }
    sizes = {"encoder_hidden_size": 8} if how == "p" else {}
    tuned = peft.get_peft_model(
        tiny.scone("gpt2", min_freq=1), kinds[how](task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes)
    )
    prefixed = "the cache holds 2 positions but the tokens of 0|found a cache and past_key_values"  # transformers 5.24
    refusal = prefixed if how == "prefix" else "found inputs_embeds without"
    for call in (lambda: tuned(input_ids=TEXT, labels=TEXT), lambda: tuned.generate(input_ids=TEXT, max_new_tokens=2)):
        with pytest.raises(ValueError, match=refusal):
            call()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_continuous_batching_is_refused(kind):
    model = MODELS[kind]
    with pytest.raises(SconeError, match=r"^found continuous batching .*; expected generate, .*$"):
        model.generate_batch(
            TEXT.tolist(), GenerationConfig(max_new_tokens=2), continuous_batching_config=ContinuousBatchingConfig()
        )
    with pytest.raises(SconeError, match="found continuous batching"):  # whoever drives it
        model(TEXT, write_index=[torch.arange(12)], read_index=[torch.arange(12)])
