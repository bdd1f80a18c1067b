"""A tiny model of each kind: live, of rows alone, from a table, and the baselines."""

from __future__ import annotations

from typing import Any

import torch

from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.models.scaled_trunk import ScaledTrunkForCausalLM
from scone.tests import tiny

KINDS = ["live", "table", "over-encoding", "scaled"]
HASHED_ROWS = 60


def model_of(kind: str, trunk: str = "llama", min_freq: int = 1, **trunk_changes: Any) -> EmbeddedTrunk:
    """In evaluation mode, as if trained."""
    if kind == "over-encoding":
        return over_encoding(trunk, trunk_changes)
    if kind == "scaled":
        return ScaledTrunkForCausalLM.from_trunk(tiny.trunk(trunk, **trunk_changes), embedding_scale=3.0).eval()
    f_gram_model = {"rows": False, "own tokens": tiny.F_GRAM_SIZES | {"own_tokens": True}}.get(kind, True)
    model = tiny.scone(trunk, f_gram_model=f_gram_model, min_freq=min_freq, **trunk_changes)
    if kind == "table":
        model.attach_table(tiny.RowsInMemory(model))
    return model


def over_encoding(
    trunk: str = "gpt2", trunk_changes: Any = None, trained: bool = True, **changes: Any
) -> OverEncodingForCausalLM:
    settings = {"num_rows": HASHED_ROWS, "separator_ids": (tiny.SEPARATOR,)} | changes
    model = OverEncodingForCausalLM.from_trunk(tiny.trunk(trunk, **(trunk_changes or {})), **settings).eval()
    if trained:
        torch.manual_seed(1)
        torch.nn.init.normal_(model.hashed_embedding.rows.weight, std=0.5)
    return model
