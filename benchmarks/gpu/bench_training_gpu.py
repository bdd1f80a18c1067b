"""Training steps on one GPU: plain, SCONE with shared prefixes, SCONE padded as in the paper, learned rows.

    python benchmarks/gpu/bench_training_gpu.py --tokens TOKEN_FOLDER [--json FILE] [--tiny] [--no_compile]

bf16 autocast, compiled, batches from a loader with workers. Trunks are those of the paper's GPT-2 experiments
(width 1,024 × 6 layers) and GPT2-Small; f-grams (N = 5, S = 1 M) are counted on the tokens. Batches of
``--positions``; where there are several, the largest stands in the names without a number. What does not fit the memory
is named in the configuration's ``did_not_fit``. Utilisation is the formula's operations a second, attention over all
pairs, against ``--peak_tflops``. ``--tiny`` rehearses everything on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import Report
from torch import Tensor
from transformers import PreTrainedModel
from workloads import TrainingStep, f_grams_of, gpt2_trunk

from scone.data.collator import Collator
from scone.data.dataset import BlockDataset
from scone.data.token_file import TokenFile
from scone.models.accounting import f_gram_forward_flops, training_flops, trunk_forward_flops
from scone.models.configuration import FGramModelConfig
from scone.models.f_gram_model import FGramModel, padded_f_gram_model
from scone.models.language_model import SconeForCausalLM
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.training.compilation import compile_for_training

TRUNKS = {"1024x6": (1024, 6, 16), "gpt2": (768, 12, 12)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H100_BF16_TFLOPS = 989.0
"""Dense bf16 of an H100 SXM, NVIDIA's data sheet."""


def main() -> None:
    """Measure, print the table of records, write the JSON."""
    report = Report.from_arguments("gpu_training", __doc__, add_options=_add_options)
    options = report.config
    file = TokenFile.open(options["tokens"])
    tiny = options["tiny"]
    counted = f_grams_of(file.tokens, 10_000 if tiny else 1_000_000, [file.separator_id])
    length = 64 if tiny else 1024
    if tiny:
        options["positions"] = [positions // 64 for positions in options["positions"]]
    options |= {"f_grams": counted.num_f_grams, "max_n": 5, "length": length, "did_not_fit": [], "failed": []}
    options |= {"num_tokens": file.num_tokens, "tokenizer_tokens": file.vocab_size}
    trunks = {"tiny": (32, 2, 2)} if tiny else {name: TRUNKS[name] for name in options["trunks"]}
    for name, sizes in trunks.items():
        plain: dict[int, Measured] = {}
        shared: dict[int, Measured] = {}
        for variant in options["variants"]:
            for positions, now in measure(variant, sizes, file, counted, length, options):
                known = {"plain": plain, "shared": shared}.get(variant)
                if known is not None:
                    known[positions] = now
                number = "" if positions == max(options["positions"]) else f"_{positions}"
                report_variant(report, f"{name}_{variant}{number}", now, plain.get(positions))
                if variant == "padded":
                    report_speedup(report, name, number, now, plain.get(positions), shared.get(positions))
            gc.collect()
            torch.cuda.empty_cache()
    report.finish()


VARIANTS = ("plain", "shared", "rows", "both", "padded", "shared_half", "shared_double")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=Path, required=True, help="folder of a token file")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at toy size, on any device")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--positions", type=int, nargs="*", default=[16_384, 65_536], help="positions of a batch")
    parser.add_argument("--trunks", nargs="*", choices=list(TRUNKS), default=list(TRUNKS))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--peak_tflops", type=float, default=H100_BF16_TFLOPS)


class Measured:
    """What one variant took: seconds a step from the loader and from batches at hand, bytes, operations, nodes."""

    def __init__(self, loaded: float, at_hand: float, peak_bytes: int, flops: float, nodes: float, tokens: int) -> None:
        self.loaded, self.at_hand, self.peak_bytes, self.flops = loaded, at_hand, peak_bytes, flops
        self.nodes, self.tokens = nodes, tokens


