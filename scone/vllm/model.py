"""Our models in vLLM: its own model of the trunk's architecture behind input vectors of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import init_vllm_registered_model

from scone.inference.embedding_table import EmbeddingTable
from scone.models.configuration import EmbeddedTrunkConfig, OverEncodingConfig, SconeConfig
from scone.utils.errors import SconeError
from scone.vllm.checks import check_engine, serving_options, table_path, uses_second_runner, vocabulary_path
from scone.vllm.lookups import HashedRows, Lookup, SlotHistory, TableRows

logger = init_logger(__name__)

TRUNK = "trunk."
ROWS = "hashed_embedding.rows.weight"
NORM = "input_norm.weight"
EPSILON = 1e-6
"""Of the input norm, as it was trained."""


class EmbeddedTrunkForVllm(nn.Module, SupportsLoRA):
    """``trunk``, whose input vectors are made before it runs: outside of what vLLM compiles or captures.

    vLLM's second model runner has them made by `model_state.InputVectorsState`, which knows every request's tokens. The
    first one does not say what came before a chunk: on CPUs a history by KV slot does (`lookups.SlotHistory`).
    """

    allow_patterns_overrides = ("model*.safetensors",)  # not f_grams.safetensors

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_engine(vllm_config)
        config: EmbeddedTrunkConfig = vllm_config.model_config.hf_config
        self.config = config
        self._vllm_config = vllm_config
        text: Any = config.text_config
        names: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if text.model_type not in names:
            raise SconeError(f"found a trunk of type {text.model_type!r}; expected a causal language model's")
        self.trunk: Any = init_vllm_registered_model(
            vllm_config, hf_config=text, architectures=[names[text.model_type]], prefix=prefix + TRUNK.rstrip(".")
        )
        if getattr(self.trunk, "is_hybrid", False) or getattr(self.trunk, "has_inner_state", False):
            raise SconeError(
                f"found a trunk {names[text.model_type]} with states beside its keys and values; expected attention "
                "alone; serve it with `scone serve`"
            )
        # LoRA is that of its layers: an adapter of T belongs to another table
        self.packed_modules_mapping = getattr(self.trunk, "packed_modules_mapping", {})
        parts = getattr(self.trunk, "embedding_modules", {})
        self.trunk.embedding_modules = {name: what for name, what in parts.items() if what != "input_embeddings"}
        self.input_norm: nn.Parameter | None = None
        if config.input_norm:  # in the precision that it was trained in
            self.input_norm = nn.Parameter(torch.ones(config.hidden_size, dtype=torch.float32), requires_grad=False)
        self.lookup = _lookup_of(vllm_config, config)
        self._history: SlotHistory | None = None
        if self.lookup is not None and not uses_second_runner(vllm_config):
            self._history = SlotHistory(self.lookup.context)

    # ------------------------------------------------------------------ what vLLM asks

    def get_model_state_cls(self) -> type:
        """Who makes the inputs of each step, in vLLM's second model runner."""
        from scone.vllm.model_state import InputVectorsState

        return InputVectorsState

    def get_language_model(self) -> nn.Module:
        """The trunk. Models that draft tokens share its T, and know no f-grams."""
        return self.trunk  # type: ignore[no-any-return]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """T of tokens ``[P]`` → ``[P, D]``: what f-grams are put into, and no input of the trunk."""
        return self.trunk.embed_input_ids(input_ids)  # type: ignore[no-any-return]

    def compute_logits(self, hidden_states: Tensor, *others: Any) -> Tensor | None:
        """Of the trunk's head."""
        return self.trunk.compute_logits(hidden_states, *others)  # type: ignore[no-any-return]

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """What the table has made superfluous, and f-grams, whose file some of vLLM's loaders read with the others'."""
        return name.startswith("f_gram_embedding.") or "." not in name

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Names of ours that were found. Raises SconeError for a weight of no model of ours, or one that is missing."""
        ours: dict[str, nn.Parameter] = {}
        if self.input_norm is not None:
            ours[NORM] = self.input_norm
        if isinstance(self.lookup, HashedRows):
            ours[ROWS] = self.lookup.weight
        missing = set(ours)

        def of_trunk() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if name.startswith(TRUNK):
                    yield name.removeprefix(TRUNK), weight
                elif name in ours:
                    ours[name].data.copy_(weight)
                    missing.discard(name)
                elif not self.is_unused_checkpoint_weight(name):
                    raise SconeError(f"found the weights {name}; expected those of the model's config.json")

        loaded = self.trunk.load_weights(of_trunk())
        if missing:
            raise SconeError(f"found no weights {missing.pop()}; expected the whole model; copy its folder again")
        if loaded is None:
            return None
        names = {"input_norm" if name == NORM else "lookup.weight" for name in ours}
        return {TRUNK + name for name in loaded} | names

    # ------------------------------------------------------------------ a step

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states ``[P, D]``. The trunk always gets vectors: what vLLM compiles first, it compiles for good.

        ``inputs_embeds`` are those of the second runner, which are written to: with full CUDA graphs this is in them.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "a step has tokens"
            inputs_embeds = self._vectors_by_history(input_ids)
        self._finish(inputs_embeds)
        return self.trunk(None, positions, intermediate_tensors, inputs_embeds=inputs_embeds, **kwargs)

    def _finish(self, vectors: Tensor) -> None:
        """Normalise and scale input vectors ``[P, D]`` as configured, in place: graphs read them where they are."""
        if self.input_norm is not None:
            wide = vectors.float()
            if wide.device.type == "cpu":
                _normalise(wide.numpy(), self.input_norm.numpy())
            else:
                wide = nn.functional.rms_norm(wide, wide.shape[1:], self.input_norm, EPSILON)
            if wide is not vectors:
                vectors.copy_(wide)
        if self.config.embedding_scale != 1.0:
            vectors *= self.config.embedding_scale

    def _vectors_by_history(self, input_ids: Tensor) -> Tensor:
        """In vLLM's first model runner; ``input_ids`` ``[P]`` may end in padding."""
        vectors = self.embed_input_ids(input_ids)
        metadata = get_forward_context().attn_metadata
        if self.lookup is not None and metadata is not None:  # there is none while vLLM tries how much memory it needs
            if self._history is None:
                raise SconeError(
                    "found a step without input vectors; expected them of vLLM's second model runner; this release of "
                    "scone does not know this vLLM: install one of 0.26 … 0.32"
                )
            step = self._history.step(metadata, input_ids, self._vllm_config)
            self.lookup.put(vectors[: step.query_starts[-1]], *step)
        return vectors


