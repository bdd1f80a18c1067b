"""The cost of training: prefix sharing against the padded f-gram model, steps against their operations, learned rows.

    python benchmarks/bench_training.py [--quick] [--json FILE] [--positions 4096 16384 65536] [--tokens FILE.npy]
    python benchmarks/bench_training.py --gpu TOKEN_FOLDER [--quick] [--json FILE] [--trunks gpt2] [--variants rows]

f-grams (N = 5, the 1,000,000 most frequent; 4,000,000 for the rows) are counted on Wikipedia in GPT-2's tokens. The
padded peer is the paper's: every matched position runs its own f-gram, padded to N tokens, in one batch.

``--gpu``: steps in bf16 autocast, compiled, on batches from a loader with workers; trunks of the paper's GPT-2
experiments (width 1,024 × 6 layers) and of GPT2-Small. Where there are several ``--positions``, the largest stands in
the names without a number. What fails, or does not fit the memory, is named in the configuration's ``failed``.
Utilisation is the formula's operations a second, attention over all pairs, against an H100's peak. With ``--quick`` a
rehearsal at toy size, on any device.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from common import PeakMemory, Report, interleaved
from torch import Tensor
from transformers import PreTrainedModel
from workloads import VOCAB_SIZE, TrainingStep, f_grams_of, gpt2_tokens, gpt2_trunk

from scone.data.dataset import BlockDataset, Collator
from scone.data.token_file import TokenFile
from scone.evaluation.speed import timed
from scone.models.accounting import f_gram_forward_flops, trunk_forward_flops
from scone.models.configuration import FGramModelConfig
from scone.models.input_embeddings import FGramModel
from scone.models.language_model import SconeForCausalLM
from scone.tests.models.padded_f_gram_model import padded_f_gram_model
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.training.distributed import compile_for_training

MAX_N, NUM_F_GRAMS, MOST_ROWS = 5, 1_000_000, 4_000_000
SEQUENCE_LENGTH = 512
Batch = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU_TRUNKS = {"1024x6": (1024, 6, 16), "gpt2": (768, 12, 12)}
GPU_VARIANTS = ("plain", "shared", "rows", "both", "padded")
H100_BF16_FLOPS = 989e12
"""Dense bf16 of an H100 SXM, NVIDIA's data sheet."""


def main() -> None:
    """Measure, print the table of records, write the JSON."""
    report = Report.from_arguments("training", __doc__, add_options=_add_options)
    options = report.config
    if options["gpu"]:
        measure_gpu(report)
        report.finish()
        return
    tokens, source = gpt2_tokens(1 if report.quick else None, options["tokens"])
    print(f"{len(tokens):,} tokens ({source})", flush=True)
    started = time.perf_counter()
    large = f_grams_of(tokens, MOST_ROWS)
    vocabulary = large.truncated(min(NUM_F_GRAMS, large.num_f_grams))
    seconds = time.perf_counter() - started
    print(f"{large.num_f_grams:,} f-grams in {seconds:.0f} s", flush=True)
    trunk = {"n_embd": 192, "n_layer": 4, "n_head": 4} if report.quick else {"n_embd": 512, "n_layer": 8, "n_head": 8}
    positions = options["positions"] or ([2048] if report.quick else [4096, 16_384])
    options |= {"tokens": source, "num_tokens": len(tokens), "f_grams": vocabulary.num_f_grams, "max_n": MAX_N}
    options |= {"trunk": trunk, "positions": positions, "threads": torch.get_num_threads()}
    sizes = _f_gram_sizes(trunk, 0.75 if report.quick else 1.0)
    measure_sharing(report, batches(tokens, vocabulary, 16_384), vocabulary, sizes)
    for count in positions:
        measure_steps(report, tokens, vocabulary, trunk, count)
    measure_rows(report, tokens, large, trunk)
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--positions", type=int, nargs="+", help="batch sizes of the steps (4096 16384; quick: 2048; GPU: 16384 65536)"
    )
    parser.add_argument("--tokens", metavar="FILE", help="a .npy file of GPT-2 token ids instead of the corpus")
    parser.add_argument("--gpu", type=Path, metavar="TOKEN_FOLDER", help="whole steps on one GPU, on this token file")
    parser.add_argument("--trunks", nargs="+", choices=GPU_TRUNKS, default=list(GPU_TRUNKS), help="on the GPU")
    parser.add_argument("--variants", nargs="+", choices=GPU_VARIANTS, default=GPU_VARIANTS, help="on the GPU")


