"""Fewer bytes for the trunk's linear layers: fp16, int8, int4; the embedding table has row types of its own."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scone.utils.errors import SconeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZATIONS = ("fp16", "int8", "int4")
INT4_IN, INT4_OUT = 64, 32  # multiples that int4 layers come in


@dataclass(frozen=True)
class QuantizationReport:
    """Bytes of the model's parameters and buffers before and after, and how the layers compute now."""

    quantization: str
    num_layers: int
    num_left: int  # layers whose shape int4 cannot hold
    bytes_before: int
    bytes_after: int
    computes_in: str

    def __str__(self) -> str:
        from scone.utils.text import human_bytes

        left = f" ({self.num_left} left as they were)" if self.num_left else ""
        return (
            f"{self.quantization}: {self.num_layers} linear layers{left}, model {human_bytes(self.bytes_before)} → "
            f"{human_bytes(self.bytes_after)}, computes in {self.computes_in}"
        )


class HalfStorageLinear(nn.Module):
    """A linear layer whose weight is stored in fp16 and widened to the input's type when used.

    For CPUs without fp16 arithmetic, where fp16 matrix products are many times slower than fp32 ones.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [out, in], ``bias`` [out] or None."""
        super().__init__()
        self.weight = nn.Parameter(weight.half(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def quantize_trunk(model: PreTrainedModel, quantization: str) -> QuantizationReport:
    """Quantise the linear layers of ``model``'s trunk in place (GPT-2's ``Conv1D`` included); ``model`` is for
    inference then.

    ``int8`` and ``int4`` (NF4) use bitsandbytes; token embeddings and the output head keep their type, as is usual.
    ``fp16`` converts the whole trunk where the device computes in fp16, and otherwise (older CPUs) stores the linear
    layers in fp16 and computes in fp32. An f-gram model that runs live is left alone. On CPUs int8 and int4 save
    memory, not time.

    Raises SconeError: unknown quantisation, bitsandbytes missing.
    """
    check_quantization(quantization)
    trunk: PreTrainedModel = getattr(model, "trunk", model)
    device, bytes_before, layers = next(trunk.parameters()).device, model_bytes(model), _linear_layers(trunk)
    num_layers = len(layers)
    if quantization == "int4":  # bitsandbytes' kernels take whole blocks in a row, and packed rows
        layers = {
            n: one for n, one in layers.items() if not one[0].shape[1] % INT4_IN and not one[0].shape[0] % INT4_OUT
        }
        if not layers:
            raise SconeError(
                f"found no linear layer that int4 can hold; expected widths that are multiples of {INT4_IN} in and "
                f"{INT4_OUT} out; use int8"
            )
    model.requires_grad_(False)
    if quantization == "fp16" and computes_in_fp16(device):
        trunk.half()
        computes_in = "fp16"
    elif quantization == "fp16":
        for name, (weight, bias) in layers.items():
            _replace(trunk, name, HalfStorageLinear(weight, bias))
        computes_in = "fp32 (this processor has no fp16 arithmetic)"
    else:
        bitsandbytes = _import_bitsandbytes(quantization)
        compute_type = torch.float16 if device.type == "cuda" else torch.float32
        for name, (weight, bias) in layers.items():
            _replace(trunk, name, _quantised(bitsandbytes, quantization, weight, bias, compute_type).to(device))
        computes_in = "int8" if quantization == "int8" else str(compute_type).removeprefix("torch.")
    num_left, bytes_after = num_layers - len(layers), model_bytes(model)
    return QuantizationReport(quantization, len(layers), num_left, bytes_before, bytes_after, computes_in)


def check_quantization(quantization: str) -> None:
    """Raise SconeError for a quantisation that does not exist, or whose library is not installed."""
    if quantization not in QUANTIZATIONS:
        raise SconeError(f"found quantization {quantization!r}; expected one of {', '.join(QUANTIZATIONS)}")
    if quantization != "fp16":
        _import_bitsandbytes(quantization)


def computes_in_fp16(device: torch.device) -> bool:
    """Whether fp16 matrix products are native there: accelerators, and CPUs that oneDNN says have fp16 arithmetic."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once, and the constants that bitsandbytes keeps beside a quantised
    parameter, or in its layer once that has been used.
    """
    held: list[Any] = [*model.parameters(), *model.buffers()]
    for holder in [*held, *model.modules()]:
        quant_state = getattr(holder, "quant_state", None)
        held += [getattr(holder, "SCB", None), getattr(getattr(holder, "state", None), "SCB", None)]
        held += [getattr(quant_state, "absmax", None), getattr(quant_state, "code", None)]
    tensors = {id(one): one for one in held if isinstance(one, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _linear_layers(trunk: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight [out, in] and bias of each linear layer by its name, but for the output head (often the embeddings)."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, layer in trunk.named_modules():
        if isinstance(layer, (Conv1D, nn.Linear)) and layer is not trunk.get_output_embeddings():
            weight = layer.weight.detach()
            bias = None if layer.bias is None else layer.bias.detach()
            found[name] = (weight.T.contiguous() if isinstance(layer, Conv1D) else weight, bias)
    return found


def _quantised(
    bitsandbytes: ModuleType, quantization: str, weight: Tensor, bias: Tensor | None, compute_type: torch.dtype
) -> nn.Module:
    nn_, shape, values = bitsandbytes.nn, (weight.shape[1], weight.shape[0], bias is not None), weight.cpu().clone()
    layer: nn.Module
    if quantization == "int8":
        layer = nn_.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        layer.weight = nn_.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    else:
        layer = nn_.Linear4bit(*shape, compute_dtype=compute_type, quant_type="nf4")
        layer.weight = nn_.Params4bit(values, requires_grad=False, quant_type="nf4")
    if bias is not None:
        bias = bias.to(compute_type) if quantization == "int8" else bias.clone()
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, layer.eval())


def _import_bitsandbytes(quantization: str) -> ModuleType:
    # It logs once a process that an optional kernel download is not installed; the built-in kernels do the same job.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside bitsandbytes and torch, nothing a user can act on
            import bitsandbytes
    except ImportError as error:
        raise SconeError(
            f'found no bitsandbytes, which {quantization} needs; install it with: pip install "scone-lm[quantization]"'
        ) from error
    return bitsandbytes
