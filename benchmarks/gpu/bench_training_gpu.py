"""Training steps on one GPU: plain, SCONE with shared prefixes, SCONE padded as in the paper, learned rows.

    python benchmarks/gpu/bench_training_gpu.py --tokens TOKEN_FOLDER [--json FILE] [--tiny] [--no_compile]

bf16 autocast, compiled, batches from a loader with workers. Trunks are those of the paper's GPT-2 experiments
(width 1,024 × 6 layers) and GPT2-Small; f-grams (N = 5, S = 1 M) are counted on the tokens. Batches of
``--positions``; where there are several, the largest stands in the names without a number. What fails, or does not fit
the memory, is named in the configuration's ``failed``. Utilisation is the formula's operations a second, attention over
all pairs, against ``--peak_tflops``. ``--tiny`` rehearses everything on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import Report
from torch import Tensor
from transformers import PreTrainedModel
from workloads import TrainingStep, f_grams_of, gpt2_trunk

from scone.data.dataset import BlockDataset, Collator
from scone.data.token_file import TokenFile
from scone.models.accounting import f_gram_forward_flops, training_flops, trunk_forward_flops
from scone.models.configuration import FGramModelConfig
from scone.models.f_gram_model import FGramModel
from scone.models.language_model import SconeForCausalLM
from scone.tests.models.padded_f_gram_model import padded_f_gram_model
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.training.distributed import compile_for_training

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
    options |= {"f_grams": counted.num_f_grams, "max_n": 5, "length": length, "failed": []}
    options |= {"num_tokens": file.num_tokens, "tokenizer_tokens": file.vocab_size}
    trunks = {"tiny": (32, 2, 2)} if tiny else {name: TRUNKS[name] for name in options["trunks"]}
    for name, sizes in trunks.items():
        plain: dict[int, Measured] = {}
        for variant in options["variants"]:
            for positions, now in measure(variant, sizes, file, counted, length, options):
                number = "" if positions == max(options["positions"]) else f"_{positions}"
                report_variant(report, f"{name}_{variant}{number}", now, plain.get(positions))
                if variant == "plain":
                    plain[positions] = now
            gc.collect()
            torch.cuda.empty_cache()
    report.finish()


VARIANTS = ("plain", "shared", "rows", "both", "padded")


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


class Measured(NamedTuple):
    """What one variant took: seconds a step from the loader and from batches at hand, bytes, operations, nodes."""

    loaded: float
    at_hand: float
    peak_bytes: int
    flops: float
    nodes: float
    tokens: int


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
        except Exception as error:  # of the compiler, or out of memory: the others go on
            what = f"{variant} of {sizes[0]} x {sizes[1]} at {positions} positions"
            options["failed"].append(f"{what}: {str(error).partition(chr(10))[0]}")
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
    f_gram_model = FGramModelConfig(width, layers, heads, 4 * width).to_dict()
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
    """Records of one variant at one batch size, against the plain model where there is one."""
    peak = report.config["peak_tflops"] * 1e12
    speed = now.tokens / now.loaded
    report.add(f"{name}_tokens_per_second", "tokens/s", speed, plain and plain.tokens / plain.loaded, "plain")
    report.add(f"{name}_utilisation", "of peak", now.flops / now.at_hand / peak, ratio=None)
    report.add(f"{name}_peak_memory", "GiB", now.peak_bytes / 2**30, ratio=None)
    if plain is None:
        return
    report.add(f"{name}_tokens_per_position", "f-gram-model tokens", now.nodes, ratio=None)
    expected = {"peer": now.flops / plain.flops, "peer_name": "predicted from FLOPs"}
    target = 1.15 if "shared" in name else None
    steps = now.at_hand / plain.at_hand
    report.add(f"{name}_step_vs_flops", "plain steps", steps, **expected, most=target)
    at_hand = {"peer": now.at_hand, "peer_name": "step on prepared batches"}
    report.add(f"{name}_loader_hidden", "s", now.loaded, **at_hand, most=1.05)


if __name__ == "__main__":
    main()