def _f_gram_sizes(trunk: dict[str, int], scale: float) -> dict[str, int]:
    """An f-gram model of ``scale`` times the trunk's layers (0.75: also three quarters of its width)."""
    width = trunk["n_embd"] * 3 // 4 if scale == 0.75 else trunk["n_embd"]
    return {
        "hidden_size": width,
        "num_hidden_layers": max(1, round(trunk["n_layer"] * scale)),
        "num_attention_heads": trunk["n_head"],
        "intermediate_size": 4 * width,
    }


def batches(tokens: np.ndarray, vocabulary: FGramVocabulary | None, positions: int, rows: int = 0) -> Iterator[Batch]:
    """Batches of blocks drawn from all over the corpus, as a shuffling data loader makes them."""
    collate = Collator(vocabulary, rows)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(tokens) // SEQUENCE_LENGTH - 1, positions // SEQUENCE_LENGTH) * SEQUENCE_LENGTH
        yield collate([{"input_ids": tokens[start : start + SEQUENCE_LENGTH].astype(np.int64)} for start in starts])


def measure_sharing(
    report: Report, source: Iterator[Batch], vocabulary: FGramVocabulary, sizes: dict[str, int]
) -> None:
    """Nodes per position, and forward + backward of the f-gram model alone against the padded one."""
    some = list(itertools.islice(source, 4))
    positions = some[0]["input_ids"].numel()
    nodes = statistics.mean(len(batch["trie"]["tokens"]) / positions for batch in some)
    report.add("nodes_per_position_16k", "nodes", nodes, ratio="ours", most=0.7)
    torch.manual_seed(0)
    model = FGramModel(FGramModelConfig(**sizes), sizes["hidden_size"], MAX_N)
    model.init_weights()
    table = torch.randn(VOCAB_SIZE, sizes["hidden_size"], requires_grad=True)
    trie = some[0]["trie"]
    per_position = trie["f_grams"][trie["position_index"][trie["position_index"] > 0] - 1]

    def step(forward: Callable[[], Tensor]) -> None:
        forward().square().sum().backward()
        model.zero_grad(set_to_none=True)
        table.grad = None

    def padded(f_grams: Tensor) -> Callable[[], None]:
        its_tokens, lengths = _padded(f_grams, vocabulary)
        return partial(step, lambda: padded_f_gram_model(model, table[its_tokens], lengths))

    position, distinct = "padded, every position", "padded, every distinct f-gram"
    runs = {"ours": partial(step, lambda: model(table[trie["tokens"]], trie))}
    runs |= {position: padded(per_position), distinct: padded(trie["f_grams"])}
    peaks = []
    for name in ("ours", position):  # before larger runs leave freed memory to the allocator, which would hide theirs
        with PeakMemory() as peak:
            runs[name]()
        peaks.append(peak.growth_bytes / 2**20)
    report.add("f_gram_peak_memory_16k", "MiB", *peaks, position, ratio="peer/ours")
    seconds = interleaved(runs, 1 if report.quick else 2)
    metrics = {position: ("f_gram_forward_backward_speedup_16k", 6.0)}
    metrics[distinct] = ("f_gram_speedup_over_padded_distinct_16k", None)
    for peer, (metric, target) in metrics.items():
        report.add(metric, "s", seconds["ours"], seconds[peer], peer, ratio="peer/ours", target=target)


