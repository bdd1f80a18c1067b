"""What a model costs, measured: FLOPs a token, parameters, bytes, the machine it ran on."""

from __future__ import annotations

import gc
import math
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from scone.inference.loading import F_GRAM_WEIGHTS, device_of
from scone.inference.quantization import model_bytes
from scone.models.language_model import SconeForCausalLM
from scone.training.step_cost import RunCost

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


def resident_bytes(model: PreTrainedModel) -> int:
    """Bytes that the model holds on its device: parameters, buffers, scales; a table is not part of it."""
    return model_bytes(model)


class PeakMemory:
    """Most memory that a ``with`` block held: of this process (all of it, libraries too), and on the accelerator.

    None for what the system does not tell. Process memory is sampled by the kernel, pages mapped from files included.
    """

    process_bytes: int | None = None
    accelerator_bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()  # what an earlier model left
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (VmHWM) to the present
        return self

    def __exit__(self, *_: object) -> None:
        self.process_bytes = _peak_process_bytes()
        if self.device.type == "cuda":
            self.accelerator_bytes = int(torch.cuda.max_memory_allocated(self.device))


def _peak_process_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


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
