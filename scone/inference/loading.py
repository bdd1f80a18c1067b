"""Load a model ready for inference: SCONE with or without its embedding table, or any plain causal language model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scone.inference.quantization import QuantizationReport, check_quantization, quantize_trunk
from scone.tokenization.gguf_files import load_arguments
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import read_json
from scone.utils.progress import hide_library_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scone.inference.embedding_table import EmbeddingTable


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, the table it reads from (None: no f-grams, or they are embedded live), and what
    was quantised.
    """

    model: PreTrainedModel
    table: EmbeddingTable | None
    quantization: QuantizationReport | None


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the accelerator where there is one, or the CPU. Raises SconeError when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise SconeError(
            f"found device {str(device)!r}, which does not work here ({reason}); use --device cpu"
        ) from error
    return chosen


def _is_scone_folder(folder: Path) -> bool:
    """Whether a model folder's config.json says that it is one of ours. Raises SconeError when it is no such folder."""
    if not (folder / "config.json").is_file():
        raise SconeError(
            f"found no config.json in {folder}; expected a model folder such as OUTPUT_DIR/final_model; "
            "check --model_path"
        )
    config = read_json(folder / "config.json")
    return isinstance(config, dict) and config.get("model_type") == "scone"


def load_model(
    model_path: str | Path,
    table_path: str | Path | None = None,
    placement: str = "ram",
    device: str | torch.device | None = None,
    quantization: str | None = None,
) -> LoadedModel:
    """Load a SCONE model or any plain causal language model, by local folder or hub name, ready for inference.

    With ``table_path`` the f-gram model's weights are only compared with the table's fingerprint, not kept: input
    embeddings come from the table, placed as ``placement`` says (see `EmbeddingTable.open`). Without it they are
    computed live. ``quantization`` is that of the trunk.

    Raises SconeError: no such folder or hub model, not a model, a table for a plain model or of another model, unknown
    device or quantisation.
    """
    chosen_device = choose_device(device)
    if quantization is not None:
        check_quantization(quantization)
    hide_library_bars()
    where = load_arguments(model_path)
    folder = Path(where["pretrained_model_name_or_path"])
    table: EmbeddingTable | None = None
    if folder.is_dir() and "gguf_file" not in where and _is_scone_folder(folder):
        from scone.models.language_model import SconeForCausalLM

        if table_path is not None:
            from scone.inference.embedding_table import EmbeddingTable

            expected = {"vocabulary": read_json(folder / "config.json").get("vocabulary_fingerprint", "")}
            table = EmbeddingTable.open(table_path, placement, chosen_device, expected)
        advice = "see what `scone verify` says of it; copy it again"
        model = _complete(
            lambda: SconeForCausalLM.from_pretrained(folder, table=table, output_loading_info=True),
            folder,
            advice,
            True,
        )
    elif table_path is not None:
        raise SconeError(
            f"found the table {table_path} given for {model_path}, a model without f-grams; "
            "leave --embedding_cache_path out"
        )
    else:
        from scone.models.trunk import alone

        model = alone(_load_plain(where, model_path))
    model = model.to(chosen_device).eval().requires_grad_(False)
    model.config.return_dict = True  # whatever the folder says: what runs the model asks its output by name
    report = None if quantization is None else quantize_trunk(model, quantization)
    return LoadedModel(model, table, report)


def _complete(load: Callable[[], Any], source: str | Path, advice: str, exactly: bool = False) -> Any:
    """The model of what ``from_pretrained`` gives with its loading info. Raises SconeError where it cannot be loaded,
    where weights are missing (transformers puts random numbers in their place) or, if it must be ``exactly`` so, where
    some are left over.
    """
    with library_refusal(f"cannot load a causal language model from {source}", advice), _no_loading_report():
        model, info = load()
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"]) if exactly else []
    if missing or left:
        what = f"no weights for {missing[0]}" if missing else f"weights {left[0]} that have no place"
        raise SconeError(
            f"found {what} in the model in {source} ({len(missing or left)} in all); expected those that config.json "
            "speaks of; copy the whole folder again"
        )
    return model


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Without the table that transformers prints of weights that are missing or left over: `_complete` says it."""
    log = logging.getLogger("transformers.modeling_utils")

    def speaks_of_else(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(speaks_of_else)  # a level would do more: below WARNING, transformers looks for other things to say
    try:
        yield
    finally:
        log.removeFilter(speaks_of_else)


def _load_plain(where: dict[str, Any], model_path: str | Path) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    # the Auto classes know our baselines from then on
    import scone.models.over_encoding
    import scone.models.scaled_trunk  # noqa: F401
    from scone.models.trunk import causal

    if Path(where["pretrained_model_name_or_path"]).is_file():
        raise SconeError(f"found the file {model_path}; expected a model folder such as OUTPUT_DIR/final_model")
    # code that comes with a model is never run, and nobody is asked on the terminal whether it may
    where = where | {"trust_remote_code": False}
    advice = "give a model folder that `scone verify` finds whole, or a hub name within reach"

    def load() -> Any:
        config = causal(AutoConfig.from_pretrained(**where))
        return AutoModelForCausalLM.from_pretrained(**where, config=config, output_loading_info=True)

    model: PreTrainedModel = _complete(load, model_path, advice)
    return model
