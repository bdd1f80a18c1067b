"""Train a small SCONE on real text; its perplexity with its table in each row type (used by bench_lookup)."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import shared_data
from transformers import GPT2Config, GPT2LMHeadModel

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import precompute_table
from scone.inference.row_types import ROW_TYPES
from scone.inference.table_convert import convert_table
from scone.models.language_model import SconeForCausalLM
from scone.tokenization.counting import count_f_grams
from scone.training.optimizer import AdamWWithRows

VOCAB_SIZE, MAX_N, LENGTH, BATCH = 4096, 4, 128, 16
HELD_OUT_TOKENS = 40_000


def main() -> None:
    """Print one JSON object: perplexity by row type, and what the model was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 2,048 tokens")
    parser.add_argument("--parts", type=int, default=2, help="how much text, in pieces of 14 MB")
    options = parser.parse_args()
    steps = options.steps
    torch.manual_seed(0)
    tokens = words(VOCAB_SIZE, options.parts)
    train, held_out = tokens[:-HELD_OUT_TOKENS], tokens[-HELD_OUT_TOKENS:]
    vocabulary = count_f_grams(
        [train], vocab_size=VOCAB_SIZE, max_n=MAX_N, min_freq=10, max_f_grams=100_000, separator_ids=(), quiet=True
    ).vocabulary
    trunk = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=128, n_layer=3, n_head=4, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
        )
    )
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


def words(vocab_size: int, parts: int) -> np.ndarray:
    """Words of ``parts`` × 14 MB of Wikipedia (or of Python's standard library) as int64 ids by frequency; 0 is any
    rarer word.
    """
    pattern, counts, numbers = re.compile(r"\w+|[^\w\s]"), Counter[str](), array("q")
    first_seen: dict[str, int] = {}
    for text in texts(parts):
        found = pattern.findall(text)
        counts.update(found)
        numbers.extend(first_seen.setdefault(word, len(first_seen)) for word in found)
    id_of = np.zeros(len(first_seen), dtype=np.int64)
    for rank, (word, _) in enumerate(counts.most_common(vocab_size - 1)):
        id_of[first_seen[word]] = rank + 1
    return id_of[np.frombuffer(numbers, dtype=np.int64)]


def texts(parts: int) -> Iterator[str]:
    """Documents of the shared Wikipedia files; without them, the sources of the standard library."""
    folder = shared_data("wikipedia")
    if folder is None:
        for path in sorted(Path(json.__file__).parent.parent.rglob("*.py")):
            if "site-packages" not in path.parts:
                yield path.read_text(encoding="utf-8", errors="ignore")
        return
    import zstandard

    for path in sorted(folder.glob("*.jsonl.zst"))[:parts]:
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def train_model(model: SconeForCausalLM, tokens: np.ndarray, steps: int) -> None:
    """A short plain run: what counts is that the rows are trained ones."""
    rows = model.f_gram_embedding.rows
    optimizer = AdamWWithRows([{"params": list(model.parameters())}], lr=1e-3, rows=rows, rows_learning_rate=3e-3)
    random = np.random.default_rng(0)
    model.train()
    for step in range(steps):
        starts = random.integers(0, len(tokens) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([tokens[start : start + LENGTH] for start in starts]))
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


@torch.no_grad()
def perplexity(model: SconeForCausalLM, tokens: np.ndarray) -> float:
    """exp of the mean loss over ``tokens``, in windows."""
    windows = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH))
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


if __name__ == "__main__":
    main()
