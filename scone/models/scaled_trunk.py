"""The plain baseline of models with an embedding scale: a trunk whose token embeddings are scaled, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scone.models.configuration import ScaledTrunkConfig
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.token_history import TokenHistory


class ScaledTrunkForCausalLM(EmbeddedTrunk):
    """A trunk that reads its own token embeddings times ``embedding_scale``.

    With a scale of 1 it is the trunk; a plain model is then trained without this wrapper.
    """

    config_class = ScaledTrunkConfig

    def __init__(self, config: ScaledTrunkConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config, trunk)
        self.post_init()

    @classmethod
    def from_trunk(
        cls, trunk: PreTrainedModel, embedding_scale: float, input_norm: bool = False
    ) -> ScaledTrunkForCausalLM:
        """A model around ``trunk``, which keeps its weights."""
        # a copy: building the composite resets fields of its part
        config = ScaledTrunkConfig(
            text_config=copy.deepcopy(trunk.config), embedding_scale=embedding_scale, input_norm=input_norm
        )
        model = cls(config, trunk=trunk)
        model.generation_config = trunk.generation_config
        return model

    def vectors_of(
        self, input_ids: Tensor, tokens: Tensor, history: TokenHistory | None, trie: dict[str, Any] | None
    ) -> Tensor:
        """Token embeddings ``[B, T, D]``: nothing is looked up."""
        vectors: Tensor = self.get_input_embeddings()(input_ids)
        return vectors


AutoConfig.register("scone_scaled_trunk", ScaledTrunkConfig, exist_ok=True)
AutoModelForCausalLM.register(ScaledTrunkConfig, ScaledTrunkForCausalLM, exist_ok=True)
