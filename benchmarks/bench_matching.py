"""Matching tokens to f-grams: tokens per second per core against a dictionary and Aho–Corasick.

Real tokens (Wikipedia, GPT-2's tokenizer) where the maintainers' data is present, else synthetic Zipf tokens. The
f-grams are counted on one part, matching is timed on the rest, on one thread. `--quick` counts on a tenth, and has
2.5 M f-grams where 10 M are said.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
from common import Report, has_peer, interleaved
from workloads import f_grams_of, gpt2_tokens

from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher

MAX_N = 5
PEER_TOKENS = 500_000
BATCH = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    report = Report.from_arguments("matching", __doc__, argv, _add_options)
    corpus, origin = gpt2_tokens(1 if report.quick else None)
    if report.quick:
        report.config |= {"repeats": 2, "matched_tokens": 500_000}
    held_out = np.asarray(corpus[-report.config["matched_tokens"] :]).astype(np.int64)
    counted = corpus[: -len(held_out)]
    report.config |= {"tokens": origin, "counted_tokens": len(counted), "max_n": MAX_N}
    with tempfile.TemporaryDirectory() as folder:
        print(f"counting f-grams in {len(counted):,} tokens ({origin})", flush=True)
        largest = f_grams_of(counted, 2_500_000 if report.quick else 10_000_000, min_freq=1 if report.quick else 2)
        largest.save(f"{folder}/10m")
        largest.truncated(1_000_000).save(f"{folder}/1m")
        del largest
        measure_size(
            report, "1m", FGramVocabulary.load(f"{folder}/1m"), held_out, with_aho_corasick=has_peer("ahocorasick")
        )
        start = time.perf_counter()
        vocabulary = FGramVocabulary.load(f"{folder}/10m")
        opening_seconds = time.perf_counter() - start
        report.config["largest_num_f_grams"] = vocabulary.num_f_grams
        measure_size(report, "10m", vocabulary, held_out, with_aho_corasick=False)
        report.add("open_seconds_10m", "s", opening_seconds, ratio="ours", most=1.0)
        measure_memory_and_step(report, vocabulary, held_out)
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, of which the median counts")
    parser.add_argument("--matched_tokens", type=int, default=2_000_000, help="tokens that are matched, not counted")


def measure_size(
    report: Report, name: str, vocabulary: FGramVocabulary, tokens: np.ndarray, with_aho_corasick: bool
) -> None:
    """Tokens per second of all ways of matching, which must agree."""
    matcher = Matcher(vocabulary)
    nodes = matcher.match(tokens)
    few = tokens[: PEER_TOKENS // 10 if report.quick else PEER_TOKENS]
    matrix = vocabulary.token_matrix(np.arange(vocabulary.num_f_grams)).tolist()
    f_grams = [tuple(row[:length]) for row, length in zip(matrix, vocabulary.lengths.tolist(), strict=True)]
    results: dict[str, list[int]] = {}
    matchers = {"dictionary probing": dictionary_matcher(f_grams, vocabulary.vocab_size)}
    if with_aho_corasick:
        matchers["pyahocorasick"] = aho_corasick_matcher(f_grams, vocabulary.vocab_size)
    runs: dict[str, Callable[[], object]] = {"ours": lambda: matcher.match(tokens, num_threads=1)}
    for peer, match in matchers.items():
        runs[peer] = lambda peer=peer, match=match: results.update({peer: match(tuple(few.tolist()))})
    seconds = interleaved(runs, repeats=report.config["repeats"])
    for peer, result in results.items():
        assert result == nodes[: len(few)].tolist(), f"{peer} found other matches"
    speed = {run: (len(few) if run in matchers else len(tokens)) / seconds[run] for run in runs}
    report.config |= {f"match_rate_{name}": float((nodes >= vocabulary.vocab_size).mean())}
    peers = {f"tokens_per_second_{name}": ("dictionary probing", 50), "speed_vs_aho_corasick": ("pyahocorasick", 3)}
    for metric, (peer, target) in peers.items():
        if peer in speed:
            report.add(metric, "tokens/s", speed["ours"], speed[peer], peer, target=target)


def measure_memory_and_step(report: Report, vocabulary: FGramVocabulary, tokens: np.ndarray) -> None:
    """Bytes of everything that matching and training keep in memory; microseconds of a decode step."""
    arrays = (vocabulary.keys, vocabulary.suffixes, vocabulary.lengths, vocabulary.index.slots)
    bytes_each = sum(array.nbytes for array in arrays) / vocabulary.num_f_grams
    report.add("index_bytes_per_f_gram", "bytes", bytes_each, ratio="ours", most=20)
    matcher = Matcher(vocabulary)
    columns = tokens[: len(tokens) // BATCH * BATCH].reshape(BATCH, -1).T.copy()
    states = np.full(BATCH, -1)
    microseconds = []
    for column in columns[:5_000]:
        start = time.perf_counter()
        states = matcher.step(states, column)
        microseconds.append(1e6 * (time.perf_counter() - start))
    step = statistics.median(microseconds[100:])
    report.add("decode_step_us_batch64", "µs", step, ratio="ours", most=50)


def dictionary_matcher(f_grams: list[tuple[int, ...]], vocab_size: int) -> Callable[[tuple[int, ...]], list[int]]:
    """Longest first, look up the tokens before each position in a dictionary."""
    node_of = {gram: vocab_size + rank for rank, gram in enumerate(f_grams)}

    def match(tokens: tuple[int, ...]) -> list[int]:
        nodes = []
        for end in range(1, len(tokens) + 1):
            for length in range(min(MAX_N, end), 1, -1):
                node = node_of.get(tokens[end - length : end])
                if node is not None:
                    break
            else:
                node = tokens[end - 1]
            nodes.append(node)
        return nodes

    return match


def aho_corasick_matcher(f_grams: list[tuple[int, ...]], vocab_size: int) -> Callable[[tuple[int, ...]], list[int]]:
    """The longest of the matches that the library reports at each position (it reports the longest first)."""
    import ahocorasick

    automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS, ahocorasick.KEY_SEQUENCE)
    for rank, gram in enumerate(f_grams):
        automaton.add_word(gram, vocab_size + rank)
    automaton.make_automaton()

    def match(tokens: tuple[int, ...]) -> list[int]:
        nodes = list(tokens)
        last = -1
        for end, node in automaton.iter(tokens):
            if end != last:
                nodes[end] = node
                last = end
        return nodes

    return match


if __name__ == "__main__":
    main()
