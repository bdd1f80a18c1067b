"""Compiled decoding on one GPU: a plain trunk, and SCONE with its table in every placement.

    python benchmarks/gpu/bench_generation_gpu.py --tokens TOKEN_FOLDER [--json FILE] [--trunk 1b]

GPT2-Small's shape (or a billion parameters) in bf16 with random weights (speed does not depend on them), 1 M f-grams
counted on the tokens, a bf16 table. Static caches, and the call that ``generate(cache_implementation="static")`` of
transformers compiles, CUDA graphs in it. Every step feeds the next token of real text, so that matches are those of
text. The host waits for every choice, as it does to stream it; or, ``queued``, choices stay on the GPU and the host
launches the next step while this one runs. Milliseconds a step, medians of interleaved rounds. What fails is named, and
the rest goes on. ``--tiny`` rehearses on a CPU. Not compiled: ``bench_generation.py --device cuda``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from common import Report
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from workloads import f_grams_of, gpt2_trunk, write_table

from scone.data.token_file import TokenFile
from scone.inference.embedding_table import EmbeddingTable
from scone.models.language_model import SconeForCausalLM
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"tiny": (64, 2, 1), "gpt2": (768, 12, 12), "1b": (2048, 20, 16)}  # width, layers, heads
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def main() -> None:
    """Measure, print the table of records, write the JSON."""
    report = Report.from_arguments("gpu_generation", __doc__, add_options=_add_options)
    options = report.config
    tiny, file = options["tiny"], TokenFile.open(options["tokens"])
    counted = f_grams_of(file.tokens, 5_000 if tiny else 1_000_000, [file.separator_id])
    batches = [1, 4] if tiny else options["batches"]
    prompt, steps = (16, 4) if tiny else (128, 48)
    options |= {"f_grams": counted.num_f_grams, "prompt": prompt, "steps": steps, "batches": batches}
    width, layers, heads = SIZES["tiny" if tiny else options["trunk"]]
    with tempfile.TemporaryDirectory(dir=options["dir"], prefix="bench_generation.") as folder:
        path = Path(folder) / "embeddings.cache"
        # random rows: their values do not change how fast they are read
        write_table(path, "bf16", counted.num_f_grams, [torch.randn(65_536, width)])
        models = build_all(counted, path, width, layers, heads, options["models"])
        text = torch.from_numpy(file.tokens[: 4_000_000 if not tiny else 40_000].astype(np.int64))
        options["failed"] = []
        for batch in batches:
            measure(report, models, text, batch, prompt, steps, rounds=2 if tiny else 5)
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=Path, required=True, help="folder of a token file")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the table goes: the disk that is measured")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at toy size, on any device")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32, 128], help="in this order")
    parser.add_argument("--models", nargs="+", help="these alone, beside plain (default: all)")
    parser.add_argument("--trunk", choices=["gpt2", "1b"], default="gpt2", help="its size")


def build_all(
    vocabulary: FGramVocabulary, path: Path, width: int, layers: int, heads: int, chosen: list[str] | None = None
) -> dict[str, PreTrainedModel]:
    """The ``chosen`` models by name (None: all), "plain" first; they share nothing but the table's file."""
    placements = {"ram": "ram", "mmap": "mmap", "direct": "direct"}
    if DEVICE.type == "cuda":
        placements |= {"gpu": "gpu", "tiered": "gpu:100k,ram:400k,disk"}
    models: dict[str, PreTrainedModel] = {}
    for name in ["plain", *(name for name in placements if chosen is None or name in chosen)]:
        with DEVICE:  # where random numbers come faster
            models[name] = gpt2_trunk(width, layers, heads).to(DEVICE, DTYPE).eval()
        if name != "plain":
            model = SconeForCausalLM.from_trunk(models[name], vocabulary, f_gram_model=None, learned_rows=1)
            model.f_gram_embedding = None
            model.attach_table(EmbeddingTable.open(path, placements[name], device=DEVICE))
            models[name] = model.eval()
    return models


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def some_text(text: Tensor, batch: int, length: int, seed: int) -> Tensor:
    """int64 [batch, length]: stretches of the text."""
    starts = torch.randint(0, len(text) - length, (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + length] for start in starts.tolist()]).to(DEVICE)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    tokens: Tensor,
    prompt: int,
    cache: StaticCache,
    call: Callable[..., Any],
    waits: bool = True,
) -> float:
    """Seconds of a decoding step by ``call``, after a prefill; the host ``waits`` for each choice, or for the last.

    Waiting, it is the median of all; else they cannot be told apart, and it is their mean.
    """
    logits = model(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    synchronize()
    times = [time.perf_counter()]
    for place in range(prompt, tokens.shape[1]):
        # the real next token, once the model has chosen its own
        following = torch.where(logits[:, -1:].argmax(-1) >= 0, tokens[:, place : place + 1], 0)
        logits = call(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if waits:
            logits[:, -1].argmax(-1).cpu()
            times.append(time.perf_counter())
    synchronize()
    if waits:
        return statistics.median(end - begin for begin, end in itertools.pairwise(times))
    return (time.perf_counter() - times[0]) / (tokens.shape[1] - prompt)


def add_times(report: Report, milliseconds: dict[str, float], metric: str) -> None:
    """One record a model; the ratio is plain's time ÷ its own, that is its speed in plain's."""
    plain = milliseconds.pop("plain")
    report.add(f"{metric}_plain", "ms", plain, ratio=None)
    for name, value in milliseconds.items():
        report.add(f"{metric}_{name}", "ms", value, plain, "plain", ratio="peer/ours", target=0.97)


def measure(
    report: Report, models: dict[str, PreTrainedModel], text: Tensor, batch: int, prompt: int, steps: int, rounds: int
) -> None:
    """A step of every model at one batch size, in turn, by the call that ``generate`` of transformers compiles."""
    calls: dict[str, tuple[Callable[..., Any], StaticCache]] = {}
    tokens = some_text(text, batch, prompt + steps, seed=0)
    for name, model in models.items():
        cache = StaticCache(getattr(model, "trunk", model).config, max_cache_len=prompt + steps)
        call: Callable[..., Any] = model.get_compiled_call(None)
        try:  # compile, and whatever is done once more
            for _ in range(2):
                decode(model, tokens, prompt, cache, call)
                reset(cache)
            calls[name] = call, cache
        except Exception as error:  # of the compiler, or out of memory
            report.config["failed"].append(f"compiled {name} at batch {batch}: {str(error).splitlines()[0]}")
            print(report.config["failed"][-1], flush=True)
    if "plain" not in calls:  # which all others are compared with
        return
    for waits, metric in ((True, "compiled_decode_ms"), (False, "queued_decode_ms")):
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(1, rounds + 1):
            tokens = some_text(text, batch, prompt + steps, seed=turn)
            for name, (call, cache) in calls.items():
                reset(cache)
                taken[name].append(decode(models[name], tokens, prompt, cache, call, waits) * 1e3)
        add_times(report, {name: statistics.median(times) for name, times in taken.items()}, f"{metric}_b{batch}")


@torch.inference_mode()
def reset(cache: StaticCache) -> None:
    """Empty a cache whose memory was made in inference mode."""
    cache.reset()


if __name__ == "__main__":
    main()
