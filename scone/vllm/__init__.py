"""vLLM serves our models: what it calls in each of its processes (entry point ``vllm.general_plugins``).

Nothing here is imported by the rest of the package, and nothing numba: workers of vLLM on CPUs look at every attribute
of every module before they load a model, which llvmlite does not survive.
"""

from __future__ import annotations

import logging

ARCHITECTURES = {
    "SconeForCausalLM": "SconeConfig",
    "OverEncodingForCausalLM": "OverEncodingConfig",
    "ScaledTrunkForCausalLM": "ScaledTrunkConfig",
}
"""What config.json calls our models, and their configurations."""


def register() -> None:
    """Make our models known to vLLM. It runs for whatever this vLLM serves, several times: it changes nothing else."""
    try:
        _register()
    except Exception as error:  # this vLLM may serve any model, which is not to fail with ours
        logging.getLogger("vllm.scone").warning("scone: cannot register its models: %s", error)


def _register() -> None:
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models import config as model_configs

    from scone.models import configuration
    from scone.vllm.checks import ChecksOfOurs

    for architecture, config in ARCHITECTURES.items():
        config_class = getattr(configuration, config)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        ModelRegistry.register_model(architecture, "scone.vllm.model:EmbeddedTrunkForVllm")
        # no public place of vLLM's, so it may be gone: then the model itself checks, later and in the workers
        known = getattr(model_configs, "MODELS_CONFIG_MAP", None)
        if isinstance(known, dict):
            known[architecture] = ChecksOfOurs
