"""The paper's training cost with prefix sharing: nodes per position of real batches, and what they make of its models.

    python benchmarks/training_cost.py [--quick] [--json docs/results/training_cost.json] [--tokens FILE.npy]

Nodes are counted, nothing is trained. Costs follow from the formulas of ``scone.models.accounting``, in plain steps of
the same trunk. Batches are blocks of 2,048 tokens drawn from all over the corpus, as a shuffling loader makes them.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from typing import Any

import numpy as np
from common import Report, commit, machine
from training_data import SEPARATOR, VOCAB_SIZE, gpt2_tokens
from transformers import AutoConfig

from scone.kernels.trie_batch import build_trie_batch
from scone.models.accounting import f_gram_forward_flops, trunk_forward_flops
from scone.models.f_gram_config import FGramModelConfig
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher
from scone.utils.files import write_json

MAX_N, LENGTH, WIDTH, INNER = 5, 2048, 2048, 8192
POSITIONS = (16_384, 65_536, 524_288, 4_194_304)
TRUNK_LAYERS = {"1.0B": 18, "1.3B": 24}
F_GRAM_LAYERS = {"0.6B": 12, "1.8B": 36}
POSITIONS_TO_AVERAGE = 1_000_000
"""Smaller batches are drawn until so many positions were seen."""


def main() -> None:
    """Count, compute, print, write the JSON that the documentation's tables are made from."""
    report = Report.from_arguments("training_cost", __doc__, add_options=_add_options)
    tokens, source = gpt2_tokens(3 if report.quick else None, report.config["tokens"])
    sizes = (1_000_000,) if report.quick else (1_000_000, 10_000_000)
    limits: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_n": MAX_N, "min_freq": 2, "max_f_grams": sizes[-1]}
    largest = count_f_grams([tokens], **limits, separator_ids=[SEPARATOR], quiet=True).vocabulary
    batches = []
    for num_f_grams in sizes:
        vocabulary = largest.truncated(min(num_f_grams, largest.num_f_grams))
        for positions in POSITIONS:
            if positions <= len(tokens) // 2:
                batches.append({"f_grams": vocabulary.num_f_grams, **count_batch(tokens, vocabulary, positions)})
                print(json.dumps(batches[-1]), flush=True)
    costs = [cost(trunk, f_gram_model, batch) for trunk, f_gram_model in _models() for batch in batches]
    for line in costs:
        print(json.dumps(line))
    report.config |= {"tokens": source, "num_tokens": len(tokens), "max_n": MAX_N, "sequence_length": LENGTH}
    if report.json_path:
        result = {"benchmark": "training_cost", "machine": machine(), "commit": commit(), "config": report.config}
        write_json(report.json_path, result | {"batches": batches, "costs": costs})


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", metavar="FILE", help="a .npy file of GPT-2 token ids instead of the corpus")


def _models() -> list[tuple[str, str]]:
    return [(trunk, f_gram_model) for trunk in TRUNK_LAYERS for f_gram_model in F_GRAM_LAYERS]


def count_batch(tokens: np.ndarray, vocabulary: FGramVocabulary, positions: int) -> dict[str, Any]:
    """What the f-gram model computes for a batch, per position: padded, at exact lengths, distinct f-grams, nodes."""
    matcher, rng = Matcher(vocabulary), np.random.default_rng(0)
    repeats = max(1, POSITIONS_TO_AVERAGE // positions)
    figures = np.zeros(4 + 2 * MAX_N)
    for _ in range(repeats):
        starts = rng.choice(len(tokens) // LENGTH, positions // LENGTH, replace=False) * LENGTH
        nodes = matcher.match(np.stack([tokens[start : start + LENGTH] for start in starts]))
        trie = build_trie_batch(nodes, vocabulary.keys, vocabulary.suffixes, VOCAB_SIZE, MAX_N)
        f_grams = nodes[nodes >= VOCAB_SIZE] - VOCAB_SIZE
        counts = [len(f_grams), vocabulary.lengths[f_grams].sum(dtype=np.int64), len(trie.f_grams), len(trie.tokens)]
        figures += [*counts, *np.diff(trie.depth_offsets), *np.diff(trie.f_gram_offsets)]
    figures /= repeats * positions
    return {
        "positions": positions,
        "match_rate": figures[0],
        "padded": MAX_N * figures[0],
        "exact_lengths": figures[1],
        "distinct_f_grams": figures[2],
        "nodes": figures[3],
        "nodes_by_depth": figures[4 : 4 + MAX_N].tolist(),
        "f_grams_by_depth": figures[4 + MAX_N :].tolist(),
    }


def cost(trunk: str, f_gram_model: str, batch: dict[str, Any]) -> dict[str, Any]:
    """A step of this trunk and f-gram model in plain steps: padded as in the paper, at exact lengths, and shared."""
    plain = _trunk_flops(TRUNK_LAYERS[trunk])
    its = FGramModelConfig(WIDTH, F_GRAM_LAYERS[f_gram_model], WIDTH // 128, INNER)
    deepest = [0.0] * (MAX_N - 1)
    flops = {
        "padded": f_gram_forward_flops(its, WIDTH, [*deepest, batch["padded"]]),
        "exact_lengths": f_gram_forward_flops(its, WIDTH, [*deepest, batch["exact_lengths"]]),
        "shared": f_gram_forward_flops(its, WIDTH, batch["nodes_by_depth"], batch["f_grams_by_depth"]),
    }
    ratios = {name: 1 + value / plain for name, value in flops.items()}
    where = {"f_grams": batch["f_grams"], "positions": batch["positions"]}
    return {"trunk": trunk, "f_gram_model": f_gram_model, **where, **ratios}


@cache
def _trunk_flops(layers: int) -> float:
    special = {"bos_token_id": SEPARATOR, "eos_token_id": SEPARATOR}
    sizes = {"n_embd": WIDTH, "n_inner": INNER, "n_layer": layers, "n_head": WIDTH // 128, "n_positions": LENGTH}
    return trunk_forward_flops(AutoConfig.for_model("gpt2", vocab_size=VOCAB_SIZE, **sizes, **special), LENGTH)


if __name__ == "__main__":
    main()