def measure(
    variant: str,
    sizes: tuple[int, int, int],
    file: TokenFile,
    vocabulary: FGramVocabulary,
    length: int,
    options: Mapping[str, Any],
) -> Iterator[tuple[int, Measured]]:
    """Build the model of ``variant`` and measure it at every batch size, the smallest first."""
    model = build(variant, sizes, vocabulary)
    if not options["no_compile"] and DEVICE.type == "cuda":
        compile_for_training(model, dynamic=True)  # one compilation for all batch sizes
    step = TrainingStep(model)
    for positions in sorted(options["positions"]):
        try:
            yield positions, measured_steps(variant, model, step, file, (positions // length, length), options)
        except torch.OutOfMemoryError:
            options["did_not_fit"].append(f"{variant} of {sizes[0]} x {sizes[1]} at {positions} positions")
            step.optimizer.zero_grad()
            print(f"out of memory: {options['did_not_fit'][-1]}", flush=True)
        except Exception as error:  # of the compiler: the other variants go on
            first_line = str(error).partition("\n")[0]
            options["failed"].append(f"{variant} of {sizes[0]} x {sizes[1]} at {positions} positions: {first_line}")
            step.optimizer.zero_grad()
            print(f"failed: {options['failed'][-1]}", flush=True)


def measured_steps(
    variant: str,
    model: PreTrainedModel,
    step: TrainingStep,
    file: TokenFile,
    shape: tuple[int, int],
    options: Mapping[str, Any],
) -> Measured:
    """Warm up, then time steps on prepared batches, then on batches from the loader; sequences × length in a batch."""
    scone = model if isinstance(model, SconeForCausalLM) else None
    rounded = not options["no_compile"] and DEVICE.type == "cuda"
    workers = 0 if options["tiny"] else options["workers"]
    loader = torch.utils.data.DataLoader(
        BlockDataset(file, shape[1], drop_last=True),
        batch_size=shape[0],
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=Collator(scone.vocabulary if scone else None, scone.config.learned_rows if scone else 0, 0, rounded),
        num_workers=workers,
        pin_memory=DEVICE.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    some = [to_device(next(batches)) for _ in range(4)]
    for batch in [*some, *some[:2]]:
        step(batch)
    steps = 2 if options["tiny"] else options["steps"]
    at_hand = seconds_a_step(step, itertools.cycle(some), steps)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loaded = seconds_a_step(step, map(to_device, batches), steps)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    flops, nodes = operations(variant, model, some, shape)
    return Measured(loaded, at_hand, peak, flops, nodes, shape[0] * shape[1])


def build(variant: str, sizes: tuple[int, int, int], vocabulary: FGramVocabulary) -> PreTrainedModel:
    """The model of a variant on the device, in fp32 weights."""
    width, layers, heads = sizes
    trunk = gpt2_trunk(width, layers, heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if variant == "plain":
        return trunk.to(DEVICE).train()
    its_layers = {"shared_half": max(1, layers // 2), "shared_double": 2 * layers}.get(variant, layers)
    f_gram_model = FGramModelConfig(width, its_layers, heads, 4 * width).to_dict()
    rows = vocabulary.num_f_grams if variant in ("rows", "both") else 0
    model = SconeForCausalLM.from_trunk(
        trunk, vocabulary, f_gram_model=None if variant == "rows" else f_gram_model, learned_rows=rows
    )
    if variant == "padded":
        assert model.f_gram_embedding is not None
        padded = PaddedFGramModel(FGramModelConfig(**f_gram_model), width, vocabulary.max_n)
        padded.init_weights()
        model.f_gram_embedding.f_gram_model = padded
    return model.to(DEVICE).train()


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


def to_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors to the device; what a trie keeps on the host stays there."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: moved(inner) for name, inner in value.items()}
        return value.to(DEVICE, non_blocking=True) if isinstance(value, Tensor) else value

    return moved(batch)


def seconds_a_step(step: TrainingStep, batches: Iterator[dict[str, Any]], count: int) -> float:
    """Wall seconds of one of ``count`` steps, after one that is not counted."""
    step(next(batches))
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step(next(batches))
    synchronize()
    return (time.perf_counter() - start) / count


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def operations(
    variant: str, model: PreTrainedModel, batches: list[dict[str, Any]], positions: tuple[int, int]
) -> tuple[float, float]:
    """Operations of a training step, and f-gram-model tokens a position (padding included where there is some)."""
    scone = model if isinstance(model, SconeForCausalLM) else None
    forward = trunk_forward_flops((scone.trunk if scone else model).config, positions[1]) * positions[0] * positions[1]
    if scone is None or scone.config.f_gram_model_config is None:
        return training_flops(forward), 0.0
    sizes, width = scone.config.f_gram_model_config, scone.config.hidden_size
    total = nodes = 0.0
    for batch in batches:
        trie = batch["trie"]
        if variant == "padded":
            matched = int((trie["position_index"] > 0).sum())
            by_depth = [float(matched)] * scone.config.max_n
            total += f_gram_forward_flops(sizes, width, by_depth)
        else:
            by_depth, wanted = (
                [float(high - low) for low, high in itertools.pairwise(trie[name])]
                for name in ("depth_offsets", "f_gram_offsets")
            )
            total += f_gram_forward_flops(sizes, width, by_depth, wanted)
        nodes += sum(by_depth)
    tokens = len(batches) * positions[0] * positions[1]
    return training_flops(forward + total / len(batches)), nodes / tokens


def report_variant(report: Report, name: str, now: Measured, plain: Measured | None) -> None:
    """Records of one variant at one batch size, against the plain model where it is not that one."""
    peak = report.config["peak_tflops"] * 1e12
    other = None if plain is now else plain
    report.add(
        f"{name}_tokens_per_second",
        "tokens/s",
        now.tokens / now.loaded,
        other and other.tokens / other.loaded,
        other and "plain",
        ratio="ours/peer" if other else None,
    )
    report.add(f"{name}_utilisation", "of peak", now.flops / now.at_hand / peak, ratio=None)
    report.add(f"{name}_peak_memory", "GiB", now.peak_bytes / 2**30, ratio=None)
    if plain is now:
        return
    report.add(f"{name}_tokens_per_position", "f-gram-model tokens", now.nodes, ratio=None)
    if other:
        report.add(
            f"{name}_step_vs_flops",
            "plain steps",
            now.at_hand / other.at_hand,
            now.flops / other.flops,
            "predicted from FLOPs",
            target=1.15 if "shared" in name else None,
            better="lower",
        )
    report.add(
        f"{name}_loader_hidden", "s", now.loaded, now.at_hand, "step on prepared batches", target=1.05, better="lower"
    )


def report_speedup(
    report: Report, trunk: str, number: str, padded: Measured, plain: Measured | None, shared: Measured | None
) -> None:
    """What the f-gram model adds to a plain step, with shared prefixes and padded; and the whole steps."""
    if plain is None or shared is None:
        return
    report.add(
        f"{trunk}_f_gram_speedup_over_padded{number}",
        "s",
        shared.at_hand - plain.at_hand,
        padded.at_hand - plain.at_hand,
        "padded, added to the plain step",
        ratio="peer/ours",
    )
    report.add(
        f"{trunk}_step_speedup_over_padded{number}",
        "s",
        shared.at_hand,
        padded.at_hand,
        "a whole step, padded",
        ratio="peer/ours",
    )


if __name__ == "__main__":
    main()
