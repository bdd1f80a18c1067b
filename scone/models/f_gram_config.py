"""Sizes of the f-gram model, in a module that a configuration can be read with where nothing is compiled (no numba)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class FGramModelConfig:
    """Sizes of the f-gram model, which need not be the trunk's, and what else of it is a choice.

    Args:
        start: "random", "zero" (the gain starts there), or "identity" (an f-gram's vector starts as its last token's
            embedding); None: zero, or random where that cannot be (see ``FGramInputEmbedding``).
        output_norm: the vector that comes out is divided by its root mean square.
        output_gain: it is multiplied by a learned gain.
        own_tokens: the model has token embeddings of its own instead of reading the trunk's.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    start: str | None = None
    output_norm: bool = True
    output_gain: bool = True
    own_tokens: bool = False

    def __post_init__(self) -> None:
        if self.num_hidden_layers < 1:
            raise ValueError(f"{self.num_hidden_layers=} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.hidden_size=} must be a multiple of {self.num_attention_heads=}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