def _padded(f_grams: Tensor, vocabulary: FGramVocabulary) -> tuple[Tensor, Tensor]:
    """Tokens [M, N] of the f-grams, padded at the end, and their lengths [M]."""
    ranks = f_grams.numpy() - VOCAB_SIZE
    lengths = torch.from_numpy(vocabulary.lengths[ranks].astype(np.int64))
    return torch.from_numpy(vocabulary.token_matrix(ranks, padding=0)), lengths


def measure_steps(
    report: Report, tokens: np.ndarray, vocabulary: FGramVocabulary, trunk: dict[str, int], positions: int
) -> None:
    """Steps with f-gram models of half, once and twice the trunk's layers against the plain step and their FLOPs."""
    source = batches(tokens, vocabulary, positions)
    prepared = list(itertools.islice(source, 3))
    plain = gpt2_trunk(*trunk.values())
    without_trie = [{name: value for name, value in batch.items() if name != "trie"} for batch in prepared]
    steps: dict[str, Callable[[], object]] = {"plain": TrainingStep(plain, without_trie)}
    predicted = {}
    for scale in (1.0,) if report.quick else (0.5, 1.0, 2.0):
        sizes = _f_gram_sizes(trunk, scale)
        model = SconeForCausalLM.from_trunk(gpt2_trunk(*trunk.values()), vocabulary, f_gram_model=sizes)
        steps[f"{scale}x"] = TrainingStep(model, prepared)
        predicted[scale] = 1 + _f_gram_flops(sizes, prepared) / trunk_forward_flops(plain.config, SEQUENCE_LENGTH)
    steps["trie"] = lambda: next(source)
    plain_source = batches(tokens, None, positions)
    steps["tokens"] = lambda: next(plain_source)
    seconds = interleaved(steps, 2 if report.quick else 3)
    suffix = "" if positions == report.config["positions"][0] else f"_{positions}"
    for scale, expected in predicted.items():
        name = ("step_vs_flops" if scale == 1.0 else f"step_vs_flops_{scale}x") + suffix
        peer = (expected, f"predicted from FLOPs, {positions:,} positions")
        measured = seconds[f"{scale}x"] / seconds["plain"]
        report.add(name, "plain steps", measured, *peer, most=1.15 if scale == 1.0 else None)
    trie, peer = seconds["trie"] - seconds["tokens"], (seconds["1.0x"], f"step of {positions:,} positions")
    report.add(f"trie_build_share{suffix}", "s", trie, *peer, most=0.05)


def _f_gram_flops(sizes: dict[str, int], prepared: list[Batch], padded: bool = False) -> float:
    """Forward operations of the f-gram model per position; ``padded``: of every matched position's own N tokens."""
    config, total, positions = FGramModelConfig(**sizes), 0.0, 0
    for batch in prepared:
        counts = [
            [float(stop - start) for start, stop in itertools.pairwise(batch["trie"][name])]
            for name in ("depth_offsets", "f_gram_offsets")
        ]
        if padded:
            counts = [[float((batch["trie"]["position_index"] > 0).sum())] * MAX_N]
        total += f_gram_forward_flops(config, config.hidden_size, *counts)
        positions += batch["input_ids"].numel()
    return total / positions


