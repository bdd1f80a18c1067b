"""The metric trackers named by --report_to, checked before training starts."""

from __future__ import annotations

from importlib.util import find_spec

from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError

_MODULES = {"azure_ml": "azureml", "comet_ml": "comet_ml", "dagshub": "dagshub", "flyte": "flytekit"}
"""Modules of trackers that are not named as their module is."""


def reporter_names(report_to: str) -> list[str]:
    """The trackers in "tensorboard,wandb"; empty for "none".

    Raises SconeError for one that the trainer does not know, or whose library is not installed.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as known

    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if name not in known:
            advice = did_you_mean(name, known) or f"expected none, or some of {', '.join(sorted(known))}"
            raise SconeError(f"found --report_to {name}; {advice}")
        if find_spec(_MODULES.get(name, name)) is None:
            raise SconeError(
                f"found --report_to {name}, whose library is not installed; install it (pip install "
                f"{_MODULES.get(name, name)}), or leave {name} out"
            )
    return names
