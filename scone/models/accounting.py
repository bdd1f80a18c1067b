"""What a model costs: parameters by where they live, and floating-point operations per token.

One multiplication and one addition count as two operations. The formulas count matrix products, as
``torch.utils.flop_counter`` does, against which the tests check them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from scone.models.configuration import FGramModelConfig, SconeConfig
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.input_embeddings import FGramModel
from scone.models.language_model import SconeForCausalLM
from scone.models.learned_rows import LearnedRows
from scone.models.over_encoding import OverEncodingForCausalLM


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    ``resident`` ones are on the accelerator when the model serves; ``training_only`` ones become rows of the table, of
    which ``table`` values lie in RAM or on disk. An over-encoding model's rows are such a table as they are.
    """

    resident: int
    training_only: int
    table: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def parameter_counts(model: PreTrainedModel) -> ParameterCounts:
    """Of a SCONE model (live or served), an over-encoding model or a plain trunk; tied weights count once."""
    if isinstance(model, OverEncodingForCausalLM):
        return ParameterCounts(_count_served(model), 0, _count(model.hashed_embedding))
    if not isinstance(model, SconeForCausalLM):
        return ParameterCounts(_count(model), 0, 0)
    extra = 0 if model.f_gram_embedding is None else _count(model.f_gram_embedding)
    return ParameterCounts(_count_served(model), extra, model.config.num_f_grams * model.config.hidden_size)


def _count_served(model: EmbeddedTrunk) -> int:
    """Of the trunk and of the norm in front of it."""
    return _count(model.trunk) + (0 if model.input_norm is None else _count(model.input_norm))


