"""The plain baseline of models with an embedding scale or an input norm: a trunk behind its own, scaled embeddings."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scone.models.configuration import ScaledTrunkConfig
from scone.models.embedded_trunk import EmbeddedTrunk


class ScaledTrunkForCausalLM(EmbeddedTrunk):
    """A trunk that reads its own token embeddings, normalised and scaled as configured."""

    config_class = ScaledTrunkConfig

    def __init__(self, config: ScaledTrunkConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config, trunk)
        self.post_init()


AutoConfig.register("scone_scaled_trunk", ScaledTrunkConfig, exist_ok=True)
AutoModelForCausalLM.register(ScaledTrunkConfig, ScaledTrunkForCausalLM, exist_ok=True)
