"""Tiny real things that many tests need: corpora, vocabularies, trunks and SCONE models of a few thousand weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from scone.models.language_model import SconeForCausalLM
from scone.tests.kernels.reference import count_n_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

VOCAB_SIZE = 24
SEPARATOR = 0
WIDTH = 16
F_GRAM_SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

SIZES: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 64}
TRUNKS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "bert": SIZES | {"is_decoder": True},
    "llama": SIZES | {"num_key_value_heads": 1},
    "qwen2": SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True},
}


def corpus(length: int = 3000, seed: int = 0) -> np.ndarray:
    """Zipf-like tokens 1 … V−1 with separators now and then, int64 [length]."""
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.6, length) % (VOCAB_SIZE - 1) + 1
    tokens[rng.random(length) < 0.02] = SEPARATOR
    return tokens.astype(np.int64)


def vocabulary(tokens: np.ndarray | None = None, max_n: int = 3, min_freq: int = 4) -> FGramVocabulary:
    """The f-grams of ``tokens``, counted the plain way."""
    tokens = corpus() if tokens is None else tokens
    limits: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_n": max_n, "min_freq": min_freq}
    counts = count_n_grams([tokens], max_n, [SEPARATOR])
    return FGramVocabulary.from_counts(counts, separator_ids=(SEPARATOR,), **limits)


def trunk(kind: str = "gpt2", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random trunk in evaluation mode."""
    torch.manual_seed(seed)
    special = {"bos_token_id": SEPARATOR, "eos_token_id": SEPARATOR, "pad_token_id": SEPARATOR}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB_SIZE, **(special | TRUNKS[kind] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def scone(
    kind: str = "gpt2",
    *,
    f_gram_model: bool = True,
    learned_rows: int = 40,
    trained: bool = True,
    combination: str = "add",
    max_n: int = 3,
    min_freq: int = 4,
    **trunk_changes: Any,
) -> SconeForCausalLM:
    """A SCONE model; ``trained`` gives gain and rows random values, as if training had moved them."""
    model = SconeForCausalLM.from_trunk(
        trunk(kind, **trunk_changes),
        vocabulary(max_n=max_n, min_freq=min_freq),
        f_gram_model=F_GRAM_SIZES if f_gram_model else None,
        learned_rows=learned_rows,
        combination=combination,
    ).eval()
    if trained:
        torch.manual_seed(1)
        embedding = model.f_gram_embedding
        assert embedding is not None
        if embedding.gain is not None:
            torch.nn.init.normal_(embedding.gain, std=0.5)
        if embedding.rows is not None:
            torch.nn.init.normal_(embedding.rows.weight, std=0.5)
    return model


def training_arguments(folder: object, **options: Any) -> TrainingArguments:
    """Of transformers' trainer, for a few steps here that leave nothing."""
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **(quiet | options))


class RowsInMemory:
    """An embedding table as plain as can be: the model's own rows in a tensor."""

    def __init__(self, model: SconeForCausalLM) -> None:
        assert model.vocabulary is not None
        self.num_rows = model.vocabulary.num_f_grams
        self.data = model.embed_nodes(torch.arange(VOCAB_SIZE, VOCAB_SIZE + self.num_rows))
        self.width = self.data.shape[1]
        self.device = torch.device("cpu")

    def rows(self, ranks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.data[ranks].to(dtype)

    def gpu_rows(self, device: torch.device) -> None:
        """The host reads the rows."""