def _normalise(vectors: np.ndarray, weight: np.ndarray) -> None:
    """RMS norm of float32 ``vectors`` ``[P, D]`` in place, on one thread.

    PyTorch makes temporaries in six operators: a fifth slower for one token to 64, three times for 2,048; and where a
    worker has several threads, all of them would start for each operator and wait for each other.
    """
    squares = np.einsum("pd,pd->p", vectors, vectors)
    vectors *= 1 / np.sqrt(squares / vectors.shape[1] + EPSILON)[:, None]
    vectors *= weight


def _lookup_of(vllm_config: VllmConfig, config: EmbeddedTrunkConfig) -> Lookup | None:
    if isinstance(config, OverEncodingConfig):
        width, separators = config.hidden_size, tuple(config.separator_ids)
        return HashedRows(config.num_rows, width, separators, config.vocab_size)
    if not isinstance(config, SconeConfig):
        return None
    options, model = serving_options(vllm_config.additional_config), vllm_config.model_config
    device = torch.device(vllm_config.device_config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    expected = {"vocabulary": config.vocabulary_fingerprint}
    with torch.device("cpu"):  # vLLM's default meanwhile is where the weights go
        path = table_path(model.model, model.revision, options)
        table = EmbeddingTable.open(path, options.placement, device, expected)
        rows = TableRows(vocabulary_path(model.model, model.revision), table)
    logger.info("scone: %s", table.describe())
    if device.type != "cpu" and rows.on_device is None:
        logger.info(
            "scone: the host reads these rows, so each step waits for the tokens of the one before; placements gpu and "
            "ram are read by the GPU itself"
        )
    return rows
