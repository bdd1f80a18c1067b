"""What several kernels need: threads, copies to an accelerator, where Triton is and launches, rows that a GPU reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def run_in_parts(
    kernel: Callable[..., Any], arguments: Sequence[Any], size: int, parts: int, pool: Executor | None = None
) -> list[Any]:
    """What ``kernel(*arguments, first, last)`` returns for ``parts`` ranges that cover ``size`` places, side by side.

    The kernel has to release the interpreter's lock; one part, or none, runs in the caller's thread. Threads are plain
    and, without a ``pool``, new: forked data loading workers survive them, unlike parallel loops.
    """
    parts = max(1, min(parts, size))
    if parts == 1:
        return [kernel(*arguments, 0, size)]
    cuts = [size * part // parts for part in range(parts + 1)]
    with nullcontext(pool) if pool is not None else ThreadPoolExecutor(parts - 1) as threads:
        others = [threads.submit(kernel, *arguments, cuts[part], cuts[part + 1]) for part in range(1, parts)]
        return [kernel(*arguments, cuts[0], cuts[1]), *(other.result() for other in others)]


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels of Triton start on PyTorch's current device; inside, that is ``device``."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` (on the host) on ``device``; to a CUDA device by way of pinned memory.

    From other memory a copy would first wait for all that runs there.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def pin(owner: object, address: int, size: int, device: torch.device) -> weakref.finalize[[int], Any] | None:
    """Pin memory of the host, which kernels then read and write, until what comes back is called or ``owner`` is
    collected; None where it cannot be.

    Memory that were freed while it is registered could never be registered again.
    """
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, size, 0)):
        # CUDA keeps a refusal as its last error, which the next kernel's check would take for that kernel's own.
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
        return None
    return weakref.finalize(owner, runtime.cudaHostUnregister, address)


_TRITON = find_spec("triton") is not None


def triton_is_installed() -> bool:
    """Whether kernels for CUDA can be compiled. Looked up once, since every step of a decoder asks; not by
    ``functools.cache``, which makes torch.compile warn where a model that it traces asks.
    """
    return _TRITON


@dataclass(frozen=True)
class GPUReadableRows:
    """All rows of a table as they are stored, uint8 ``[m, row_bytes]`` in at most two blocks.

    The rows from rank 0 on are ``near``, those that follow are ``far`` (None where ``near`` holds all): on the
    accelerator, or in pinned memory of the host. ``width``: D; ``group_size``: 0 for row types that are floats.
    """

    near: Tensor
    far: Tensor | None
    row_type: str
    width: int
    group_size: int
