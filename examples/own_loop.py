"""SCONE's input embedding in a training loop of your own: plain PyTorch, any optimizer, here torch.optim.AdamW.

    python examples/own_loop.py [TEXT_FILE] [--steps 200] [--row_optimizer]

Learned rows are ordinary parameters, so nothing here is special to them. With many of them, ``--row_optimizer`` shows
the three lines by which a step costs the rows that it touches, and not all that there are.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scone import RowOptimizer, SconeForCausalLM, count_f_grams

SEPARATOR = 0  # tokens are bytes here; texts have none of value 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text_file", nargs="?", default=argparse.__file__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--row_optimizer", action="store_true")
    options = parser.parse_args()

    tokens = np.frombuffer(Path(options.text_file).read_bytes(), np.uint8).astype(np.int64)
    f_grams = count_f_grams([tokens], vocab_size=256, max_n=4, min_freq=8, separator_ids=[SEPARATOR], quiet=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": SEPARATOR, "eos_token_id": SEPARATOR}
    trunk = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **special))
    model = SconeForCausalLM.from_trunk(trunk, f_grams.vocabulary, f_gram_model=None, learned_rows=100_000)
    rows = model.f_gram_embedding.rows.weight
    print(f"{len(tokens):,} tokens, {len(rows):,} f-grams with a learned row")

    optimizers = []
    if options.row_optimizer:
        optimizers.append(RowOptimizer(model, lr=1e-2))
    optimizers.append(torch.optim.AdamW(model.parameters(), lr=3e-3))
    generator = np.random.default_rng(0)
    for step in range(1, options.steps + 1):
        starts = generator.integers(0, len(tokens) - 64, 8)
        batch = torch.from_numpy(np.stack([tokens[start : start + 64] for start in starts]))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step in (1, options.steps) or step % 50 == 0:
            moved = (rows != 0).any(1).sum().item()
            print(f"step {step}: loss {loss.item():.3f}, {moved:,} rows have learned")


if __name__ == "__main__":
    main()
