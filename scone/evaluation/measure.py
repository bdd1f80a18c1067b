"""What a model costs, measured: FLOPs a token, parameters, bytes, the machine it ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from scone.inference.loading import device_of
from scone.inference.quantization import model_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which knows attention on accelerators; taught the fused attention of CPUs."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    operators = torch.ops.aten
    mapping = {
        operators._scaled_dot_product_flash_attention_for_cpu: forward,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def inference_flops_per_token(model: PreTrainedModel, tokens: np.ndarray) -> float:
    """FLOPs (a multiply-add is two) of reading ``tokens`` [T] once, divided by T, as PyTorch counts them.

    Matrix products and attention are counted; look-ups, norms and activations are not.
    """
    input_ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(device_of(model))
    with _flop_counter() as counter, torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    return counter.get_total_flops() / input_ids.numel()


def training_flops_per_token(model: PreTrainedModel, tokens: np.ndarray) -> float:
    """FLOPs of forward and backward over the batch ``tokens`` [B, T], divided by B · T; gradients are thrown away."""
    input_ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(device_of(model))
    was_training = model.training
    model.train()
    with _flop_counter() as counter:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return counter.get_total_flops() / input_ids.numel()


def resident_bytes(model: PreTrainedModel) -> int:
    """Bytes that the model holds on its device: parameters, buffers, scales; a table is not part of it."""
    return model_bytes(model)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that PyTorch held on a CUDA device since its statistics were reset."""
    return int(torch.cuda.max_memory_allocated(device))


def process_bytes() -> int | None:
    """Resident memory of this process now, shared pages included; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions, for reports."""
    import transformers

    return {
        "processor": _processor_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
