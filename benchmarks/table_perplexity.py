"""Train a small SCONE on real text; its perplexity with its table in each row type (used by bench_lookup)."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from workloads import TrainingStep, f_grams_of, gpt2_tokens, gpt2_trunk, most_frequent

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import convert_table, precompute_table
from scone.inference.table_format import ROW_TYPES
from scone.models.language_model import SconeForCausalLM

VOCAB_SIZE, MAX_N, LENGTH, BATCH = 4096, 4, 128, 16


def main() -> None:
    """Print one JSON object: perplexity by row type, and what the model was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of 2,048 tokens; one for a hundred f-grams")
    parser.add_argument("--parts", type=int, default=2, help="how much text, in files of 14 MB")
    options = parser.parse_args()
    steps = options.steps
    torch.manual_seed(0)
    tokens = most_frequent(gpt2_tokens(options.parts)[0], VOCAB_SIZE)
    held_out_tokens = max(8_000, 40 * steps)
    train, held_out = tokens[:-held_out_tokens], tokens[-held_out_tokens:]
    vocabulary = f_grams_of(train, 100 * steps, (), vocab_size=VOCAB_SIZE, max_n=MAX_N, min_freq=10)
    trunk = gpt2_trunk(128, 3, 4, vocab_size=VOCAB_SIZE, n_positions=LENGTH)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    model = SconeForCausalLM.from_trunk(trunk, vocabulary, f_gram_model=sizes, learned_rows=vocabulary.num_f_grams)
    train_model(model, train, steps)
    found: dict[str, object] = {"config": {"steps": steps, "f_grams": vocabulary.num_f_grams, "tokens": len(train)}}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "fp32"
        precompute_table(model, whole, quiet=True)
        for row_type in ROW_TYPES:
            path = Path(folder) / row_type
            if row_type != "fp32":
                convert_table(whole, path, row_type=row_type, quiet=True)
            with EmbeddingTable.open(path) as table:
                model.attach_table(table)
                found[row_type] = perplexity(model, held_out)
    print(json.dumps(found))


def train_model(model: SconeForCausalLM, tokens: np.ndarray, steps: int) -> None:
    """A short plain run: what counts is that the rows are trained ones."""
    random, step = np.random.default_rng(0), TrainingStep(model, rows_learning_rate=3e-3)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(steps):
        starts = random.integers(0, len(tokens) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([tokens[start : start + LENGTH] for start in starts]))
        step({"input_ids": batch, "labels": batch})
    model.eval()


@torch.no_grad()
def perplexity(model: SconeForCausalLM, tokens: np.ndarray) -> float:
    """exp of the mean loss over ``tokens``, in windows."""
    windows = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH))
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


if __name__ == "__main__":
    main()
