"""Do learned rows change what a trunk copies from its context? ``python experiments/long_context.py``.

    … long_context.py --models plain=FOLDER rows=FOLDER --data DATA --json FILE

Each model folder is a final_model of experiments/long_context.yaml. All models read the same sequences of held-out
text, at several distances:

* needle: four sentences that give a name a colour; at the end one of the names is asked for. The share of questions
  whose right colour is the likeliest of the four. Each of the four is asked for, so guessing, or a favourite colour,
  gives 0.25.
* pair: two tokens drawn at random, and again later. By how much the loss of the second falls, in nats, against a
  sequence whose first pair was another one.
* passage: the same with 32 tokens of real text, all but the first.

And the loss by position, on all texts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "experiments")]

from common import measured_on  # noqa: E402
from what_users_ask import TEXTS, measured, run_name  # noqa: E402

from scone.data.token_file import TokenFile  # noqa: E402
from scone.evaluation.perplexity import Window, paired_difference, token_losses  # noqa: E402
from scone.inference.loading import load_model  # noqa: E402
from scone.models.trunk import longest_sequence  # noqa: E402
from scone.tokenization.tokenizers import load_tokenizer  # noqa: E402
from scone.utils.command_line import run_main  # noqa: E402
from scone.utils.errors import SconeError  # noqa: E402
from scone.utils.files import write_json  # noqa: E402

HAYSTACKS = ("novels", "court_opinions")
DISTANCES = (64, 256, 512, 1024, 2048, 3900)
POSITIONS = (0, 64, 256, 1024, 2048)
"""Where buckets of positions begin."""
NEEDLES = 4
PASSAGE = 32
LEAD = 16
"""Tokens of text before the first passage."""
NAMES = "Harris Peter George Mary Henry Charles Elizabeth Arthur Edward Helen Martin Alice Frank Jane Robert Margaret"
COLOURS = "red blue green white black yellow brown gray golden purple pink orange"
TOKENS_AT_ONCE = 1 << 16


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all models on the same sequences. Raises SconeError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="the first is compared with")
    parser.add_argument("--data", type=Path, required=True, help="folder of the token files")
    parser.add_argument("--distances", nargs="+", type=int, default=DISTANCES)
    parser.add_argument("--number", type=int, default=300, help="contexts; of pairs and passages twice as many")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    folders = {name: Path(folder) for name, folder in (pair.split("=", 1) for pair in arguments.models)}
    texts = {name: np.asarray(TokenFile.open(arguments.data / name).tokens) for name in TEXTS}
    tokenizer = load_tokenizer(str(next(iter(folders.values()))))
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    report: dict[str, Any] = {**measured_on(), "number": arguments.number, "models": {}}
    for name, folder in folders.items():
        model = load_model(folder).model
        length = longest_sequence(model.config)
        longest = LEAD + max(arguments.distances) + PASSAGE
        if length is not None and length < longest:
            raise SconeError(f"found {length} positions in {folder}; expected {longest}; give smaller --distances")
        found[name] = measures(model, tokenizer, texts, arguments.distances, arguments.number)
        whole = {text: tokens[: len(tokens) // length * length] for text, tokens in texts.items()}
        losses = np.concatenate(list(measured(model, whole, length, max(1, TOKENS_AT_ONCE // length)).values()))
        report["models"][name] = {"run": run_name(folder), "loss": float(losses.mean())} | {
            "by_position": [
                {"first": first, "loss": float(losses[:, first:last].mean())}
                for first, last in zip(POSITIONS, [*POSITIONS[1:], None], strict=True)
                if first < losses.shape[1]
            ]
        }
        first_name = next(iter(folders))
        report["models"][name] |= {
            test: [summary(values, found[first_name][test][distance], distance) for distance, values in by.items()]
            for test, by in found[name].items()
        }
        write_json(arguments.json, {"users": True, "long": report})
    return 0


def summary(values: np.ndarray, first: np.ndarray, distance: int) -> dict[str, Any]:
    """Mean over sequences with its 95 % interval, and the same of the difference from the first model."""
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    difference, interval = paired_difference(first, values)
    return {
        "distance": distance,
        "mean": mean,
        "interval": (mean - half, mean + half),
        "difference": {"mean": difference, "interval": interval},
    }


def measures(
    model: Any, tokenizer: Any, texts: Mapping[str, np.ndarray], distances: Sequence[int], number: int
) -> dict[str, dict[int, np.ndarray]]:
    """Test → distance → what each sequence gave [n]."""
    found: dict[str, dict[int, np.ndarray]] = {"needle": {}, "pair": {}, "passage": {}}
    for distance in distances:
        draws = np.random.default_rng(distance)  # the same for every model
        contexts, colours = zip(*(needles(draws, texts, tokenizer, distance) for _ in range(number)), strict=True)
        found["needle"][distance] = right_answers(model, np.stack(contexts), np.stack(colours))
        for test, size in (("pair", 2), ("passage", PASSAGE)):
            cases = np.stack([repeats(draws, texts, distance, size, model.config.get_text_config().vocab_size)
                              for _ in range(2 * number)])  # fmt: skip
            losses = last_losses(model, cases.reshape(-1, cases.shape[-1]), size - 1).mean(1)
            found[test][distance] = losses.reshape(-1, 2) @ [-1, 1]
    return found


def right_answers(model: Any, questions: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Of ``questions`` [n, 4, L] the share that is answered with their own of ``colours`` [n, 4], [n]."""
    found = []
    for asked, offered in zip(questions, colours, strict=True):
        ids = torch.from_numpy(asked).to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        answers = logits[:, torch.from_numpy(offered).to(logits.device)].argmax(1).cpu().numpy()
        found.append((answers == np.arange(NEEDLES)).mean())
    return np.array(found)


