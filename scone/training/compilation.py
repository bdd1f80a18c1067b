"""Which parts of a model ``torch.compile`` compiles for training: all accelerator code with known shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.language_model import SconeForCausalLM


def compile_for_training(
    model: PreTrainedModel, *, dynamic: bool | None = None, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile a plain trunk as a whole; for our models compile trunk, loss and f-gram model separately.

    Between them the host reads node ids, which a graph cannot hold. The loss must not stay outside: uncompiled, the
    copies of the logits in fp32 took an eighth of a step at a vocabulary of 50,257 (width 1,024 × 6 layers, one H200).

    Args:
        dynamic: whether batch sizes may change, as for ``torch.compile``. The f-gram model's always do.
        backend: ``torch.compile``'s.
    """
    options: dict[str, Any] = {"dynamic": dynamic, "backend": backend}
    if not isinstance(model, EmbeddedTrunk):
        model.compile(**options)
        return
    model.trunk.compile(**options)
    model.loss_function = torch.compile(model.loss_function, **options)
    embedding = model.f_gram_embedding if isinstance(model, SconeForCausalLM) else None
    if embedding is not None and embedding.f_gram_model is not None:
        embedding.f_gram_model.compile(dynamic=True, backend=backend)
