"""What accelerate and transformers do in a run that ours goes without: copies, waits, and names of other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import get_mixed_precision_context_manager
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import masking_utils


def leaving_buffers(prepare_model: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Training changes no buffers, so ranks need not send them at every step. PyTorch 2.13 warns of the argument."""
    model = prepare_model(*args, **kwargs)
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False
    return model


def leaving_logits(
    accelerator: Accelerator, prepare_model: Callable[..., nn.Module], model: nn.Module, *args: Any, **kwargs: Any
) -> nn.Module:
    """In mixed precision accelerate makes fp32 of all that a model gives. The loss is that already, and nobody reads
    the logits: converting them took 3.3 of a step's 139 ms at 65,536 tokens × 16,384 words on an H100.
    """
    forward: Any = model.forward
    prepared = prepare_model(model, *args, **kwargs)
    if model.forward != forward and hasattr(forward, "__func__"):  # else it runs as somebody else has wrapped it
        autocast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
        model.forward = MethodType(autocast(forward.__func__), model)
    return prepared


@contextmanager
def own_names(model: Any) -> Iterator[None]:
    """Inside, ``model`` is saved by the names of its weights, as the trainer loads a checkpoint. transformers saves
    those of mixtures of experts by the names that other programs know.
    """
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


@contextmanager
def sequences_are_whole() -> Iterator[None]:
    """Inside, transformers makes masks for sequences that are one text each.

    It would look at the positions, which it has made itself a moment ago, whether there are several: the host then
    waits at every step, until the accelerator is through with the last one.
    """
    look = getattr(masking_utils, "find_packed_sequence_indices", None)
    if look is None:  # of another version, in which it has another name: steps wait, nothing else
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, what is compiled runs as it was written: for an epoch's last batch, which is smaller than the others.

    Compiled, it takes a minute, and from then on PyTorch runs every batch by what it has made for any size: 556,000
    tokens/s became 512,000 with the second epoch (92 M weights, batches of 256 × 256 tokens, one H100).
    """
    return torch.compiler.set_stance("force_eager")