def last_losses(model: Any, sequences: np.ndarray, predicted: int) -> np.ndarray:
    """Losses [n, predicted] of the last tokens of ``sequences`` [n, L]."""
    length = sequences.shape[1]
    each = [Window(start, start + length, start + length - predicted) for start in range(0, sequences.size, length)]
    at_once = max(1, TOKENS_AT_ONCE // length)
    batches = (each[first : first + at_once] for first in range(0, len(each), at_once))
    flat = sequences.ravel()
    return np.stack([losses for batch in batches for losses in token_losses(model, flat, batch, model.device)])


def needles(
    draws: np.random.Generator, texts: Mapping[str, np.ndarray], tokenizer: Any, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """Four questions int64 [4, L] and their answers [4]. The first sentence begins ``distance`` tokens before the
    question, the others follow within its first quarter.
    """
    names = draws.choice(single_tokens(tokenizer, NAMES), NEEDLES, replace=False)
    colours = draws.choice(single_tokens(tokenizer, COLOURS), NEEDLES, replace=False)
    start, middle, end = (tokenizer(part, add_special_tokens=False).input_ids for part in (" The house of", " is", "."))
    context: list[int] = []
    for name, colour in zip(names, colours, strict=True):
        context += [*start, name, *middle, colour, *end, *passage(draws, texts, distance // 16)]
    if len(context) > distance:
        raise SconeError(f"found a distance of {distance} tokens; expected {len(context)}, which the sentences take")
    context += [*passage(draws, texts, distance - len(context))]
    return np.array([[*context, *start, name, *middle] for name in names]), np.asarray(colours)


def repeats(
    draws: np.random.Generator, texts: Mapping[str, np.ndarray], distance: int, size: int, vocab_size: int
) -> np.ndarray:
    """Int64 [2, L]: a passage of ``size`` tokens at the end, and ``distance`` tokens before it the same, or another."""
    if size == 2:
        own, other = draws.integers(vocab_size // 4, vocab_size, (2, 2))  # not the bytes and the most frequent tokens
    else:
        own, other = passage(draws, texts, size), passage(draws, texts, size)
    lead, between = passage(draws, texts, LEAD), passage(draws, texts, distance - size)
    return np.stack([np.concatenate([lead, first, between, own]) for first in (own, other)]).astype(np.int64)


def passage(draws: np.random.Generator, texts: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """Neighbouring tokens of a haystack."""
    tokens = texts[HAYSTACKS[draws.integers(len(HAYSTACKS))]]
    start = draws.integers(len(tokens) - size)
    return np.asarray(tokens[start : start + size])


def single_tokens(tokenizer: Any, words: str) -> list[int]:
    """Those of the words that are one token after a space."""

    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words.split()]
    single = [each[0] for each in ids if len(each) == 1]
    if len(single) < NEEDLES:
        raise SconeError(f"found {len(single)} of the words {words} that are one token; expected {NEEDLES}")
    return single


if __name__ == "__main__":
    sys.exit(run_main(main))
