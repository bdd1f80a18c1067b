"""Count, index, save, open and match a vocabulary of tens of millions of f-grams, for real.

    python benchmarks/bench_large_vocabulary.py --tokens FOLDER [--f_grams 50000000] [--json FILE]

FOLDER is a token file, as ``experiments/prepare_data.py`` makes it. Every n-gram counts, those that occur once too, so
that ordinary text has as many as are wanted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import Report

from scone.data.token_file import TokenFile
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher
from scone.utils.peak_memory import process_bytes
from scone.utils.text import parse_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table of records, write the JSON."""
    report = Report.from_arguments("large_vocabulary", __doc__, argv, add_options)
    options = report.config
    tokens = TokenFile.open(options["tokens"])
    with tempfile.TemporaryDirectory(dir=options["work_dir"]) as folder:
        measure(report, tokens, Path(folder))
    report.finish()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=Path, required=True, help="folder of a token file")
    parser.add_argument("--f_grams", type=int, default=50_000_000, help="how many to keep")
    parser.add_argument("--max_n", type=int, default=5, help="length of the longest")
    parser.add_argument("--memory_budget", default="4GiB", help="of counting")
    parser.add_argument("--work_dir", type=Path, help="where files are written (default: /tmp)")


def measure(report: Report, tokens: TokenFile, folder: Path) -> None:
    options = report.config
    started, before = time.perf_counter(), process_bytes()
    counted = count_f_grams(
        [tokens.tokens],
        vocab_size=tokens.vocab_size,
        max_n=options["max_n"],
        min_freq=1,
        max_f_grams=options["f_grams"],
        separator_ids=[tokens.separator_id],
        memory_budget_bytes=parse_bytes(options["memory_budget"]),
        work_dir=folder,
        quiet=True,
    )
    vocabulary = counted.vocabulary
    seconds, size = time.perf_counter() - started, vocabulary.num_f_grams
    options |= {"num_tokens": tokens.num_tokens, "found": size}
    report.add("count_and_index", "tokens/s", tokens.num_tokens / seconds)
    peak = process_bytes(peak=True)
    report.add("count_and_index_peak", "bytes", peak and before and peak - before)
    started = time.perf_counter()
    file = vocabulary.save(folder)
    report.add("save", "s", time.perf_counter() - started)
    report.add("file_bytes_an_f_gram", "bytes", file.stat().st_size / size)
    del counted, vocabulary
    started = time.perf_counter()
    matcher = Matcher(FGramVocabulary.load(file))
    report.add("open", "s", time.perf_counter() - started)
    blocks = np.asarray(tokens.tokens[: 16 * 1024 * 8], dtype=np.int64).reshape(8, 16, 1024)
    matcher.match(blocks[0])  # compiles, and reads pages
    started = time.perf_counter()
    nodes = np.stack([matcher.match(block) for block in blocks])
    report.add("match", "tokens/s", nodes.size / (time.perf_counter() - started))
    report.add("match_rate", "of positions", float((nodes >= tokens.vocab_size).mean()))


if __name__ == "__main__":
    main()
