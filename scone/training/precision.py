"""The number type for mixed precision: what was asked for, if the machine has it."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def resolve_precision(fp16: bool, bf16: bool, device_type: str) -> str:
    """ "fp16", "bf16" or "fp32" for mixed-precision training on ``device_type``; warns when it is not what was asked.

    A CPU without native bf16 computes it many times slower than fp32, so it gets fp32.
    """
    asked = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    if asked == "fp32":
        return asked
    if device_type == "cuda":
        if asked == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning("this GPU has no native bf16: training in fp16")
            return "fp16"
        return asked
    found = "bf16" if device_type == "cpu" and cpu_has_native_bf16() else "fp32"
    if found != asked:
        logger.warning("%s is not available on this device (%s): training in %s", asked, device_type, found)
    return found


def cpu_has_native_bf16() -> bool:
    """Whether matrix products in bf16 run on instructions made for them (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))
