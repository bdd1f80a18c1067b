"""What a model costs: FLOPs a token by formula, and the parameters that only training needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scone.inference.loading import F_GRAM_WEIGHTS
from scone.models.language_model import SconeForCausalLM
from scone.training.step_cost import RunCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def flops_per_token(model: PreTrainedModel, tokens: np.ndarray) -> dict[str, Any]:
    """What ``model`` computes per token of a batch like ``tokens`` [B, T], by the formulas of `models.accounting`.

    ``inference_flops_per_token``: as the model is served here (the f-gram model counts only where it runs live).
    ``training_flops_per_token``: forward and backward of trunk and input embedding; of a SCONE model also
    ``nodes_per_position`` and ``match_rate``. Both depend on ``tokens``: f-grams share their prefixes within a batch.
    Works for a model served from a table too: what training costs follows from its configuration and vocabulary.
    """
    cost = RunCost(model)
    input_ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    inputs: dict[str, Any] = {"input_ids": input_ids}
    scone = isinstance(model, SconeForCausalLM)
    if isinstance(model, SconeForCausalLM):
        inputs["trie"] = model.trie_of(model.match(input_ids))
    cost.count(inputs)
    figures = cost.to_dict()
    live = scone and getattr(model, "f_gram_embedding", None) is not None
    inference = figures["inference_flops_per_token"] + (figures["f_gram_flops_per_token"] if live else 0.0)
    kept = ("training_flops_per_token", "nodes_per_position", "match_rate")
    return {"inference_flops_per_token": inference} | {name: figures[name] for name in kept if name in figures}


def training_only_parameters(folder: str | Path) -> int | None:
    """Values of the f-gram model, gain and learned rows in a model folder's weights, read from the files' headers.

    None where there are no weights (a hub name), 0 for a plain model.
    """
    from safetensors import safe_open

    paths = sorted(Path(folder).glob("model*.safetensors"))
    if not paths:
        return None
    total = 0
    for path in paths:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if name.startswith(F_GRAM_WEIGHTS)]  # noqa: SIM118 (no mapping)
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total
