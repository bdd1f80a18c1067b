"""Precomputing a table: speed against the padded reference, f-gram-model tokens per f-gram, memory as the table grows.

    python benchmarks/bench_precompute.py [--quick] [--json FILE] [--f_grams N] [--f_gram_model small] [--dir DIR]

The f-grams (N = 5) are those of Wikipedia's most frequent tokens. The padded reference runs the same
f-gram model over each f-gram alone, padded to N tokens, in batches of its best size. Both compute with one thread: that
is how precomputing uses a processor, a chunk to each core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Report, in_child, interleaved
from workloads import f_grams_of, gpt2_tokens, gpt2_trunk, most_frequent

from scone.inference.precompute import ROWS_PER_BATCH_UNIT, precompute_table
from scone.models.language_model import SconeForCausalLM
from scone.tests.models.padded_f_gram_model import padded_f_gram_model
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.environment import process_bytes

VOCAB_SIZE, MAX_N = 16_384, 5
SIZES = {
    "tiny": (192, 3, 3, 768),
    "small": (384, 6, 6, 1536),
    "medium": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


def main() -> None:
    """Measure, print the table of records, write the JSON; or, as a child, precompute one table and print the peak."""
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(_child(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))))
        return
    report = Report.from_arguments("precompute", __doc__, add_options=_add_options)
    options = report.config
    num_f_grams = options["f_grams"] or (60_000 if report.quick else 1_000_000)
    size = options["f_gram_model"] or ("tiny" if report.quick else "small")
    tokens = most_frequent(gpt2_tokens(1 if report.quick else 6)[0], VOCAB_SIZE)
    vocabulary = f_grams_of(tokens, num_f_grams, (), vocab_size=VOCAB_SIZE)
    model = _model(vocabulary, size)
    options |= {"f_grams": vocabulary.num_f_grams, "f_gram_model": size, "max_n": MAX_N, "vocab_size": VOCAB_SIZE}
    options["mean_length"] = float(np.mean(vocabulary.lengths))
    measure_tokens(report, model)
    measure_speed(report, model)
    with tempfile.TemporaryDirectory(dir=options["dir"], prefix="bench_precompute.") as folder:
        measure_whole(report, model, size, Path(folder))
        measure_memory(report, vocabulary, Path(folder))
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--f_grams", type=int, help="f-grams of the vocabulary (1,000,000; quick: 60,000)")
    parser.add_argument("--f_gram_model", choices=SIZES, help="size of the f-gram model (small; quick: tiny)")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the tables go")


def _model(vocabulary: FGramVocabulary, size: str) -> SconeForCausalLM:
    """A SCONE whose trunk is only its token embedding's width: it plays no part here."""
    width, *rest = SIZES[size]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    trunk = gpt2_trunk(width, 1, rest[1], vocab_size=vocabulary.vocab_size)
    return SconeForCausalLM.from_trunk(
        trunk, vocabulary, f_gram_model=dict(zip(names, SIZES[size], strict=True))
    ).eval()


def _chunk_nodes(vocabulary: FGramVocabulary, batch_size: int = 32) -> list[torch.Tensor]:
    """The chunks that precomputing makes."""
    order = torch.from_numpy(vocabulary.depth_first_order())
    return list((order + vocabulary.vocab_size).split(batch_size * ROWS_PER_BATCH_UNIT))


def measure_tokens(report: Report, model: SconeForCausalLM) -> None:
    """Distinct nodes that the f-gram model runs over, summed over all chunks, for each f-gram."""
    vocabulary = model.vocabulary
    tokens = sum(len(model.trie_of(nodes.numpy()[None])["tokens"]) for nodes in _chunk_nodes(vocabulary))
    ours = tokens / vocabulary.num_f_grams
    report.add("model_tokens_per_f_gram", "tokens", ours, float(MAX_N), "padded", ratio="ours", most=1.05)


def measure_speed(report: Report, model: SconeForCausalLM) -> None:
    """f-grams a second of the two ways to compute the same rows, in turn."""
    vocabulary = model.vocabulary
    chunks = _chunk_nodes(vocabulary)
    chunk = chunks[len(chunks) // 2][: 8192 if report.quick else None]
    ranks = chunk.numpy() - vocabulary.vocab_size
    shared, padded = model.embed_nodes(chunk), _padded(model, ranks, 512)
    torch.testing.assert_close(shared, padded, rtol=1e-3, atol=1e-4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {"shared": lambda: model.embed_nodes(chunk)}
    sizes = (512,) if report.quick else (128, 512, 2048)
    runs |= {f"padded {size}": lambda size=size: _padded(model, ranks, size) for size in sizes}
    seconds = interleaved(runs, repeats=2 if report.quick else 3)
    torch.set_num_threads(threads)
    best = min(value for name, value in seconds.items() if name.startswith("padded"))
    report.add(
        "speed_vs_padded", "f-grams/s a core", len(chunk) / seconds["shared"], len(chunk) / best, "padded", target=2.5
    )


@torch.no_grad()
def _padded(model: SconeForCausalLM, ranks: np.ndarray, batch: int) -> torch.Tensor:
    """The same rows by the reference: token embedding + gain × padded f-gram model."""
    layer, vocabulary = model.f_gram_embedding, model.vocabulary
    embedding, rows = model.get_input_embeddings(), []
    for low in range(0, len(ranks), batch):
        part = ranks[low : low + batch]
        tokens = torch.from_numpy(vocabulary.token_matrix(part, padding=0))
        tokens = torch.nn.functional.pad(tokens, (0, MAX_N - tokens.shape[1]))
        lengths = torch.from_numpy(vocabulary.lengths[part].astype(np.int64))
        vectors = padded_f_gram_model(layer.f_gram_model, embedding(tokens), lengths)
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
        rows.append(embedding(last) + layer.gain * vectors)
    return torch.cat(rows)


def measure_whole(report: Report, model: SconeForCausalLM, size: str, folder: Path) -> None:
    """Start to finished file with all cores, disk included; of at most 100,000 f-grams."""
    part = _model(model.vocabulary.truncated(min(100_000, model.vocabulary.num_f_grams)), size)
    start = time.perf_counter()
    precompute_table(part, folder / "whole", quiet=True)
    seconds = time.perf_counter() - start
    report.add("f_grams_per_second_with_writing", "f-grams/s", part.vocabulary.num_f_grams / seconds, ratio=None)


def measure_memory(report: Report, vocabulary: FGramVocabulary, folder: Path) -> None:
    """Peak memory of a process of its own with --use_memory_map and a tiny f-gram model, at all f-grams against a tenth
    of them.
    """
    peaks = {}
    for divisor in (10, 1):
        part = vocabulary.truncated(vocabulary.num_f_grams // divisor)
        path = part.save(folder / f"f_grams_{divisor}.safetensors")
        found = in_child(Path(__file__), ["child", str(path), "tiny", str(folder / f"table_{divisor}")])
        peaks[divisor] = found["peak_bytes"]
    report.add("memory_growth", "bytes", peaks[1], peaks[10], "a tenth of the rows", most=1.1)


def _child(vocabulary_path: Path, size: str, table: Path) -> dict[str, int]:
    model = _model(FGramVocabulary.load(vocabulary_path), size)
    precompute_table(model, table, use_memory_map=True, quiet=True)
    return {"peak_bytes": process_bytes(peak=True)}


if __name__ == "__main__":
    main()
