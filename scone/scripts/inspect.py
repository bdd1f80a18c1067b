"""Show a text as the model's input embeddings see it: `scone inspect TEXT --model_path FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from scone.configs.loading import parse_options
from scone.scripts.arguments import arguments, check_tokenizer
from scone.utils.command_line import run_main

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from scone.tokenization.matcher import InspectedToken

EXAMPLES = (
    'scone inspect "Once upon a time" --model_path ./outputs/scone-model/final_model',
    "scone inspect --model_path ./outputs/scone-model/final_model < story.txt",
)
ARGUMENTS = arguments(
    "model_path",
    "tokenizer_path",
    "json",
    text={"positional": True, "nargs": "?", "metavar": "TEXT", "help": "the text (default: standard input)"},
)
DESCRIPTION = "Show a text's tokens with the longest f-gram that ends at each, its rank and its count."
read_arguments = partial(
    parse_options, sections=(), description=DESCRIPTION, examples=EXAMPLES, add_arguments=ARGUMENTS
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per token, or JSON."""
    _, extra = read_arguments(argv)
    import numpy as np

    import scone.models.language_model  # noqa: F401 (registers itself: else AutoTokenizer asks to run a folder's code)
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary
    from scone.tokenization.matcher import Matcher, inspect_tokens
    from scone.tokenization.tokenizers import load_tokenizer

    text = sys.stdin.read() if extra.text is None else extra.text
    vocabulary = FGramVocabulary.load(extra.model_path)
    tokenizer = load_tokenizer(extra.tokenizer_path or extra.model_path)
    check_tokenizer(tokenizer, vocabulary, "give that one by --tokenizer_path")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    records = inspect_tokens(np.array(tokens, np.int64), Matcher(vocabulary))
    if extra.json:
        texts = [
            {"text": tokenizer.decode([one.token]), "f_gram_text": tokenizer.decode([*one.f_gram])} for one in records
        ]
        print(json.dumps([asdict(one) | text for one, text in zip(records, texts, strict=True)], indent=2))
    else:
        print(_as_table(tokenizer, records))
    return 0


def _as_table(tokenizer: PreTrainedTokenizerBase, records: list[InspectedToken]) -> str:
    rows: list[tuple[str, ...]] = [("position", "token", "longest f-gram ending here", "length", "rank", "count")]
    for record in records:
        matched: tuple[str, ...] = ("", "", "", "")
        if record.rank is not None:
            numbers = (f"{number:,}" for number in (record.match_length, record.rank, record.count))
            matched = (_quoted(tokenizer, record.f_gram), *numbers)
        rows.append((f"{record.position:,}", _quoted(tokenizer, (record.token,)), *matched))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "><<>>>", widths, strict=True)).rstrip()
        for row in rows
    ]
    lengths = [record.match_length for record in records if record.rank is not None]
    if records:
        mean = f", {sum(lengths) / len(lengths):.2f} tokens long on average" if lengths else ""
        lines.append(f"{len(lengths)} of {len(records)} tokens end an f-gram ({len(lengths) / len(records):.1%}){mean}")
    return "\n".join(lines)


def _quoted(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text of tokens in quotes, line ends and the like escaped, so that spaces show."""
    return json.dumps(tokenizer.decode(list(tokens)), ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(run_main(main))
