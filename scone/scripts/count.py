"""Count the f-grams of a corpus and show what they cover: `scone count`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scone.configs.loading import parse_options
from scone.configs.presets import trunk_configuration
from scone.configs.schema import DEFAULT_RANKING, SconeOptions
from scone.scripts.arguments import ROW_TYPES, arguments
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError
from scone.utils.files import check_writable
from scone.utils.progress import is_quiet
from scone.utils.text import human_bytes, parse_bytes

if TYPE_CHECKING:
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary

EXAMPLES = (
    "scone count --dataset_name wikitext --max_n 4 --max_f_grams 500000 --output f_grams.safetensors",
    "scone count --dataset_name my_texts/ --tokenizer train --memory_budget 4GiB --json",
)
OPTIONS = (
    *(f"data.{name}" for name in ("dataset_name", "dataset_config_name", "text_column", "max_n", "min_freq")),
    *("data.max_f_grams", "data.ranking", "data.cache_dir", "data.memory_budget"),
    *("model.base_model_name", "model.tokenizer", "model.vocab_size"),
)
DEFAULT_WIDTH = 768
ARGUMENTS = arguments(
    "json",
    output={"metavar": "PATH", "help": "file or folder to write the vocabulary to"},
    width={"type": int, "metavar": "D", "help": "row width of the table (default: base_model_name's)"},
)
DESCRIPTION = "Count the f-grams of a corpus and show what they cover on held-out text."
read_arguments = partial(
    parse_options, sections=OPTIONS, description=DESCRIPTION, examples=EXAMPLES, add_arguments=ARGUMENTS
)


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print the result."""
    options, extra = read_arguments(argv)
    from scone.inference.table_format import RowFormat
    from scone.tokenization.f_gram_file import file_of

    if extra.output:
        check_writable(file_of(extra.output))
    report, vocabulary = _count(options, extra.json or is_quiet())
    fields = trunk_configuration(options.model.base_model_name) or {}
    width = extra.width or int(fields.get("hidden_size") or fields.get("n_embd") or DEFAULT_WIDTH)
    rows = vocabulary.num_f_grams
    report["table_bytes"] = {kind: rows * RowFormat.of(kind, width).row_bytes for kind in ROW_TYPES}
    if extra.output:
        report["vocabulary"] = str(vocabulary.save(extra.output))
    print(json.dumps(report, indent=2) if extra.json else _readable(report))
    return 0


def _count(options: SconeOptions, quiet: bool) -> tuple[dict[str, Any], FGramVocabulary]:
    from scone.data.prepare import default_cache_folder, prepare_training_corpus
    from scone.tokenization.counting import count_f_grams
    from scone.tokenization.matcher import Matcher, match_lengths
    from scone.tokenization.tokenizers import separator_ids, tokenizer_fingerprint, vocabulary_size

    data = options.data
    tokenizer, files = prepare_training_corpus(options, quiet=quiet)
    work_dir = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_folder()
    result = count_f_grams(
        [files["train"].tokens],
        vocab_size=vocabulary_size(tokenizer),
        max_n=data.max_n,
        min_freq=data.min_freq,
        max_f_grams=data.max_f_grams,
        separator_ids=separator_ids(tokenizer),
        memory_budget_bytes=parse_bytes(data.memory_budget) if data.memory_budget else None,
        work_dir=work_dir / "counting",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        ranking=data.ranking or DEFAULT_RANKING,
        quiet=quiet,
    )
    vocabulary = result.vocabulary
    if not vocabulary.num_f_grams:
        raise SconeError(
            f"found no n-gram of 2 to {data.max_n} tokens that occurs {data.min_freq} times in "
            f"{files['train'].num_tokens:,} tokens; expected at least one; lower --min_freq or give more text"
        )
    held_out = files.get("validation") or files.get("test")
    lengths = match_lengths(Matcher(vocabulary), held_out.tokens).tolist() if held_out else [0, 0]
    report = {
        "corpus": {
            "dataset_name": data.dataset_name,
            "dataset_config_name": data.dataset_config_name,
            "num_tokens": files["train"].num_tokens,
            "num_documents": files["train"].num_documents,
        },
        "count": result.statistics.to_json(),
        "fingerprint": vocabulary.fingerprint,
        "held_out_positions_by_length": dict(enumerate(lengths[1:], start=1)),
    }
    return report, vocabulary


def _readable(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    coverage, lengths = "no held-out text", report["held_out_positions_by_length"]
    if positions := sum(lengths.values()):
        shares = ", ".join(f"{n}: {each / positions:.1%}" for n, each in lengths.items())
        coverage = f"{1 - lengths[1] / positions:.1%} of {positions:,} held-out tokens (by length {shares})"
    corpus, count = report["corpus"], report["count"]
    sizes = ", ".join(f"{row_type} {human_bytes(size)}" for row_type, size in report["table_bytes"].items())
    lines = [
        f"tokens read    {corpus['num_tokens']:,} in {corpus['num_documents']:,} documents",
        f"f-grams        {count['num_f_grams']:,} of {count['requested_f_grams']:,} asked for, by {count['ranking']}",
        f"count at cut   {count['count_at_cut']:,} occurrences of the rarest f-gram",
        f"{'length':>9} {'candidates':>15} {'survivors':>15} {'f-grams':>15} {'floor':>9}",
        *(
            f"{level['length']:>9} {level['num_candidates']:>15,} {level['num_survivors']:>15,} "
            f"{level['num_f_grams']:>15,} {level['floor']:>9,}"
            for level in count["levels"]
        ),
        f"match rate     {coverage}",
        f"time           {count['seconds']:.1f} s on {count['num_threads']} threads",
        f"table          {sizes}",
    ]
    if "vocabulary" in report:
        size = human_bytes(Path(report["vocabulary"]).stat().st_size)
        lines.append(f"vocabulary     {report['vocabulary']} ({size})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
