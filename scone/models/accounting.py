"""What a model costs: parameters by where they live, and floating-point operations per token.

One multiplication and one addition count as two operations. The formulas count matrix products, as
``torch.utils.flop_counter`` does, against which the tests check them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence, Set
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
from scone.utils.command_line import one_line

logger = logging.getLogger(__name__)


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
    """Operations per token of one forward pass of the trunk that ``config`` describes: see `trunk_flops`."""
    return trunk_flops(without_memory(config).requires_grad_(False), sequence_length)[0]


def without_memory(trunk: PreTrainedConfig | nn.Module) -> Any:
    """A model of that configuration, or a copy of that model with what trains in it, on the meta device."""
    if isinstance(trunk, nn.Module):
        memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in trunk.buffers()}
        for weight in trunk.parameters():
            memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        return copy.deepcopy(trunk, memo)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(trunk))


def trunk_flops(trunk: Any, sequence_length: int, input_trains: bool = False) -> tuple[float, float]:
    """Operations per token of a forward and of a backward pass over ``sequence_length`` tokens, output head included.

    A matrix of p weights costs 2·p per token in the forward pass. In the backward pass it costs 2·p for the gradient of
    its input, if anything before it trains, and 2·p for its own, if it trains: together the factor of two that Kaplan
    et al. (arXiv 2001.08361, section 2.1) give where everything does. A frozen trunk costs one, down to its first
    layer, with ``input_trains``, and none without. A product of two activations costs as much again for each of them.

    Counted on the real modules without memory or arithmetic (``trunk`` is one of `without_memory`), so it holds for any
    architecture and for adapters in it. Attention counts all pairs of positions, as kernels without a causal shortcut
    compute them; of experts those count that a token goes to.
    """
    trunk.eval().set_attn_implementation("eager")
    trunk.set_experts_implementation("batched_mm")  # the others look at values, which meta tensors do not have
    if input_trains:
        trunk.enable_input_require_grads()
    tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        # with a mask, or transformers looks for one in the positions' values
        logits = trunk(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        forward = counter.get_total_flops()
        if logits.requires_grad:
            logits.sum().backward()
    return forward / sequence_length, (counter.get_total_flops() - forward) / sequence_length


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


def input_embedding_backward_flops(
    config: SconeConfig, nodes_by_depth: Sequence[float], f_grams_by_depth: Sequence[float], trains: Set[str]
) -> float:
    """Of the backward pass of what `input_embedding_flops` counts, by the rule of `trunk_flops`.

    ``trains``: those of "f_gram_model", "rows", "gain", "gate" and "tokens", the trunk's token embeddings, that do. The
    f-gram model has positions of its own before all its matrices but the map in.
    """
    sizes, width = config.f_gram_model_config, config.hidden_size
    model = 0.0 if sizes is None else f_gram_forward_flops(sizes, width, nodes_by_depth, f_grams_by_depth)
    gate = input_embedding_flops(config, nodes_by_depth, f_grams_by_depth) - model
    backward = gate * (("gate" in trains) + bool(trains - {"gate"}))
    if sizes is None:
        return backward
    tokens_train = "tokens" in trains and not sizes.own_tokens
    if "f_gram_model" not in trains:
        return backward + model * tokens_train
    map_in = (
        0 if sizes.own_tokens or sizes.hidden_size == width else 2 * sizes.hidden_size * width * sum(nodes_by_depth)
    )
    return backward + 2 * model - (0 if tokens_train else map_in)


class RunCost:
    """Adds up over a whole run what its batches made the model compute; of several processes, those of this one.

    What trains is looked up at once, before training shares weights out or merges adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        trunk: Any = model.trunk if isinstance(model, EmbeddedTrunk) else model
        all_trains = all(weight.requires_grad for weight in trunk.parameters())
        self._trunk = trunk.config if all_trains else without_memory(trunk)
        before = [name for name, weight in model.named_parameters() if weight.requires_grad]
        self._before_trunk = {name for name in before if trunk is not model and not name.startswith("trunk.")}
        self._trains = {name.split(".")[1] for name in self._before_trunk if name.startswith("f_gram_embedding.")}
        self._trains |= {"tokens"} if trunk.get_input_embeddings().weight.requires_grad else set()
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
        embedding is a row read. Attention counts whole blocks, as ``trunk_flops`` says. Operations are None, with a
        warning, for a trunk that cannot be counted.
        """
        model, counts = self.model, self.state_dict()
        trunk_config: Any = model.trunk.config if isinstance(model, EmbeddedTrunk) else model.config
        figures: dict[str, Any] = {"inference_flops_per_token": None, "f_gram_flops_per_token": 0.0}
        backward = 0.0
        if isinstance(model, SconeForCausalLM):
            nodes, f_grams = ([count / counts["positions"] for count in counts[name]] for name in ("nodes", "f_grams"))
            figures["f_gram_flops_per_token"] = input_embedding_flops(model.config, nodes, f_grams)  # type: ignore[arg-type]
            backward = input_embedding_backward_flops(model.config, nodes, f_grams, self._trains)  # type: ignore[arg-type]
            figures |= {
                "match_rate": counts["matched"] / counts["positions"],
                "nodes_per_position": sum(nodes),
                "nodes_per_position_by_depth": nodes,
                "f_grams_per_position_by_depth": f_grams,
            }
        try:
            figures["inference_flops_per_token"] = trunk_forward_flops(trunk_config, counts["length"])
            trunk = self._trunk if isinstance(self._trunk, nn.Module) else without_memory(self._trunk)
            forward, of_trunk = trunk_flops(trunk, counts["length"], bool(self._before_trunk))
        except Exception as error:  # of any model: a run that is through must not fail for it
            logger.warning("the operations of this trunk cannot be counted (%s)", one_line(str(error))[:200])
            return figures | {"training_flops_per_token": None}
        forward += figures["f_gram_flops_per_token"]
        return figures | {"training_flops_per_token": forward * (2 if recomputed else 1) + of_trunk + backward}
