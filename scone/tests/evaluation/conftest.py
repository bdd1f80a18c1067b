"""A small SCONE model on disk, with its tokenizer and its table, for tests of whole evaluations."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scone.cli import main
from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.tokenizers import train_tokenizer

WORDS = "which animal barks? a dog a cat the sun is hot and cold today yes no Question: Answer: " * 30
VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; beside it ``table``, and ``plain``, a trunk of the same sizes without f-grams."""
    folder = tmp_path_factory.mktemp("evaluation") / "final_model"
    tokenizer = train_tokenizer(iter([WORDS]), VOCAB_SIZE, folder)
    counts = Counter(pairwise(tokenizer(WORDS, add_special_tokens=False)["input_ids"]))
    separator = tokenizer.all_special_ids[0]
    frequent = {pair: count for pair, count in counts.items() if count >= 5 and separator not in pair}
    vocabulary = FGramVocabulary.from_counts(frequent, vocab_size=VOCAB_SIZE, max_n=2, separator_ids=(separator,))
    sizes = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=640, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = SconeForCausalLM.from_trunk(
        GPT2LMHeadModel(sizes), vocabulary, f_gram_model=tiny.F_GRAM_SIZES, learned_rows=20
    ).eval()
    embedding = model.f_gram_embedding
    torch.nn.init.normal_(embedding.gain, std=0.5)
    torch.nn.init.normal_(embedding.rows.weight, std=0.5)
    model.save_pretrained(folder)
    GPT2LMHeadModel(sizes).save_pretrained(folder.parent / "plain")
    tokenizer.save_pretrained(folder.parent / "plain")
    assert main(["precompute", "--model_path", str(folder), "--output_path", str(folder.parent / "table")]) == 0
    return folder
