"""Whether a step may leave a parameter without a gradient; DDP then has to search for them."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from scone.models.embedded_trunk import EmbeddedTrunk


def all_are_used(model: PreTrainedModel) -> bool:
    """Whether every step gives each trained parameter of ``model`` a gradient, whatever the text.

    Tried on a model of the trunk's configuration without data, which computes nothing. What cannot be tried that way
    (experts that only some tokens go to, say) counts as not known, and the answer is False. Our own layers use all of
    theirs, also for a batch in which no f-gram ends.
    """
    trunk = model.trunk if isinstance(model, EmbeddedTrunk) else model
    # most models look at numbers to make a mask, and few take a finished one
    return any(_all_get_gradients(trunk.config, has_mask) for has_mask in (True, False))


def _all_get_gradients(config: PreTrainedConfig, has_mask: bool) -> bool:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").train()
            inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "use_cache": False}
            if has_mask:
                inputs["attention_mask"] = torch.zeros(1, 1, 8, 8)
            model(**inputs).logits.sum().backward()
    except Exception:  # of any model, ours or not
        return False
    return all(parameter.grad is not None for parameter in model.parameters())
