"""Whether a model folder's configuration fits the size of its weights: asked before anything is built or allocated."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scone.utils.errors import SconeError
from scone.utils.files import read_json

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_PACKED = 16  # at most so many parameters in one stored number: quantised ones are packed
_SPARE_PARAMETERS = 1 << 20  # built without being stored, such as fixed position embeddings
_HEADER_LIMIT = 1 << 28


def check_sizes(folder: Path) -> None:
    """Raise SconeError where ``config.json`` speaks of far more than the weight files of ``folder`` hold.

    The model is built on PyTorch's meta device, which allocates nothing. What is no folder, or has no safetensors
    files, is left to its loader.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = [shape for file in sorted(folder.glob("*.safetensors")) for shape in _stored_shapes(file)]
    if not shapes:
        return
    layers = max(_layers(read_json(folder / "config.json")), default=0)
    if layers > len(shapes):  # a loop that builds layers has no other end
        raise SconeError(
            f"found {layers:,} layers in {folder / 'config.json'} and {len(shapes):,} weights beside it; expected "
            "those of one model; copy the whole folder again"
        )
    stored = sum(math.prod(shape) for shape in shapes)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    if parameters > _PACKED * stored + _SPARE_PARAMETERS:
        raise SconeError(
            f"found {parameters:,} parameters by {folder / 'config.json'} and {stored:,} stored beside it; expected "
            "those of one model; copy the whole folder again"
        )


def _stored_shapes(file: Path) -> list[list[int]]:
    """The shapes in a safetensors header; none where it is damaged, which its loader says better."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size) if size <= min(_HEADER_LIMIT, file.stat().st_size) else b""
    try:
        shapes = [entry["shape"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return [[int(length) for length in shape] for shape in shapes]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return []


def _layers(config: Any) -> Iterator[int]:
    """Every number of layers in a configuration and those inside it."""
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from _layers(value)
        elif name in _LAYERS and isinstance(value, int):
            yield value