def f_gram_model_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the f-gram model that ``config`` describes, wherever its weights are; 0 for a model without one."""
    if not isinstance(config, SconeConfig) or config.f_gram_model_config is None:
        return 0
    with torch.device("meta"):
        return _count(FGramModel(config.f_gram_model_config, config.hidden_size, config.max_n))


def _count(module: nn.Module) -> int:
    """Of all processes together, where learned rows are shared out."""
    rows = [part for part in module.modules() if isinstance(part, LearnedRows)]
    elsewhere = sum((part.num_rows - len(part.weight)) * part.weight.shape[1] for part in rows)
    return elsewhere + sum(parameter.numel() for parameter in module.parameters())


def trunk_forward_flops(config: PreTrainedConfig, sequence_length: int) -> float:
    """Operations per token of one forward pass over ``sequence_length`` tokens, output head included.

    Counted on the real modules without memory or arithmetic (meta device), so it holds for any architecture. Attention
    counts all pairs of positions, as kernels without a causal shortcut compute them.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        tokens = torch.zeros(1, sequence_length, dtype=torch.int64)
        # a finished mask: making one looks at values, which meta tensors do not have
        mask = torch.zeros(1, 1, sequence_length, sequence_length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(input_ids=tokens, attention_mask=mask, use_cache=False)
    return counter.get_total_flops() / sequence_length


def f_gram_forward_flops(
    config: FGramModelConfig,
    trunk_width: int,
    nodes_by_depth: Sequence[float],
    f_grams_by_depth: Sequence[float] | None = None,
) -> float:
    """Operations of one forward pass of the f-gram model.

    ``nodes_by_depth[d]`` is the number of trie nodes with d ancestors (for a cost per position: nodes per position).
    A node costs its projections, its feed-forward layers and d + 1 places of attention; where the widths differ, a map
    in, and a map out. In the last layer all nodes give keys and values, but only the distinct f-grams that positions
    read, ``f_grams_by_depth``, cost the rest and the map out; without these numbers all nodes do.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    map_out = 0 if width == trunk_width else 2 * width * trunk_width
    map_in = 0 if config.own_tokens else map_out
    keys_and_values = 4 * width * width
    last = nodes_by_depth if f_grams_by_depth is None else f_grams_by_depth
    total = 0.0
    for depth, (nodes, f_grams) in enumerate(zip(nodes_by_depth, last, strict=True)):
        rest_of_layer = 4 * width * (width + inner) + 4 * width * (depth + 1)
        total += nodes * (map_in + layers * keys_and_values + (layers - 1) * rest_of_layer)
        total += f_grams * (map_out + rest_of_layer)
    return total


def input_embedding_flops(
    config: SconeConfig, nodes_by_depth: Sequence[float], f_grams_by_depth: Sequence[float]
) -> float:
    """As `f_gram_forward_flops`, of a live SCONE's whole input embedding layer: with the gate. Reading and adding up
    rows are no products and count nothing, as the token embedding's own lookup does not.
    """
    sizes, width = config.f_gram_model_config, config.hidden_size
    model = 0.0 if sizes is None else f_gram_forward_flops(sizes, width, nodes_by_depth, f_grams_by_depth)
    gate = 2 * 2 * width * width if config.combination == "gate" else 0
    return model + gate * sum(f_grams_by_depth)


def training_flops(forward: float, recomputed: bool = False) -> float:
    """Of one training step, from its forward operations; ``recomputed``: with gradient checkpointing. A backward pass
    costs two products for each product of the forward pass.
    """
    return forward * (4 if recomputed else 3)


class RunCost:
    """Adds up over a whole run what its batches made the model compute; of several processes, those of this one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._counts: dict[str, Any] = {"positions": 0, "length": 0, "matched": 0, "nodes": [], "f_grams": []}

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Add a training batch. Matches stay on the device, so that nothing waits for it."""
        counts = self._counts
        counts["positions"] += inputs["input_ids"].numel()
        counts["length"] = max(counts["length"], inputs["input_ids"].shape[1])
        if isinstance(self.model, SconeForCausalLM):
            trie = inputs["trie"]
            counts["matched"] = counts["matched"] + trie["position_index"].count_nonzero()
            for name, offsets in (("nodes", trie["depth_offsets"]), ("f_grams", trie["f_gram_offsets"])):
                by_depth = [float(after - before) for before, after in pairwise(offsets)]
                counts[name] = [sum(pair) for pair in zip_longest(counts[name], by_depth, fillvalue=0.0)]

    def state_dict(self) -> dict[str, Any]:
        """What was added up so far, JSON-ready: for a checkpoint."""
        return self._counts | {"matched": int(self._counts["matched"])}

    def load_state_dict(self, counts: Mapping[str, Any]) -> None:
        self._counts = dict(counts)

    def to_dict(self, recomputed: bool = False) -> dict[str, Any]:
        """Operations per token, and of a SCONE model what it matched and computed per position; JSON-ready.

        ``recomputed``: with gradient checkpointing. Serving costs the trunk's forward operations alone: the input
        embedding is a row read. Attention counts whole blocks, as ``trunk_forward_flops`` says.
        """
        model, counts = self.model, self.state_dict()
        trunk_config: Any = model.trunk.config if isinstance(model, EmbeddedTrunk) else model.config
        trunk = trunk_forward_flops(trunk_config, counts["length"])
        figures: dict[str, Any] = {"inference_flops_per_token": trunk, "f_gram_flops_per_token": 0.0}
        if isinstance(model, SconeForCausalLM):
            nodes, f_grams = ([count / counts["positions"] for count in counts[name]] for name in ("nodes", "f_grams"))
            figures["f_gram_flops_per_token"] = input_embedding_flops(model.config, nodes, f_grams)  # type: ignore[arg-type]
            figures |= {
                "match_rate": counts["matched"] / counts["positions"],
                "nodes_per_position": sum(nodes),
                "nodes_per_position_by_depth": nodes,
                "f_grams_per_position_by_depth": f_grams,
            }
        forward = trunk + figures["f_gram_flops_per_token"]
        return figures | {"training_flops_per_token": training_flops(forward, recomputed)}
