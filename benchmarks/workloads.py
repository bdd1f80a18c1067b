"""What several benchmarks read, count, train and write: GPT-2's tokens of Wikipedia, f-grams, trunks, tables, steps."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import shared_data
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scone.data.prepare import prepare_corpus
from scone.inference.table_format import RowFormat, TableLayout
from scone.inference.table_writer import TablePlan, TableWriter
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.tokenizers import load_tokenizer
from scone.training.optimizer import AdamWWithRows, learned_rows

VOCAB_SIZE, SEPARATOR = 50_257, 50_256


def gpt2_tokens(parts: int | None = None, file: str | Path | None = None) -> tuple[np.ndarray, str]:
    """uint16 tokens of the first ``parts`` (None: all) files of Wikipedia, each document ended by a separator, and
    where they come from; synthetic ones where that is not here. ``file``: a .npy file that holds such tokens.
    """
    if file:
        return np.load(file, mmap_mode="r", allow_pickle=False), Path(file).name
    texts, tokenizer = shared_data("wikipedia"), shared_data("tokenizers", "gpt2")
    if texts is None or tokenizer is None:
        return phrases(3_000_000 * (parts or 7)), "synthetic: Zipf tokens in repeated phrases"
    paths = sorted(texts.glob("*.jsonl.zst"))[:parts]
    loaded = load_tokenizer(tokenizer)
    files = [prepare_corpus(str(path), loaded, splits=("all",), quiet=True)["all"] for path in paths]
    return np.concatenate([file.tokens for file in files]).astype(np.uint16), f"Wikipedia, {len(paths)} files"


def phrases(length: int) -> np.ndarray:
    """Tokens by Zipf's law, two thirds of them in phrases of two to six that themselves follow it; uint16 [length]."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 7, 400_000)
    known, starts = rng.zipf(1.15, sizes.sum()) % SEPARATOR, np.cumsum(sizes) - sizes
    chosen = np.minimum(rng.zipf(1.05, length // 6) - 1, len(sizes) - 1)
    tokens = rng.zipf(1.15, sizes[chosen].sum() + 2 * len(chosen)) % SEPARATOR
    # each phrase is written over the beginning of its place, and two tokens of no phrase stay behind it
    counts = sizes[chosen]
    inner = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.repeat(np.cumsum(counts + 2) - counts - 2, counts) + inner
    tokens[places] = known[np.repeat(starts[chosen], counts) + inner]
    return tokens[:length].astype(np.uint16)


def most_frequent(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """``tokens`` numbered by frequency, int64; those that are too rare for ``vocab_size`` are all 0."""
    number_of = np.zeros(VOCAB_SIZE, np.int64)
    number_of[np.argsort(-np.bincount(tokens, minlength=VOCAB_SIZE), kind="stable")[: vocab_size - 1]] = np.arange(
        1, vocab_size
    )
    return number_of[tokens]


def f_grams_of(
    tokens: np.ndarray, most: int, separators: Iterable[int] = (SEPARATOR,), **limits: Any
) -> FGramVocabulary:
    """The ``most`` frequent f-grams of GPT-2's tokens, N = 5, that occur twice, but for other ``limits``."""
    limits = {"vocab_size": VOCAB_SIZE, "max_n": 5, "min_freq": 2, "max_f_grams": most} | limits
    return count_f_grams([tokens], separator_ids=list(separators), ranking="frequency", quiet=True, **limits).vocabulary


def gpt2_trunk(width: int, layers: int, heads: int, **fields: Any) -> PreTrainedModel:
    """A trunk of GPT-2's form with random weights, the same in every process."""
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0} | fields
    config = AutoConfig.for_model("gpt2", n_embd=width, n_layer=layers, n_head=heads, **fields)
    return AutoModelForCausalLM.from_config(config)


def write_table(path: Path, row_type: str, num_rows: int, blocks: Iterable[torch.Tensor]) -> None:
    """A table of the fp32 rows in ``blocks`` [n, D], in order; what they have more than ``num_rows`` is left out."""
    first, blocks = 0, iter(blocks)
    block = next(blocks)
    row_format = RowFormat.of(row_type, block.shape[1])
    with TableWriter(path, TablePlan(TableLayout(num_rows, row_format), 1, {})) as writer:
        while first < num_rows:
            part = block[: num_rows - first]
            writer.write(np.arange(first, first + len(part)), row_format.encode(part))
            first, block = first + len(part), next(blocks, block)
        writer.mark_finished(0)
        writer.finish()


def pairs_as_f_grams(num_f_grams: int) -> FGramVocabulary:
    """The first so many of all pairs of V tokens, where V is as small as that allows; made in seconds."""
    size = int(np.ceil(np.sqrt(num_f_grams)))
    pairs, counts = np.divmod(np.arange(num_f_grams), size), np.ones(num_f_grams, np.uint64)
    return FGramVocabulary.from_links(*pairs, counts, vocab_size=size, max_n=2)


def write_tiled_table(path: Path, row_format: RowFormat, vocabulary: FGramVocabulary) -> None:
    """A table whose rows are one random block again and again: as sound as any, written as fast as the disk can."""
    layout = TableLayout(vocabulary.num_f_grams, row_format, {"vocabulary": vocabulary.fingerprint})
    rows = torch.randn(layout.checksum_rows, row_format.width, generator=torch.Generator().manual_seed(0))
    block = np.ascontiguousarray(row_format.encode(rows)).view(np.uint8).tobytes()
    whole, rest = divmod(layout.num_rows, layout.checksum_rows)
    last = block[: rest * layout.row_bytes]
    sums = [hashlib.sha256(block).digest()] * whole + ([hashlib.sha256(last).digest()] if rest else [])
    layout = replace(layout, rows_checksum=hashlib.sha256(b"".join(sums)).hexdigest())
    with path.open("wb") as file, ThreadPoolExecutor(8) as pool:
        places = [layout.data_start + number * len(block) for number in range(whole)]
        list(pool.map(lambda at: os.pwrite(file.fileno(), block, at), places))
        for part, at in (
            (layout.header(), 0),
            (last, layout.data_start + whole * len(block)),
            (b"".join(sums), layout.checksums_start),
        ):
            os.pwrite(file.fileno(), part, at)
        os.fsync(file.fileno())


class TrainingStep:
    """Whole training steps of one model: forward, backward, clipping, optimizer; on prepared batches in turn, or on one
    that is given. On a GPU in bf16 autocast.
    """

    def __init__(self, model: PreTrainedModel, prepared: Iterable[Mapping[str, Any]] = (), **rates: float) -> None:
        self.model = model.train()
        self.batches = itertools.cycle(prepared)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": self.parameters, "lr": 1e-4}]
        self.optimizer = AdamWWithRows(groups, rows=learned_rows(model), **rates)

    def __call__(self, batch: Mapping[str, Any] | None = None) -> None:
        on_gpu = self.parameters[0].is_cuda
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            loss = self.model(**(next(self.batches) if batch is None else batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