def measure_rows(report: Report, tokens: np.ndarray, large: FGramVocabulary, trunk: dict[str, int]) -> None:
    """Steps of rows-only models with 100 k, 1 M and 4 M rows against the plain step; each batch is new."""
    positions, repeats = (1024, 2) if report.quick else (8192, 4)
    steps: dict[str, Callable[[], object]] = {}
    for num_rows in (0, 100_000, NUM_F_GRAMS, MOST_ROWS):
        vocabulary = large.truncated(min(max(num_rows, 1), large.num_f_grams))
        source = batches(tokens, vocabulary if num_rows else None, positions, num_rows)
        prepared = list(itertools.islice(source, repeats + 1))
        model = gpt2_trunk(*trunk.values())
        if num_rows:
            model = SconeForCausalLM.from_trunk(model, vocabulary, f_gram_model=None, learned_rows=num_rows)
        steps[str(num_rows)] = TrainingStep(model, prepared, rows_learning_rate=1e-3)
    seconds = interleaved(steps, repeats)
    report.add("rows_step_overhead", "s", seconds[str(NUM_F_GRAMS)], seconds["0"], "plain step", most=1.1)
    report.add("rows_step_growth", "s", seconds[str(MOST_ROWS)], seconds["100000"], "step with 100,000 rows", most=1.1)


# ---------------------------------------------------------------------- whole steps on a GPU


class Measured(NamedTuple):
    """What one variant took: seconds a step from the loader and from batches at hand, bytes, operations."""

    loaded: float
    at_hand: float
    peak_bytes: int
    flops: float
    tokens: int


