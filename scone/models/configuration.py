"""What a saved model needs to be built again, and what its table knows it by (no numba)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of

F_GRAM_WEIGHTS = "f_gram_embedding."


@dataclass
class FGramModelConfig:
    """Sizes of the f-gram model, which need not be the trunk's. With ``own_tokens`` it has token embeddings of its own
    instead of reading the trunk's.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    own_tokens: bool = False

    def __post_init__(self) -> None:
        if self.num_hidden_layers < 1:
            raise ValueError(f"{self.num_hidden_layers=} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise SconeError(
                f"found an f-gram model of width {self.hidden_size} with {self.num_attention_heads} heads; expected a "
                "multiple of the heads; give --f_gram_hidden_size and --f_gram_num_attention_heads"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class EmbeddedTrunkConfig(PreTrainedConfig):
    """What all models around a trunk share.

    Args:
        text_config: the trunk's own configuration (or its dictionary, with ``model_type``); Hugging Face's name for
            the part of a composite model that speaks text, so caches and generation read the trunk's sizes from it.
        embedding_scale: factor on the input vectors, in front of the trunk and its position embeddings.
        input_norm: they are normalised before that (RMSNorm with a learned gain), table rows and tokens alike.
    """

    model_type = "embedded_trunk"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (the library's class attribute)

    text_config: dict | PreTrainedConfig | None = None
    embedding_scale: float = 1.0
    input_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = {"model_type": "gpt2"}
        if isinstance(self.text_config, dict):
            values = dict(self.text_config)
            self.text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        if not self.text_config.return_dict:  # the model around the trunk makes the tuples
            self.return_dict, self.text_config.return_dict = False, True
        # the trunk ties them, nothing is tied at this level; but adapters ask here
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size  # type: ignore[union-attr]

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size  # type: ignore[union-attr]

    @property
    def reads_tokens_in_layers(self) -> bool:
        """Whether the trunk's layers read tokens beside the input vectors: Gemma 3n's and those of small Gemma 4s."""
        text = self.text_config.get_text_config()  # type: ignore[union-attr]
        return bool(getattr(text, "hidden_size_per_layer_input", None))

    @property
    def initial_token_scale(self) -> float:
        """Standard deviation of the trunk's token embeddings at its start."""
        return getattr(self.text_config, "initializer_range", 0.02)


class SconeConfig(EmbeddedTrunkConfig):
    """Configuration of ``SconeForCausalLM``.

    Args:
        f_gram_model: sizes of the f-gram model (``FGramModelConfig``), or None for a model without one.
        learned_rows: how many f-grams, the first by rank, have a learned row.
        rows_dtype: type of the rows, "float32" or "bfloat16", whatever the model's.
        combination: "add", "replace" or "gate", see ``FGramInputEmbedding``.
        max_n: N, the longest f-gram in tokens.
        num_f_grams: S.
        vocabulary_fingerprint: that of the f-gram vocabulary the model was trained with.
        requires_table: the model was saved without its f-gram model and rows; it runs only with its embedding table.
    """

    model_type = "scone"

    f_gram_model: dict | None = None
    learned_rows: int = 0
    rows_dtype: str = "float32"
    combination: str = "add"
    max_n: int = 3
    num_f_grams: int = 0
    vocabulary_fingerprint: str = ""
    requires_table: bool = False

    @property
    def f_gram_model_config(self) -> FGramModelConfig | None:
        """The f-gram model's sizes, or None."""
        if self.f_gram_model is None:
            return None
        known = FGramModelConfig.__dataclass_fields__  # version 0.1.0 wrote more; check_live looks at it
        return FGramModelConfig(**{name: value for name, value in self.f_gram_model.items() if name in known})

    def check_live(self) -> None:
        """Raise SconeError for a model of version 0.1.0 with a choice that lost its ablations and is gone. Its table
        holds whole rows, and serves as before.
        """
        stated = vars(self) | (self.f_gram_model or {})
        for name, usual in {"rows_backoff": True, "control": "none", "output_norm": True, "output_gain": True}.items():
            if stated.get(name, usual) != usual:
                raise SconeError(
                    f"found a model with {name} {stated[name]}, which this version cannot compute; expected a table of "
                    "its rows; serve it from the table that was made with it, or use the version that trained it"
                )


class OverEncodingConfig(EmbeddedTrunkConfig):
    """Configuration of ``OverEncodingForCausalLM``.

    Args:
        num_rows: rows of the hashed tables together.
        rows_dtype: as in ``SconeConfig``.
        separator_ids: tokens that no hashed n-gram contains.
    """

    model_type = "scone_over_encoding"

    num_rows: int = 0
    rows_dtype: str = "float32"
    separator_ids: list[int] | tuple[int, ...] = ()


class ScaledTrunkConfig(EmbeddedTrunkConfig):
    """Configuration of ``ScaledTrunkForCausalLM``: the trunk and ``embedding_scale``."""

    model_type = "scone_scaled_trunk"


def weights_fingerprint(token_embedding: Tensor, f_gram_embedding: Mapping[str, Tensor]) -> str:
    """Of what a table's rows depend on: the trunk's T ``[V, D]`` and the input embedding layer's state, by name."""
    parts: list[str | np.ndarray] = []
    for name, tensor in [("token embedding", token_embedding), *sorted(f_gram_embedding.items())]:
        # as bytes, since NumPy has no bfloat16
        parts += [name, tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)]
    return fingerprint_of(*parts)


def check_table_weights(folder: Path, token_embedding: Tensor, table: Path, fingerprints: Mapping[str, str]) -> None:
    """Refuse a ``table`` whose rows were made from other weights than those in a model's ``folder``.

    Those are read once, as they were saved, to be compared: those of the f-gram embedding, and all of the trunk's that
    have the shape of ``token_embedding``, T ``[V, D]``, since the file may call it otherwise than the trunk does (and
    its precision may be another). A folder without the former (a served model) has nothing to compare. Raises
    SconeError.
    """
    found, tokens = fingerprints.get("weights", ""), []
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")) if found else ():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name.startswith(F_GRAM_WEIGHTS):
                    state[name.removeprefix(F_GRAM_WEIGHTS)] = file.get_tensor(name)
                elif file.get_slice(name).get_shape() == list(token_embedding.shape):
                    tokens.append(file.get_tensor(name))
    if not state:
        return
    if not tokens:
        shape = " × ".join(map(str, token_embedding.shape))
        raise SconeError(f"found no token embeddings ({shape}) in {folder}; expected the whole model; copy it again")
    expected = (weights_fingerprint(each, state) for each in tokens)
    if found not in expected:
        raise SconeError(
            f"{table} is the table of another model: found weights {found[:12]}, which are not those in "
            f"{folder}; make it again from this model with `scone precompute`"
        )
