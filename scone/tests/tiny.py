"""Tiny real things that many tests need: corpora, vocabularies, trunks and SCONE models of a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from scone.models.language_model import SconeForCausalLM
from scone.tests.kernels import reference
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError

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


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length]."""
    return torch.from_numpy(corpus(batch * length, seed).reshape(batch, length))


def refusal(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """What a call is refused with, which is one line."""
    with pytest.raises(SconeError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def word_tokenizer(words: Iterable[str], unknown: str, **special: str) -> PreTrainedTokenizerFast:
    """One token a word, by its place among them."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def vocabulary(tokens: np.ndarray | None = None, max_n: int = 3, min_freq: int = 4) -> FGramVocabulary:
    """The f-grams of ``tokens``, counted the plain way."""
    tokens = corpus() if tokens is None else tokens
    limits: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_n": max_n, "min_freq": min_freq}
    counts = reference.count_n_grams([tokens], max_n, [SEPARATOR])
    return reference.vocabulary_of(counts, separator_ids=(SEPARATOR,), **limits)


def trunk(kind: str = "gpt2", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random trunk in evaluation mode."""
    torch.manual_seed(seed)
    special = {"bos_token_id": SEPARATOR, "eos_token_id": SEPARATOR, "pad_token_id": SEPARATOR}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB_SIZE, **(special | TRUNKS[kind] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def scone(
    kind: str = "gpt2",
    *,
    f_gram_model: Any = True,
    learned_rows: int = 40,
    trained: bool = True,
    max_n: int = 3,
    min_freq: int = 4,
    **changes: Any,
) -> SconeForCausalLM:
    """A SCONE model; ``trained`` gives gain, gate, rows and norm random values, as if training had moved them."""
    settings = {name: changes.pop(name) for name in ("combination", "embedding_scale", "input_norm") if name in changes}
    model = SconeForCausalLM.from_trunk(
        trunk(kind, **changes),
        vocabulary(max_n=max_n, min_freq=min_freq),
        f_gram_model=F_GRAM_SIZES if f_gram_model is True else f_gram_model or None,
        learned_rows=learned_rows,
        **settings,
    ).eval()
    if trained:
        torch.manual_seed(1)
        assert model.f_gram_embedding is not None
        for name, parameter in model.f_gram_embedding.named_parameters():
            if name in ("gain", "gate.weight", "gate.bias", "rows.weight"):
                torch.nn.init.normal_(parameter, std=0.5)
        if model.input_norm is not None:
            torch.nn.init.normal_(model.input_norm.weight)
    return model


def training_arguments(folder: object, **options: Any) -> TrainingArguments:
    """Of transformers' trainer, for a few steps here that leave nothing."""
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **(quiet | options))


def live_rows(model: SconeForCausalLM) -> torch.Tensor:
    """What an embedding table of the model holds, [S, D]."""
    assert model.vocabulary is not None
    return model.embed_nodes(torch.arange(model.vocabulary.num_f_grams) + model.vocabulary.vocab_size)


class RowsInMemory:
    """An embedding table as plain as can be: the model's own rows in a tensor."""

    def __init__(self, model: SconeForCausalLM) -> None:
        self.data = live_rows(model)
        self.num_rows, self.width = self.data.shape
        self.device = torch.device("cpu")

    def rows(self, ranks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.data[ranks].to(dtype)

    def gpu_rows(self, device: torch.device) -> None:
        """The host reads the rows."""