def measure_gpu(report: Report) -> None:
    """Every variant of every trunk at every batch size, the smallest first."""
    options = report.config
    file, length = TokenFile.open(options["gpu"]), 64 if report.quick else 1024
    vocabulary = f_grams_of(file.tokens, 10_000 if report.quick else NUM_F_GRAMS, [file.separator_id])
    positions = sorted(options["positions"] or ([256, 1024] if report.quick else [16_384, 65_536]))
    options |= {"f_grams": vocabulary.num_f_grams, "max_n": MAX_N, "length": length, "positions": positions}
    options |= {"num_tokens": file.num_tokens, "tokenizer_tokens": file.vocab_size, "failed": []}
    trunks = {"tiny": (32, 2, 2)} if report.quick else {name: GPU_TRUNKS[name] for name in options["trunks"]}
    for name, trunk in trunks.items():
        plain: dict[int, Measured] = {}
        for variant in options["variants"]:
            model, sizes = _gpu_model(variant, trunk, vocabulary)
            if DEVICE.type == "cuda":
                compile_for_training(model, dynamic=True)  # one compilation for all batch sizes
            step = TrainingStep(model)
            for count in positions:
                try:
                    now = _gpu_steps(variant, step, file, (count // length, length), sizes, report.quick)
                except Exception as error:  # of the compiler, or out of memory: the others go on
                    what = f"{variant} of {name} at {count} positions: {str(error).partition(chr(10))[0]}"
                    options["failed"].append(what)
                    step.optimizer.zero_grad()
                    print(f"failed: {what}", flush=True)
                    continue
                number = "" if count == positions[-1] else f"_{count}"
                _report_variant(report, f"{name}_{variant}{number}", now, plain.get(count))
                if variant == "plain":
                    plain[count] = now
            del model, step
            gc.collect()
            torch.cuda.empty_cache()


def _gpu_model(
    variant: str, trunk: tuple[int, int, int], vocabulary: FGramVocabulary
) -> tuple[PreTrainedModel, dict[str, int]]:
    """The model of a variant on the device, in fp32 weights, and the sizes of an f-gram model as large as the trunk."""
    width, layers, heads = trunk
    sizes = _f_gram_sizes({"n_embd": width, "n_layer": layers, "n_head": heads}, 1.0)
    model = gpt2_trunk(*trunk, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if variant != "plain":
        rows = vocabulary.num_f_grams if variant in ("rows", "both") else 0
        f_gram_model = None if variant == "rows" else sizes
        model = SconeForCausalLM.from_trunk(model, vocabulary, f_gram_model=f_gram_model, learned_rows=rows)
    if variant == "padded":
        padded = PaddedFGramModel(FGramModelConfig(**sizes), width, vocabulary.max_n)
        padded.init_weights()
        model.f_gram_embedding.f_gram_model = padded
    return model.to(DEVICE).train(), sizes


class PaddedFGramModel(FGramModel):
    """The paper's way behind the same interface: every matched position runs its own f-gram, padded to N tokens.

    Positions that read the same f-gram get the same vector, so their mean is exact, in values and in gradients.
    """

    def compile(self, *_: Any, **__: Any) -> None:
        """Only the padded pass is compiled, in ``forward``."""

    def forward(self, token_vectors: Tensor, trie: Mapping[str, Any]) -> Tensor:
        which = trie["position_index"].reshape(-1)
        which = which[which > 0] - 1
        wanted = trie["f_gram_index"][which]
        padded = torch.compile(padded_f_gram_model, dynamic=True) if DEVICE.type == "cuda" else padded_f_gram_model
        vectors = padded(self, token_vectors[trie["ancestors"][wanted]], trie["depths"][wanted] + 1)
        count = torch.bincount(which, minlength=len(trie["f_gram_index"])).clamp(min=1)[:, None]
        total = vectors.new_zeros(len(count), vectors.shape[1]).index_add(0, which, vectors)
        return total / count


def _gpu_steps(
    variant: str, step: TrainingStep, file: TokenFile, shape: tuple[int, int], sizes: dict[str, int], quick: bool
) -> Measured:
    """Warm up, then time steps on prepared batches, then on batches from the loader; sequences × length in a batch."""
    scone = step.model if isinstance(step.model, SconeForCausalLM) else None
    rows, on_gpu, workers = scone.config.learned_rows if scone else 0, DEVICE.type == "cuda", 0 if quick else 6
    loader = torch.utils.data.DataLoader(
        BlockDataset(file, shape[1], drop_last=True),
        batch_size=shape[0],
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=Collator(scone.vocabulary if scone else None, rows),
        num_workers=workers,
        pin_memory=on_gpu,
        prefetch_factor=4 if workers else None,
    )
    batches = (send_to_device(batch, DEVICE, non_blocking=True) for batch in loader)
    some, steps = list(itertools.islice(batches, 4)), 2 if quick else 12
    for batch in [*some, *some[:2]]:
        step(batch)

    def seconds_a_step(source: Iterator[Batch]) -> float:
        step(next(source))  # not counted
        return timed(lambda: [step(batch) for batch in itertools.islice(source, steps)], DEVICE) / steps

    at_hand = seconds_a_step(itertools.cycle(some))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    loaded = seconds_a_step(batches)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    forward = trunk_forward_flops((scone.trunk if scone else step.model).config, shape[1])
    if scone is not None and scone.config.f_gram_model_config is not None:
        forward += _f_gram_flops(sizes, some, variant == "padded")
    tokens = shape[0] * shape[1]
    # a backward pass costs two products for each of the forward pass, where everything trains
    return Measured(loaded, at_hand, peak, 3 * forward * tokens, tokens)


def _report_variant(report: Report, name: str, now: Measured, plain: Measured | None) -> None:
    """Records of one variant at one batch size, against the plain model where there is one."""
    speed = now.tokens / now.loaded
    report.add(f"{name}_tokens_per_second", "tokens/s", speed, plain and plain.tokens / plain.loaded, "plain")
    report.add(f"{name}_utilisation", "of peak", now.flops / now.at_hand / H100_BF16_FLOPS, ratio=None)
    report.add(f"{name}_peak_memory", "GiB", now.peak_bytes / 2**30, ratio=None)
    if plain is not None:
        expected = {"peer": now.flops / plain.flops, "peer_name": "predicted from FLOPs"}
        target = 1.15 if "shared" in name else None
        report.add(f"{name}_step_vs_flops", "plain steps", now.at_hand / plain.at_hand, **expected, most=target)
        at_hand = {"peer": now.at_hand, "peer_name": "step on prepared batches"}
        report.add(f"{name}_loader_hidden", "s", now.loaded, **at_hand, most=1.05)


if __name__ == "__main__":
    main()
