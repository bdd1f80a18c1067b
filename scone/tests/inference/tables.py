"""Small vocabularies, models and tables that the table tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from scone.inference.table_format import RowFormat, TableLayout
from scone.inference.table_writer import TablePlan, TableWriter
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

if TYPE_CHECKING:
    from scone.models.language_model import SconeForCausalLM

VOCAB_SIZE = 23


def small_vocabulary(num_tokens: int = 4000, seed: int = 0) -> FGramVocabulary:
    """The f-grams of a random text with repeated phrases: a few hundred, up to 4 tokens long."""
    random = np.random.default_rng(seed)
    text = random.choice(VOCAB_SIZE, num_tokens, p=_zipf(VOCAB_SIZE)).tolist()
    counts: dict[tuple[int, ...], int] = {}
    for n in (2, 3, 4):
        for start in range(len(text) - n + 1):
            gram = tuple(text[start : start + n])
            counts[gram] = counts.get(gram, 0) + 1
    return FGramVocabulary.from_counts(
        {gram: count for gram, count in counts.items() if count >= 5}, vocab_size=VOCAB_SIZE
    )


def _zipf(size: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, size + 1)
    return weights / weights.sum()


def small_model(f_gram_model: bool = True, learned_rows: int = 40, seed: int = 0) -> SconeForCausalLM:
    """A 2-layer, 32-wide SCONE whose corrections are far from zero, as after training."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from scone.models.language_model import SconeForCausalLM

    torch.manual_seed(seed)
    trunk = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = SconeForCausalLM.from_trunk(
        trunk, small_vocabulary(), f_gram_model=sizes if f_gram_model else None, learned_rows=learned_rows
    )
    with torch.no_grad():
        for parameter in model.f_gram_embedding.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write_table(
    path: Path, rows: torch.Tensor, row_type: str = "fp32", group_size: int | None = None, **fingerprints: str
) -> RowFormat:
    """A table of ``rows`` (float32 [S, D]), written in three chunks in a scattered order."""
    row_format = RowFormat.of(row_type, rows.shape[1], group_size)
    encoded = row_format.encode(rows)
    plan = TablePlan(TableLayout(len(rows), row_format, fingerprints), 3, {})
    order = np.random.default_rng(0).permutation(len(rows))
    with TableWriter(path, plan) as writer:
        for chunk, ranks in enumerate(np.array_split(order, 3)):
            writer.write(ranks, encoded[ranks])
            writer.mark_finished(chunk)
        assert writer.finish()
    return row_format
